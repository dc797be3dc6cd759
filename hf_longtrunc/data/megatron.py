"""Read and write indexed datasets of Megatron-LM and NeMo: tokens in `<prefix>.bin`, their places in `<prefix>.idx`.

The index, little-endian: the magic bytes, version 1 (u64), a code of the tokens' type (u8), the number of sequences and
of document bounds (u64 each), the tokens of every sequence (i32), where it begins in the .bin in bytes (i64), and the
first sequence of every document, ending with the number of sequences (i64).
"""

from __future__ import annotations

import hashlib
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.arguments import check_int
from hf_longtrunc.data.writing import token_blocks
from hf_longtrunc.extras import import_extra
from hf_longtrunc.saving import replacing

if TYPE_CHECKING:
    import os

    import datasets

    from hf_longtrunc.data.dataset import PackedDataset
    from hf_longtrunc.data.documents import FlatRows

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_FORMAT = "Megatron's format"


def read_megatron(prefix: str | os.PathLike[str]) -> datasets.Dataset:
    """Return the documents of `<prefix>.bin` and `<prefix>.idx` as `input_ids`, memory-mapped and not copied.

    Raises:
        FileNotFoundError: one of the files is missing.
        TypeError, ValueError: the prefix is no path; the index is damaged, of another format, or its sequences are not
            contiguous.

    Examples:
        >>> import tempfile
        >>> prefix = Path(tempfile.mkdtemp(), "rows")
        >>> write_megatron(pack([{"input_ids": [5, 6, 7]}], 4), prefix, pad_token_id=0)
        >>> read_megatron(prefix)[0]
        {'input_ids': [5, 6, 7, 0]}
    """
    import pyarrow as pa

    library = import_extra("datasets", "read_megatron", "train")
    paths = _paths(prefix)
    tokens, sizes, begins, firsts = _read(*paths)
    ends = np.append(0, np.cumsum(sizes, dtype=np.int64))
    if (sizes < 0).any() or not np.array_equal(begins, ends[:-1] * tokens.itemsize) or ends[-1] > len(tokens):
        raise ValueError(f"{prefix}.idx speaks of sequences that do not lie one after another in {prefix}.bin")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(tokens.dtype), len(tokens), [None, pa.py_buffer(tokens)])
    lists = pa.LargeListArray.from_arrays(pa.array(ends[firsts]), values)
    table = library.table.InMemoryTable(pa.table({"input_ids": lists}))
    # datasets itself would hash, and for that copy, all tokens.
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    fingerprint = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    documents: datasets.Dataset = library.Dataset(table, fingerprint=fingerprint)
    return documents


def write_megatron(rows: PackedDataset, prefix: str | os.PathLike[str], *, pad_token_id: int = -1) -> None:
    """Write packed rows as `<prefix>.bin` and `<prefix>.idx`: Megatron's GPTDataset reads each row as one sample.

    Each row is one sequence of `seq_length` tokens, padding included. GPTDataset returns the rows unchanged with
    `sequence_length=seq_length` and `add_extra_token_to_sequence=False`. It separates documents at their EOD token:
    enable `reset_position_ids`, `reset_attention_mask` and `eod_mask_loss`.

    Tokens are uint16 if all are below 65,500 and padding is not negative, else int32. The format has no labels. The
    index is written last. Existing files are not overwritten, as two files cannot be replaced at once.

    Args:
        rows: of a dataset without labels and masks, packed with a tokenizer; its EOS must be Megatron's EOD.
        prefix: of the two files.
        pad_token_id: the `pad` of Megatron's tokenizer, which it never learns; -1 if it has none or uses EOS.

    Raises:
        FileExistsError: one of the files exists, or another process wrote it meanwhile.
        TypeError, ValueError: rows that are no `PackedDataset`; documents with labels or masks; a document without EOS
            that another one follows in its row; a token equal to the padding token, or too large for int32.

    Warns of an EOS inside a document: Megatron starts a new document after it.

    Examples:
        >>> import tempfile
        >>> rows = pack([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], 5)
        >>> write_megatron(rows, Path(tempfile.mkdtemp(), "rows"))
        Traceback (most recent call last):
        ValueError: Megatron tells documents apart by the EOS at their ends...
    """
    idx_at, bin_at = _paths(prefix)
    pad_token_id = check_int("pad_token_id", pad_token_id, minimum=-1, maximum=2**31 - 1)
    with replacing(idx_at, overwrite=False) as index, replacing(bin_at, overwrite=False) as tokens:
        blocks, eos_token_id = token_blocks(rows, _FORMAT), rows.ending.eos_token_id
        highest, inside = pad_token_id, 0
        for part in blocks:
            highest = max(highest, int(part.input_ids.max(initial=0)))
            inside += _check_ends(part, eos_token_id, pad_token_id)
        if highest >= 2**31:
            raise ValueError(f"token {highest} is more than int32 holds")
        if inside:
            warnings.warn(
                f"EOS ({eos_token_id}) lies {inside} times inside a document, as in chats of several turns: "
                "Megatron tells documents apart by it, and begins one behind each",
                stacklevel=2,
            )
        code, seq_length = 8 if pad_token_id >= 0 and highest < 65_500 else 4, rows.packing.seq_length
        with tokens.open("wb") as file:
            for part in token_blocks(rows, _FORMAT):
                file.write(part.padded(seq_length, pad_token_id, np.dtype(_TYPES[code])).tobytes())
        lengths, firsts = np.full(len(rows), seq_length, "<i4"), np.arange(len(rows) + 1, dtype="<i8")
        begins = firsts[:-1] * (seq_length * np.dtype(_TYPES[code]).itemsize)
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(firsts))
        index.write_bytes(header + b"".join(array.tobytes() for array in (lengths, begins, firsts)))


def _check_ends(rows: FlatRows, eos_token_id: int | None, pad_token_id: int) -> int:
    """Return the number of EOS inside pieces; ValueError if one before a row's last ends with another token."""
    ends = np.cumsum(rows.piece_lengths)
    is_followed = np.ones(len(ends), np.bool_)
    is_followed[np.cumsum(rows.pieces)[rows.pieces > 0] - 1] = False
    ends_with_eos = rows.input_ids[ends - 1] == (-1 if eos_token_id is None else eos_token_id)
    if (wrong := is_followed & ~ends_with_eos).any():
        end = rows.input_ids[ends[wrong.argmax()] - 1]
        raise ValueError(
            "Megatron tells documents apart by the EOS at their ends, and a document that another follows ends with "
            f"{end}: give pack() the tokenizer, whose EOS it puts there, got {eos_token_id}. Leave out a newline "
            "that a chat template writes behind the last EOS"
        )
    if (rows.input_ids == pad_token_id).any():
        raise ValueError(
            f"pad_token_id must be no token of the documents, which Megatron would not learn, got {pad_token_id}; "
            "take another one, or -1 where Megatron's tokenizer has no padding token of its own"
        )
    return 0 if eos_token_id is None else int((rows.input_ids == eos_token_id).sum() - ends_with_eos.sum())


def _paths(prefix: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the paths of index and tokens."""
    path = Path(prefix)
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
