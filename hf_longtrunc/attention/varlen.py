"""Λ-attention by PyTorch's attention for rows of unlike length: for prompts on CUDA, in half precision.

The kernel takes the window and says the log-sum-exp of its logits. The old sinks' logits, computed beside (n S dot
products), join that softmax afterwards. Columns before a row's first token become a row of their own, so that padding
needs no mask. No gradients: the kernel drops those of its log-sum-exp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn  # newer than the oldest torch that is declared

from hf_longtrunc.attention.joined import per_group

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_DTYPES = (torch.float16, torch.bfloat16)  # of the kernel


def varlen_lambda_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    query_positions: Int[Tensor, "rows n"],
    key_positions: Int[Tensor, "rows m"],
    far: tuple[Tensor, Tensor] | None,
    window: int,
    scaling: float,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend as `lambda_attention` does.

    Args:
        query: rotated at its own positions.
        key: likewise, in the order of the text and ending with the queries' own.
        value: of the keys.
        query_positions: counted from each row's first real token.
        key_positions: likewise.
        far: the sinks' logits [batch, heads, n, S] and values [batch, kv_heads, S, value_dim], None without sinks.
        window: L.
        scaling: of the dot products; `far` has it already.

    Raises:
        ValueError: queries, keys or values of another dtype than float16 or bfloat16, or not of one.
    """
    dtypes = {query.dtype, key.dtype, value.dtype}
    if len(dtypes) > 1 or query.dtype not in _DTYPES:
        raise ValueError(
            f"path 'varlen' is for float16 or bfloat16 alone, got {', '.join(sorted(map(str, dtypes)))}: use 'auto'"
        )
    output, lse = _window_attention(query, key, value, query_positions, key_positions, window, scaling)
    if far is None:
        return output
    sinks = torch.arange(far[0].shape[-1], device=query.device)
    is_near = query_positions[:, None, :, None] - sinks < window
    scores = far[0].float().masked_fill(is_near, -torch.inf)
    total = torch.logaddexp(lse, scores.logsumexp(-1))[..., None]
    weights = (scores - total).exp()
    return (output * (lse[..., None] - total).exp() + per_group(weights, far[1].float())).to(query.dtype)


def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Return the output [batch, heads, n, value_dim] and the log-sum-exp [batch, heads, n] of a plain window."""
    batch, heads, n, dim = query.shape
    width = value.shape[-1]
    wide = -(-max(dim, width) // 8) * 8  # the kernel wants one width, in eights

    def packed(x: Tensor) -> Tensor:
        return F.pad(x, (0, wide - x.shape[-1])).transpose(1, 2).flatten(0, 1)  # [batch * columns, heads, wide]

    output, lse = varlen_attn(
        packed(query),
        packed(key),
        packed(value),
        _row_ends(query_positions, batch),
        _row_ends(key_positions, batch),
        n,
        key.shape[2],
        return_aux=AuxRequest(lse=True),
        scale=scaling,
        window_size=(window - 1, 0),
        enable_gqa=heads != key.shape[1],
    )
    output = output[..., :width].unflatten(0, (batch, n)).transpose(1, 2)
    return output, lse.unflatten(1, (batch, n)).transpose(0, 1)


def _row_ends(positions: Tensor, batch: int) -> Tensor:
    """Where rows of all columns end to end begin and end [2 * batch + 1]: each row's padding, then its tokens."""
    n = positions.shape[1]
    starts = torch.arange(batch, device=positions.device)[:, None] * n
    padding = (-positions[:, :1]).clamp(0, n).expand(batch, -1)
    return F.pad(torch.cat([starts, starts + padding], dim=1).flatten(), (0, 1), value=batch * n).int()
