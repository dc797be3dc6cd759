"""Best-fit packing of a dataset: rows are indices into its documents, and no corpus is rewritten."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, overload

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.data.collators import check_tokenizer, padding_token, warn_beyond_window
from hf_longtrunc.data.columns import (
    ArrowDocuments,
    check_plan,
    check_token,
    documents_of,
    has_rows,
    warn_of_lost_targets,
)
from hf_longtrunc.data.documents import COLUMNS, IGNORE, LOSS_MASKS, Document, FlatRows, checked_ending, join
from hf_longtrunc.data.packing import Packing, best_fit_decreasing, checked_options, row_order
from hf_longtrunc.data.stream import PackedStream
from hf_longtrunc.data.writing import WRITTEN, checked_columns, refuse_own_folder, write_rows
from hf_longtrunc.extras import import_extra

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import datasets
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from hf_longtrunc.data.columns import Documents
    from hf_longtrunc.data.documents import Ending, Tokens
    from hf_longtrunc.data.packing import LongDocuments
    from hf_longtrunc.data.stream import Sharding

logger = logging.getLogger(__name__)


class PackedDataset(TorchDataset[dict[str, "Tokens"]]):
    """A dataset's documents packed into rows: a view that gathers the tokens of a row when you index it.

    Row i is a dict of int64 arrays of at most `seq_length` tokens: `input_ids`, `position_ids` that restart with each
    piece, and `labels`, -100 at each piece's first token. Pass it to Trainer together with `BestFitPackingCollator`.
    Samplers, data parallelism and resuming work as with any dataset; the view pickles.

    `pack()` plans and returns one. Construct it yourself to reuse a plan of `best_fit_decreasing`, or one that another
    process saved (`Packing.from_pretrained`).

    Args:
        dataset: the documents. `tokenizer` and `pad_document_to` are as for `pack()`, and those of the plan.
        packing: the plan for their lengths, EOS and padding included.
        seed: shuffles the rows; None keeps the plan's order, the fullest rows first.
        row_multiple: add rows until their number is a multiple. An added row takes the last piece of another row; if
            no row has several pieces it is padding only, with a warning.

    Raises:
        TypeError: no dataset with a length, or no plan.
        ValueError: a plan for other documents; only at the row if the lengths are not known without reading all.

    Examples:
        >>> documents = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
        >>> plan = best_fit_decreasing([3, 2], seq_length=5)
        >>> PackedDataset(documents, plan)[0]["input_ids"].tolist()
        [5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        packing: Packing,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_document_to: int = 1,
        seed: int | None = 0,
        row_multiple: int = 1,
    ) -> None:
        seed = None if seed is None else check_int("seed", seed, minimum=0)
        row_multiple = check_int("row_multiple", row_multiple, minimum=1)
        if not isinstance(packing, Packing) or not has_rows(dataset):
            raise TypeError(
                "PackedDataset wants a dataset with a length and a plan for it (best_fit_decreasing, "
                f"Packing.from_pretrained), got {type(dataset).__name__} and {type(packing).__name__}"
            )
        ending, documents = _ending(tokenizer, pad_document_to, packing.seq_length), documents_of(dataset)
        check_plan(documents, packing, ending)
        self._set(documents, packing, ending, *row_order(packing, row_multiple, seed))

    def _set(
        self,
        documents: Documents,
        packing: Packing,
        ending: Ending,
        order: NDArray[np.int64],
        donors: Sequence[int],
    ) -> PackedDataset:
        self.packing = packing
        self._documents = documents
        self._order = order
        self._donors = donors  # rows that gave their last piece to an added row
        self.ending = ending
        return self

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Tokens]:
        return join([self._piece(int(piece)) for piece in self._pieces(index)])

    def __repr__(self) -> str:
        documents, length = len(self.packing.document_lengths), self.packing.seq_length
        return f"<PackedDataset: {len(self):,} rows of up to {length:,} tokens, of {documents:,} documents>"

    def stats(self) -> dict[str, int | float]:
        """Count rows, cuts and drops: see `Packing.stats`."""
        return self.packing.stats()

    def shard(self, index: int, num_shards: int) -> PackedDataset:
        """Return a view of every `num_shards`-th row from row `index` on; its `stats()` are those of all rows."""
        num_shards = check_int("num_shards", num_shards, minimum=1)
        first = check_int("index", index, minimum=0, maximum=num_shards - 1)
        shard = PackedDataset.__new__(PackedDataset)
        order = self._order[first::num_shards]
        return shard._set(self._documents, self.packing, self.ending, order, self._donors)

    def materialize(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        num_proc: int = 1,
        dtype: Literal["int64", "int32"] = "int64",
        columns: Sequence[str] = WRITTEN,
    ) -> datasets.Dataset:
        """Write the rows, in this order, as a `datasets.Dataset` with the additional column `seq_lengths` of TRL.

        Args:
            folder: for `datasets.load_from_disk`. Earlier rows in it are replaced when the new ones are complete. None
                takes a new folder in the cache of datasets.
            num_proc: number of processes; each writes one file.
            dtype: of `input_ids` and `labels`. Boundaries are always int32.
            columns: to write, with `input_ids`; `position_ids` and `seq_lengths` are always written. `labels` may be
                left out if the documents have no labels or masks.

        Raises:
            ValueError: a token too large for `dtype`; columns without `input_ids`, or without `labels` that documents
                have; the folder of the documents, or a folder of splits.
            FileExistsError: another process wrote rows into the folder at the same time, on a disk without locks.

        Cost: 90 million tokens a CPU second for documents of tokens only, in Arrow; less with labels or masks.
        """
        library = import_extra("datasets", "materialize()", "train")
        names = checked_columns(columns, self.teaching)
        check_choice("dtype", dtype, ("int64", "int32"))
        num_proc = min(check_int("num_proc", num_proc, minimum=1), max(len(self), 1))
        cache = Path(library.config.HF_DATASETS_CACHE, "packed", secrets.token_hex(8))
        at = cache if folder is None else Path(folder)
        refuse_own_folder(self._documents, at, library)
        return write_rows(self, at, names, dtype, num_proc)

    def spans(self, first: int = 0, last: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the begins and ends of rows `first` to `last` in `packing.items`, [rows] each."""
        rows, offsets, donors = self._order[first:last], self.packing.offsets, np.array(self._donors, np.int64)
        added = rows - len(self.packing)  # rows with a piece of another row, followed by rows of padding only
        begins, stops = (offsets[np.minimum(rows + end, len(self.packing))].astype(np.int64) for end in (0, 1))
        takes = (added >= 0) & (added < len(donors))
        begins[takes] = stops[takes] = offsets[donors[added[takes]] + 1]
        begins[takes] -= 1
        return begins, stops - np.isin(rows, donors)

    @property
    def teaching(self) -> list[str]:
        """The columns (and the padding) of the documents that decide which tokens are learned."""
        padding = ["padding (pad_document_to)"] if self.ending.multiple > 1 else []
        return sorted({"labels", *LOSS_MASKS} & set(self._documents.columns)) + padding

    def blocks(self, first: int, last: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield the bounds of blocks of about so many tokens, from row `first` to row `last`."""
        step = max(1, tokens // self.packing.seq_length)
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def gather(
        self,
        first: int,
        last: int,
        *,
        with_labels: bool = True,
        dtype: str = "int64",
        empty: Callable[[str, int, str], NDArray[Any]] = lambda name, size, dtype: np.empty(size, dtype),
    ) -> FlatRows:
        """Return the tokens of rows `first` to `last` (exclusive), joined, in arrays of `empty(name, size, dtype)`.

        Without `with_labels` the labels are `input_ids`, and documents with other labels raise ValueError; so does a
        token too large for `dtype`.
        """
        begins, stops = self.spans(first, last)
        counts = stops - begins
        flat = self.packing.items[np.repeat(stops - np.cumsum(counts), counts) + np.arange(counts.sum())]
        lengths = self.packing.length[flat].astype(np.int64)
        ends = np.cumsum(lengths)
        tokens = np.diff(np.append(0, ends)[np.append(0, np.cumsum(counts))])
        if isinstance(self._documents, ArrowDocuments) and self._documents.is_plain and self.ending.multiple == 1:
            pieces = self.packing.document[flat], self.packing.start[flat], lengths
            input_ids = labels = empty("input_ids", int(lengths.sum()), dtype)
            self._documents.gather(*pieces, self.ending.eos_token_id, input_ids)
            if with_labels:
                labels = empty("labels", len(input_ids), dtype)
                labels[:] = input_ids
                labels[ends - lengths] = IGNORE
            return FlatRows(input_ids, labels, tokens, lengths, counts)
        joined = join([self._piece(int(piece)) for piece in flat])
        is_plain = (joined["labels"] == joined["input_ids"]) | (joined["position_ids"] == 0)
        if not with_labels and not is_plain.all():
            raise ValueError(
                "labels cannot be left out: some documents have labels or masks of their own, and without labels every "
                "token would be learned"
            )
        for name in ("input_ids", "labels"):
            check_token(int(joined[name].max(initial=0)), np.dtype(dtype))
        return FlatRows(joined["input_ids"].astype(dtype), joined["labels"].astype(dtype), tokens, lengths, counts)

    def _pieces(self, index: int) -> NDArray[Any]:
        row = range(len(self))[index]  # IndexError ends a loop over the rows
        (begin,), (stop,) = self.spans(row, row + 1)
        return self.packing.items[begin:stop]

    def _piece(self, piece: int) -> Document:
        packing = self.packing
        document = self.ending.close(self._documents[int(packing.document[piece])])
        if len(document.input_ids) != packing.document_lengths[packing.document[piece]]:
            raise ValueError(
                f"document {int(packing.document[piece])} has {len(document.input_ids)} tokens and the plan counted "
                f"on {int(packing.document_lengths[packing.document[piece]])}: it was made for another dataset"
            )
        return document.cut(int(packing.start[piece]), int(packing.length[piece]))


class IndexedDataset(Protocol):
    """Any dataset with a length and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class _Options(TypedDict, total=False):
    long: LongDocuments
    min_piece: int
    seed: int | None
    row_multiple: int
    pad_document_to: int
    pool_size: int
    pool_tokens: int | None
    sharding: Sharding


Tokenizer: TypeAlias = "PreTrainedTokenizerBase | None"


@overload
def pack(
    dataset: Mapping[str, IndexedDataset], seq_length: int, tokenizer: Tokenizer = None, **options: Unpack[_Options]
) -> dict[str, PackedDataset]: ...
@overload
def pack(
    dataset: IndexedDataset, seq_length: int, tokenizer: Tokenizer = None, **options: Unpack[_Options]
) -> PackedDataset: ...
@overload
def pack(
    dataset: Iterable[Mapping[str, Any]], seq_length: int, tokenizer: Tokenizer = None, **options: Unpack[_Options]
) -> PackedStream: ...
def pack(
    dataset: Any,
    seq_length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    long: LongDocuments = "split",
    min_piece: int = 2,
    seed: int | None = 0,
    row_multiple: int = 1,
    pad_document_to: int = 1,
    pool_size: int = 8192,
    pool_tokens: int | None = None,
    sharding: Sharding = "auto",
) -> PackedDataset | PackedStream | dict[str, Any]:
    """Pack a tokenized dataset's documents into rows of `seq_length` tokens by best-fit decreasing.

    Args:
        dataset: a `datasets.Dataset` (lengths come from Arrow's offsets, tokens are not copied), another dataset with
            `len` and indices (read once), a mapping of splits, or an iterable of examples (a stream). Columns:
            `input_ids`, and optionally `labels`, `attention_mask` (zeros are padding, cut off), `assistant_masks` and
            `completion_mask` (applied to the labels). Other columns are left out.
        seq_length: tokens in a row.
        tokenizer: adds its EOS to each document without one, before cutting. A final EOS and newline, as chat templates
            write, counts as an EOS. None adds nothing.
        long: for a document longer than a row: "split", "truncate", "drop" or "error".
        min_piece: shorter pieces are left out and counted; 1 keeps every token.
        seed: shuffles the rows, and pieces of equal length; None keeps the algorithm's order.
        row_multiple: add rows until their number is a multiple, see `PackedDataset`. With the number of processes
            times the batch size, no sampler repeats or drops a row.
        pad_document_to: pad each document to a multiple of this number of tokens, with the tokenizer's padding token
            or EOS (0 without a tokenizer), never learned. Context parallelism over n ranks cuts each document into 2 n
            equal parts, so pass 2 n. `seq_length` must be a multiple.
        pool_size: for a stream, see `PackedStream`.
        pool_tokens: for a stream.
        sharding: for a stream.

    Returns:
        A `PackedDataset`, a dict of them for a mapping of splits, or a `PackedStream` for an iterable or a torch
        `IterableDataset`.

    Raises:
        TypeError, ValueError: no documents; packed rows; a column that is no flat list of integers or has another
            length than `input_ids` (the message names row and column); a bad parameter.

    Examples:
        >>> rows = pack([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [4] * 4}], 5, seed=None)
        >>> [row["input_ids"].tolist() for row in rows]
        [[4, 4, 4, 4], [5, 6, 7, 8, 9]]
        >>> rows[1]["position_ids"].tolist(), rows[1]["labels"].tolist()
        ([0, 1, 2, 0, 1], [-100, 6, 7, -100, 9])
    """
    seq_length, min_piece, seed = checked_options(seq_length, long, min_piece, seed)
    row_multiple = check_int("row_multiple", row_multiple, minimum=1)
    ending = _ending(tokenizer, pad_document_to, seq_length)
    options: dict[str, Any] = {"long": long, "min_piece": min_piece, "seed": seed, "pad_document_to": pad_document_to}
    options |= {"pool_size": pool_size, "pool_tokens": pool_tokens, "sharding": sharding}
    if isinstance(dataset, Mapping):
        _check_splits(dataset)
        options["row_multiple"] = row_multiple
        return {name: pack(split, seq_length, tokenizer, **options) for name, split in dataset.items()}
    # transformers writes 1e30 where a tokenizer knows no maximum.
    warn_beyond_window(seq_length, getattr(tokenizer, "model_max_length", None), "tokenizer")
    if tokenizer is not None and ending.eos_token_id is None:
        logger.warning(
            "tokenizer has no EOS (%s): no document gets one, and a model trained on these rows does not learn to end. "
            "Set tokenizer.eos_token; pass no tokenizer if the documents end as they should",
            type(tokenizer).__name__,
        )
    if not has_rows(dataset):
        _check_stream(dataset, row_multiple)
        return PackedStream(
            dataset,
            seq_length,
            eos_token_id=ending.eos_token_id,
            pad_token_id=ending.pad_token_id,
            newline_token_id=ending.newline_token_id,
            **options,
        )
    documents = documents_of(dataset)
    unused = sorted(set(documents.columns) - set(COLUMNS))
    if unused:
        logger.info("packing leaves out the columns %s", ", ".join(unused))
    packing = best_fit_decreasing(documents.lengths(ending), seq_length, long=long, min_piece=min_piece, seed=seed)
    packed = PackedDataset.__new__(PackedDataset)
    packed._set(documents, packing, ending, *row_order(packing, row_multiple, seed))
    if packed.teaching:
        warn_of_lost_targets(documents, packing, ending)
    return packed


def _ending(tokenizer: PreTrainedTokenizerBase | None, pad_document_to: int, seq_length: int) -> Ending:
    """Return the ending of the documents, or raise TypeError or ValueError."""
    check_tokenizer(tokenizer)
    eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if callable(tokenizer) else ()
    newline_token_id = newline[-1] if newline else None
    padding = 0 if pad_document_to == 1 else padding_token(tokenizer)
    return checked_ending(seq_length, eos_token_id, pad_document_to, padding, newline_token_id)


def _check_splits(splits: Mapping[str, Any]) -> None:
    if not splits:
        raise ValueError("the mapping holds no splits: there are no documents to pack")
    if columns := [name for name in COLUMNS if name in splits]:
        raise TypeError(
            f"dataset must be a mapping of splits, got one of columns ({', '.join(columns)}); make a dataset of it by "
            "datasets.Dataset.from_dict"
        )


def _check_stream(dataset: object, row_multiple: int) -> None:
    if not isinstance(dataset, Iterable) or isinstance(dataset, (str, bytes)):
        raise TypeError(
            f"dataset must be a dataset of tokenized documents or an iterable of them, got {type(dataset).__name__}; "
            'tokenize first, so that an example is {"input_ids": [...]}'
        )
    if row_multiple != 1:
        raise ValueError("row_multiple needs a dataset of known length; a stream's rows cannot be counted beforehand")
