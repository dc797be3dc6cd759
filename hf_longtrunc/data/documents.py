"""One tokenised document: reading it from an example of a dataset, cutting it, joining pieces to a row.

Columns: `input_ids`; optionally `labels`, an `attention_mask` whose zeros are padding at the ends, and masks of the
tokens to learn (`assistant_masks`, `completion_mask`), which become -100 in the labels. A column that is None counts
as absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Tokens: TypeAlias = NDArray[np.int64]

IGNORE = -100
LOSS_MASKS = ("assistant_masks", "completion_mask")
COLUMNS = ("input_ids", "labels", "attention_mask", *LOSS_MASKS)


class Document(NamedTuple):
    """Token ids and the labels of the same length; a label of -100 is not learned."""

    input_ids: Tokens
    labels: Tokens

    def cut(self, start: int, length: int) -> Document:
        """Return `length` tokens from `start` on; the first has no token before it and so no label."""
        labels = self.labels[start : start + length].copy()
        labels[:1] = IGNORE
        return Document(self.input_ids[start : start + length], labels)

    def ending_with(self, eos_token_id: int | None) -> Document:
        """Return the document with EOS behind it where it is missing, learned if the last token is."""
        if eos_token_id is None or not len(self.input_ids) or self.input_ids[-1] == eos_token_id:
            return self
        label = IGNORE if self.labels[-1] == IGNORE else eos_token_id
        return Document(np.append(self.input_ids, eos_token_id), np.append(self.labels, label))


def read_document(columns: Mapping[str, Any], where: str) -> Document:
    """Make a document of one example's columns; `where` names the example in errors.

    Raises:
        TypeError, ValueError: ids that are no flat sequence of integers >= 0, a column of another length, or an
            attention mask with zeros between ones.
    """
    arrays = {name: _integers(columns[name], name, where) for name in COLUMNS if columns.get(name) is not None}
    if "input_ids" not in arrays:
        if "input_ids" not in columns:
            raise ValueError(f"{where} has no column 'input_ids', only {sorted(columns)}; tokenize the dataset first")
        return Document(np.empty(0, np.int64), np.empty(0, np.int64))
    input_ids = arrays["input_ids"]
    for name, array in arrays.items():
        if len(array) != len(input_ids):
            raise ValueError(f"{where}: column {name!r} has {len(array)} entries, 'input_ids' has {len(input_ids)}")
    if len(input_ids) and input_ids.min() < 0:
        raise ValueError(f"{where}: 'input_ids' holds {input_ids.min()}; a token id is never negative")
    labels = arrays.get("labels", input_ids)
    for name in LOSS_MASKS:
        if name in arrays:
            labels = np.where(arrays[name] == 0, IGNORE, labels)
    real = _real_tokens(arrays.get("attention_mask"), len(input_ids), where)
    return Document(input_ids[real], labels[real])


def join(pieces: Sequence[Document]) -> dict[str, Tokens]:
    """Lay pieces out one after another: `input_ids`, `labels`, and `position_ids` that restart with every piece."""
    empty = np.empty(0, np.int64)
    return {
        "input_ids": np.concatenate([empty, *(piece.input_ids for piece in pieces)]),
        "position_ids": np.concatenate([empty, *(np.arange(len(piece.input_ids)) for piece in pieces)]),
        "labels": np.concatenate([empty, *(piece.labels for piece in pieces)]),
    }


def _integers(values: Any, name: str, where: str) -> Tokens:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{where}: column {name!r} is ragged: one flat sequence a document is expected") from error
    if array.ndim != 1:
        raise ValueError(f"{where}: column {name!r} must be one flat sequence, got shape {array.shape}")
    if len(array) and array.dtype.kind not in "iub":
        raise TypeError(f"{where}: column {name!r} must hold integers, got {array.dtype} (first {array[0]!r})")
    return array.astype(np.int64, copy=False)


def _real_tokens(attention_mask: Tokens | None, length: int, where: str) -> slice:
    if attention_mask is None or attention_mask.all():
        return slice(0, length)
    ones = np.flatnonzero(attention_mask)
    if not len(ones):
        return slice(0, 0)
    if ones[-1] - ones[0] + 1 != len(ones):
        raise ValueError(
            f"{where}: 'attention_mask' has zeros between ones; zeros may only be padding before or behind a document"
        )
    return slice(int(ones[0]), int(ones[-1]) + 1)
