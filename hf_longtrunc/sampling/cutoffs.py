r"""Thresholds on rows of scores, in pure torch.

A row of scores s (logits, log-probabilities, anything up to a constant) is read as p = softmax(s). With
z = s - max s, w = exp z, Z = sum w:

    log p = z - log Z         H = log Z - (sum w z) / Z         keep a token iff z >= threshold

so one exponential and two sums give everything (top-n-sigma and p-less take one pass more): no sort, no host sync.
Where rank decides (top-h, min-k), as many of the largest as it takes are put in order. The maximum sits at z = 0, which
makes "the most probable token stays" a clamp of the threshold at zero. In units of z, the threshold's logarithm plus
log Z, it can be a token's own: "keep the five most probable" is the fifth's z, to the bit.

Invariants:
- fp32 arithmetic whatever the input; entries at -inf (cut by an earlier processor) count as p = 0.
- a row's result depends on that row alone, to the bit (see `_row_sum`).
- a row that is no distribution (a NaN, a +inf, or nothing but -inf) has threshold NaN, no comparison with which
  holds: it comes back unchanged, so that the sampler reports it instead of drawing from something invented here.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Bool, Float, Int

# exp(-200) is exactly 0 in fp32: the floor gives tokens at -inf zero weight and keeps 0 * (-inf) out of the sums.
_Z_FLOOR = -200.0
# A summation tree of this width is one warp wide on CUDA and never split between threads on a CPU.
_FOLD = 32
# A draw reads a level of so many entries whole: on a CPU as quick as 32 of them, and it saves the levels above.
_WHOLE_LEVEL = 2048
_BELOW_ONE = 1 - 2**-53
# So many of the largest scores are put in order before more are.
_HEAD = 128
# A sum that reaches its goal to fp32's rounding has reached it.
_ROUNDING = 1e-6


class Softmax(NamedTuple):
    """Rows of log-probabilities: log p = z - log_total, z 0 at a row's maximum.

    `tree` holds the sums that led from exp z, its first level, to the total, its last (see `sum_tree`).
    """

    z: Float[Tensor, "*rows vocab"]
    tree: list[Tensor]
    log_total: Float[Tensor, "*rows 1"]

    @property
    def entropy(self) -> Float[Tensor, "*rows 1"]:
        """Shannon's entropy of each row in nats; tokens of probability zero add nothing to it. Cost: one sum."""
        return self.log_total - _row_sum(self.tree[0] * self.z) / self.tree[-1]


def softmax_rows(scores: Float[Tensor, "*rows vocab"]) -> Softmax:
    """Read each row of scores as a distribution, in fp32.

    Cost: one `exp`, one sum, two temporaries of the size of `scores`.
    """
    # Contiguous: the sums of a transposed row are added up in another order, and differ in the last bit.
    scores = scores.float().contiguous()
    z = (scores - scores.amax(-1, keepdim=True)).clamp_min_(_Z_FLOOR)
    tree = sum_tree(z.exp())
    return Softmax(z, tree, tree[-1].log())


def eta_threshold(rows: Softmax, log_epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return eta, min(epsilon, sqrt(epsilon) exp(-H)) (Hewitt et al. 2022, section 4.2).

    H is the entropy of the full row, so the threshold falls below epsilon only where H > -log(epsilon) / 2: a flat
    distribution keeps a long tail, a peaked one is cut at epsilon.
    """
    eta = log_epsilon / 2 - rows.entropy
    eta = torch.minimum(eta, log_epsilon) if isinstance(log_epsilon, Tensor) else eta.clamp_max(log_epsilon)
    return eta + rows.log_total


def epsilon_threshold(rows: Softmax, log_epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return epsilon (Hewitt et al. 2022, section 4.1)."""
    return rows.log_total + log_epsilon


def top_n_sigma_threshold(rows: Softmax, n: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return a score n standard deviations below the row's maximum (Tang et al. 2024, section 3).

    The deviation is that of the row's scores, entries at -inf left out: the root of their mean square about the mean.
    It does not depend on temperature: scores and their deviation are divided by the same number.
    """
    alive = rows.z > _Z_FLOOR
    count = _row_sum(alive.float())
    centred = torch.where(alive, rows.z - _row_sum(torch.where(alive, rows.z, 0)) / count, 0)
    return (_row_sum(centred.square_()) / count).sqrt_() * -n


def p_less_threshold(rows: Softmax, on: float | Tensor, normalized: bool = False) -> Float[Tensor, "*rows 1"]:
    """Return the collision probability C = sum of p^2 (Tan et al. 2025, section 3), which max p always reaches.

    Normalised it is (V C - 1) / (V - 1): C less what the wrong tokens, 1 - C, come to on average. `on` is 1.
    """
    log_probs = rows.z - rows.log_total
    if not normalized:
        return _row_sum(log_probs.mul_(2).exp_()).log() * on + rows.log_total
    # V C - 1 = V sum (p - 1 / V)^2, which does not cancel in flat rows.
    size = rows.z.shape[-1]
    collision = _row_sum(log_probs.exp_().sub_(1 / size).square_()) * (size / max(size - 1, 1))
    return collision.log() * on + rows.log_total


def top_h_threshold(rows: Softmax, share: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return the least of the most probable tokens whose terms -p log p sum to at most `share` of the entropy.

    Potraghloo et al. 2025, arXiv 2509.02510, as its authors' code and transformers have it: the terms are those of the
    whole row, not renormalised, and the most probable token always stays. Both look at the 100 most probable tokens
    only; here the row is read as far as the share reaches.
    """
    goal = (rows.entropy * share).double().reshape(-1, 1) * (1 + _ROUNDING)
    log_total = rows.log_total.reshape(-1, 1)

    def count(head: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = (head - log_total[which]).double().clamp_max_(0)
        within = (-log_probs.exp() * log_probs).cumsum(-1) <= goal[which]
        return within.sum(-1), ~within[:, -1]

    return _threshold_of_rank(rows, count, goal.isnan())


def min_k_threshold(rows: Softmax, tau: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return the last token in front of the steepest drop: k = argmax of (s_i - s_{i+1}) / i over the scores in order.

    Ding et al. 2026, arXiv 2604.11012, section 3: the drops are relative to the row's range R, which changes no argmax,
    and at least floor(tau / R) tokens stay. The set is the same at every temperature as long as tau is below R times
    the k that the drops give. Entries at -inf end the row: the drop to them is none.
    """
    lowest = torch.where(rows.z > _Z_FLOOR, rows.z, 0).amin(-1).reshape(-1, 1)
    least = (torch.zeros_like(lowest) + tau.reshape(-1, 1) if isinstance(tau, Tensor) else tau) / -lowest
    size = rows.z.shape[-1]
    least = least.clamp_max(size).floor()

    def count(head: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        following = torch.nn.functional.pad(head[:, 1:], (0, 1), value=-torch.inf)
        places = torch.arange(1, head.shape[-1] + 1, device=head.device)
        best, place = torch.where(following > _Z_FLOOR, (head - following) / places, 0).max(-1)
        # No later drop is steeper than from the head's last to the row's lowest, at its first place.
        is_best = (head[:, -1] - lowest[which, 0]) / head.shape[-1] <= best
        counts = torch.maximum(place + 1, least[which, 0].nan_to_num(0).long())
        return counts, is_best & (counts <= head.shape[-1])

    # A flat row has no range: 0 / 0 is for tau 0.
    return _threshold_of_rank(rows, count, torch.as_tensor(tau, device=lowest.device).isnan().expand_as(lowest))


def xtc_cut(rows: Softmax, log_threshold: float | Tensor, is_decided: Bool[Tensor, "*rows 1"]) -> Tensor:
    """Mark, in the rows where it is decided to, the tokens with p >= threshold but the least probable of them.

    p-e-w 2024, "Exclude Top Choices" (text-generation-webui, pull request 6335).
    """
    reaching = torch.where(rows.z >= rows.log_total + log_threshold, rows.z, torch.inf)
    return (rows.z > reaching.amin(-1, keepdim=True)) & is_decided


class Cutoff(NamedTuple):
    """A sampler that cuts what lies below a threshold: `threshold(rows, value)`.

    Attributes:
        threshold: the z of the last kept score [*rows, 1]; of a value that `prepared` returned, or a column of them.
            NaN, of a row that is no distribution or of a value that is NaN, cuts nothing.
        prepared: makes the number that `threshold` takes of the one that users give.
        bounds: of the users' number, as keywords of `arguments.check_float`; None where there is only on (1) and off.
    """

    threshold: Callable[[Softmax, float | Tensor], Tensor]
    prepared: Callable[[float], float]
    bounds: Mapping[str, float] | None


_SHARE = {"gt": 0, "lt": 1}
# Every sampler of that kind, in the order in which a request's are applied: all engines read this table.
CUTOFFS: dict[str, Cutoff] = {
    "eta": Cutoff(eta_threshold, math.log, _SHARE),
    "epsilon": Cutoff(epsilon_threshold, math.log, _SHARE),
    "top_n_sigma": Cutoff(top_n_sigma_threshold, float, {"gt": 0}),
    "p_less": Cutoff(p_less_threshold, float, None),
    "p_less_norm": Cutoff(functools.partial(p_less_threshold, normalized=True), float, None),
    "top_h": Cutoff(top_h_threshold, float, {"gt": 0, "maximum": 1}),
    "min_k": Cutoff(min_k_threshold, float, {"minimum": 0}),
}


def threshold_of(name: str, rows: Softmax, value: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return the threshold of the cutoff `name` for a user's number, or a float64 tensor of one a row."""
    cutoff = CUTOFFS[name]
    # Prepared on the host in both cases, so that a row has the same bits alone and among others.
    if isinstance(value, Tensor):
        return cutoff.threshold(rows, column([cutoff.prepared(each) for each in value.tolist()], rows))
    return cutoff.threshold(rows, cutoff.prepared(value))


def below(
    scores: Float[Tensor, "*rows vocab"],
    rows: Softmax,
    threshold: Float[Tensor, "*rows 1"],
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Mark each token with z < threshold that is not among the row's most probable ones.

    Args:
        scores: the rows that `rows` was made from.
        rows: their softmax.
        threshold: one a row, in units of z: a token's own z keeps this token, whatever is rounded elsewhere.
        min_tokens_to_keep: so many of the largest scores stay whatever the threshold, ties with the last of them too;
            1 costs nothing, more costs a `topk`.

    Returns:
        A boolean mask of the shape of `scores`.
    """
    cut = rows.z < threshold.clamp_max(0)
    if min_tokens_to_keep > 1:
        kth_largest = scores.topk(min(min_tokens_to_keep, scores.shape[-1]), dim=-1).values[..., -1:]
        cut = cut & (scores < kth_largest)
    return cut


def column(values: list[float], rows: Softmax) -> Float[Tensor, "*rows 1"]:
    """One value for all rows, or one a row, or one for each group of rows that stand together, as a column."""
    found = torch.tensor(values, dtype=torch.float32, device=rows.z.device)[:, None]
    if rows.z.ndim != 2 or rows.z.shape[0] % len(values):
        raise ValueError(
            f"{len(values)} values, one a row, do not fit scores {list(rows.z.shape)}: give one for every row, or one "
            "for every prompt, whose beams or returns stand together"
        )
    return found.repeat_interleave(rows.z.shape[0] // len(values), 0)


def _threshold_of_rank(
    rows: Softmax, count: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], off: Bool[Tensor, "n 1"]
) -> Float[Tensor, "*rows 1"]:
    """Return the z of each row's last kept token, NaN for rows that are no distribution and those that are `off`.

    `count(head, which)` is handed the largest z of the rows `which`, in order [n, m], and returns how many of them to
    keep and whether the rest of the row cannot change that; the rows where it can are read further, in the end whole.
    """
    z = rows.z.reshape(-1, rows.z.shape[-1])
    thresholds = rows.log_total.reshape(-1, 1).masked_fill(off, torch.nan)
    which = (~thresholds.isnan()[:, 0]).nonzero()[:, 0]
    size = min(_HEAD, z.shape[-1])
    while len(which):
        head = _largest(z if len(which) == len(z) else z[which], size)
        counts, is_settled = count(head, which)
        is_settled |= size == z.shape[-1]
        last = head.gather(-1, counts.clamp(1, size)[:, None] - 1)
        thresholds[which] = torch.where(is_settled[:, None], last, thresholds[which])
        which, size = which[~is_settled], min(8 * size, z.shape[-1])
    return thresholds.reshape(rows.log_total.shape)


def _largest(z: Float[Tensor, "n vocab"], count: int) -> Float[Tensor, "n count"]:
    """Return the `count` largest of each row, in order."""
    columns = z.shape[-1] // _FOLD
    if 2 * count <= columns:
        # Each lies in one of the `count` columns with the largest maxima, or there is a tie: fewer to put in order.
        grid = z[:, : columns * _FOLD].reshape(len(z), _FOLD, columns)
        best = grid.amax(1).topk(count, sorted=False).indices
        found = grid.gather(2, best[:, None].expand(-1, _FOLD, -1)).flatten(1)
        return torch.cat([found, z[:, columns * _FOLD :]], -1).topk(count).values
    if z.device.type != "cpu" or z.requires_grad or count <= _WHOLE_LEVEL:
        return z.topk(count).values
    # On values alone NumPy's sort takes a third of the time of torch's.
    return torch.from_numpy(np.sort(z.numpy(), axis=-1)[:, -count:].copy()).flip(-1)


def _row_sum(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows 1"]:
    """Sum over the last dimension by a 32-ary tree, whose shape depends on that dimension alone.

    `Tensor.sum` splits a lone long row between threads (CPU) or blocks (CUDA) and not one of many rows: the same
    row then rounds differently in another batch, and a token on the threshold is kept in one and cut in the other.
    log32(n) reductions; the tree also rounds less than a running sum.
    """
    return sum_tree(values)[-1]


def sum_tree(values: Float[Tensor, "*rows n"]) -> list[Tensor]:
    """Return the levels of that tree [*rows, n], [*rows, n / 32 rounded up], ..., [*rows, 1].

    Entry i of a level is the sum of the entries 32 i to 32 i + 31, as many as there are, of the level before it.
    """
    levels = [values]
    while levels[-1].shape[-1] > _FOLD:
        levels.append(_folded(levels[-1]))
    return [*levels, levels[-1].sum(-1, keepdim=True)]


def draw(tree: list[Tensor], uniform: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Draw an entry of each row with probability in proportion to its value, by descending the row's tree.

    Args:
        tree: of values that are nowhere negative, [rows, n]; `sum_tree` makes it.
        uniform: float64 in [0, 1), one a row.

    Cost: 2,048 numbers at most, and 32 for each longer level. An entry of value zero is never drawn. A row's draw
    depends on that row alone.
    """
    start = next(n for n, level in enumerate(tree) if level.shape[-1] <= _WHOLE_LEVEL)
    values = tree[start]
    sums, goal, which = _reached(values, uniform)
    place = which
    for level in reversed(tree[:start]):
        # What share of the value lies before the goal.
        share = (goal - sums.gather(-1, which)).div_(values.gather(-1, which)).add_(1).clamp_(0, _BELOW_ONE)
        values = _summands(level, place)
        sums, goal, which = _reached(values, share)
        place = torch.add(which, place, alpha=_FOLD)
    return place


def _reached(
    values: Float[Tensor, "rows n"], share: Float[Tensor, "rows 1"]
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows 1"], Int[Tensor, "rows 1"]]:
    """Return the running sums of each row, the `share` of their last, and which of them is the first above that."""
    sums = values.cumsum(-1, dtype=torch.float64)
    # Below the last sum, as the share is below 1; so the first sum above it ends with a value above zero.
    goal = share * sums[:, -1:]
    return sums, goal, (sums <= goal).sum(-1, keepdim=True)


def _summands(level: Float[Tensor, "rows n"], place: Int[Tensor, "rows 1"]) -> Float[Tensor, "rows 32"]:
    """Return the entries of a level that entry `place` of the next is the sum of, zeros where they are fewer."""
    places = torch.add(torch.arange(_FOLD, device=place.device), place, alpha=_FOLD)
    if level.shape[-1] % _FOLD == 0:
        return level.gather(-1, places)
    end = level.shape[-1] - 1
    return level.gather(-1, places.clamp_max(end)).masked_fill_(places > end, 0)


def set_zero(tree: list[Tensor], place: int) -> None:
    """Take entry `place` out of the tree of one row, levels [1, n], in place: its sums are added up anew."""
    tree[0][:, place] = 0
    for values, sums in itertools.pairwise(tree):
        place //= _FOLD
        sums[:, place] = values[:, place * _FOLD : (place + 1) * _FOLD].sum(-1)


def _folded(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
    """Sum groups of 32; what is left over is a group of its own."""
    n = values.shape[-1]
    whole = n - n % _FOLD
    partial = values[..., :whole].reshape(*values.shape[:-1], n // _FOLD, _FOLD).sum(-1)
    if whole < n:
        partial = torch.cat([partial, values[..., whole:].sum(-1, keepdim=True)], dim=-1)
    return partial
