r"""How much probability a token can have among all distributions that a basis cannot tell from p-hat.

    max { p_i : p >= 0, sum_j p_j b_j = sum_j p-hat_j b_j }

is the closed form of basis-aware truncation without p >= 0: there sigma p-hat - p >= 0 is all that is asked, and
token i is kept iff p-hat_i > tau times this maximum. The polytope is one for all tokens and thresholds of a row.

At a low temperature p-hat spans twenty orders of magnitude, and sums over it keep nothing but the first token. Two
changes of variables, neither of which changes the program, bring everything to the size of one:

- coordinates in which the most probable independent tokens are the unit vectors, so that nothing small is a difference
  of large numbers, divided by what p-hat puts on them; then each column by its largest entry. This gives columns a_j
  with entries in [-1, 1], and p_j = scale_j x_j.
- the analytic centre x of the polytope on some columns, with its multipliers d: x_j (a_j . d) = 1 for each of them.
  Columns divided by their height a_j . d have weight one each and d for the constant function: the form that
  `interior_point` starts from, at its best point for every token.

Invariant: "reaches" and "stays under" are only said by a relative margin of 1e-8 in these coordinates, the second over
all columns, rounding included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.sampling.interior_point import MARGIN, Box, InteriorPoint, split

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_EPSILON = torch.finfo(torch.float64).eps
# Among so many of the most probable tokens are the axes.
_CANDIDATES = 2048
# A column with less than this of its length outside the earlier ones depends on them.
_INDEPENDENT = 1e-8
_MAX_STEPS = 40
_MAX_ROUNDS = 40
# Newton's decrement at which the centre is exact to rounding, and under which its full step is safe.
_CENTRED = 1e-9
_NEAR = 0.25
# Columns that join for each multiplier, or centre, that the whole vocabulary refuses.
_JOINING = 32
_VERIFIED_TOGETHER = 16


class Proof(NamedTuple):
    """The distribution p [vocab] with p_i >= level, or the multipliers l [width] with l . b_j >= 0 everywhere.

    For these the margin says by what part level (l . b_i) exceeds sum_j p-hat_j (l . b_j).
    """

    vector: Tensor
    margin: float | None = None


class _Raised(NamedTuple):
    """Multipliers over all columns, raised along d until nowhere negative: f = y . a_j / height_j + shift."""

    f: Float[Tensor, "n vocab"]
    shift: Float[Tensor, " n"]
    total: Float[Tensor, " n"]  # of the image: no x_i / height_i exceeds total / f_i


class Polytope:
    """The distributions with the image of one row's p-hat, in float64.

    Args:
        probs: p-hat; tokens of probability zero are left out.
        basis: b_j, each with a leading one.
        columns: how many of the most probable tokens the programs start with; what they lack joins them.
    """

    def __init__(self, probs: Float[Tensor, " vocab"], basis: Float[Tensor, "vocab width"], columns: int):
        self._probs = probs
        axes = _axes(probs, basis)
        self._inverse = torch.linalg.pinv(basis[axes])
        entries = basis @ self._inverse
        entries[axes] = torch.eye(len(axes), dtype=basis.dtype, device=basis.device)
        self._sizes = probs @ entries.abs()
        self._image = probs @ entries / self._sizes
        entries /= self._sizes
        self._scale = entries.abs().amax(1).reciprocal_()
        self._entries = entries.mul_(self._scale[:, None])
        # The constant function of the basis: above zero on every column.
        self._centre = self._sizes
        likely = probs.topk(min(columns, len(probs))).indices
        self._columns = likely[:0]
        self._join(torch.cat([axes, likely[probs[likely] > 0]]))

    def decide(
        self, tokens: Int[Tensor, " n"], levels: Float[Tensor, " n"], proofs: dict[int, Proof] | None = None
    ) -> Tensor:
        """Return [n], int8: -1 where a token's probability can reach its level, 1 where it cannot, 0 for not known.

        With `proofs`, that dictionary gets the proof of each place n that is known.
        """
        status = torch.zeros_like(tokens, dtype=torch.int8)
        for _ in range(_MAX_ROUNDS):
            refused = self._pass(tokens, self._bars(tokens, levels), status, proofs)
            if not len(refused):
                break
            self._join(refused.topk(min(_JOINING, refused.shape[1]), largest=False).indices.flatten())
        return status

    def bound(self, token: int, level: float) -> float:
        """Return a proved upper bound of the token's probability that is under `level`, or infinity for none."""
        tokens, levels = torch.tensor([token], device=self._probs.device), self._probs.new_tensor([level])
        for _ in range(_MAX_ROUNDS):
            outcome = self._program.solve(self._rays(tokens), self._bars(tokens, levels), settle=1.0)
            if not self._is_centred or int(outcome.status[0]) != 1:
                break
            raised = self._raised(outcome.multipliers @ self._whitener.T)
            bound = float(raised.total / raised.f[:, token] * self._scale[token] / self._heights[token])
            if bound < level * (1 - MARGIN):
                return bound
            self._join(raised.f.topk(min(_JOINING, raised.f.shape[1]), largest=False).indices.flatten())
        return torch.inf

    def _bars(self, tokens: Tensor, levels: Tensor) -> Tensor:
        return levels.div(self._scale[tokens]).mul_(self._heights[tokens])

    def _rays(self, tokens: Tensor) -> Float[Tensor, "n width"]:
        return torch.mm(self._entries[tokens] / self._heights[tokens, None], self._whitener)

    def _pass(
        self, tokens: Tensor, bars: Tensor, status: Tensor, proofs: dict[int, Proof] | None
    ) -> Float[Tensor, "n vocab"]:
        """Ask every token without an answer once; return the f of the multipliers that prove nothing."""
        refused = [bars.new_zeros(0, len(self._probs))]
        rays = self._rays(tokens)
        pending = (status == 0).nonzero()[:, 0]
        if not self._is_centred:
            return refused[0]
        if proofs is None and len(pending) > 1:
            status[pending[self._program.screen(rays[pending], bars[pending])]] = -1
        for (batch,) in split(self._program.batch, pending):
            batch = batch[status[batch] == 0]
            outcome = self._program.solve(rays[batch], bars[batch])
            reached, under = (outcome.status == -1).nonzero()[:, 0], (outcome.status == 1).nonzero()[:, 0]
            status[batch[reached]] = -1
            if proofs is not None:
                for n in reached.tolist():
                    reached = self._distribution(int(tokens[batch[n]]), bars[batch[n]], outcome.u[n])
                    proofs[int(batch[n])] = Proof(reached)
            for places, y in split(_VERIFIED_TOGETHER, batch[under], outcome.multipliers[under] @ self._whitener.T):
                refused.append(self._verify(places, y, tokens, bars, status, proofs))
        return torch.cat(refused)

    def _verify(
        self,
        places: Tensor,
        y: Float[Tensor, "n width"],
        tokens: Tensor,
        bars: Tensor,
        status: Tensor,
        proofs: dict[int, Proof] | None,
    ) -> Float[Tensor, "m vocab"]:
        """Write down each token that one of the multipliers keeps under its level; return the f of those that failed.

        `places` says which token each multiplier was made for.
        """
        raised = self._raised(y)
        under = raised.total[:, None] < bars * raised.f[:, tokens] * (1 - MARGIN)
        new = (under.any(0) & (status == 0)).nonzero()[:, 0]
        status[new] = 1
        if proofs is not None:
            for n in new.tolist():
                first = under[:, n].nonzero()[0, 0]
                multipliers = self._inverse @ ((y[first] + raised.shift[first] * self._centre) / self._sizes)
                margin = float(bars[n] * raised.f[first, tokens[n]] / raised.total[first]) - 1
                proofs[n] = Proof(multipliers, margin)
        return raised.f[status[places] == 0]

    def _raised(self, y: Float[Tensor, "n width"]) -> _Raised:
        # Coordinates differ in size by as much as probabilities do: each term rounds by itself.
        size = 64 * _EPSILON * y.abs()
        f = y @ self._entries.T / self._heights
        least = f - size @ self._entries.abs().T / self._heights
        shift = least.masked_fill_(self._probs <= 0, 0).amin(1).clamp_max_(0).neg_()
        total = y @ self._image + shift * (self._image @ self._centre) + size @ self._image.abs()
        return _Raised(f + shift[:, None], shift, total)

    def _distribution(self, token: int, bar: Tensor, u: Float[Tensor, " k"]) -> Float[Tensor, " vocab"]:
        x = torch.zeros_like(self._probs)
        x[self._columns] = 1 - u
        x[token] += bar
        return x.mul_(self._scale).div_(self._heights)

    def _join(self, columns: Int[Tensor, " m"]) -> None:
        """Add columns, find the centre of the polytope on all of them, and prepare the program there.

        Where the centre's d is negative, columns are missing: the most negative ones join, and d goes as far as it may.
        """
        self._columns = _with(self._columns, columns)
        before = self._over_columns(self._centre)
        for _ in range(_MAX_ROUNDS):
            centre, self._is_centred = _analytic_centre(self._entries[self._columns], self._image, self._centre)
            heights = self._over_columns(centre)
            outside = (heights <= 0).nonzero()[:, 0]
            if len(outside):
                part = 0.5 * (before / (before - heights))[outside].min()
                centre = self._centre.lerp(centre, part)
                worst = (heights / before)[outside].topk(min(_JOINING, len(outside)), largest=False).indices
                self._columns = _with(self._columns, outside[worst])
                heights = self._over_columns(centre)
            self._centre, before = centre, heights
            if self._is_centred and not len(outside):
                break
        self._heights = heights
        self._prepare()

    def _over_columns(self, d: Float[Tensor, " width"]) -> Float[Tensor, " vocab"]:
        return torch.mv(self._entries, d).masked_fill_(self._probs <= 0, 1)

    def _prepare(self) -> None:
        columns = self._entries[self._columns] / self._heights[self._columns, None]
        factor, failed = torch.linalg.cholesky_ex(columns.T @ columns)
        self._is_centred &= not int(failed)
        unit = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self._whitener = torch.linalg.solve_triangular(factor, unit, upper=False).T.contiguous()
        weights = torch.ones_like(columns[:, 0])
        self._program = InteriorPoint(columns @ self._whitener, weights, Box(1.0, 0.0), len(weights))


def _with(columns: Int[Tensor, " k"], joining: Int[Tensor, " m"]) -> Int[Tensor, " n"]:
    every = torch.cat([columns, joining]).sort().values
    return every[torch.cat([every[:1] >= 0, every[1:] != every[:-1]])]


def _axes(probs: Float[Tensor, " vocab"], basis: Float[Tensor, "vocab width"]) -> Int[Tensor, " axes"]:
    """Return independent tokens, the next one always that of the most p-hat_j |b_j outside the earlier ones|."""
    for count in (_CANDIDATES, len(probs)):
        candidates = probs.topk(min(count, len(probs))).indices
        rest, length, chosen = basis[candidates], basis[candidates].norm(dim=1), []
        for _ in range(basis.shape[1]):
            outside = rest.norm(dim=1)
            gain = (outside * probs[candidates]).masked_fill_(outside <= _INDEPENDENT * length, 0)
            best = gain.argmax()
            if not float(gain[best]) > 0:
                break
            chosen.append(candidates[best])
            direction = rest[best] / outside[best]
            for _ in range(2):  # the second time for what rounding left of the first
                rest = rest.addr(rest @ direction, direction, alpha=-1)
        if len(chosen) == basis.shape[1]:
            break
    return torch.stack(chosen)


def _analytic_centre(
    columns: Float[Tensor, "k width"], image: Float[Tensor, " width"], start: Float[Tensor, " width"]
) -> tuple[Float[Tensor, " width"], bool]:
    """Minimise image . d - sum log(a_j . d) by Newton's method from a d with a_j . d > 0; say whether it was found."""
    d = start
    for _ in range(_MAX_STEPS):
        scaled = columns / (columns @ d)[:, None]
        gradient = image - scaled.sum(0)
        step = _solved(scaled.T @ scaled, -gradient)
        decrement = float((-gradient @ step).clamp_min(0).sqrt())
        if not decrement > _CENTRED:  # NaN too
            return d, decrement <= _CENTRED
        d = d + _length(scaled @ step, float(image @ step), decrement) * step
    return d, False


def _length(rate: Float[Tensor, " k"], slope: float, decrement: float) -> float:
    """Return how far to go: all the way near the centre, else until the objective falls well short of the border."""
    if decrement < _NEAR:
        return 1.0
    length = min(1.0, 0.95 / max(-float(rate.min()), 1e-300))
    while length > 1e-9 and slope * length - float((length * rate).log1p().sum()) > -1e-4 * length * decrement**2:
        length /= 2
    return length


def _solved(matrix: Float[Tensor, "width width"], right: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """Solve with a positive definite matrix, its diagonal scaled to one; NaN where it has no factor."""
    scale = matrix.diagonal().rsqrt()
    factor, failed = torch.linalg.cholesky_ex(matrix * scale[:, None] * scale)
    solution: Tensor = torch.cholesky_solve((right * scale)[:, None], factor)[:, 0] * scale
    return solution.masked_fill(failed != 0, torch.nan)
