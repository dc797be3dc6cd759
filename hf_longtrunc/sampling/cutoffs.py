r"""Entropy-dependent thresholds on rows of scores, in pure torch.

A row of scores s (logits, log-probabilities, anything up to a constant) is read as p = softmax(s). With
z = s - max s, w = exp z, Z = sum w:

    log p = z - log Z         H = log Z - (sum w z) / Z         keep a token iff log p >= log threshold

so one exponential and two sums give everything (top-n-sigma and p-less take one pass more): no sort, no host sync. The
maximum sits at z = 0, which makes "the most probable token stays" a clamp of the bar at zero.

Invariants:
- fp32 arithmetic whatever the input; entries at -inf (cut by an earlier processor) count as p = 0.
- a row's result depends on that row alone, to the bit (see `_row_sum`).
- a row that is no distribution (a NaN, a +inf, or nothing but -inf) has threshold NaN, no comparison with which
  holds: it comes back unchanged, so that the sampler reports it instead of drawing from something invented here.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# exp(-200) is exactly 0 in fp32: the floor gives tokens at -inf zero weight and keeps 0 * (-inf) out of the sums.
_Z_FLOOR = -200.0
# A summation tree of this width is one warp wide on CUDA and never split between threads on a CPU.
_FOLD = 32
# A draw reads a level of so many entries whole: on a CPU as quick as 32 of them, and it saves the levels above.
_WHOLE_LEVEL = 2048
_BELOW_ONE = 1 - 2**-53


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


def eta_log_threshold(rows: Softmax, epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Log of eta: min(log epsilon, log epsilon / 2 - H) (Hewitt et al. 2022, section 4.2); one epsilon, or one a row.

    H is the entropy of the full row, so the bar falls below epsilon only where H > -log(epsilon) / 2: a flat
    distribution keeps a long tail, a peaked one is cut at epsilon.
    """
    log_epsilon = _logs(epsilon, rows)
    return (log_epsilon / 2 - rows.entropy).clamp_max(log_epsilon)


def epsilon_log_threshold(rows: Softmax, epsilon: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Log of epsilon for every row that is a distribution, NaN for the others (Hewitt et al. 2022, section 4.1)."""
    return torch.where(rows.log_total.isnan(), rows.log_total, _logs(epsilon, rows))


def top_n_sigma_log_threshold(rows: Softmax, n: float | Tensor) -> Float[Tensor, "*rows 1"]:
    """Log of the probability of a score n standard deviations below the row's maximum (Tang et al. 2024, section 3).

    The deviation is that of the row's scores, entries at -inf left out: the root of their mean square about the mean.
    It does not depend on temperature: scores and their deviation are divided by the same number.
    """
    alive = rows.z > _Z_FLOOR
    count = _row_sum(alive.float())
    centred = torch.where(alive, rows.z - _row_sum(torch.where(alive, rows.z, 0)) / count, 0)
    sigma = (_row_sum(centred.square_()) / count).sqrt_()
    n = n if isinstance(n, float) else _column(n.tolist(), rows)
    return -n * sigma - rows.log_total


def p_less_log_threshold(rows: Softmax, normalized: bool = False) -> Float[Tensor, "*rows 1"]:
    """Log of the collision probability C = sum of p^2 (Tan et al. 2025, section 3), which max p always reaches.

    Normalised it is (V C - 1) / (V - 1): C less what the wrong tokens, 1 - C, come to on average.
    """
    log_probs = rows.z - rows.log_total
    if not normalized:
        return _row_sum(log_probs.mul_(2).exp_()).log()
    # V C - 1 = V sum (p - 1 / V)^2, which does not cancel in flat rows.
    size = rows.z.shape[-1]
    return (_row_sum(log_probs.exp_().sub_(1 / size).square_()) * (size / max(size - 1, 1))).log()


def below_threshold(
    scores: Float[Tensor, "*rows vocab"],
    rows: Softmax,
    log_threshold: Float[Tensor, "*rows 1"],
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Mark each token with log p < log_threshold that is not among the row's most probable ones.

    Args:
        scores: the rows that `rows` was made from.
        rows: their softmax.
        log_threshold: one bar a row, in nats.
        min_tokens_to_keep: so many of the largest scores stay whatever the bar, ties with the last of them too;
            1 costs nothing, more costs a `topk`.

    Returns:
        A boolean mask of the shape of `scores`.
    """
    cut = rows.z < (log_threshold + rows.log_total).clamp_max(0)
    if min_tokens_to_keep > 1:
        kth_largest = scores.topk(min(min_tokens_to_keep, scores.shape[-1]), dim=-1).values[..., -1:]
        cut = cut & (scores < kth_largest)
    return cut


def _logs(values: float | Tensor, rows: Softmax) -> float | Tensor:
    # By math.log in both cases, so that a row has the same bits alone and among others.
    if isinstance(values, float):
        return math.log(values)
    return _column([math.log(value) for value in values.tolist()], rows)


def _column(values: list[float], rows: Softmax) -> Float[Tensor, "*rows 1"]:
    """One value for all rows, or one a row, or one for each group of rows that stand together, as a column."""
    column = torch.tensor(values, dtype=torch.float32, device=rows.z.device)[:, None]
    if rows.z.ndim != 2 or rows.z.shape[0] % len(values):
        raise ValueError(
            f"{len(values)} values, one a row, do not fit scores {list(rows.z.shape)}: give one for every row, or one "
            "for every prompt, whose beams or returns stand together"
        )
    return column.repeat_interleave(rows.z.shape[0] // len(values), 0)


def _row_sum(values: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows 1"]:
    """Sum over the last dimension by a 32-ary tree, whose shape depends on that dimension alone.

    `Tensor.sum` splits a lone long row between threads (CPU) or blocks (CUDA) and not one of many rows: the same
    row then rounds differently in another batch, and a token on the bar is kept in one and cut in the other.
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
