"""Everything that a text has said so far, and the ways to score, choose and take keys of it.

Every key is scored as if it stood at one constant distance D_k from the query, <R(D_k) q, k> with k un-rotated, so that
its place in the text says nothing. `retrieval.py` says what this is for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.lambda_attention import Retrieved, constant_scores

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """

    distance: int
    num_sink_tokens: int
    window: int
    scoring: Scoring
    first_query: int = 0


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
    groups: Bool[Tensor, "groups rows n"],
) -> Float[Tensor, "batch heads groups blocks"]:
    """Return the attention that each head and a group's rows would pay to each block of the middle.

    Args:
        query: turned to the distance at which it is to see the middle.
        query_positions: counted from each row's first real token; padding has no say.
        middle: the text, on any device.
        normalizer: log-sum-exp of each query's logits with window and sinks.
        block_size: tokens a block; block b begins at position S + b * block_size.
        sight: distance, sinks, window and scoring.
        groups: which queries belong to each group.

    Returns:
        [batch, heads, groups, blocks]: the sum over a group's queries.
    """
    scores = _middle_scores(query, query_positions, middle, sight)
    normalizer = normalizer.to(scores.device, scores.dtype)[..., None]
    total = torch.logaddexp(normalizer, scores.logsumexp(-1, keepdim=True))
    counted = (groups & (query_positions >= 0)).to(scores.device, scores.dtype).transpose(0, 1)
    mass = counted[:, None] @ (scores - total).exp()  # [batch, heads, groups, m]
    block = ((middle.positions - sight.num_sink_tokens) // block_size).clamp_min(0)[:, None, None].expand(mass.shape)
    count = -(-middle.key.shape[2] // block_size)
    return mass.new_zeros(*mass.shape[:3], count).scatter_add(3, block, mass)


class Choice(NamedTuple):
    """What each row of a batch reads.

    Attributes:
        blocks: of the middle [batch, blocks], the best first; -1, which is never seen, where there are fewer.
        emphasis: how many keys each key of a block counts for [batch, blocks].
    """

    blocks: Tensor
    emphasis: Tensor


def choose_blocks(
    vote: Float[Tensor, "batch heads blocks"],
    background: Float[Tensor, "batch heads blocks"],
    count: int,
    emphasis: float,
    least: float,
    total: Callable[[Tensor], Tensor],
) -> Choice:
    """Choose each row's `count` best blocks.

    Where there is no background the blocks of most votes are the best, and all get `emphasis`. Elsewhere each head says
    how many times as much attention v it pays to a block as it pays it anyway, v / (b + mean b + mean of all heads' b),
    and a block is worth the root of the mean of their squares: few heads look for what is asked, and those count.
    Blocks that are worth less than `least` are not read. The best gets the square of its worth, 1 to `emphasis`, and
    the others as much less as the square of theirs is smaller.

    Args:
        vote: attention that a voting row pays to each block, of all heads of all layers that vote.
        background: attention that a row before them pays to each; 0 everywhere where there are no such rows.
        count: how many blocks.
        emphasis: the most keys that a key counts for.
        least: worth of a block that is read.
        total: returns the sum over the ranks that share the heads.
    """
    tiny = torch.finfo(vote.dtype).tiny
    heads = total(vote.new_full((1,), vote.shape[1]))
    usual = background.sum(-1, keepdim=True) / (background > 0).sum(-1, keepdim=True).clamp_min(1)
    common = total(usual.sum(1)) / heads  # [batch, 1]
    has_background = common > 0
    anyway = (background + usual + common[:, None]).clamp_min(tiny)
    contrast = (total((vote / anyway).square().sum(1)) / heads).sqrt()
    worth = torch.where(has_background, contrast, total(vote.sum(1)))
    best, index = worth.topk(min(count, worth.shape[1]), dim=-1)
    is_read = (best > 0) & (~has_background | (best >= least))
    first = best[:, :1]
    shared = first.square().clamp(1, emphasis) * (best / first.clamp_min(tiny)).square()
    given = torch.where(has_background, shared.clamp_min(1), emphasis)
    return Choice(torch.where(is_read, index, -1), given)


def read_blocks(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    middle: Middle,
    choice: Choice,
    block_size: int,
    margin: int,
    sight: Sight,
) -> Retrieved:
    """Return the keys of each row's chosen blocks, for every head and query; arguments as for `block_mass`.

    `margin` keys on either side of a block come with it. Each key is there once, and counts for as many as the best of
    its blocks has emphasis: the emphasis' logarithm joins its logit.
    """
    device, heads = middle.key.device, query.shape[1]
    positions, emphasis = positions_of(choice, block_size, margin, sight.num_sink_tokens)
    positions, emphasis = positions.to(device), emphasis.to(query.device)
    columns = (positions - middle.positions[:, :1]).clamp(0, middle.key.shape[2] - 1)[:, None, :, None]
    key, value = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])).to(query.device) for x in middle[:2])
    part = Middle(key, value, positions.to(query.device))
    group = heads // value.shape[1]
    scores = _middle_scores(query, query_positions, part, sight)
    scores = scores + emphasis.to(scores.dtype).log()[:, None, None]
    return Retrieved(scores, value.repeat_interleave(group, dim=1)[:, :, None])


def positions_of(choice: Choice, block_size: int, margin: int, num_sink_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the positions of a choice's keys [batch, k], each once and -1 for none, and their emphasis [batch, k]."""
    inside = torch.arange(-margin, block_size + margin, device=choice.blocks.device)
    positions = num_sink_tokens + choice.blocks[..., None] * block_size + inside
    positions = positions.masked_fill(choice.blocks[..., None] < 0, -1).flatten(1)
    emphasis = choice.emphasis.repeat_interleave(len(inside), dim=1)
    if margin:  # the blocks come best first, so a stable sort puts the largest emphasis of a position first
        positions, order = positions.sort(dim=-1, stable=True)
        again = torch.nn.functional.pad(positions[:, 1:] == positions[:, :-1], (1, 0))
        positions, emphasis = positions.masked_fill(again, -1), emphasis.gather(1, order)
    return positions, emphasis


def _middle_scores(query: Tensor, query_positions: Tensor, middle: Middle, sight: Sight) -> Tensor:
    """Logits [batch, heads, n, m], where the middle is stored; the least number that there is for other keys."""
    device = middle.key.device
    scores = constant_scores(query.to(device), middle.key, sight.distance, sight.scoring)
    i = query_positions.to(device)
    candidates = in_middle(i, middle.positions, sight.num_sink_tokens, sight.window)
    candidates = candidates & (i >= sight.first_query)[..., None]
    return scores.masked_fill(~candidates[:, None], torch.finfo(scores.dtype).min)
