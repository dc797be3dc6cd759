"""Best-fit packing of a whole dataset: an index view of its documents, no rewritten corpus."""

from __future__ import annotations

import logging
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, overload

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.data.collators import check_tokenizer, padding_token, warn_beyond_window
from hf_longtrunc.data.columns import ArrowDocuments, check_token, documents_of, has_rows
from hf_longtrunc.data.documents import BOUNDARIES, COLUMNS, IGNORE, LOSS_MASKS, Document, checked_ending, join
from hf_longtrunc.data.packing import Packing, best_fit_decreasing, checked_options, row_order
from hf_longtrunc.data.stream import PackedStream
from hf_longtrunc.data.writing import WRITTEN, import_datasets, refuse_own_folder, write_rows

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
    """A dataset's documents packed into rows: a view that holds indices and gathers a row's tokens when asked.

    Row i is a dict of int64 arrays of at most `seq_length` tokens: `input_ids`, `position_ids` that restart with every
    piece, and `labels`, -100 at every piece's first token. Give it to Trainer together with `BestFitPackingCollator`.
    Rows are indices, so samplers, data parallelism and resuming need nothing special; the view pickles.

    `pack()` makes one with a plan of its own. With a plan that was made before, by `best_fit_decreasing` or by another
    process and read by `Packing.from_pretrained`, nothing is planned again.

    Args:
        dataset: the documents, as for `pack()`.
        packing: the plan for their lengths, EOS included.
        tokenizer: its EOS is put behind every document that does not end with it; the plan must have counted it.
        pad_document_to: as for `pack()`; the plan must have counted the padding.
        seed: orders the rows; None keeps the plan's order, the fullest pieces first.
        row_multiple: rows are added until their number is a multiple of this: each is the last piece of a row of
            several; where there are none, padding only, which is warned of.

    Raises:
        TypeError: no dataset with a length, or no plan.
        ValueError: the plan was made for other documents; where their lengths are not known without reading them all,
            when a row with such a document is read.
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
        _check_plan(documents, packing, ending)
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
        self._donors = donors  # rows whose last piece is a row of its own
        self.ending = ending  # of every document
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
        """Return every `num_shards`-th row from row `index` on, as a view of its own; `stats()` speaks of all rows."""
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
        """Write the rows out as a `datasets.Dataset`, in this order, with TRL's `seq_lengths` beside the columns.

        Args:
            folder: where they go, for `datasets.load_from_disk` to read; rows that are there are replaced, at once and
                when the new ones are whole. None takes a new folder in the cache of datasets. The documents' own
                folder is refused.
            num_proc: processes, each of which writes a file of its own.
            dtype: of `input_ids` and `labels`; "int32" takes half the place. Boundaries are always int32.
            columns: what is written beside the boundaries, `position_ids` and `seq_lengths`: Trainer keeps the first of
                them only, TRL's SFTTrainer the second. `input_ids` alone says the rest where no labels and no masks
                were given.

        Raises:
            ValueError: a token that `dtype` does not hold; columns without `input_ids`, or without `labels` where the
                documents have labels or masks; the folder is that of the documents, or one of splits.
            FileExistsError: another process has written rows into the folder at the same time.

        Cost: measured 90 million tokens a CPU second, 180 million as int32 without labels and positions, for documents
        of tokens only, in Arrow; less where they have labels or masks.
        """
        library = import_datasets("materialize()")
        names = self._checked_columns(columns)
        check_choice("dtype", dtype, ("int64", "int32"))
        num_proc = min(check_int("num_proc", num_proc, minimum=1), max(len(self), 1))
        cache = Path(library.config.HF_DATASETS_CACHE, "packed", secrets.token_hex(8))
        at = cache if folder is None else Path(folder)
        refuse_own_folder(self._documents, at, library)
        return write_rows(self, at, names, dtype, num_proc)

    def spans(self, first: int = 0, last: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where in `packing.items` the rows `first` to `last` of this view begin and end, [rows] each."""
        rows, offsets, donors = self._order[first:last], self.packing.offsets, np.array(self._donors, np.int64)
        added = rows - len(self.packing)  # rows that take a piece of another, and behind them rows of padding only
        begins, stops = (offsets[np.minimum(rows + end, len(self.packing))].astype(np.int64) for end in (0, 1))
        takes = (added >= 0) & (added < len(donors))
        begins[takes] = stops[takes] = offsets[donors[added[takes]] + 1]
        begins[takes] -= 1
        return begins, stops - np.isin(rows, donors)

    @property
    def teaching(self) -> list[str]:
        """What says which tokens are learned: columns of the documents, and their padding."""
        padding = ["padding (pad_document_to)"] if self.ending.multiple > 1 else []
        return sorted({"labels", *LOSS_MASKS} & set(self._documents.columns)) + padding

    def blocks(self, first: int, last: int, tokens: int) -> Iterator[tuple[int, int]]:
        """Cut rows `first` to `last` into blocks of about so many tokens."""
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
        """Return the tokens of rows `first` to `last`, one after another.

        Args:
            first: row of this view.
            last: row behind the last one.
            with_labels: whether labels are returned; else they are `input_ids`.
            dtype: of both.
            empty: makes the arrays of a name, a size and a dtype; a writer reuses them.

        Raises:
            ValueError: a token that `dtype` does not hold; labels left out that are not the tokens.
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

    def _checked_columns(self, columns: Sequence[str]) -> tuple[str, ...]:
        given = (columns,) if isinstance(columns, str) else columns
        wanted = {check_choice("columns", name, WRITTEN) for name in given}
        if "input_ids" not in wanted:
            raise ValueError(f"columns must have input_ids, got {', '.join(sorted(wanted)) or 'none'}")
        names = tuple(name for name in WRITTEN if name in wanted or name in BOUNDARIES)
        if self.teaching and "labels" not in names:
            raise ValueError(
                f"columns must have labels: the documents have {', '.join(self.teaching)}, and without labels every "
                "token would be learned"
            )
        return names

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


class FlatRows(NamedTuple):
    """Rows one after another: tokens, labels, and the lengths of rows and pieces."""

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    tokens: Tokens  # in every row
    piece_lengths: Tokens
    pieces: Tokens  # in every row

    def padded(self, seq_length: int, pad_token_id: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the tokens [rows, seq_length], filled up with `pad_token_id`."""
        rows = np.full((len(self.tokens), seq_length), pad_token_id, dtype.newbyteorder("<"))
        rows[np.arange(seq_length) < self.tokens[:, None]] = self.input_ids
        return rows


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
        dataset: a `datasets.Dataset` (lengths are read from Arrow's offsets, the tokens stay where they are), any other
            dataset with `len` and indices (read through once), a mapping of splits, or an iterable of examples, which
            is packed as a stream. Columns: `input_ids`; `labels`, `attention_mask` (its zeros are padding and cut off),
            `assistant_masks` and `completion_mask` (folded into the labels) are used where present, others are not.
        seq_length: tokens in a row.
        tokenizer: its EOS is put behind every document that does not end with it, or with it and a newline, as chat
            templates write it; before anything is cut. None leaves the documents as they are.
        long: what becomes of a document longer than a row: "split", "truncate", "drop" or "error".
        min_piece: shorter pieces are left out and counted; 1 keeps every token.
        seed: orders the rows and decides among pieces of equal length; None keeps the algorithm's order.
        row_multiple: rows are added, as in `PackedDataset`, until their number is a multiple of this; with the number
            of processes times the batch size, no sampler repeats or drops a row.
        pad_document_to: every document is filled up to a multiple of so many tokens, by the tokenizer's padding token
            (or its EOS, or 0), never learned; boundaries are then multiples of it. Context parallelism over n ranks,
            which cuts each document into 2 n equal parts, needs 2 n. `seq_length` must be a multiple.
        pool_size: pieces in the pool, for a stream.
        pool_tokens: tokens in the pool, for a stream, see `PackedStream`.
        sharding: who deals a stream's documents out among DataLoader workers, see `PackedStream`.

    Returns:
        A `PackedDataset`, a dict of them for a mapping of splits, or a `PackedStream` for an iterable and for a torch
        `IterableDataset`, whether it has a length or not.

    Raises:
        TypeError, ValueError: no documents, rows that are packed already, a column that is no flat list of integers or
            has another length than `input_ids` (row and column are named), a bad parameter.

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
    if isinstance(dataset, Mapping):
        _check_splits(dataset)
        options: dict[str, Any] = {"long": long, "min_piece": min_piece, "seed": seed, "row_multiple": row_multiple}
        options |= {"pad_document_to": pad_document_to}
        options |= {"pool_size": pool_size, "pool_tokens": pool_tokens, "sharding": sharding}
        return {name: pack(split, seq_length, tokenizer, **options) for name, split in dataset.items()}
    # transformers writes 1e30 where a tokenizer knows no maximum.
    warn_beyond_window(seq_length, getattr(tokenizer, "model_max_length", None), "tokenizer")
    if not has_rows(dataset):
        _check_stream(dataset, row_multiple)
        return PackedStream(
            dataset,
            seq_length,
            eos_token_id=ending.eos_token_id,
            long=long,
            min_piece=min_piece,
            seed=seed,
            pad_document_to=pad_document_to,
            pad_token_id=ending.pad_token_id,
            newline_token_id=ending.newline_token_id,
            pool_size=pool_size,
            pool_tokens=pool_tokens,
            sharding=sharding,
        )
    documents = documents_of(dataset)
    unused = sorted(set(documents.columns) - set(COLUMNS))
    if unused:
        logger.info("packing leaves out the columns %s", ", ".join(unused))
    packing = best_fit_decreasing(documents.lengths(ending), seq_length, long=long, min_piece=min_piece, seed=seed)
    packed = PackedDataset.__new__(PackedDataset)
    packed._set(documents, packing, ending, *row_order(packing, row_multiple, seed))
    if packed.teaching:
        _warn_of_lost_targets(documents, packing, ending)
    return packed


def _ending(tokenizer: PreTrainedTokenizerBase | None, pad_document_to: int, seq_length: int) -> Ending:
    """Return what is put behind documents, or raise TypeError or ValueError."""
    check_tokenizer(tokenizer)
    eos_token_id = None if tokenizer is None else tokenizer.eos_token_id
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if callable(tokenizer) else ()
    newline_token_id = newline[-1] if newline else None
    return checked_ending(seq_length, eos_token_id, pad_document_to, padding_token(tokenizer), newline_token_id)


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


def _warn_of_lost_targets(documents: Documents, packing: Packing, ending: Ending) -> None:
    """Warn of documents all of whose targets were cut off or dropped; only those that are not kept whole are read."""
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


def _check_plan(documents: Documents, packing: Packing, ending: Ending) -> None:
    if len(documents) != len(packing.document_lengths):
        raise ValueError(
            f"the plan was made for {len(packing.document_lengths)} documents, the dataset has {len(documents)}"
        )
    if not isinstance(documents, ArrowDocuments):
        return  # their lengths would cost a reading of all; each is checked when it is gathered
    differ = np.flatnonzero(documents.lengths(ending) != packing.document_lengths)
    if len(differ):
        raise ValueError(
            f"the plan was made for other documents: {len(differ)} have another length, the first of them is document "
            f"{differ[0]}. Were the EOS of a tokenizer or pad_document_to counted there and not here, or only here?"
        )
