"""Attention calls that every technique shares: logits of pairs, and one softmax over masked keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float

    from hf_longtrunc.attention.rope import Rotation


class Scoring(NamedTuple):
    """How a layer computes the logit of a query and a key: scaling * <q, k>, soft-capped, minus slope * distance."""

    scaling: float
    softcap: float | None = None  # c in c * tanh(score / c)
    slopes: Tensor | None = None  # ALiBi's, of each query head [heads]
    null_logits: Tensor | None = None  # of each query head [heads], learned: they join the softmax without a value
    dropout: float = 0.0  # probability that an attention weight is dropped
    rotation: Rotation | None = None  # of queries and keys; None for layers without rotary positions

    @property
    def is_plain(self) -> bool:
        """Whether an ordinary attention kernel computes it."""
        return self.softcap is None and self.slopes is None and self.null_logits is None

    def scores(self, products: Tensor) -> Tensor:
        """Return the logits of dot products: scaled and soft-capped, without bias."""
        scores = products * self.scaling
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def rotate(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rotate x [batch, heads, n, dim] by offsets [rows, n] positions, where anything rotates."""
        return x if self.rotation is None else self.rotation.rotate(x, offsets)


class ExtraKeys(NamedTuple):
    """Keys of each head and query that join the softmax."""

    scores: Tensor  # logits [batch, heads, n, k]; the dtype's least number for a key that is not visible
    value: Tensor  # [batch, heads, n, k, value_dim], or [batch, heads, 1, k, value_dim] if all queries share them


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
    """Attend to the sinks by S far logits [batch, heads, n, S], to m keys and to extra keys, in one softmax.

    `value` [batch, kv_heads, S + m, value_dim] and `seen` [rows, n, S + m] begin with the far set; `bias` joins the
    scores of the m keys.
    """
    scores = scoring.scores(grouped_scores(query, key))
    scores = scores if bias is None else scores + bias
    scores = scores if far is None else torch.cat([far, scores], dim=-1)
    scores = scores if seen is None else scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    extra = None if read is None else read(scores)
    if extra is not None:
        scores = torch.cat([scores, extra.scores], dim=-1)
    weights = softmax_weights(scores, scoring).to(value.dtype)
    weights = F.dropout(weights, scoring.dropout) if scoring.dropout else weights
    m = value.shape[2]
    output = grouped_matmul(weights[..., :m], value)
    if extra is not None:
        output = output + (weights[..., None, m:] @ extra.value.to(weights.dtype))[..., 0, :]
    return output


def softmax_weights(scores: Tensor, scoring: Scoring) -> Tensor:
    """Return the attention weights of logits [batch, heads, n, k]; null logits join the softmax."""
    if scoring.null_logits is None:
        return scores.softmax(-1)
    null = scoring.null_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, null], dim=-1).softmax(-1)[..., :-1]


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scoring: Scoring, far: Tensor | None
) -> Tensor:
    """Attend as `eager_attention` does, with plain scores, by PyTorch's kernel."""
    batch, heads, n, value_dim = *query.shape[:3], value.shape[-1]
    if far is not None:
        query, key = _with_far_keys(query, key, far / scoring.scaling)
    dim = max(query.shape[-1], value_dim)
    # `pad` would copy even where there is nothing to pad: the whole cache for every decoded token.
    if query.shape[-1] < dim:
        query, key = F.pad(query, (0, dim - query.shape[-1])), F.pad(key, (0, dim - key.shape[-1]))
    if value_dim < dim:
        value = F.pad(value, (0, dim - value_dim))
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


def _with_far_keys(query: Tensor, key: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
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


def grouped_matmul(x: Float[Tensor, "batch heads n k"], y: Float[Tensor, "batch kv_heads k m"]) -> Tensor:
    """Return x times its group's y [batch, heads, n, m]."""
    batch, heads, n, k = x.shape
    return (x.reshape(batch, y.shape[1], -1, k) @ y).view(batch, heads, n, y.shape[-1])
