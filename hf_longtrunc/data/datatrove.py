"""Write datatrove's token files, for nanotron: rows of one length in `<path>`, document ends in `<path>.index`.

Tokens are uint16 or uint32, little-endian; the index holds the end of each document, in tokens, as uint64.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.data.writing import token_blocks
from hf_longtrunc.saving import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import BinaryIO

    from hf_longtrunc.data.dataset import PackedDataset
    from hf_longtrunc.data.documents import FlatRows, Tokens


def write_datatrove(
    rows: PackedDataset,
    path: str | os.PathLike[str],
    *,
    pad_token_id: int,
    dtype: Literal["uint16", "uint32"] = "uint16",
) -> None:
    """Write packed rows as `<path>` (its name should end with .ds) and `<path>.index`.

    Each row is padded to `seq_length` with `pad_token_id`; the padding is a document of its own. datatrove reads one
    token more than `seq_len`, for the labels: read with `seq_len = seq_length - 1` and `return_positions=True`. The
    format has no labels: a trainer learns the first token of each document, from the token before it, and the padding.
    Existing files are not overwritten, as two files cannot be replaced at once.

    Args:
        rows: of a dataset without labels and masks.
        path: of the tokens.
        pad_token_id: such as EOS.
        dtype: of the tokens (token size 2 or 4 in datatrove and nanotron).

    Raises:
        FileExistsError: one of the files exists, or another process wrote it meanwhile.
        TypeError, ValueError: a bad argument, rows that are no `PackedDataset`, documents with labels or masks, a token
            too large for `dtype`.

    Examples:
        >>> import os, tempfile
        >>> rows = pack([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}], 8)
        >>> path = os.path.join(tempfile.mkdtemp(), "rows.ds")
        >>> write_datatrove(rows, path, pad_token_id=0)
        >>> np.fromfile(path, np.uint16).tolist(), np.fromfile(path + ".index", np.uint64).tolist()
        ([5, 6, 7, 8, 9, 0, 0, 0], [3, 5, 8])
    """
    tokens_at, index_at = Path(path), Path(f"{path}.index")
    most = int(np.iinfo(check_choice("dtype", dtype, ("uint16", "uint32"))).max)
    pad_token_id = check_int("pad_token_id", pad_token_id, minimum=0, maximum=most)
    blocks = token_blocks(rows, "datatrove's format")
    with (
        replacing(tokens_at, overwrite=False) as new_tokens,
        replacing(index_at, overwrite=False) as new_index,  # named first: tokens without an index are no data set
        new_tokens.open("wb") as tokens,
        new_index.open("wb") as index,
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
    """Return the ends of pieces and rows if each row has `seq_length` tokens."""
    row = np.repeat(np.arange(len(block.tokens)), block.pieces)
    before = np.cumsum(block.tokens) - block.tokens
    pieces = np.cumsum(block.piece_lengths) - before[row] + row * seq_length
    ends: Tokens = np.union1d(pieces, np.arange(1, len(block.tokens) + 1) * seq_length)
    return ends
