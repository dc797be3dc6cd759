"""Documents by index, from the Arrow table of a `datasets.Dataset` without a copy, or from any other dataset."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sized
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset

from hf_longtrunc.data.documents import COLUMNS, MASKS, Document, read_document, refuse_unreadable

if TYPE_CHECKING:
    from collections.abc import Callable

    import datasets
    from numpy.typing import NDArray

    from hf_longtrunc.data.documents import Ending
    from hf_longtrunc.data.packing import Packing


class Documents(Protocol):
    """Documents by index, of known lengths."""

    columns: list[str]

    def __len__(self) -> int: ...

    def lengths(self, ending: Ending) -> NDArray[np.int64]:
        """Return the number of tokens of each document, with its ending."""

    def __getitem__(self, index: int) -> Document: ...


def has_rows(dataset: object) -> bool:
    """Tell whether a dataset has a length and rows by number."""
    is_indexed = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    return is_indexed and not isinstance(dataset, (str, bytes, IterableDataset))


def documents_of(dataset: Any) -> Documents:
    """Return the documents of a dataset with rows; TypeError or ValueError if it is empty or cannot be packed."""
    library = sys.modules.get("datasets")  # a datasets.Dataset cannot exist without it
    # The table does not hold the results of a transform.
    if library is not None and isinstance(dataset, library.Dataset) and dataset.format["type"] != "custom":
        return ArrowDocuments(dataset)
    return SizedDocuments(dataset)


class SizedDocuments:
    """The documents of any dataset with `len` and indices."""

    def __init__(self, dataset: Any) -> None:
        if not len(dataset):
            raise ValueError("the dataset is empty: there are no documents to pack")
        self.dataset = dataset
        self.columns = list(self._example(0))  # of the first row; another may lack some of them

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self, ending: Ending) -> NDArray[np.int64]:
        """Return the number of tokens of each document, with its ending; reads all documents."""
        lengths = (len(ending.close(self[i]).input_ids) for i in range(len(self.dataset)))
        return np.fromiter(lengths, np.int64, len(self.dataset))

    def __getitem__(self, index: int) -> Document:
        return read_document(self._example(index), f"row {index}")

    def _example(self, index: int) -> Mapping[str, Any]:
        try:
            example = self.dataset[index]
        except KeyError as error:
            raise TypeError(
                f"dataset must give its rows by number, and {type(self.dataset).__name__} knows no row {index}; make a "
                "datasets.Dataset of it (Dataset.from_pandas, Dataset.from_dict)"
            ) from error
        if not isinstance(example, Mapping):
            raise TypeError(
                f"row {index} of the dataset must be a mapping of columns, got {type(example).__name__}; "
                'give rows as {"input_ids": [...]}'
            )
        return example


class ArrowDocuments:
    """The documents of a `datasets.Dataset`, of any format, selected, shuffled or concatenated.

    Lengths need Arrow's offsets only, and the last tokens if an EOS may be missing.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        if not len(dataset):
            raise ValueError("the dataset is empty: there are no documents to pack")
        self.dataset = dataset
        is_whole = dataset.format["output_all_columns"]
        self.columns: list[str] = dataset.column_names if is_whole else list(dataset.format["columns"])
        if "input_ids" not in self.columns:
            raise ValueError(
                f"the dataset has no column 'input_ids', only {self.columns}; tokenize it first: "
                "dataset.map(lambda batch: tokenizer(batch['text']), batched=True)"
            )
        refuse_unreadable(self.columns, "the dataset")
        self._open()

    def lengths(self, ending: Ending) -> NDArray[np.int64]:
        """Return the number of tokens of each document, with its ending."""
        input_ids = self._lists["input_ids"]
        lengths = self._rows(input_ids.lengths)
        for name, column in self._lists.items():
            others = self._rows(column.lengths)
            # A document without labels or mask (None, length 0) is its own label, all of it real.
            ragged = np.flatnonzero((others != lengths) & ((others > 0) | self._rows(column.is_given)))
            if len(ragged):
                row = ragged[0]
                raise ValueError(
                    f"row {row}: column {name!r} has {others[row]} entries, 'input_ids' has {lengths[row]}"
                )
        ends = () if ending.eos_token_id is None else (self._rows(input_ids.last(back)) for back in (1, 2))
        lengths = ending.lengths(lengths, *(ends or (lengths, lengths)))
        if "attention_mask" in self._lists:
            is_padded = np.zeros(len(input_ids.lengths), np.bool_)
            is_padded[self._lists["attention_mask"].rows_with(lambda values: values != 1)] = True
            padded = np.flatnonzero(self._rows(is_padded))
            lengths = lengths.copy()
            lengths[padded] = [len(ending.close(self[row]).input_ids) for row in padded.tolist()]
        return lengths

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def is_plain(self) -> bool:
        """Tell whether documents are tokens only, without labels and masks."""
        return list(self._lists) == ["input_ids"]

    def gather(
        self,
        documents: NDArray[Any],
        starts: NDArray[Any],
        lengths: NDArray[Any],
        eos_token_id: int | None,
        tokens: NDArray[Any],
    ) -> None:
        """Copy the tokens of pieces of plain documents into `tokens`, one after another.

        `lengths` may include an EOS that is added to a document. A token that is negative, or too large for the dtype
        of `tokens`, raises ValueError.
        """
        rows, column = documents if self._indices is None else self._indices[documents], self._lists["input_ids"]
        chunks, begins, sizes = column.places(rows)
        given, ends = np.minimum(lengths, sizes - starts), np.cumsum(lengths)
        where = (chunks, begins + starts, ends - lengths, given)
        pieces = list(zip(*(array.tolist() for array in where), strict=True))
        least, most = column.range
        if least < 0 or most > np.iinfo(tokens.dtype).max:  # somewhere in the table, perhaps in none of the pieces
            self._check(documents, pieces, tokens.dtype)
        for chunk, begin, place, count in pieces:
            tokens[place : place + count] = column.values[chunk][begin : begin + count]
        is_ended = given < lengths
        if is_ended.any():
            check_token(int(eos_token_id or 0), tokens.dtype)
            tokens[ends[is_ended] - 1] = eos_token_id

    def _check(self, documents: NDArray[Any], pieces: list[tuple[int, ...]], dtype: np.dtype[Any]) -> None:
        values = self._lists["input_ids"].values
        for document, (chunk, begin, _, count) in zip(documents.tolist(), pieces, strict=True):
            piece = values[chunk][begin : begin + count]
            if piece.min(initial=0) < 0 or piece.max(initial=0) >= 2**63:
                self[document]  # raises where the token is
            check_token(int(piece.max(initial=0)), dtype)

    def __getitem__(self, index: int) -> Document:
        row = index if self._indices is None else int(self._indices[index])
        return read_document({name: column[row] for name, column in self._lists.items()}, f"row {index}")

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        table, indices = self.dataset.data, self.dataset._indices
        used = [name for name in COLUMNS if name in self.columns]
        self._lists = {name: _ListColumn(table.column(name), name) for name in used}
        self._indices = None if indices is None else indices.column(0).to_numpy()
        for name, column in self._lists.items():
            has_none = np.zeros(len(column.lengths), np.bool_)
            has_none[column.rows_with_none] = True
            rows = np.flatnonzero(self._rows(has_none & column.is_given))
            if len(rows):
                raise TypeError(f"row {rows[0]}: column {name!r} must hold integers, got None inside a list")

    def _rows(self, of_table: NDArray[Any]) -> NDArray[Any]:
        return of_table if self._indices is None else of_table[self._indices]


class _ListColumn:
    """A chunked column of integer lists as numpy views: the values of each chunk, and where each list lies."""

    def __init__(self, column: Any, name: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise TypeError(f"column {name!r} must hold lists of integers, got {kind}")
        is_mask = name in MASKS and pa.types.is_boolean(kind.value_type)
        if not (pa.types.is_integer(kind.value_type) or is_mask):
            raise TypeError(f"column {name!r} must hold lists of integers, got lists of {kind.value_type}")
        if pa.types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
        self._chunks = [_flat(chunk) for chunk in column.chunks]
        self.values = [values for values, _ in self._chunks]
        self._bounds = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._chunks)])
        self._begins = np.concatenate([offsets[:-1] for _, offsets in self._chunks])
        self.is_given = np.asarray(pc.is_valid(column))
        sizes = [np.diff(offsets).astype(np.int64) for _, offsets in self._chunks]
        self.lengths: NDArray[np.int64] = np.concatenate(sizes) * self.is_given
        nones = [np.flatnonzero(chunk.values.is_null()) if chunk.values.null_count else () for chunk in column.chunks]
        self.rows_with_none = np.concatenate([self._rows_of(chunk, places) for chunk, places in enumerate(nones)])

    def __getitem__(self, row: int) -> NDArray[Any] | None:
        if not self.is_given[row]:
            return None
        chunk, begin, length = self.places(np.array(row))
        return self.values[chunk][begin : begin + length]

    def places(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
        """Return the chunks of lists, where they begin among its values, and their lengths: 0 for a missing list."""
        return np.searchsorted(self._bounds, rows, side="right") - 1, self._begins[rows], self.lengths[rows]

    @cached_property
    def range(self) -> tuple[int, int]:
        """The least and the greatest entry of the column, or 0."""
        return (
            min(int(values.min(initial=0)) for values in self.values),
            max(int(values.max(initial=0)) for values in self.values),
        )

    def last(self, back: int) -> NDArray[Any]:
        """Return the last entry of every list, or the second last (`back` = 2); -1 where it has none."""
        parts = []
        for values, offsets in self._chunks:
            last = np.full(len(offsets) - 1, -1, np.int64)
            filled = offsets[1:] >= offsets[:-1] + back
            last[filled] = values[offsets[1:][filled] - back]
            parts.append(last)
        return np.concatenate(parts)

    def rows_with(self, condition: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> NDArray[np.intp]:
        """Return the rows that hold an entry for which the condition, given all entries of a chunk, is true."""
        parts = [np.flatnonzero(condition(values)) for values, _ in self._chunks]
        return np.concatenate([self._rows_of(chunk, places) for chunk, places in enumerate(parts)])

    def _rows_of(self, chunk: int, places: Any) -> NDArray[np.intp]:
        """Return the rows that hold given places of a chunk's entries, each once."""
        offsets = self._chunks[chunk][1]
        rows = np.unique(np.searchsorted(offsets, places, side="right")) - 1
        found: NDArray[np.intp] = rows[(rows >= 0) & (rows < len(offsets) - 1)] + self._bounds[chunk]
        return found


def _flat(chunk: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    values = chunk.values.fill_null(0) if chunk.values.null_count else chunk.values
    return values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()


def check_plan(documents: Documents, packing: Packing, ending: Ending) -> None:
    """Raise ValueError if a plan was made for documents of other lengths; reads the lengths of Arrow documents only."""
    if len(documents) != len(packing.document_lengths):
        raise ValueError(
            f"the plan was made for {len(packing.document_lengths)} documents, the dataset has {len(documents)}"
        )
    if not isinstance(documents, ArrowDocuments):
        return  # lengths would need reading all documents: each is checked when it is gathered
    differ = np.flatnonzero(documents.lengths(ending) != packing.document_lengths)
    if len(differ):
        raise ValueError(
            f"the plan was made for other documents: {len(differ)} have another length, the first of them is document "
            f"{differ[0]}. Were the EOS of a tokenizer or pad_document_to counted there and not here, or only here?"
        )


def warn_of_lost_targets(documents: Documents, packing: Packing, ending: Ending) -> None:
    """Warn of documents that lost all their targets; reads only documents that were cut or dropped."""
    kept = np.bincount(packing.document, packing.length, len(packing.document_lengths))
    cut = np.flatnonzero((kept < packing.document_lengths) | (packing.document_lengths > packing.seq_length))
    order = np.argsort(packing.document, kind="stable")
    bounds = np.searchsorted(packing.document[order], np.stack([cut, cut + 1]))
    lost = 0
    for document, first, last in zip(cut.tolist(), *bounds.tolist(), strict=True):
        content = ending.close(documents[document])
        pieces = (content.cut(int(packing.start[p]), int(packing.length[p])) for p in order[first:last])
        lost += content.cut(0, len(content.labels)).teaches and not any(piece.teaches for piece in pieces)
    if lost:
        warnings.warn(
            f"{lost} of {len(documents)} documents lose every token that is to be learned: their targets lie behind "
            f"{packing.seq_length} tokens, or at the first token of a piece. Take a larger seq_length",
            stacklevel=3,
        )


def check_token(token: int, dtype: np.dtype[Any]) -> None:
    """Raise ValueError if a token is too large for a dtype."""
    if token > np.iinfo(dtype).max:
        raise ValueError(f'token {token} is more than {dtype} holds; pass dtype="int64"')
