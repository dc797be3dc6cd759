"""Everything that a text has said so far, and the ways to score, choose and take keys of it.

Every key is scored as if it stood at one constant distance D_k from the query, <R(D_k) q, k> with k un-rotated, so that
its place in the text says nothing. `retrieval.py` says what this is for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.lambda_attention import Retrieved, constant_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from hf_longtrunc.attention.lambda_attention import Scoring


class Middle(NamedTuple):
    """Everything that a text has said so far, un-rotated.

    Attributes:
        key: [batch, kv_heads, m, dim], every key as if it stood at position 0.
        value: [batch, kv_heads, m, value_dim].
        positions: of the keys [rows, m], counted from each row's first real token.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


def in_middle(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], num_sink_tokens: int, window: int
) -> Bool[Tensor, "... n m"]:
    """Return whether a key is no sink and at least `window` away, S <= j <= i - window."""
    i, j = query_positions[..., :, None], key_positions[..., None, :]
    return (j >= num_sink_tokens) & (i - j >= window)


class Sight(NamedTuple):
    """How a query sees the middle: at one distance, with the layer's scoring.

    Attributes:
        distance: D_k.
        num_sink_tokens: S, which are left out.
        window: keys that are nearer than this are left out.
        scoring: of the layer.
        first_query: queries before this position see none of it.
        emphasis: how many keys each chosen key counts for.
    """

    distance: int
    num_sink_tokens: int
    window: int
    scoring: Scoring
    first_query: int = 0
    emphasis: float = 1.0


def top_k(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    middle: Middle,
    k: int,
    sight: Sight,
) -> Retrieved:
    """Choose each head's and row's k best keys of the middle; all of them where there are fewer.

    Args:
        query: turned to the distance at which it is to see the middle.
        query_positions: counted from each row's first real token; `rows` is the batch or 1.
        middle: the text, on any device.
        k: keys a head and row.
        sight: distance, sinks, window and scoring.

    Returns:
        On the query's device; logits of -3e38 or so where a row found fewer.
    """
    batch, heads, n, _ = query.shape
    best, index = _middle_scores(query, query_positions, middle, sight).topk(min(k, middle.key.shape[2]), dim=-1)
    dim = middle.value.shape[-1]
    flat = index.reshape(batch, middle.value.shape[1], -1, 1).expand(-1, -1, -1, dim)  # a group's heads together
    value = middle.value.gather(2, flat).view(batch, heads, n, -1, dim)
    return Retrieved(best.to(query.device), value.to(query.device))


def block_mass(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    middle: Middle,
    normalizer: Float[Tensor, "batch heads n"],
    block_size: int,
    sight: Sight,
) -> Float[Tensor, "batch blocks"]:
    """Return the attention that all heads and rows together would pay to each block of the middle.

    Args:
        query: turned to the distance at which it is to see the middle.
        query_positions: counted from each row's first real token; padding has no say.
        middle: the text, on any device.
        normalizer: log-sum-exp of each query's logits with window and sinks.
        block_size: tokens a block; block b begins at position S + b * block_size.
        sight: distance, sinks, window and scoring.
    """
    scores = _middle_scores(query, query_positions, middle, sight)
    normalizer = normalizer.to(scores.device, scores.dtype)[..., None]
    total = torch.logaddexp(normalizer, scores.logsumexp(-1, keepdim=True))
    is_real = (query_positions >= 0).to(scores.device)[:, None, :, None]
    mass = ((scores - total).exp() * is_real).sum((1, 2))  # [batch, m]
    block = ((middle.positions - sight.num_sink_tokens) // block_size).clamp_min(0).expand(mass.shape[0], -1)
    count = -(-middle.key.shape[2] // block_size)
    return mass.new_zeros(mass.shape[0], count).scatter_add(1, block, mass)


def choose_blocks(mass: Float[Tensor, "batch blocks"], count: int) -> Int[Tensor, "batch chosen"]:
    """Return each row's `count` blocks of most mass; -1, which is never seen, where there are fewer with any."""
    best, index = mass.topk(min(count, mass.shape[1]), dim=-1)
    return torch.where(best > 0, index, -1)


def read_blocks(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    middle: Middle,
    chosen: Int[Tensor, "batch blocks"],
    block_size: int,
    sight: Sight,
) -> Retrieved:
    """Return the keys of each row's `chosen` blocks, for every head and query; arguments as for `block_mass`.

    Each counts for `sight.emphasis` keys: log(emphasis) joins its logit.
    """
    device, heads = middle.key.device, query.shape[1]
    first = sight.num_sink_tokens + chosen.to(device) * block_size
    positions = (first[..., None] + torch.arange(block_size, device=device)).flatten(1)  # [batch, k]
    columns = (positions - middle.positions[:, :1]).clamp(0, middle.key.shape[2] - 1)[:, None, :, None]
    key, value = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])).to(query.device) for x in middle[:2])
    part = Middle(key, value, positions.to(query.device))
    group = heads // value.shape[1]
    scores = _middle_scores(query, query_positions, part, sight) + math.log(sight.emphasis)
    return Retrieved(scores, value.repeat_interleave(group, dim=1)[:, :, None])


def _middle_scores(query: Tensor, query_positions: Tensor, middle: Middle, sight: Sight) -> Tensor:
    """Logits [batch, heads, n, m], where the middle is stored; the least number that there is for other keys."""
    device = middle.key.device
    scores = constant_scores(query.to(device), middle.key, sight.distance, sight.scoring)
    i = query_positions.to(device)
    candidates = in_middle(i, middle.positions, sight.num_sink_tokens, sight.window)
    candidates = candidates & (i >= sight.first_query)[..., None]
    return scores.masked_fill(~candidates[:, None], torch.finfo(scores.dtype).min)
