"""The documents of a `datasets.Dataset`, read from its Arrow table without copying it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.data.documents import COLUMNS, Document, read_document

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray


class ArrowDocuments:
    """Documents by index; select, shuffle and concatenate views included, whatever the dataset's format.

    Only Arrow's offsets are read to know the lengths, and each document's last token where EOS may be missing.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        if not len(dataset):
            raise ValueError("the dataset is empty: there are no documents to pack")
        if "input_ids" not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column 'input_ids', only {dataset.column_names}; tokenize it first: "
                "dataset.map(lambda batch: tokenizer(batch['text']), batched=True)"
            )
        self.dataset = dataset
        self.columns: list[str] = dataset.column_names
        self._open()

    def lengths(self, eos_token_id: int | None) -> NDArray[np.int64]:
        """Return the tokens of every document, a missing EOS included."""
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
        if "attention_mask" in self._lists and not self._lists["attention_mask"].all():
            every = (len(self[i].ending_with(eos_token_id).input_ids) for i in range(len(lengths)))
            return np.fromiter(every, np.int64, len(lengths))
        if eos_token_id is None:
            return lengths
        lacks_eos: NDArray[np.bool_] = (lengths > 0) & (self._rows(input_ids.last()) != eos_token_id)
        return lengths + lacks_eos

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
        if not (pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)):
            raise TypeError(f"column {name!r} must hold lists of integers, got lists of {kind.value_type}")
        if pa.types.is_fixed_size_list(kind):
            column = column.cast(pa.list_(kind.value_type))
        self._chunks = [_flat(chunk, name) for chunk in column.chunks]
        self._bounds = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._chunks)])
        self.is_given = np.asarray(pc.is_valid(column))
        sizes = [np.diff(offsets).astype(np.int64) for _, offsets in self._chunks]
        self.lengths: NDArray[np.int64] = np.concatenate(sizes) * self.is_given

    def __getitem__(self, row: int) -> NDArray[Any] | None:
        if not self.is_given[row]:
            return None
        chunk = int(np.searchsorted(self._bounds, row, side="right")) - 1
        values, offsets = self._chunks[chunk]
        local = row - self._bounds[chunk]
        return values[offsets[local] : offsets[local + 1]]

    def last(self) -> NDArray[Any]:
        """Return the last entry of every list; 0 where it has none."""
        parts = []
        for values, offsets in self._chunks:
            last = np.zeros(len(offsets) - 1, np.int64)
            filled = offsets[1:] > offsets[:-1]
            last[filled] = values[offsets[1:][filled] - 1]
            parts.append(last)
        return np.concatenate(parts)

    def all(self) -> bool:
        """Tell whether no entry is zero."""
        return all(bool(values[offsets[0] : offsets[-1]].all()) for values, offsets in self._chunks if len(offsets))


def _flat(chunk: Any, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if chunk.values.null_count:
        row = next(i for i, entry in enumerate(chunk) if entry.is_valid and None in entry.as_py())
        raise TypeError(f"column {name!r} must hold integers, got None inside a list (entry {row} of its chunk)")
    return chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
