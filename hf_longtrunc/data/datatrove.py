"""datatrove's files of tokens, which nanotron trains from: rows of one length in `<path>`, ends in `<path>.index`.

Tokens are uint16 or uint32, little-endian; the index holds where every document ends, in tokens, as uint64.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.data.writing import token_blocks
from hf_longtrunc.saving import placing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import BinaryIO

    from hf_longtrunc.data.dataset import FlatRows, PackedDataset
    from hf_longtrunc.data.documents import Tokens


def write_datatrove(
    rows: PackedDataset,
    path: str | os.PathLike[str],
    *,
    pad_token_id: int,
    dtype: Literal["uint16", "uint32"] = "uint16",
) -> None:
    """Write packed rows as `<path>` (its name should end with .ds) and `<path>.index`.

    Rows lie one after another, filled up with `pad_token_id` to their `seq_length`; padding is a document of its own.
    datatrove reads one token more than it is told, for the labels: read these with `seq_len = seq_length - 1` and
    `return_positions=True`. The format has no labels: who reads it learns the first token of every document, from the
    one before it, and the padding. Nothing is overwritten, for two files cannot be replaced at once.

    Args:
        rows: of a dataset without labels and masks.
        path: of the tokens.
        pad_token_id: fills rows up, such as EOS.
        dtype: of the tokens; datatrove and nanotron call it a token size of 2 or 4.

    Raises:
        FileExistsError: one of the files is there, or another process has written it meanwhile.
        TypeError, ValueError: a bad argument, rows that are no `PackedDataset`, documents with labels or masks, a token
            that takes more bytes.
    """
    tokens_at, index_at = Path(path), Path(f"{path}.index")
    most = int(np.iinfo(check_choice("dtype", dtype, ("uint16", "uint32"))).max)
    pad_token_id = check_int("pad_token_id", pad_token_id, minimum=0, maximum=most)
    blocks = token_blocks(rows, "datatrove's format")
    with (
        placing(index_at, tokens_at) as (index_beside, tokens_beside),  # tokens without the index are no data set
        tokens_beside.open("wb") as tokens,
        index_beside.open("wb") as index,
    ):
        _write(blocks, rows.packing.seq_length, pad_token_id, dtype, tokens, index)


def _write(
    blocks: Iterator[FlatRows], seq_length: int, pad_token_id: int, dtype: str, tokens: BinaryIO, index: BinaryIO
) -> None:
    num_rows, most = 0, np.iinfo(dtype).max
    for block in blocks:
        if block.input_ids.max(initial=0) > most:
            raise ValueError(f'token {block.input_ids.max()} is more than {dtype} holds; dtype="uint32" is more')
        tokens.write(block.padded(seq_length, pad_token_id, np.dtype(dtype)).tobytes())
        index.write((num_rows * seq_length + _ends(block, seq_length)).astype("<u8").tobytes())
        num_rows += len(block.tokens)


def _ends(block: FlatRows, seq_length: int) -> Tokens:
    """Return where pieces and rows end when every row takes `seq_length` tokens."""
    row = np.repeat(np.arange(len(block.tokens)), block.pieces)
    before = np.cumsum(block.tokens) - block.tokens
    pieces = np.cumsum(block.piece_lengths) - before[row] + row * seq_length
    ends: Tokens = np.union1d(pieces, np.arange(1, len(block.tokens) + 1) * seq_length)
    return ends
