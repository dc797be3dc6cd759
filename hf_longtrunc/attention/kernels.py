"""Attention calls that every technique shares: how a pair becomes a logit, and one softmax over masked keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int

    from hf_longtrunc.attention.rope import Rotation


class Scoring(NamedTuple):
    """How a layer makes a logit of a query and a key: scaling * <q, k>, soft-capped, minus slope * distance.

    Attributes:
        scaling: factor of the dot product.
        softcap: c in c * tanh(score / c), or None.
        slopes: ALiBi's slope of each query head [heads], or None.
        null_logits: a learned logit of each query head [heads] that joins the softmax and carries no value, or None.
        dropout: probability that an attention weight is dropped.
        rotation: of queries and keys; None for layers without rotary positions.
    """

    scaling: float
    softcap: float | None = None
    slopes: Tensor | None = None
    null_logits: Tensor | None = None
    dropout: float = 0.0
    rotation: Rotation | None = None

    @property
    def is_plain(self) -> bool:
        """Whether an ordinary attention kernel computes it."""
        return self.softcap is None and self.slopes is None and self.null_logits is None

    def rotate(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rotate x [batch, heads, n, dim] by offsets [rows, n] positions, where anything rotates."""
        return x if self.rotation is None else self.rotation.rotate(x, offsets)


class ExtraKeys(NamedTuple):
    """Keys of their own for each head and query, which join the softmax.

    Attributes:
        scores: logits [batch, heads, n, k]; the dtype's least number for a key that is not visible.
        value: [batch, heads, n, k, value_dim], or [batch, heads, 1, k, value_dim] where all queries share them.
    """

    scores: Tensor
    value: Tensor


def single_query_attention(
    query: Float[Tensor, "batch heads 1 dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    distances: Int[Tensor, "rows m"],
    seen: Bool[Tensor, "rows m"] | None,
    scoring: Scoring,
    read: Callable[[Tensor], ExtraKeys | None] | None = None,
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """Attend with one query a row over keys in any order that are already rotated to their distances.

    One ordinary attention call: the heads of a group become the queries of their key head. Every query must see a key;
    `seen` is None where it sees them all, which lets any kernel serve.
    """
    seen = None if seen is None else seen[:, None]
    if read is None and scoring.softcap is None and scoring.slopes is None and scoring.null_logits is None:
        batch, heads, _, dim = query.shape
        width = value.shape[-1]
        wide = max(dim, width)
        mask = None if seen is None else seen[:, None]
        grouped = query.reshape(batch, key.shape[1], -1, dim)
        # `pad` copies even where there is nothing to pad: the whole cache for every token that is decoded.
        if dim != wide:
            grouped, key = F.pad(grouped, (0, wide - dim)), F.pad(key, (0, wide - dim))
        if width != wide:
            value = F.pad(value, (0, wide - width))
        dropout, scale = scoring.dropout, scoring.scaling
        output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale)
        return output[..., :width].reshape(batch, heads, 1, -1)
    bias = None if scoring.slopes is None else alibi_bias(scoring.slopes, distances[:, None], query)
    return eager_attention(query, key, value, seen, scoring, None, bias, read)


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scoring: Scoring,
    far: Tensor | None,
    bias: Tensor | None,
    read: Callable[[Tensor], ExtraKeys | None] | None,
) -> Tensor:
    """One softmax over S far logits [batch, heads, n, S], where there are any, m keys, and extra keys.

    `value` [batch, kv_heads, S + m, value_dim] and `seen` [rows, n, S + m] begin with the far set; `bias` joins the
    scores of the m keys.
    """
    scores = soft_capped(grouped_scores(query, key) * scoring.scaling, scoring.softcap)
    scores = scores if bias is None else scores + bias
    scores = scores if far is None else torch.cat([far, scores], dim=-1)
    scores = scores if seen is None else scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    extra = None if read is None else read(scores)
    if extra is not None:
        scores = torch.cat([scores, extra.scores], dim=-1)
    count = scores.shape[-1]
    if scoring.null_logits is not None:
        null = scoring.null_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, null], dim=-1)
    weights = scores.softmax(-1)[..., :count].to(value.dtype)
    weights = F.dropout(weights, scoring.dropout) if scoring.dropout else weights
    m = value.shape[2]
    output = grouped_matmul(weights[..., :m], value)
    if extra is not None:
        output = output + (weights[..., None, m:] @ extra.value.to(weights.dtype))[..., 0, :]
    return output


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scoring: Scoring, far: Tensor | None
) -> Tensor:
    """`eager_attention` of plain scores by PyTorch's kernel."""
    batch, heads, n, value_dim = *query.shape[:3], value.shape[-1]
    if far is not None:
        query, key = _with_far_dimensions(query, key, far / scoring.scaling)
    dim = max(query.shape[-1], value_dim)
    query, key, value = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (query, key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if seen is None else seen[:, None],
        dropout_p=scoring.dropout,
        scale=scoring.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[..., :value_dim].reshape(batch, heads, n, value_dim)


def _with_far_dimensions(query: Tensor, key: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Let any attention kernel add the far logits: as dot products over dimensions of their own.

    Query [q, far] meets key [k, 0] of the local set and key [0, identity] of the far set, so the mask stays a boolean
    that all heads share. In half precision the logits are held as a rounded value and its remainder, 16 bits or more.
    """
    parts = [far.to(query.dtype)]
    if query.dtype in (torch.float16, torch.bfloat16):
        parts.append((far - parts[0]).to(query.dtype))
    sinks = far.shape[-1]
    identity = torch.eye(sinks, dtype=key.dtype, device=key.device).repeat(1, len(parts))  # [S, parts * S]
    far_key = F.pad(identity, (key.shape[-1], 0)).expand(*key.shape[:2], -1, -1)
    return torch.cat([query, *parts], dim=-1), torch.cat([far_key, F.pad(key, (0, identity.shape[-1]))], dim=2)


def alibi_bias(slopes: Tensor, distances: Tensor, query: Tensor) -> Tensor:
    """ALiBi's part of the logits [rows, heads, n, m] at distances [rows, n, m]."""
    return -slopes.to(query.device, torch.promote_types(query.dtype, torch.float32))[:, None, None] * distances[:, None]


def grouped_scores(
    query: Float[Tensor, "batch heads n dim"], key: Float[Tensor, "batch kv_heads m dim"]
) -> Float[Tensor, "batch heads n m"]:
    """Return the dot products, in fp32 or better, of each query head with its group's key head."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return grouped_matmul(query.to(wide), key.to(wide).transpose(-1, -2))


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Return c * tanh(score / c); the scores where there is no cap c."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def grouped_matmul(x: Float[Tensor, "batch heads n k"], y: Float[Tensor, "batch kv_heads k m"]) -> Tensor:
    """Return x times its group's y [batch, heads, n, m]."""
    batch, heads, n, k = x.shape
    return (x.reshape(batch, y.shape[1], -1, k) @ y).view(batch, heads, n, y.shape[-1])
