"""Tokenized documents: read from an example, cut into pieces, joined to a row.

Columns: `input_ids`; optionally `labels`, an `attention_mask` (zeros are padding at the ends), and masks of the tokens
to learn (`LOSS_MASKS`; 0 becomes -100 in the labels). A column that is None counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_longtrunc.arguments import check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

Tokens: TypeAlias = NDArray[np.int64]

IGNORE = -100
LOSS_MASKS = ("assistant_masks", "assistant_mask", "completion_mask", "loss_mask")
MASKS = ("attention_mask", *LOSS_MASKS)
COLUMNS = ("input_ids", "labels", *MASKS)
# Columns of packed rows: positions that restart with each document, and TRL's lengths of the documents.
BOUNDARIES = ("position_ids", "seq_lengths")
# Inputs of a model other than tokens, which packed rows would lose.
INPUTS = (
    "inputs_embeds", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "input_features",
    "images", "videos", "audio",
)  # fmt: skip
# Boundaries of other packers: such rows are no documents either.
FOREIGN_BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seqlens", "packed_seq_lengths")


class Document(NamedTuple):
    """Token ids and the labels of the same length; a label of -100 is not learned."""

    input_ids: Tokens
    labels: Tokens

    @property
    def teaches(self) -> bool:
        """Tell whether any token is learned."""
        return bool((self.labels != IGNORE).any())

    def cut(self, start: int, length: int) -> Document:
        """Return `length` tokens from `start` on; the first has no token before it and so no label."""
        labels = self.labels[start : start + length].copy()
        labels[:1] = IGNORE
        return Document(self.input_ids[start : start + length], labels)


class Ending(NamedTuple):
    """The end of each document: an EOS if it has none, then padding to a multiple of `multiple` tokens.

    A final EOS and newline, as chat templates write after the last turn, counts as an EOS.
    """

    eos_token_id: int | None = None
    multiple: int = 1
    pad_token_id: int = 0
    newline_token_id: int | None = None

    def close(self, document: Document) -> Document:
        """Return the document with its ending: EOS is learned if the last token is, padding never is."""
        (input_ids, labels), eos = document, self.eos_token_id
        second_last = input_ids[-2] if len(input_ids) > 1 else -1
        if eos is not None and len(input_ids) and not self._has_eos(input_ids[-1], second_last):
            label = IGNORE if labels[-1] == IGNORE else eos
            input_ids, labels = np.append(input_ids, eos), np.append(labels, label)
        if padding := -len(input_ids) % self.multiple:
            input_ids = np.append(input_ids, np.full(padding, self.pad_token_id))
            labels = np.append(labels, np.full(padding, IGNORE))
        return Document(input_ids, labels)

    def lengths(self, lengths: Tokens, last: Tokens, second_last: Tokens) -> Tokens:
        """Return the lengths of documents with their ending, from lengths and last tokens; 0 stays 0."""
        if self.eos_token_id is not None:
            lengths = lengths + ((lengths > 0) & ~self._has_eos(last, second_last))
        return -(-lengths // self.multiple) * self.multiple

    def _has_eos(self, last: Any, second_last: Any) -> Any:
        eos, newline = self.eos_token_id, -1 if self.newline_token_id is None else self.newline_token_id
        return (last == eos) | ((last == newline) & (second_last == eos))


class FlatRows(NamedTuple):
    """Concatenated rows: tokens, labels, and the lengths of rows and pieces."""

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    tokens: Tokens  # in every row
    piece_lengths: Tokens
    pieces: Tokens  # in every row

    def padded(self, seq_length: int, pad_token_id: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the tokens [rows, seq_length], padded with `pad_token_id`."""
        rows = np.full((len(self.tokens), seq_length), pad_token_id, dtype.newbyteorder("<"))
        rows[np.arange(seq_length) < self.tokens[:, None]] = self.input_ids
        return rows


def checked_ending(seq_length: int, eos: object, multiple: object, pad_token_id: object, newline: object) -> Ending:
    """Return an `Ending`, or raise TypeError or ValueError."""
    ending = Ending(
        None if eos is None else check_int("eos_token_id", eos, minimum=0),
        check_int("pad_document_to", multiple, minimum=1),
        check_int("pad_token_id", pad_token_id, minimum=0),
        None if newline is None else check_int("newline_token_id", newline, minimum=0),
    )
    if seq_length % ending.multiple:
        raise ValueError(
            f"seq_length must be a multiple of pad_document_to = {multiple}, as all pieces are, got {seq_length}"
        )
    return ending


def read_document(columns: Mapping[str, Any], where: str) -> Document:
    """Make a document of one example's columns, or raise TypeError or ValueError; `where` names the example."""
    if not isinstance(columns, Mapping):
        raise TypeError(
            f'{where} must be a mapping of columns, such as {{"input_ids": [...]}}, got {type(columns).__name__}'
        )
    refuse_unreadable([name for name in columns if columns[name] is not None], where)
    return _document(columns, where)


def refuse_unreadable(columns: Sequence[str], where: str) -> None:
    """Raise ValueError for columns of packed rows (their documents would be joined), of images or of sounds."""
    if inputs := [name for name in INPUTS if name in columns]:
        raise ValueError(
            f"{where} has {' and '.join(inputs)} beside its tokens, which packed rows would lose: rows hold text only. "
            f"If the tokens do not speak of them, leave the column out: dataset.remove_columns({inputs})"
        )
    packed = [name for name in (*BOUNDARIES, *FOREIGN_BOUNDARIES) if name in columns]
    if packed:
        raise ValueError(
            f"{where} is packed already (it has {' and '.join(packed)}): packing it again would join its documents. "
            f"Pack the documents it was made of; if these are documents, leave the column out: "
            f"dataset.remove_columns({packed})"
        )


def read_packed_row(columns: Mapping[str, Any], where: str) -> dict[str, Tokens]:
    """Return `input_ids`, `position_ids` and `labels` of a packed row; the first token of a document is never learned.

    Positions come from `position_ids`, or else from TRL's `seq_lengths`. Labels default to the tokens. Columns that
    contradict each other raise ValueError.
    """
    document = _document(columns, where)
    tokens, given = len(document.input_ids), columns.get("input_ids")
    if given is not None and len(given) != tokens:
        raise ValueError(f"{where}: a packed row's 'attention_mask' has zeros; a packed row holds no padding")
    arrays = {name: _integers(columns[name], name, where) for name in BOUNDARIES if columns.get(name) is not None}
    lengths = arrays.get("seq_lengths")
    if lengths is not None and (lengths.sum() != tokens or lengths.min(initial=1) < 1):
        raise ValueError(
            f"{where}: 'seq_lengths' must be lengths of at least 1 that sum up to the row's {tokens} tokens, got a sum "
            f"of {lengths.sum()} and a least of {lengths.min(initial=1)}"
        )
    positions = arrays.get("position_ids")
    if positions is None:
        positions = np.concatenate([np.empty(0, np.int64), *map(np.arange, lengths if lengths is not None else ())])
    elif len(positions) != tokens:
        raise ValueError(f"{where}: column 'position_ids' has {len(positions)} entries, 'input_ids' has {tokens}")
    is_first = positions == 0
    if tokens and not (is_first[0] and (is_first[1:] | (np.diff(positions) == 1)).all()):
        raise ValueError(
            f"{where}: a packed row's 'position_ids' must begin at 0 and rise by one or restart at 0, got "
            f"{positions[:8].tolist()}{'...' if tokens > 8 else ''}"
        )
    if lengths is not None and not np.array_equal(np.cumsum(lengths) - lengths, np.flatnonzero(is_first)):
        raise ValueError(f"{where}: 'seq_lengths' and 'position_ids' speak of different documents")
    return {
        "input_ids": document.input_ids,
        "position_ids": positions,
        "labels": np.where(is_first, IGNORE, document.labels),
    }


def _document(columns: Mapping[str, Any], where: str) -> Document:
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
    if "labels" in arrays and len(wrong := labels[(labels < 0) & (labels != IGNORE)]):
        raise ValueError(f"{where}: 'labels' holds {wrong[0]}; a label is a token id, or {IGNORE} for no label")
    for name in MASKS:
        if name in arrays and (arrays[name].max(initial=0) > 1 or arrays[name].min(initial=0) < 0):
            raise ValueError(
                f"{where}: {name!r} must hold 0 and 1, got {arrays[name].min()} to {arrays[name].max()}; numbers of "
                "segments are no mask"
            )
    for name in LOSS_MASKS:
        if name in arrays:
            labels = np.where(arrays[name] == 0, IGNORE, labels)
    real = _real_tokens(arrays.get("attention_mask"), len(input_ids), where)
    return Document(input_ids[real], labels[real])


def join(pieces: Sequence[Document]) -> dict[str, Tokens]:
    """Concatenate pieces to a row: `input_ids`, `labels`, and `position_ids` that restart with each piece."""
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
    if len(array) and array.dtype.kind not in ("iub" if name in MASKS else "iu"):
        raise TypeError(f"{where}: column {name!r} must hold integers, got {array.dtype} (first {array[0]!r})")
    if array.dtype == np.uint64 and len(array) and array.max() >= 2**63:
        raise ValueError(f"{where}: column {name!r} holds {array.max()}, more than a 64-bit integer can")
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
