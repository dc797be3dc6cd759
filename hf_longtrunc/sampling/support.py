r"""Which tokens provably have non-zero true probability: basis-aware truncation, decided with certificates.

With p-hat the model's distribution, b_j = (1, W_j) the basis of its output embedding with a leading one, and a
threshold tau, s = tau / (1 - tau), sigma = 1 + s: token i is **kept** iff no p satisfies

    sum_j p_j b_j = sum_j p-hat_j b_j,    p_i = 0,    0 <= p <= sigma p-hat

Write p_j = p-hat_j (1 + u_j). Everything then takes place in one convex body that all tokens share,

    Z = { sum_j p-hat_j u_j b_j : -1 <= u_j <= s },  and token i is cut iff sigma p-hat_i b_i lies in Z.

So how far the ray of b_i runs inside Z decides, a linear program in t, and each side of its duality is a proof:

    max { t : sum_j p-hat_j u_j b_j = t b_i }  =  min { T(l) : l . b_i = 1 },
    T(l) = sum_j p-hat_j (s max(f_j, 0) + max(-f_j, 0)),  f_j = l . b_j

- one l with T(l) < sigma p-hat_i (l . b_i) keeps token i, and every other token for which that holds;
- one u with t >= sigma p-hat_i cuts it. A u that is zero outside some columns is as good a proof as any.

The program is weighted quantile regression with rank + 1 coefficients. It is solved on the most probable columns by
the Frisch-Newton interior point (Portnoy and Koenker 1997) with Mehrotra's corrector, for many tokens at a time,
and left at the first proof. Its start u = 0, l = (1, 0, ..., 0) is feasible on both sides for every token, so each
iterate bounds the optimum from both sides; its first step is the least-squares solution. A kept token's l is
verified over the whole vocabulary in float64; where it fails, the columns that it misjudged join and the program is
solved again.

Invariants:
- "kept" and "cut" are only said with a proof whose inequality holds by a relative margin of 1e-8, rounding included;
  what cannot be proved within the limits of work is "undecided", and counted.
- a row's decisions depend on that row, tau and the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.sampling.basis import SoftmaxBasis

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Variant = Literal["paper", "official"]

_MARGIN = 1e-8
# Residual of a cut's equalities, relative to the target: far under the margin once corrected.
_RESIDUAL = 1e-10
_EPSILON = torch.finfo(torch.float64).eps
_STEP = 0.9995
_MAX_ITERATIONS = 60
_MAX_ROUNDS = 12
# Numbers in the [tokens, columns] arrays of tokens that are solved together: they stay in a core's second-level cache.
_BATCH_SIZE = 2**15
_VERIFIED_TOGETHER = 16
# Most tokens are cut on so few columns, in so few iterations; what is left goes on to more.
_SIFTING_COLUMNS = 128
_SIFTING_ITERATIONS = 8
# Columns that join the head for each multiplier that the whole vocabulary refuses.
_JOINING = 32
# The other tokens are bundled by the signs of f under so many of those multipliers.
_BITS = 8
# Columns of less probability than this have nothing to give.
_NEGLIGIBLE = 1e-30
# From so many tokens on, products b_jk b_jl formed once make the normal matrices cheaper.
_PAIRS_PAY = 4
# tau above this is "every threshold": s stays representable.
_TAU_MAX = 0.999


class Decision(IntEnum):
    """What is proved about a token."""

    CUT = -1
    UNDECIDED = 0
    KEPT = 1


@dataclass(frozen=True, eq=False)
class Certificate:
    """The proof behind one decision; everything in float64.

    Attributes:
        token: the token that it speaks of.
        decision: kept, cut or undecided.
        multipliers: of a kept token below tau: l [rank + 1], the constant's first, with
            sum_j p-hat_j (s max(f_j, 0) + max(-f_j, 0)) < sigma p-hat_i f_i, f_j = l . (1, W_j).
        distribution: of a cut token: p [vocabulary] with p_i = 0, 0 <= p <= sigma p-hat, and p-hat's sum and W^T p-hat.

    Both are None where p-hat_i >= tau (kept), where p-hat_i = 0 (cut), and where nothing is proved.
    """

    token: int
    decision: Decision
    multipliers: Tensor | None = None
    distribution: Tensor | None = None


class _Box(NamedTuple):
    """-1 <= u <= ceiling; without a floor (`floored` 0) the official code's form, which lets p go below zero."""

    ceiling: float
    floored: float

    @classmethod
    def of(cls, tau: float, variant: Variant) -> _Box:
        return cls(tau / (1 - tau), float(variant == "paper"))


class _Row(NamedTuple):
    """One row of scores: p-hat over the vocabulary and the basis with its leading one."""

    probs: Float[Tensor, " vocab"]
    basis: Float[Tensor, "vocab width"]


class _Head(NamedTuple):
    """Columns of a row: single tokens first, then bundles of tokens that share one u.

    A u on these columns is a u on the vocabulary, zero for tokens in no column: what is feasible here is feasible
    there. Coordinates are those in which sum_j p-hat_j b_j b_j^T over the columns is the identity.
    """

    singles: Int[Tensor, " singles"]
    member: Int[Tensor, " vocab"]  # the column that each token belongs to, -1 for none
    probs: Float[Tensor, " k"]
    basis: Float[Tensor, "k width"]
    whitener: Float[Tensor, "width width"]  # head coordinates = b @ whitener; l = whitener @ (head's l)

    def pairs(self) -> Float[Tensor, "k pairs"]:
        width = self.basis.shape[1]
        i, j = torch.triu_indices(width, width, device=self.basis.device)
        columns = self.basis.T.contiguous()
        return (columns[i] * columns[j]).T


class _Programs(NamedTuple):
    """Interior-point iterates, one row a token. Side 0 is the floor (slack 1 + u), side 1 the ceiling (s - u)."""

    place: Int[Tensor, " n"]
    target: Float[Tensor, "n width"]
    bar: Float[Tensor, " n"]
    slack: Float[Tensor, "n 2 k"]
    dual: Float[Tensor, "n 2 k"]
    t: Float[Tensor, " n"]
    multipliers: Float[Tensor, "n width"]  # the latest l with l . target = 1
    upper: Float[Tensor, " n"]  # T at it

    def select(self, rows: Tensor) -> _Programs:
        return _Programs(*(field[rows] for field in self))


class _Outcome(NamedTuple):
    """Per token: -1 with a feasible u that reaches the bar, 1 with an l below it on the head's columns, or 0."""

    status: Tensor  # [n] int8
    u: Float[Tensor, "n k"]
    multipliers: Float[Tensor, "n width"]  # head coordinates


class _Bound(NamedTuple):
    """T(l) = ceiling * positive + negative, with f raised by `shift` where the body has no floor."""

    positive: Float[Tensor, " n"]
    negative: Float[Tensor, " n"]
    shift: Float[Tensor, " n"]


class _Newton(NamedTuple):
    """The Newton system at an iterate, with its affine (predictor) step."""

    ratio: Float[Tensor, "n 2 k"]  # dual / slack
    weight: Float[Tensor, "n k"]  # du per df
    factor: Float[Tensor, "n width width"]  # Cholesky, of the normal matrix scaled to a unit diagonal
    scale: Float[Tensor, "n width"]
    ray: Float[Tensor, "n width"]  # normal matrix^-1 target
    dt: Float[Tensor, " n"]
    multipliers: Float[Tensor, "n width"]
    f: Float[Tensor, "n k"]
    du: Float[Tensor, "n k"]
    d_slack: Float[Tensor, "n 2 k"]
    d_dual: Float[Tensor, "n 2 k"]
    primal_step: Float[Tensor, " n"]

    def select(self, rows: Tensor) -> _Newton:
        return _Newton(*(field[rows] for field in self))

    def solve(self, right: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        return self.scale * torch.cholesky_solve((self.scale * right)[..., None], self.factor)[..., 0]


class _InteriorPoint:
    """Max t on the columns of one head, for many targets at a time.

    The barrier gives column j the weight p-hat_j + mean p-hat: by p-hat alone a rare column is no obstacle until the
    step hits it, by one alone it is as large as a frequent one. Measured on SmolLM2: 2.3 to 4.3 iterations a token,
    where p-hat alone takes 4.9 to 8.4.
    """

    def __init__(self, head: _Head, box: _Box, tokens: int):
        self.head, self.box = head, box
        self.pairs = head.pairs() if tokens >= _PAIRS_PAY else None
        weights = 1 + head.probs.mean() / head.probs
        self.weights = weights * (head.probs.sum() / (weights @ head.probs))
        self.sign = head.probs.new_tensor([[box.floored], [-1.0]])
        # The dual objective, per dual variable.
        self.cost = torch.cat([head.probs, box.ceiling * head.probs])

    @property
    def batch(self) -> int:
        """Tokens to solve together."""
        return int(max(_PAIRS_PAY, _BATCH_SIZE // len(self.head.probs)))

    def solve(self, target: Tensor, bar: Tensor, *, settle: float = 0.0, iterations: int = _MAX_ITERATIONS) -> _Outcome:
        """Decide for each target [n, width] whether t reaches its bar [n].

        `settle`: a token below its bar is only let go once the gap between the two bounds is at most 1 / settle of the
        distance to the bar; 0 leaves at the first proof.
        """
        n, k = len(target), len(self.head.probs)
        outcome = _Outcome(target.new_zeros(n, dtype=torch.int8), target.new_zeros(n, k), torch.zeros_like(target))
        programs = self._start(target, bar)
        for _ in range(iterations):
            newton = self._newton(programs)
            going = self._harvest(programs, newton, settle, outcome)
            left = int(going.sum())
            if not left:
                break
            if left < len(going):
                programs, newton = programs.select(going), newton.select(going)
            programs = self._advance(programs, newton)
        return outcome

    def screen(self, target: Tensor, bar: Tensor) -> Tensor:
        """[n]: whether the first step alone, whose matrix all tokens share, reaches the bar."""
        newton = self._newton(self._start(target[:1], bar[:1]))
        return torch.cat([self._screen(newton, *part) for part in _split(2 * self.batch, target, bar)])

    def _screen(self, newton: _Newton, target: Tensor, bar: Tensor) -> Tensor:
        u = newton.solve(target) @ self.head.basis.T * newton.weight
        # t along the ray: 1 over the first of u's bounds that it meets.
        rate = torch.maximum(u.amax(1) / self.box.ceiling, -self.box.floored * u.amin(1))
        residual = (u * self.head.probs) @ self.head.basis - target
        exact: Tensor = residual.abs().amax(1) <= _RESIDUAL * target.norm(dim=1)
        return exact & (rate * bar * (1 + _MARGIN) <= 1)

    def _start(self, target: Tensor, bar: Tensor) -> _Programs:
        """Start from u = 0 and l = 1 for the constant: feasible on both sides and nearly centred, for every token."""
        s, floored = self.box.ceiling, self.box.floored
        floor_dual = (s / (1 - floored * s) if s < 0.5 else 1.0) * self.weights
        dual = torch.stack([floor_dual, 1 + floored * floor_dual])
        slack = torch.stack([torch.ones_like(floor_dual), torch.full_like(floor_dual, s)])
        place = torch.arange(len(target), device=target.device)
        every = len(target), -1, -1
        nothing = torch.zeros_like(target), torch.full_like(bar, torch.inf)
        return _Programs(place, target, bar, slack.expand(every), dual.expand(every), torch.zeros_like(bar), *nothing)

    def _newton(self, programs: _Programs) -> _Newton:
        ratio = programs.dual / programs.slack
        weight = 1 / (self.sign.square().T @ ratio)[:, 0]
        factor, scale = _scaled_cholesky(self._normal_matrix(weight * self.head.probs))
        ray = scale * torch.cholesky_solve((scale * programs.target)[..., None], factor)[..., 0]
        dt = 1 / (programs.target * ray).sum(1)
        multipliers = ray * dt[:, None]
        f = multipliers @ self.head.basis.T
        du = f * weight
        d_slack = self.sign * du[:, None]
        d_dual = -torch.addcmul(programs.dual, ratio, d_slack)
        step = _longest(programs.slack, d_slack)
        return _Newton(ratio, weight, factor, scale, ray, dt, multipliers, f, du, d_slack, d_dual, step)

    def _normal_matrix(self, weight: Float[Tensor, "n k"]) -> Float[Tensor, "n width width"]:
        basis = self.head.basis
        if self.pairs is None:
            return (basis.T * weight[:, None]) @ basis
        width = basis.shape[1]
        i, j = torch.triu_indices(width, width, device=basis.device)
        matrix = basis.new_empty(len(weight), width, width)
        matrix[:, i, j] = matrix[:, j, i] = weight @ self.pairs
        return matrix

    def _harvest(self, programs: _Programs, newton: _Newton, settle: float, outcome: _Outcome) -> Tensor:
        """Write down what is proved at this iterate; return which programs go on."""
        # The optimum lies between t where the ray meets the box and T at the predictor's or the last corrector's l.
        lower = programs.t + newton.primal_step * newton.dt
        ahead = self._per_unit(newton.f)
        upper = torch.minimum(ahead, programs.upper)
        below = upper < programs.bar * (1 - _MARGIN)
        if settle:
            below &= settle * (upper - lower) <= programs.bar - upper
        above = lower >= programs.bar * (1 + _MARGIN)
        going = newton.dt.isfinite()
        if below.any():
            outcome.status[programs.place[below]] = 1
            best = torch.where((ahead < programs.upper)[:, None], newton.multipliers, programs.multipliers)
            outcome.multipliers[programs.place[below]] = best[below]
            going &= ~below
        if above.any():
            rows = above.nonzero()[:, 0]
            u, proved = self._feasible(programs.select(rows), newton.select(rows))
            cut = rows[proved]
            outcome.status[programs.place[cut]] = -1
            outcome.u[programs.place[cut]] = u[proved]
            going[cut] = False
        return going

    def _per_unit(self, f: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        """T(l) over the head's columns, for f of l with l . b_i = 1."""
        if self.box.floored:
            return torch.maximum(self.box.ceiling * f, -f) @ self.head.probs
        bound = _bound(f, self.head.probs, self.box)
        return self.box.ceiling * bound.positive / (1 + bound.shift)

    def _feasible(self, programs: _Programs, newton: _Newton) -> tuple[Tensor, Tensor]:
        """Return u at a point of the ray just past the bar, its equalities corrected, and whether it is a proof."""
        target, bar, basis = programs.target, programs.bar, self.head.basis
        past_bar = (bar * (1 + 1e-4) - programs.t) / newton.dt
        step = torch.minimum(newton.primal_step, past_bar.clamp_min(0))
        u = self.box.ceiling - programs.slack[:, 1] + step[:, None] * newton.du
        t = programs.t + step * newton.dt
        goal = t[:, None] * target
        # Least squares in the head's coordinates, in which the columns' second moment is the identity.
        u = u - (((u * self.head.probs) @ basis) - goal) @ basis.T
        residual = ((u * self.head.probs) @ basis - goal).abs().amax(1)
        excess = torch.maximum(u.amax(1) / self.box.ceiling, -self.box.floored * u.amin(1)).clamp_min(1)
        reached = t / excess >= bar * (1 + _MARGIN)
        return u * (bar / t)[:, None], reached & (residual <= _RESIDUAL * t * target.norm(dim=1))

    def _advance(self, programs: _Programs, newton: _Newton) -> _Programs:
        """Mehrotra's corrector: aim at the centre as far as the predictor failed to close the gap."""
        gap = programs.dual.flatten(1) @ self.cost - programs.t
        dual_step = _longest(programs.dual, newton.d_dual).clamp_max(1)
        closed = dual_step * (newton.d_dual.flatten(1) @ self.cost) - newton.primal_step.clamp_max(1) * newton.dt
        centring = (1 + closed / gap).clamp(0, 1) ** 3
        mu = (centring * gap)[:, None] * (self.weights / (2 * self.head.probs.sum()))
        goal = (mu[:, None] - newton.d_slack * newton.d_dual) / programs.slack
        aim = -(self.sign.T @ goal)[:, 0]
        h = newton.solve((newton.weight * aim * self.head.probs) @ self.head.basis)
        dt = (1 - (programs.target * h).sum(1)) * newton.dt
        multipliers = torch.addcmul(h, dt[:, None], newton.ray)
        f = multipliers @ self.head.basis.T
        du = newton.weight * (f - aim)
        d_slack = self.sign * du[:, None]
        d_dual = goal - torch.addcmul(programs.dual, newton.ratio, d_slack)
        primal = (_STEP * _longest(programs.slack, d_slack)).clamp_max(1)
        dual = (_STEP * _longest(programs.dual, d_dual)).clamp_max(1)
        return programs._replace(
            slack=torch.addcmul(programs.slack, primal[:, None, None], d_slack),
            dual=torch.addcmul(programs.dual, dual[:, None, None], d_dual),
            t=torch.addcmul(programs.t, primal, dt),
            multipliers=multipliers,
            upper=self._per_unit(f),
        )


def _longest(values: Float[Tensor, "n 2 k"], change: Float[Tensor, "n 2 k"]) -> Float[Tensor, " n"]:
    """Longest step that keeps every value positive."""
    return -1 / (change / values).amin((1, 2)).clamp_max(-1e-300)


def _bound(f: Float[Tensor, "n k"], probs: Float[Tensor, " k"], box: _Box) -> _Bound:
    """Return the parts of T for rows of f; without a floor f is first raised until it is nowhere negative."""
    if box.floored:
        positive = f.clamp_min(0) @ probs
        return _Bound(positive, positive - f @ probs, torch.zeros_like(positive))
    shift = -f.amin(1).clamp_max(0)
    return _Bound(f @ probs + shift * probs.sum(), torch.zeros_like(shift), shift)


def _scaled_cholesky(matrix: Float[Tensor, "n width width"]) -> tuple[Tensor, Tensor]:
    """Cholesky factor of each matrix scaled to a unit diagonal, with 1e-13 on it, and the scale."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    scaled = matrix * scale[:, :, None] * scale[:, None, :]
    scaled.diagonal(dim1=-2, dim2=-1).add_(1e-13)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    # A matrix that is not positive definite gives up its token: NaN fails every proof.
    return factor.masked_fill_((failed != 0)[:, None, None], torch.nan), scale


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _split(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True))


class SupportChecker:
    """Decides tokens of rows of scores by basis-aware truncation, each with a proof.

    Args:
        basis: of the output embedding of the model that made the scores; moved to the scores' device on first use.
        variant: "paper" asks 0 <= p; "official" leaves that out, as the authors' generation code does (fewer tokens
            are kept, never others).
        columns: how many of the most probable tokens the linear programs start with.

    Attributes:
        checked, undecided: tokens below tau that were decided by proof or not, since the checker was made. Undecided
            ones are reported as such; whoever needs a set treats them as cut, since keeping asks for a proof.

    Cost on one CPU thread at V = 49152, rank 20 (docs/bat.md): 1 to 2 ms a check of one token, row included. Memory:
    V * (rank + 1) float64 for the basis, and 16 vectors of V while a batch is verified.

    Source: Finlayson et al. 2023, arXiv 2310.01693, section 5. Deviations: exact where the published code is at the
    mercy of a solver's tolerance; the restricted program, its proofs and their reuse are not in the paper.
    """

    def __init__(self, basis: SoftmaxBasis, *, variant: Variant = "paper", columns: int = 512):
        if not isinstance(basis, SoftmaxBasis):
            raise TypeError(f"basis must be a SoftmaxBasis, got {type(basis).__name__}; see SoftmaxBasis.from_model")
        if variant not in ("paper", "official"):
            raise ValueError(f"variant must be 'paper' or 'official', got {variant!r}")
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
            raise ValueError(f"columns must be a whole number of at least 1, got {columns!r}")
        self.basis, self.variant, self.columns = basis, variant, columns
        self.checked = self.undecided = 0
        ones = basis.factors.new_ones(basis.vocab_size, 1)
        self._basis = torch.cat([ones, basis.factors], dim=1).contiguous()
        self._largest = self._basis.abs().amax(0)

    def check(self, scores: Tensor, tau: float | Tensor, tokens: Tensor) -> Tensor:
        """Decide `tokens` [*rows, n] of `scores` [*rows, V] at `tau` (one number, or one a row [*rows] or [*rows, 1]).

        Scores are logits or log-probabilities, -inf for tokens that are out already (the latter not for a basis with a
        softcap). Returns int8 [*rows, n] of `Decision` values: 1 kept, -1 cut, 0 undecided.
        """
        return self._over_rows(scores, tau, tokens, None).clone()

    def certify(self, scores: Tensor, tau: float | Tensor, tokens: Tensor) -> list[Certificate]:
        """Decide as `check` does and return every token's proof, in the order of `tokens` read row by row."""
        proofs: list[Certificate] = []
        self._over_rows(scores, tau, tokens, proofs)
        return [replace(p, multipliers=_cloned(p.multipliers), distribution=_cloned(p.distribution)) for p in proofs]

    def kept(self, scores: Tensor, tau: float | Tensor, *, floor: float = 1e-6) -> Tensor:
        """Return the kept set as a boolean mask of `scores` [*rows, V].

        Tokens with floor <= p-hat < tau are decided one by one; those under `floor` are called cut without a proof, as
        are the undecided ones.
        """
        if not 0 <= floor < 1:
            raise ValueError(f"floor must lie in [0, 1), got {floor!r}")
        rows, taus = self._rows(scores, tau)
        masks = [self._kept(row, float(bar), floor).clone() for row, bar in zip(rows, taus, strict=True)]
        return torch.stack(masks).reshape(scores.shape)

    def critical_threshold(self, scores: Tensor, tokens: Tensor, *, tolerance: float = 1e-4) -> Tensor:
        """Return tau* of `tokens` [*rows, n]: each is kept at every tau below it and cut at tau* * (1 + tolerance).

        The paper's basis-aware probability: p-hat_i <= tau*_i. The value is a proved lower bound, 0.999 at most (a
        token that no threshold cuts); a solve that ends undecided leaves it at the bound proved so far. Cost: some 5
        to 10 checks a token. Float64.
        """
        rows, _ = self._rows(scores, 0.5)
        wanted = self._tokens(scores, tokens).reshape(len(rows), -1)
        values = [self._critical_of_row(row, ids, tolerance) for row, ids in zip(rows, wanted.tolist(), strict=True)]
        return torch.tensor(values, dtype=torch.float64, device=scores.device).reshape(tokens.shape)

    @torch.inference_mode()
    def row(self, scores: Tensor, tau: float) -> SupportRow:
        """Return the decisions of one row of scores [V] at one tau, its shared work done once."""
        rows, _ = self._rows(scores, tau)
        return SupportRow(self, self._row(rows[0]), tau)

    # Inference mode saves a fifth of the time of so many small operations; what leaves it is cloned outside.
    @torch.inference_mode()
    def _over_rows(
        self, scores: Tensor, tau: float | Tensor, tokens: Tensor, proofs: list[Certificate] | None
    ) -> Tensor:
        rows, taus = self._rows(scores, tau)
        wanted = self._tokens(scores, tokens).reshape(len(rows), -1)
        decisions = []
        for row, bar, ids in zip(rows, taus, wanted, strict=True):
            work = _RowWork(self, self._row(row), float(bar), ids, proofs is not None)
            work.decide()
            decisions.append(work.decisions)
            if proofs is not None:
                proofs += work.certificates()
        return torch.stack(decisions).reshape(tokens.shape)

    @torch.inference_mode()
    def _kept(self, scores: Tensor, tau: float, floor: float) -> Tensor:
        row = self._row(scores)
        tokens = ((row.probs >= floor) & (row.probs < tau)).nonzero()[:, 0]
        work = _RowWork(self, row, tau, tokens[row.probs[tokens].argsort(descending=True)], False)
        work.sift()
        work.decide()
        mask = row.probs >= tau
        mask[work.tokens[work.decisions == 1]] = True
        return mask

    @torch.inference_mode()
    def _critical_of_row(self, scores: Tensor, tokens: list[int], tolerance: float) -> list[float]:
        row = self._row(scores)
        return [self._critical(row, token, tolerance) for token in tokens]

    def _critical(self, row: _Row, token: int, tolerance: float) -> float:
        """Dinkelbach's steps: the l that is best at one s names the largest s that it can prove."""
        p = float(row.probs[token])
        if not 0 < p < _TAU_MAX:
            return min(p, _TAU_MAX)
        low, s_max = p / (1 - p), _TAU_MAX / (1 - _TAU_MAX)
        work = _RowWork(self, row, p, row.probs.new_tensor([token]).long(), False)
        for _ in range(_MAX_ITERATIONS):
            s = low * (1 + tolerance)
            if s >= s_max:
                return _TAU_MAX
            reach = work.largest_ceiling(_Box(s, float(self.variant == "paper")))
            if reach <= s:
                break
            low = reach
        return low / (1 + low)

    def _row(self, scores: Tensor) -> _Row:
        probs, basis, softcap = scores.double().softmax(-1), self._basis, self.basis.softcap
        if not bool(probs.sum().isfinite()):
            raise ValueError("scores must be finite or -inf, at least one of them finite, in every row")
        if softcap is not None:
            _check_capped(scores, softcap)
            # d logits / d hidden = diag(1 - (z / cap)^2) W: the error is orthogonal to those columns.
            slope = (1 - (scores.double() / softcap).square()).clamp_min(0).nan_to_num(0)
            basis = torch.cat([basis[:, :1], basis[:, 1:] * slope[:, None]], dim=1)
        return _Row(probs, basis)

    def _rows(self, scores: Tensor, tau: float | Tensor) -> tuple[Tensor, Tensor]:
        if scores.ndim == 0 or scores.shape[-1] != self.basis.vocab_size or not scores.is_floating_point():
            raise ValueError(
                f"scores must be a floating-point tensor [..., {self.basis.vocab_size}], the vocabulary of the basis, "
                f"got {scores.dtype} of shape {tuple(scores.shape)}; make the basis from the model they come from"
            )
        rows = scores.reshape(-1, scores.shape[-1])
        taus = torch.as_tensor(tau, dtype=torch.float64).reshape(-1).cpu()
        if len(taus) not in (1, len(rows)):
            raise ValueError(f"tau must be one number or one a row ({len(rows)}), got {len(taus)}")
        if not bool(((taus > 0) & (taus < 1)).all()):
            raise ValueError(f"tau must lie in (0, 1), got {tau}")
        if self._basis.device != scores.device:
            self._basis, self._largest = self._basis.to(scores.device), self._largest.to(scores.device)
        return rows, taus.expand(len(rows))

    def _tokens(self, scores: Tensor, tokens: Tensor) -> Tensor:
        if tokens.dtype != torch.long or tokens.shape[:-1] != scores.shape[:-1]:
            raise ValueError(
                f"tokens must be an int64 tensor {[*scores.shape[:-1], 'n']}, got {tokens.dtype} of shape "
                f"{tuple(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < scores.shape[-1]:
            raise ValueError(
                f"tokens must lie in 0..{scores.shape[-1] - 1}, got {int(tokens.min())}..{int(tokens.max())}"
            )
        return tokens.to(scores.device)


def critical_threshold(
    basis: SoftmaxBasis, scores: Tensor, tokens: Tensor, *, variant: Variant = "paper", tolerance: float = 1e-4
) -> Tensor:
    """Return tau* of tokens: `SupportChecker(basis, variant=variant).critical_threshold(scores, tokens)`."""
    return SupportChecker(basis, variant=variant).critical_threshold(scores, tokens, tolerance=tolerance)


class SupportRow:
    """One row of scores at one tau, for tokens asked about one after the other; made by `SupportChecker.row`."""

    def __init__(self, checker: SupportChecker, row: _Row, tau: float):
        self._checker, self._row, self._tau = checker, row, tau
        self._head: _Head | None = None

    @torch.inference_mode()
    def decide(self, token: int) -> Decision:
        """Decide one token."""
        work = _RowWork(
            self._checker, self._row, self._tau, torch.tensor([token], device=self._row.probs.device), False
        )
        work.head = self._head
        work.decide()
        self._head = work.head
        return Decision(int(work.decisions[0]))


class _RowWork:
    """The decisions about some tokens of one row at one tau."""

    def __init__(self, checker: SupportChecker, row: _Row, tau: float, tokens: Tensor, prove: bool):
        self.checker, self.row, self.tokens, self.prove = checker, row, tokens, prove
        self.box = _Box.of(tau, checker.variant)
        self.probs = row.probs[tokens]
        self.decisions = (self.probs >= tau).to(torch.int8) - (self.probs <= 0).to(torch.int8)
        self.proofs: dict[int, Certificate] = {}
        self.head: _Head | None = None

    def the_head(self) -> _Head:
        """Return the columns to start with, made on first use."""
        if self.head is None:
            self.head = _make_head(self.row, _most_probable(self.row.probs, self.checker.columns))
        return self.head

    def sift(self) -> None:
        """Cut what a few columns cut in a few steps: most tokens, at a fraction of the cost."""
        pending = self._pending()
        if len(pending) < _PAIRS_PAY:
            return
        head = _make_head(self.row, self.row.probs.topk(min(_SIFTING_COLUMNS, len(self.row.probs))).indices)
        solver = _InteriorPoint(head, self.box, len(pending))
        target, bar = self._programs(head, pending)
        cut = solver.screen(target, bar)
        rest = (~cut).nonzero()[:, 0]
        for part in torch.split(rest, solver.batch):
            cut[part] = solver.solve(target[part], bar[part], iterations=_SIFTING_ITERATIONS).status == -1
        self.decisions[pending[cut]] = -1
        self.checker.checked += int(cut.sum())

    def decide(self) -> None:
        """Decide what is pending, the first tokens first: their multipliers often keep later ones."""
        pending = self._pending()
        self.checker.checked += len(pending)
        if len(pending):
            solver = _InteriorPoint(self.the_head(), self.box, len(pending))
        while len(pending):
            batch, pending = pending[: solver.batch], pending[solver.batch :]
            self._decide_batch(solver, batch)
            self.checker.undecided += int((self.decisions[batch] == 0).sum())
            pending = pending[self.decisions[pending] == 0]

    def largest_ceiling(self, box: _Box) -> float:
        """Largest ceiling s at which the best multipliers at `box` still keep the one token; its s where it is cut."""
        refused = self.row.probs.new_zeros(0, len(self.row.probs))
        for _ in range(_MAX_ROUNDS):
            head = self.the_head()
            self.box = box
            outcome = _InteriorPoint(head, box, 1).solve(*self._programs(head, torch.arange(1)), settle=1.0)
            if int(outcome.status[0]) != 1:
                return box.ceiling
            multipliers = outcome.multipliers @ head.whitener.T
            f = multipliers @ self.row.basis.T
            bound = _bound(f, self.row.probs, box)
            own = self.probs * (f[:, self.tokens][0] + bound.shift)
            room = float(own - bound.negative) / max(float(bound.positive - own), 1e-300)
            if room > box.ceiling:
                return room
            refused = torch.cat([refused, f])[-_BITS:]
            self.head = self._widened(head, refused)
        return box.ceiling

    def certificates(self) -> list[Certificate]:
        """One a token, in order."""
        pairs = zip(self.tokens.tolist(), self.decisions.tolist(), strict=True)
        return [self.proofs.get(n, Certificate(token, Decision(d))) for n, (token, d) in enumerate(pairs)]

    def _pending(self) -> Tensor:
        return ((self.decisions == 0) & (self.probs > 0)).nonzero()[:, 0]

    def _programs(self, head: _Head, which: Tensor) -> tuple[Tensor, Tensor]:
        """Targets in head coordinates and bars: outside the head a token's own column is at its ceiling for free."""
        tokens, probs = self.tokens[which], self.probs[which]
        bar = probs + self.box.ceiling * (probs * (head.member[tokens] >= 0))
        return self.row.basis[tokens] @ head.whitener, bar

    def _decide_batch(self, solver: _InteriorPoint, batch: Tensor) -> None:
        refused = self.row.probs.new_zeros(0, len(self.row.probs))
        for _ in range(_MAX_ROUNDS):
            outcome = solver.solve(*self._programs(solver.head, batch))
            cut, keep = (outcome.status == -1).nonzero()[:, 0], (outcome.status == 1).nonzero()[:, 0]
            self.decisions[batch[cut]] = -1
            if self.prove:
                for n in cut.tolist():
                    self._prove_cut(int(batch[n]), solver.head, outcome.u[n])
            multipliers = outcome.multipliers[keep] @ solver.head.whitener.T
            batch = batch[keep]
            for which, part in _split(_VERIFIED_TOGETHER, batch, multipliers):
                f = self._verify(part)
                refused = torch.cat([refused, f[self.decisions[which] == 0]])[-_BITS:]
            batch = batch[self.decisions[batch] == 0]
            if not len(batch):
                return
            solver = _InteriorPoint(self._widened(solver.head, refused), self.box, len(batch))

    def _verify(self, multipliers: Float[Tensor, "n width"]) -> Float[Tensor, "n vocab"]:
        """Keep every pending token that one of the multipliers keeps over the whole vocabulary; return their f."""
        f = multipliers @ self.row.basis.T
        bound = _bound(f, self.row.probs, self.box)
        s = self.box.ceiling
        rounding = 64 * _EPSILON * (1 + s) * (multipliers.abs() @ self.checker._largest + bound.shift)
        limit = (s * bound.positive + bound.negative) * (1 + _MARGIN) + rounding
        kept = (1 + s) * self.probs * (f[:, self.tokens] + bound.shift[:, None]) > limit[:, None]
        new = (kept.any(0) & (self.decisions == 0)).nonzero()[:, 0]
        self.decisions[new] = 1
        if self.prove:
            for n in new.tolist():
                proof = multipliers[kept[:, n].nonzero()[0, 0]].clone()
                proof[0] += bound.shift[kept[:, n].nonzero()[0, 0]]
                self.proofs[n] = Certificate(int(self.tokens[n]), Decision.KEPT, multipliers=proof)
        return f

    def _widened(self, head: _Head, refused: Float[Tensor, "n vocab"]) -> _Head:
        """Add the columns that the refused f pay most for, and bundle the rest by the signs of these f.

        In bundles on which f has one sign T is exact: the same l is not taken for a proof again. Without a floor only
        single columns can help.
        """
        if self.box.floored:
            cost = torch.maximum(self.box.ceiling * refused, -refused).mul_(self.row.probs)
        else:
            cost = (-refused).masked_fill_(self.row.probs <= 0, -torch.inf)
        cost[:, head.singles] = -torch.inf
        joining = cost.topk(min(_JOINING, cost.shape[1]), dim=1).indices.flatten()
        chosen = torch.zeros_like(self.row.probs, dtype=torch.bool)
        chosen[head.singles] = chosen[joining] = True
        return _make_head(self.row, chosen.nonzero()[:, 0], refused > 0 if self.box.floored else None)

    def _prove_cut(self, n: int, head: _Head, u: Float[Tensor, " k"]) -> None:
        """From sum p-hat u b = bar b_i to a distribution without token i: mix with p-hat until p_i = 0."""
        token = int(self.tokens[n])
        inside = head.member >= 0
        full = torch.where(inside, u[head.member.clamp_min(0)], 0)
        full[token] -= 1 + self.box.ceiling * float(inside[token])
        probs = self.row.probs * (1 + full / -full[token])
        probs[token] = 0
        self.proofs[n] = Certificate(token, Decision.CUT, distribution=probs)


def _check_capped(scores: Tensor, softcap: float) -> None:
    largest = scores[scores > -torch.inf].abs().max()
    if largest > softcap * (1 + 1e-3) or scores.double().logsumexp(0).abs() < 1e-3:
        raise ValueError(
            f"this model caps its logits at {softcap:g}, and the basis needs those logits themselves: got "
            "log-probabilities (as beam search hands them) or scores that another processor changed first; sample "
            "without beams and put basis-aware truncation first"
        )


def _most_probable(probs: Float[Tensor, " vocab"], count: int) -> Int[Tensor, " k"]:
    """About `count` of the most probable tokens: any set is correct, a full `topk` would cost more than a solve."""
    if len(probs) > 16 * count and count >= 256:
        bar = probs[::16].topk(count // 16).values[-1]
        columns = (probs >= bar).nonzero()[:, 0]
        if count // 2 <= len(columns) <= 2 * count:
            return columns
    return probs.topk(min(count, len(probs))).indices


def _make_head(row: _Row, singles: Int[Tensor, " singles"], signs: Tensor | None = None) -> _Head:
    """Columns of single tokens; with `signs` [n, vocab] the other tokens in bundles of equal signs."""
    singles = singles[row.probs[singles] > _NEGLIGIBLE]
    member = torch.full_like(row.probs, -1, dtype=torch.long)
    member[singles] = torch.arange(len(singles), device=member.device)
    probs, basis = row.probs[singles], row.basis[singles]
    if signs is not None:
        bundle, mass, mean = _bundles(row, member < 0, signs)
        member = torch.where((member < 0) & (bundle >= 0), bundle + len(singles), member)
        probs, basis = torch.cat([probs, mass]), torch.cat([basis, mean])
    gram = (basis.T * probs) @ basis
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    scaled = gram * scale[:, None] * scale
    scaled.diagonal().add_(1e-9)
    whitener = torch.linalg.solve_triangular(torch.linalg.cholesky(scaled), scale.diag(), upper=False).T
    return _Head(singles, member, probs, basis @ whitener, whitener.contiguous())


def _bundles(row: _Row, free: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each free token's bundle (-1 for none), and the bundles' mass and mean."""
    places = 2 ** torch.arange(len(signs), device=signs.device)
    code = (signs * places[:, None]).sum(0)
    probs = torch.where(free, row.probs, 0)
    mass = probs.new_zeros(2 ** len(signs)).index_add_(0, code, probs)
    total = probs.new_zeros(len(mass), row.basis.shape[1]).index_add_(0, code, row.basis * probs[:, None])
    used = mass > _NEGLIGIBLE
    number = torch.where(used, used.cumsum(0) - 1, -1)
    return torch.where(free, number[code], -1), mass[used], total[used] / mass[used, None]
