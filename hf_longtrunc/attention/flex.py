"""Λ-attention as one FlexAttention kernel: for prompts on CUDA.

The sinks come before the keys. Their logits are computed apart (n S dot products), and the score modification puts them
in place of the kernel's own; the block mask names, for each block of queries, the sinks' blocks and those
that its windows span. It is built from these indices: the n x n booleans that `create_block_mask` goes through take
128 GiB at 131,072 tokens.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from jaxtyping import Float

    from hf_longtrunc.attention.lambda_attention import LambdaAttention

BLOCK = 128


def flex_attend(call: LambdaAttention, far: tuple[Tensor, Tensor] | None) -> Float[Tensor, "batch heads n value_dim"]:
    """Return the output of `call`.

    Args:
        call: without extra keys.
        far: the sinks' logits [batch, heads, n, S] and values [batch, kv_heads, S, value_dim], None without sinks.
    """
    query, key, value, window = call.query, call.key, call.value, call.law.window_length
    query_positions, key_positions = call.query_positions, call.key_positions
    sinks = 0 if far is None else far[0].shape[-1]
    lead = -(-sinks // BLOCK) * BLOCK  # the sinks fill whole blocks
    if far is not None:
        key = torch.cat([F.pad(key[:, :, :0], (0, 0, lead, 0)), key], dim=2)
        value = torch.cat([F.pad(far[1], (0, 0, 0, lead - sinks)), value], dim=2)
    last = query_positions.shape[0] - 1

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        row = b.clamp_max(last)
        i = query_positions[row, q]
        j = key_positions[row, (kv - lead).clamp_min(0)]
        is_near = (j >= 0) & (j <= i) & (i - j < window) | (i < 0)  # a padding query sees all it is shown: finite
        return ((kv >= lead) & is_near) | ((kv < sinks) & (i - kv >= window))

    def far_scores(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        assert far is not None
        return torch.where(kv < sinks, far[0][b, h, q, kv.clamp_max(sinks - 1)].to(score.dtype), score)

    mask = _block_mask(query.shape[2], key.shape[2] - lead, lead, window, visible, not call.is_padded, query.device)
    output = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=None if far is None else far_scores,
        block_mask=mask,
        scale=call.scoring.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _block_mask(
    n: int, m: int, lead: int, window: int, visible: Any, has_full_blocks: bool, device: torch.device
) -> BlockMask:
    """Blocks of keys for each block of queries: the sinks', then those from its first window's start to its last query.

    Blocks between the two edges are fully visible and need no mask, unless padding moves the edges from row to row.
    """
    starts = torch.arange(0, n, BLOCK, device=device)
    first_query, last_query = starts + m - n, (starts + BLOCK).clamp_max(n) - 1 + m - n
    first_block = (first_query - window + 1).clamp_min(0) // BLOCK
    counts = last_query // BLOCK - first_block + 1
    offsets = torch.arange(int(counts.max()), device=device)
    blocks = first_block[:, None] + offsets  # [query blocks, key blocks]
    is_needed = offsets < counts[:, None]
    is_whole = (blocks * BLOCK + BLOCK - 1 <= first_query[:, None]) & (last_query[:, None] - blocks * BLOCK < window)
    is_whole = is_whole & is_needed & has_full_blocks
    sinks = torch.arange(lead // BLOCK, device=device).expand(len(starts), -1)
    blocks = torch.cat([sinks, blocks + lead // BLOCK], dim=-1)
    is_partial = F.pad(is_needed & ~is_whole, (lead // BLOCK, 0), value=True)
    partial, whole = (
        _select_blocks(blocks, chosen, lead + m) for chosen in (is_partial, F.pad(is_whole, (lead // BLOCK, 0)))
    )
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(n, lead + m))


def _select_blocks(blocks: Tensor, is_chosen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return counts [1, 1, rows] and indices [1, 1, rows, all key blocks] of the chosen blocks, these first."""
    order = (~is_chosen).int().argsort(dim=-1, stable=True)
    total = -(-length // BLOCK)
    indices = blocks.gather(1, order).clamp_max(total - 1)
    indices = F.pad(indices, (0, max(0, total - indices.shape[1])))[:, :total]
    return is_chosen.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None].contiguous()


@lru_cache
def _kernel(device_type: str) -> Any:
    """Return the compiled kernel; on a CPU the plain definition, slow and good for tests."""
    return _plain_kernel if device_type == "cpu" else torch.compile(flex_attention, dynamic=True)


def _plain_kernel(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():  # PyTorch warns that it is slow
        warnings.simplefilter("ignore", UserWarning)
        return flex_attention(*args, **kwargs)
