"""Scoring and selecting keys of the whole text, for queries that no longer have them in their window.

Every key is scored at one constant distance D_k from the query, <R(D_k) q, k> with k un-rotated, so that its place in
the text does not matter. `key_retrieval.py` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.kernels import ExtraKeys, Scoring, grouped_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, eq=False)
class BlockScores:
    """The scores that a scoring pass collects."""

    # How many of the last tokens belong to the last user turn and the template's ending [batch]; None: all.
    turn: Tensor | None = None
    # Each layer's scores [batch, heads, groups, blocks + 1]: the attention weight of each block from each group of
    # rows, and how many rows these were. The last group is the baseline.
    layers: dict[int, Tensor] = field(default_factory=dict)


class UnrotatedKeys(NamedTuple):
    """Keys and values of the whole text so far."""

    key: Tensor  # [batch, kv_heads, m, dim], every key as if it stood at position 0
    value: Tensor  # [batch, kv_heads, m, value_dim]
    positions: Tensor  # of the keys [rows, m], counted from each row's first real token


class DistantKeys(NamedTuple):
    """The keys outside sinks and window that one layer offers to its queries, and how they are scored."""

    text: UnrotatedKeys  # on any device
    scoring: Scoring  # of the layer
    num_sink_tokens: int  # S, which are left out
    window: int  # nearer keys are left out
    distance: int = 0  # D_k, at which every distant key is scored
    first_query: int = 0  # queries before this position see none
    layer: int = 0  # its index
    selection: Selection | None = None  # the blocks selected for each row; None: none yet
    block_scores: BlockScores | None = None  # collects the layer's scores during a scoring pass


def is_distant(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], num_sink_tokens: int, window: int
) -> Bool[Tensor, "... n m"]:
    """Return whether a key is no sink and at least `window` away, S <= j <= i - window."""
    i, j = query_positions[..., :, None], key_positions[..., None, :]
    return (j >= num_sink_tokens) & (i - j >= window)


def top_k(
    query: Float[Tensor, "batch heads n dim"], query_positions: Int[Tensor, "rows n"], distant: DistantKeys, k: int
) -> ExtraKeys:
    """Return each head's and row's k best distant keys, on the query's device.

    A row that finds fewer gets logits of -3e38 or so. Queries are rotated at their own positions, which count from each
    row's first real token; `rows` is the batch or 1.
    """
    batch, heads, n, _ = query.shape
    text = distant.text
    best, index = _distant_scores(query, query_positions, distant).topk(min(k, text.key.shape[2]), dim=-1)
    dim = text.value.shape[-1]
    flat = index.reshape(batch, text.value.shape[1], -1, 1).expand(-1, -1, -1, dim)  # a group's heads together
    value = text.value.gather(2, flat).view(batch, heads, n, -1, dim)
    return ExtraKeys(best.to(query.device), value.to(query.device))


def block_scores(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    distant: DistantKeys,
    normalizer: Float[Tensor, "batch heads n"],
    block_size: int,
    groups: Bool[Tensor, "groups some n"],
) -> Float[Tensor, "batch heads groups blocks"]:
    """Return the attention weight that each head and a group's queries would give to each block of the text.

    Block b begins at position S + b * block_size. `normalizer` is the log-sum-exp of each query's logits with window
    and sinks, and `groups` says which queries belong to each group; its `some` is the batch or 1. Padding has none.
    """
    text = distant.text
    scores = _distant_scores(query, query_positions, distant)
    normalizer = normalizer.to(scores.device, scores.dtype)[..., None]
    total = torch.logaddexp(normalizer, scores.logsumexp(-1, keepdim=True))
    counted = (groups & (query_positions >= 0)).to(scores.device, scores.dtype).transpose(0, 1)
    weights = counted[:, None] @ (scores - total).exp()  # [batch, heads, groups, m]
    block = ((text.positions - distant.num_sink_tokens) // block_size).clamp_min(0)[:, None, None].expand(weights.shape)
    count = -(-text.key.shape[2] // block_size)
    return weights.new_zeros(*weights.shape[:3], count).scatter_add(3, block, weights)


class Selection(NamedTuple):
    """The blocks, or the single keys, that each row of a batch reads."""

    indices: Tensor  # of blocks, the best first, or positions of keys [batch, k]; -1, which is never seen, for none
    emphasis: Tensor  # how many keys each key counts for [batch, k]

    def map(self, change: Callable[[Tensor], Tensor]) -> Selection:
        """Return the selection with `change` (repeat, select, reorder) applied to its rows."""
        return Selection(change(self.indices), change(self.emphasis))


def select_blocks(
    scores: Float[Tensor, "batch heads stretches blocks"],
    baseline: Float[Tensor, "batch heads blocks"],
    count: int,
    emphasis: float,
    least: float,
    total: Callable[[Tensor], Tensor],
) -> Selection:
    """Select each row's `count` best blocks.

    Without a baseline the blocks of the largest total score are the best, and all get `emphasis`. With one, each head
    contributes the ratio of its score v to its baseline weight, v / (b + mean b + mean of all heads' b); a
    block's contrast is the root mean square over heads, so the few heads that look for the answer count, in the stretch
    of rows where it is largest. Blocks below `least` are not read. The best block's emphasis is its squared
    contrast, clamped to [1, emphasis]; the others are scaled by the ratio of squared contrasts.

    `scores` are the weights that a scoring row of each stretch gives to each block, in all heads of all scoring layers;
    `baseline` those of a row before them, 0 everywhere without such rows. `total` returns a tensor's sum over the ranks
    that share the heads.
    """
    tiny = torch.finfo(scores.dtype).tiny
    heads = total(scores.new_full((1,), scores.shape[1]))
    usual = baseline.sum(-1, keepdim=True) / (baseline > 0).sum(-1, keepdim=True).clamp_min(1)
    common = total(usual.sum(1)) / heads  # [batch, 1]
    has_baseline = common > 0
    expected = (baseline + usual + common[:, None]).clamp_min(tiny)
    contrast = (total((scores / expected[:, :, None]).square().sum(1)) / heads).sqrt().amax(1)
    rank = torch.where(has_baseline, contrast, total(scores.sum(1)).amax(1))
    best, index = rank.topk(min(count, rank.shape[1]), dim=-1)
    is_read = (best > 0) & (~has_baseline | (best >= least))
    first = best[:, :1]
    shared = first.square().clamp(1, emphasis) * (best / first.clamp_min(tiny)).square()
    given = torch.where(has_baseline, shared.clamp_min(1), emphasis)
    return Selection(torch.where(is_read, index, -1), given)


def block_keys(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    distant: DistantKeys,
    selection: Selection,
    block_size: int,
    margin: int,
) -> ExtraKeys:
    """Return the keys of each row's selected blocks, for every head and query; arguments as for `block_scores`.

    `margin` keys on either side of a block come with it. Each key is there once. The logarithm of the
    largest emphasis of its blocks joins its logit.
    """
    text, heads = distant.text, query.shape[1]
    device = text.key.device
    positions, emphasis = select_keys(selection, block_size, margin, distant.num_sink_tokens)
    positions, emphasis = positions.to(device), emphasis.to(query.device)
    columns = (positions - text.positions[:, :1]).clamp(0, text.key.shape[2] - 1)[:, None, :, None]
    key, value = (
        x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])).to(query.device) for x in (text.key, text.value)
    )
    part = distant._replace(text=UnrotatedKeys(key, value, positions.to(query.device)))
    scores = _distant_scores(query, query_positions, part)
    scores = scores + emphasis.to(scores.dtype).log()[:, None, None]
    return ExtraKeys(scores, value.repeat_interleave(heads // value.shape[1], dim=1)[:, :, None])


def select_keys(selection: Selection, block_size: int, margin: int, num_sink_tokens: int) -> Selection:
    """Return the keys of selected blocks, `margin` keys on either side included, with their emphasis."""
    inside = torch.arange(-margin, block_size + margin, device=selection.indices.device)
    positions = num_sink_tokens + selection.indices[..., None] * block_size + inside
    positions = positions.masked_fill(selection.indices[..., None] < 0, -1).flatten(1)
    emphasis = selection.emphasis.repeat_interleave(len(inside), dim=1)
    if margin:  # the blocks come best first, so a stable sort puts the largest emphasis of a position first
        positions, order = positions.sort(dim=-1, stable=True)
        is_repeated = torch.nn.functional.pad(positions[:, 1:] == positions[:, :-1], (1, 0))
        positions, emphasis = positions.masked_fill(is_repeated, -1), emphasis.gather(1, order)
    return Selection(positions, emphasis)


def _distant_scores(query: Tensor, query_positions: Tensor, distant: DistantKeys) -> Tensor:
    """Logits [batch, heads, n, m], where the text is stored; the dtype's least number for keys that are not distant."""
    text, scoring = distant.text, distant.scoring
    device = text.key.device
    query = scoring.rotate(query, distant.distance - query_positions).to(device)
    scores = scoring.scores(grouped_scores(query, text.key))
    if scoring.slopes is not None:
        scores = scores - scoring.slopes.to(scores.device, scores.dtype)[:, None, None] * distant.distance
    i = query_positions.to(device)
    candidates = is_distant(i, text.positions, distant.num_sink_tokens, distant.window)
    candidates = candidates & (i >= distant.first_query)[..., None]
    return scores.masked_fill(~candidates[:, None], torch.finfo(scores.dtype).min)
