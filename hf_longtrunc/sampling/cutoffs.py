r"""Thresholds on rows of scores, in pure torch.

A row of scores s (logits, log-probabilities, anything up to a constant) is read as p = softmax(s). With
z = s - max s, w = exp z, Z = sum w:

    log p = z - log Z         H = log Z - (sum w z) / Z         keep a token iff z >= threshold

so one exponential and two sums are enough (top-n-sigma and p-less take one pass more): no sort, no host sync. Rules by
rank (top-h, min-k) sort as many of the largest scores as they need. The maximum is at z = 0, so clamping the threshold
at zero keeps the most probable token. Thresholds are in units of z (their logarithm plus log Z), so that they can equal
a token's z exactly: "keep the five most probable" is the fifth's z.

Invariants:
- fp32 arithmetic for every input dtype; entries at -inf (cut by an earlier processor) count as p = 0.
- a row's result depends on that row alone, bit for bit (see `_row_sum`).
- a row that is no distribution (a NaN, a +inf, or nothing but -inf) has threshold NaN. No comparison with NaN holds, so
  the row comes back unchanged and sampling reports it.
"""

from __future__ import annotations

import functools
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
# More values than this sort faster in NumPy, on a CPU.
_NUMPY_SORTS = 2048
_BELOW_ONE = 1 - 2**-53
# How many of the largest scores are sorted first.
_HEAD = 128
# Relative: a sum this close to its goal has reached it, to fp32's rounding.
_ROUNDING = 1e-6


class Softmax(NamedTuple):
    """Rows of log-probabilities log p = z - log_total; z is 0 at a row's maximum, `weights` exp z, `total` its sum."""

    z: Float[Tensor, "*rows vocab"]
    weights: Float[Tensor, "*rows vocab"]
    total: Float[Tensor, "*rows 1"]

    @property
    def log_total(self) -> Float[Tensor, "*rows 1"]:
        """Logarithm of the weights' sum."""
        return self.total.log()

    @property
    def entropy(self) -> Float[Tensor, "*rows 1"]:
        """Shannon's entropy of each row in nats. Cost: one sum."""
        return self.log_total - _row_sum(self.weights * self.z) / self.total


def softmax_rows(scores: Float[Tensor, "*rows vocab"]) -> Softmax:
    """Read each row of scores as a distribution, in fp32, with two temporaries of the size of `scores`."""
    # Contiguous: a transposed row would be summed in another order and differ in the last bit.
    scores = scores.float().contiguous()
    z = (scores - scores.amax(-1, keepdim=True)).clamp_min_(_Z_FLOOR)
    weights = z.exp()
    return Softmax(z, weights, _row_sum(weights))


def eta_threshold(rows: Softmax, log_epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return eta, min(epsilon, sqrt(epsilon) exp(-H)), H the full row's entropy (Hewitt et al. 2022, section 4.2)."""
    eta = log_epsilon / 2 - rows.entropy
    eta = torch.minimum(eta, log_epsilon) if isinstance(log_epsilon, Tensor) else eta.clamp_max(log_epsilon)
    return eta + rows.log_total


def epsilon_threshold(rows: Softmax, log_epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return epsilon (Hewitt et al. 2022, section 4.1)."""
    return rows.log_total + log_epsilon


def top_n_sigma_threshold(rows: Softmax, n: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return n standard deviations, without entries at -inf, below the row's maximum (Tang et al. 2024, section 3)."""
    alive = rows.z > _Z_FLOOR
    count = _row_sum(alive.float())
    centred = torch.where(alive, rows.z - _row_sum(torch.where(alive, rows.z, 0)) / count, 0)
    return (_row_sum(centred.square_()) / count).sqrt_() * -n


def p_less_threshold(rows: Softmax, switch: float | Tensor, normalized: bool = False) -> Float[Tensor, "*rows 1"]:
    """Return C = sum of p^2, or `normalized` (V C - 1) / (V - 1) (Tan et al. 2025, section 3); `switch` is 1 or NaN."""
    log_probs = rows.z - rows.log_total
    if not normalized:
        return _row_sum(log_probs.mul_(2).exp_()).log() * switch + rows.log_total
    # V C - 1 = V sum (p - 1 / V)^2, which does not cancel in flat rows.
    size = rows.z.shape[-1]
    collision = _row_sum(log_probs.exp_().sub_(1 / size).square_()) * (size / max(size - 1, 1))
    return collision.log() * switch + rows.log_total


def top_h_threshold(rows: Softmax, share: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return the lowest kept score: the terms -p log p of the kept tokens sum to at most `share` of the entropy.

    Potraghloo et al. 2025, arXiv 2509.02510: the terms are not renormalised, and the most probable token always stays.
    The authors' code and transformers read the 100 most probable tokens only; this reads as many as the share needs.
    """
    goal = (rows.entropy * share).double().reshape(-1, 1) * (1 + _ROUNDING)
    log_total = rows.log_total.reshape(-1, 1)

    def count(head: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = (head - log_total[which]).double().clamp_max_(0)
        within = (-log_probs.exp() * log_probs).cumsum(-1) <= goal[which]
        return within.sum(-1), ~within[:, -1]

    return _threshold_of_rank(rows, count, goal.isnan())


def min_k_threshold(rows: Softmax, tau: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Return the score before the steepest drop: s_k, k the argmax of (s_i - s_{i+1}) / i over the sorted scores.

    Ding et al. 2026, arXiv 2604.11012, section 3: at least floor(tau / R) tokens stay, R the row's range. The set is
    the same at every temperature as long as tau is below k R. A drop to an entry at -inf does not count.
    """
    lowest = torch.where(rows.z > _Z_FLOOR, rows.z, 0).amin(-1).reshape(-1, 1)
    least = (torch.zeros_like(lowest) + tau.reshape(-1, 1) if isinstance(tau, Tensor) else tau) / -lowest
    size = rows.z.shape[-1]
    least = least.clamp_max(size).floor()

    def count(head: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        following = torch.nn.functional.pad(head[:, 1:], (0, 1), value=-torch.inf)
        places = torch.arange(1, head.shape[-1] + 1, device=head.device)
        best, place = torch.where(following > _Z_FLOOR, (head - following) / places, 0).max(-1)
        # A later drop can at most go from the head's last score to the row's lowest, divided by the head's length.
        is_best = (head[:, -1] - lowest[which, 0]) / head.shape[-1] <= best
        counts = torch.maximum(place + 1, least[which, 0].nan_to_num(0).long())
        return counts, is_best & (counts <= head.shape[-1])

    # A flat row has no range: 0 / 0 is for tau 0.
    return _threshold_of_rank(rows, count, torch.as_tensor(tau, device=lowest.device).isnan().expand_as(lowest))


def xtc_cut(rows: Softmax, log_threshold: float | Tensor, is_decided: Bool[Tensor, "*rows 1"]) -> Tensor:
    """Mark, in the rows of `is_decided`, the tokens with p >= threshold except the least probable of them."""
    reaching = torch.where(rows.z >= rows.log_total + log_threshold, rows.z, torch.inf)
    return (rows.z > reaching.amin(-1, keepdim=True)) & is_decided


class Cutoff(NamedTuple):
    """A sampler that cuts the tokens with z below `threshold(rows, prepared(value))` [*rows, 1]; NaN cuts nothing.

    `bounds` are limits of the user's value, as keywords of `arguments.check_float`; None for a switch, 1 for on.
    """

    threshold: Callable[[Softmax, float | Tensor], Tensor]
    prepared: Callable[[float], float]
    bounds: Mapping[str, float] | None


_SHARE = {"gt": 0, "lt": 1}
# Every sampler of that kind, in the order in which a request applies them. All engines read this table.
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
    """Return the threshold of the cutoff `name` for a user's number, or for a float64 tensor with one a row."""
    cutoff = CUTOFFS[name]
    # Prepared on the host in both cases, so that a row's result is the same alone and in a batch.
    if isinstance(value, Tensor):
        return cutoff.threshold(rows, column([cutoff.prepared(each) for each in value.tolist()], rows))
    return cutoff.threshold(rows, cutoff.prepared(value))


def below(
    scores: Float[Tensor, "*rows vocab"],
    rows: Softmax,
    threshold: Float[Tensor, "*rows 1"],
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Mark tokens with z < threshold that are not among a row's `min_tokens_to_keep` largest scores or their ties."""
    cut = rows.z < threshold.clamp_max(0)
    if min_tokens_to_keep > 1:
        kth_largest = scores.topk(min(min_tokens_to_keep, scores.shape[-1]), dim=-1).values[..., -1:]
        cut = cut & (scores < kth_largest)
    return cut


def column(values: list[float], rows: Softmax) -> Float[Tensor, "*rows 1"]:
    """Return one value for all rows, or one for each row or each group of adjacent rows, as a column."""
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
    """Return the z of each row's last kept token, NaN for rows that are no distribution and rows that are `off`.

    `count(head, which)` gets the m largest z of the rows `which` [n, m], and returns how many of them to keep and
    whether a longer head, finally the whole row, cannot change that.
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
    """Return the `count` largest of each row, sorted."""
    columns = z.shape[-1] // _FOLD
    if 2 * count <= columns:
        # All of them lie in the `count` columns with the largest maxima, up to ties: fewer values to sort.
        grid = z[:, : columns * _FOLD].reshape(len(z), _FOLD, columns)
        best = grid.amax(1).topk(count, sorted=False).indices
        found = grid.gather(2, best[:, None].expand(-1, _FOLD, -1)).flatten(1)
        return torch.cat([found, z[:, columns * _FOLD :]], -1).topk(count).values
    if z.device.type != "cpu" or z.requires_grad or count <= _NUMPY_SORTS:
        return z.topk(count).values
    # NumPy sorts values in a third of the time that torch takes for values and indices.
    return torch.from_numpy(np.sort(z.numpy(), axis=-1)[:, -count:].copy()).flip(-1)


def _row_sum(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows 1"]:
    """Sum over the last dimension by a 32-ary tree of a shape that depends on that dimension alone.

    `Tensor.sum` splits a single long row between threads or blocks, but not one of many rows: the same row would round
    differently in another batch.
    """
    while values.shape[-1] > _FOLD:
        values = _folded(values)
    return values.sum(-1, keepdim=True)


def _folded(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
    """Sum groups of 32; the remainder is a group of its own."""
    n = values.shape[-1]
    whole = n - n % _FOLD
    partial = values[..., :whole].reshape(*values.shape[:-1], n // _FOLD, _FOLD).sum(-1)
    if whole < n:
        partial = torch.cat([partial, values[..., whole:].sum(-1, keepdim=True)], dim=-1)
    return partial


def draw(weights: Float[Tensor, "rows n"], uniform: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Draw an entry of each row with probability proportional to its weight: a group of 32, then one of the group.

    `uniform` is float64 in [0, 1). An entry of weight zero is never drawn.
    """
    group, rest = _pick(_folded(weights), uniform)
    places = group * _FOLD + torch.arange(_FOLD, device=weights.device)
    end = weights.shape[-1] - 1
    members = weights.gather(-1, places.clamp_max(end)).masked_fill_(places > end, 0)
    return group * _FOLD + _pick(members, rest)[0]


def _pick(
    weights: Float[Tensor, "rows n"], uniform: Float[Tensor, "rows 1"]
) -> tuple[Int[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Return the first entry where the running sum exceeds `uniform` of the total, and how far into it, in [0, 1)."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    # `uniform` is below 1, so the goal is below the total, and the first sum above it ends with a positive weight.
    goal = uniform * sums[:, -1:]
    entry = (sums <= goal).sum(-1, keepdim=True)
    rest = 1 + (goal - sums.gather(-1, entry)) / weights.gather(-1, entry)
    return entry, rest.clamp(0, _BELOW_ONE)
