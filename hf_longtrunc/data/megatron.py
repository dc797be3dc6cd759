"""Megatron-LM's indexed datasets, which NeMo reads too: `<prefix>.bin` holds tokens, `<prefix>.idx` where they are.

The index, little-endian: the magic bytes, version 1 (u64), a code of the tokens' type (u8), the number of sequences and
of document bounds (u64 each), the tokens of every sequence (i32), where it begins in the .bin in bytes (i64), and the
first sequence of every document, ending with the number of sequences (i64).
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.data.writing import import_datasets, token_blocks
from hf_longtrunc.saving import placing

if TYPE_CHECKING:
    import os

    import datasets

    from hf_longtrunc.data.dataset import PackedDataset

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FORMAT = "Megatron's format"


def read_megatron(prefix: str | os.PathLike[str]) -> datasets.Dataset:
    """Return the documents of `<prefix>.bin` and `<prefix>.idx` as `input_ids`, mapped from the file and not copied.

    Raises:
        FileNotFoundError: one of the files is missing.
        TypeError, ValueError: the prefix is no path; the index is none, is damaged, or speaks of sequences that do not
            lie one after another.
    """
    import pyarrow as pa

    library = import_datasets("read_megatron")
    paths = _paths(prefix)
    tokens, sizes, begins, firsts = _read(*paths)
    ends = np.append(0, np.cumsum(sizes, dtype=np.int64))
    if not np.array_equal(begins, ends[:-1] * tokens.itemsize) or ends[-1] > len(tokens):
        raise ValueError(f"{prefix}.idx speaks of sequences that do not lie one after another in {prefix}.bin")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(tokens.dtype), len(tokens), [None, pa.py_buffer(tokens)])
    lists = pa.LargeListArray.from_arrays(pa.array(ends[firsts]), values)
    table = library.table.InMemoryTable(pa.table({"input_ids": lists}))
    # datasets itself would hash, and for that copy, all tokens.
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    fingerprint = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    documents: datasets.Dataset = library.Dataset(table, fingerprint=fingerprint)
    return documents


def write_megatron(rows: PackedDataset, prefix: str | os.PathLike[str]) -> None:
    """Write packed rows as `<prefix>.bin` and `<prefix>.idx`: a row is a document, its pieces are the sequences in it.

    Tokens are uint16 if all are below 65,500, as Megatron does for small vocabularies, else int32. Labels cannot be
    written. The index, without which the tokens are nothing, comes last. Nothing is overwritten: no two files can be
    replaced at once, and new tokens under an old index would be read as they come.

    Raises:
        FileExistsError: one of the files is there, or another process has written it meanwhile.
        TypeError, ValueError: the rows are no `PackedDataset`, the prefix is no path, the documents have labels or
            masks, or a token is more than int32 holds.
    """
    idx_at, bin_at = _paths(prefix)
    with placing(bin_at, idx_at) as (tokens, index):
        highest = max((int(part.input_ids.max(initial=0)) for part in token_blocks(rows, _FORMAT)), default=0)
        if highest >= 2**31:
            raise ValueError(f"token {highest} is more than int32 holds")
        code = 8 if highest < 65_500 else 4
        bin_at.parent.mkdir(parents=True, exist_ok=True)
        sizes, pieces = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        with tokens.open("wb") as file:
            for part in token_blocks(rows, _FORMAT):
                file.write(part.input_ids.astype(_TYPES[code]).tobytes())
                sizes.append(part.piece_lengths)
                pieces.append(part.pieces)
        lengths, firsts = np.concatenate(sizes), np.append(0, np.cumsum(np.concatenate(pieces)))
        begins = (np.cumsum(lengths) - lengths) * np.dtype(_TYPES[code]).itemsize
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(firsts))
        arrays = lengths.astype("<i4"), begins.astype("<i8"), firsts.astype("<i8")
        index.write_bytes(header + b"".join(array.tobytes() for array in arrays))


def _paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return where the index and the tokens lie."""
    path = Path(prefix)  # None is no path
    if not path.name:
        raise ValueError(f"prefix must end with the files' name, such as folder/rows, got {str(prefix)!r}")
    return path.with_name(f"{path.name}.idx"), path.with_name(f"{path.name}.bin")


def _read(idx: Path, bin_: Path) -> tuple[Any, Any, Any, Any]:
    for path in (idx, bin_):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: Megatron's datasets are a .bin and an .idx beside it")
    data = idx.read_bytes()
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise ValueError(f"{idx} is no index of Megatron's (it does not begin with {_MAGIC!r})")
    _, version, code, sequences, bounds = _HEADER.unpack_from(data)
    if version != 1 or code not in _TYPES:
        raise ValueError(f"{idx} has version {version} and type {code}, expected version 1 and integer tokens")
    if len(data) < _HEADER.size + 12 * sequences + 8 * bounds:
        raise ValueError(f"{idx} is damaged: it is too short for {sequences} sequences and {bounds} documents")
    sizes = np.frombuffer(data, "<i4", sequences, _HEADER.size)
    begins = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    firsts = np.frombuffer(data, "<i8", bounds, _HEADER.size + 12 * sequences)
    if not bounds or firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        raise ValueError(f"{idx} is damaged: its documents do not cover its {sequences} sequences")
    size = bin_.stat().st_size
    if size % np.dtype(_TYPES[code]).itemsize:
        raise ValueError(f"{bin_} is damaged: its {size} bytes are no whole number of {_TYPES[code].__name__} tokens")
    tokens = np.memmap(bin_, _TYPES[code], "r") if size else np.empty(0, _TYPES[code])
    return tokens, sizes, begins, firsts
