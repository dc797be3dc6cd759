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

The program is solved on the most probable columns (`interior_point`) and left at the first proof. A kept token's l is
verified over the whole vocabulary in float64; where it fails, the columns that it misjudged join, the others are
bundled by the sign that it gives them, and the program is solved again.

Invariants:
- "kept" and "cut" are only said with a proof whose inequality holds by a relative margin of 1e-8, rounding included;
  what cannot be proved within the limits of work is "undecided", and counted.
- a row's decisions depend on that row, tau and the token alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.arguments import number, one_of, whole
from hf_longtrunc.sampling.basis import SoftmaxBasis
from hf_longtrunc.sampling.interior_point import MARGIN, Box, InteriorPoint, bound_of, split
from hf_longtrunc.sampling.largest_probability import Polytope, Proof

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Variant = Literal["paper", "official"]

_EPSILON = torch.finfo(torch.float64).eps
_MAX_ITERATIONS = 60
_MAX_ROUNDS = 12
_VERIFIED_TOGETHER = 16
# Most tokens are cut on so few columns, in so few iterations; what is left goes on to more.
_SIFTING_COLUMNS = 128
_SIFTING_ITERATIONS = 8
_SIFTING_PAYS = 4
# Columns that join a program for each multiplier that the whole vocabulary refuses, and of how many multipliers.
_JOINING = 32
_JOINED = 8
# The other tokens are bundled by the signs of f under so many of those multipliers.
_BITS = 4
# Where many tokens are refused, programs that grow by a few columns of some of their multipliers serve all of them.
_SPREAD = 32
_JOINING_TOGETHER = 16
# Columns of less probability than this have nothing to give.
_NEGLIGIBLE = 1e-30
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
        margin: of a kept token below tau: by what part of the sum sigma p-hat_i f_i exceeds it; the search stops at the
            first proof, so another one may have a larger margin.

    All are None where p-hat_i >= tau (kept), where p-hat_i = 0 (cut), and where nothing is proved. Of the official form
    l says so in exact arithmetic: in these coordinates float64 cannot show it for tokens of less than some 1e-12.
    """

    token: int
    decision: Decision
    multipliers: Tensor | None = None
    distribution: Tensor | None = None
    margin: float | None = None


class _Row(NamedTuple):
    """One row of scores: p-hat over the vocabulary and the basis with its leading one."""

    probs: Float[Tensor, " vocab"]
    basis: Float[Tensor, "vocab width"]


class _Program(NamedTuple):
    """The linear program on some columns of a row: single tokens first, then bundles of tokens that share one u.

    A u on these columns is a u on the vocabulary, zero for tokens in no column: what is feasible here is feasible
    there. Coordinates are those in which sum_j p-hat_j b_j b_j^T over the columns is the identity.
    """

    singles: Int[Tensor, " singles"]
    member: Int[Tensor, " vocab"]  # the column that each token belongs to, -1 for none
    probs: Float[Tensor, " k"]
    basis: Float[Tensor, "k width"]
    whitener: Float[Tensor, "width width"]  # its coordinates = b @ whitener; l = whitener @ (its l)

    def solver(self, box: Box, rays: int) -> InteriorPoint:
        return InteriorPoint(self.basis, self.probs, box, rays)


class SupportChecker:
    """Decides tokens of rows of scores by basis-aware truncation, each with a proof.

    Args:
        basis: of the output embedding of the model that made the scores; moved to the scores' device on first use.
        variant: "paper" asks 0 <= p; "official" leaves that out, as the authors' generation code does (fewer tokens
            are kept, never others), and is solved in its closed form (`largest_probability`).
        columns: how many of the most probable tokens the linear programs start with.

    Attributes:
        checked, undecided: tokens below tau that were decided by proof or not, since the checker was made. Undecided
            ones are reported as such; whoever needs a set treats them as cut, since keeping asks for a proof.

    Cost on one idle CPU thread at V = 49152, rank 20 (docs: results/sampling.md): 1 to 2 ms a check, row included.
    Memory: V * (rank + 1) float64 for the basis, and 16 vectors of V while a batch is verified.

    Source: Finlayson et al. 2023, arXiv 2310.01693, section 5. Deviations: exact where the published code is at the
    mercy of a solver's tolerance; the restricted program, its proofs and their reuse are not in the paper.
    """

    def __init__(self, basis: SoftmaxBasis, *, variant: Variant = "paper", columns: int = 512):
        if not isinstance(basis, SoftmaxBasis):
            raise TypeError(f"basis must be a SoftmaxBasis, got {type(basis).__name__}; see SoftmaxBasis.from_model")
        self.basis = basis
        self.variant = one_of("variant", variant, ("paper", "official"))
        self.columns = whole("columns", columns, least=1)
        self.checked = self.undecided = 0
        ones = basis.factors.new_ones(basis.vocab_size, 1)
        self._basis = torch.cat([ones, basis.factors], dim=1).contiguous()
        self.largest = self._basis.abs().amax(0)

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

    def kept(self, scores: Tensor, tau: float | Tensor, *, floor: float = 1e-6, limit: int | None = None) -> Tensor:
        """Return the kept set as a boolean mask of `scores` [*rows, V].

        Of the tokens with floor <= p-hat < tau the `limit` most probable ones are decided (None: all), and the others
        kept where a proof of those covers them; the rest are called cut without a proof, as are undecided ones. Work
        grows with the tokens that are decided, so `limit` bounds a row's time; results/sampling.md says what it loses.
        """
        floor = number("floor", floor, least=0, below=1)
        limit = None if limit is None else whole("limit", limit, least=1)
        rows, taus = self._rows(scores, tau)
        masks = [self._kept(row, float(bar), floor, limit).clone() for row, bar in zip(rows, taus, strict=True)]
        return torch.stack(masks).reshape(scores.shape)

    def critical_threshold(self, scores: Tensor, tokens: Tensor, *, tolerance: float = 1e-4) -> Tensor:
        """Return tau* of `tokens` [*rows, n]: each is kept at every tau below it and cut at tau* * (1 + tolerance).

        The paper's basis-aware probability: p-hat_i <= tau*_i. The value is a proved lower bound, 0.999 at most (a
        token that no threshold cuts); a solve that ends undecided leaves it at the bound proved so far. Cost: some 5
        to 10 checks a token. Float64.
        """
        tolerance = number("tolerance", tolerance, above=0)
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
            work = self._work(self._row(row), float(bar), ids, proofs is not None)
            work.decide()
            decisions.append(work.decisions)
            if proofs is not None:
                proofs += work.certificates()
        return torch.stack(decisions).reshape(tokens.shape)

    @torch.inference_mode()
    def _kept(self, scores: Tensor, tau: float, floor: float, limit: int | None) -> Tensor:
        row = self._row(scores)
        tokens = ((row.probs >= floor) & (row.probs < tau)).nonzero()[:, 0]
        work = self._work(row, tau, tokens[row.probs[tokens].argsort(descending=True)], limit=limit)
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
        work = self._work(row, p, row.probs.new_tensor([token]).long())
        for _ in range(_MAX_ITERATIONS):
            s = low * (1 + tolerance)
            if s >= s_max:
                return _TAU_MAX
            reach = work.largest_ceiling(s)
            if reach <= s:
                break
            low = reach
        return low / (1 + low)

    def _work(self, row: _Row, tau: float, tokens: Tensor, prove: bool = False, limit: int | None = None) -> _Work:
        return (_PaperWork if self.variant == "paper" else _OfficialWork)(self, row, tau, tokens, prove, limit)

    def _row(self, scores: Tensor) -> _Row:
        probs, basis, softcap = scores.double().softmax(-1), self._basis, self.basis.softcap
        # NaN and +inf spread over the whole row.
        if not bool(probs[0].isfinite()):
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
            self._basis, self.largest = self._basis.to(scores.device), self.largest.to(scores.device)
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
        self._prepared: Any = None

    @torch.inference_mode()
    def decide(self, token: int) -> Decision:
        """Decide one token."""
        work = self._checker._work(self._row, self._tau, torch.tensor([token], device=self._row.probs.device))
        work.prepared = self._prepared
        work.decide()
        self._prepared = work.prepared
        return Decision(int(work.decisions[0]))


class _Work:
    """The decisions about some tokens of one row at one tau; with a limit, only so many, the first, are asked about."""

    def __init__(self, checker: SupportChecker, row: _Row, tau: float, tokens: Tensor, prove: bool, limit: int | None):
        self.checker, self.row, self.tokens, self.prove, self.limit = checker, row, tokens, prove, limit
        self.ceiling = tau / (1 - tau)  # s
        self.probs = row.probs[tokens]
        self.decisions = (self.probs >= tau).to(torch.int8) - (self.probs <= 0).to(torch.int8)
        self.proofs: dict[int, Certificate] = {}
        self.prepared: Any = None  # what the row's next tokens can use again

    def sift(self) -> None:
        """Cut what is cheap to cut."""

    def decide(self) -> None:
        """Decide what is pending."""
        raise NotImplementedError

    def largest_ceiling(self, ceiling: float) -> float:
        """Largest s at which the best multipliers at `ceiling` still keep the one token; `ceiling` where it is cut."""
        raise NotImplementedError

    def certificates(self) -> list[Certificate]:
        """One a token, in order."""
        pairs = zip(self.tokens.tolist(), self.decisions.tolist(), strict=True)
        return [self.proofs.get(n, Certificate(token, Decision(d))) for n, (token, d) in enumerate(pairs)]

    def _pending(self) -> Tensor:
        return ((self.decisions == 0) & (self.probs > 0))[: self.limit].nonzero()[:, 0]


class _OfficialWork(_Work):
    """Without p >= 0: token i is kept iff p-hat_i > tau times the largest probability that it can have."""

    def decide(self) -> None:
        """Decide what is pending: whether its probability can reach p-hat_i / tau."""
        pending = self._pending()
        self.checker.checked += len(pending)
        if not len(pending):
            return
        proofs: dict[int, Proof] | None = {} if self.prove else None
        levels = self.probs[pending] * (1 + 1 / self.ceiling)
        self.decisions[pending] = self._polytope().decide(self.tokens[pending], levels, proofs)
        self.checker.undecided += int((self.decisions[pending] == 0).sum())
        for n, proof in (proofs or {}).items():
            self.proofs[int(pending[n])] = self._certificate(int(pending[n]), float(levels[n]), proof)

    def largest_ceiling(self, ceiling: float) -> float:
        """Read it off the bound of the token's probability that was proved."""
        p = float(self.probs[0])
        bound = self._polytope().bound(int(self.tokens[0]), p * (1 + 1 / ceiling))
        # A bound of p-hat_i itself is every threshold.
        return p / max(bound - p, 1e-300) if bound < torch.inf else ceiling

    def _polytope(self) -> Polytope:
        if self.prepared is None:
            self.prepared = Polytope(self.row.probs, self.row.basis, self.checker.columns)
        polytope: Polytope = self.prepared
        return polytope

    def _certificate(self, n: int, level: float, proof: Proof) -> Certificate:
        token = int(self.tokens[n])
        if self.decisions[n] == Decision.KEPT:
            return Certificate(token, Decision.KEPT, proof.vector, margin=proof.margin)
        # Mixed with p-hat until p_i is p-hat_i / tau, it leaves nothing of token i in sigma p-hat - s p.
        part = (level - self.probs[n]) / (proof.vector[token] - self.probs[n])
        reached = torch.lerp(self.row.probs, proof.vector, part)
        distribution = self.row.probs + self.ceiling * (self.row.probs - reached)
        distribution[token] = 0
        return Certificate(token, Decision.CUT, distribution=distribution)


class _PaperWork(_Work):
    """With p >= 0: programs on some columns, whose proofs hold for all."""

    @property
    def box(self) -> Box:
        return Box(self.ceiling, 1.0)

    def sift(self) -> None:
        """Cut what a few columns cut in a few steps: most tokens, at a fraction of the cost."""
        pending = self._pending()
        if len(pending) < _SIFTING_PAYS:
            return
        program = _program_on(self.row, self.row.probs.topk(min(_SIFTING_COLUMNS, len(self.row.probs))).indices)
        solver = program.solver(self.box, len(pending))
        rays, bar = self._rays(program, pending)
        cut = solver.screen(rays, bar)
        for part in torch.split((~cut).nonzero()[:, 0], solver.batch):
            cut[part] = solver.solve(rays[part], bar[part], iterations=_SIFTING_ITERATIONS).status == -1
        self.decisions[pending[cut]] = -1
        self.checker.checked += int(cut.sum())

    def decide(self) -> None:
        """Decide what is pending: together on programs that grow, then the few that are left on their own."""
        pending = self._pending()
        self.checker.checked += len(pending)
        if not len(pending):
            return
        program = self._program()
        refused, left = self._ask(program, pending)
        for _ in range(_MAX_ROUNDS):
            if len(left) <= _BITS:
                break
            spread = torch.linspace(0, len(refused) - 1, min(_SPREAD, len(refused)), device=left.device).long()
            program = self._widened(program, refused[spread], _JOINING_TOGETHER)
            refused, left = self._ask(program, left)
        # Few enough at a time that the bundles are those of their own multipliers.
        for some, _ in split(_BITS, left, refused):
            self._decide_widened(some, refused)
        self.checker.undecided += int((self.decisions[pending] == 0).sum())

    def largest_ceiling(self, ceiling: float) -> float:
        """Read it off the multipliers that are best at `ceiling`, once the whole vocabulary agrees."""
        self.ceiling = ceiling
        refused = self.row.basis.new_zeros(0, self.row.basis.shape[1])
        for _ in range(_MAX_ROUNDS):
            program = self._program()
            outcome = program.solver(self.box, 1).solve(*self._rays(program, torch.arange(1)), settle=1.0)
            if int(outcome.status[0]) != 1:
                return ceiling
            multipliers = outcome.multipliers @ program.whitener.T
            f = multipliers @ self.row.basis.T
            bound = bound_of(f, self.row.probs)
            own = self.probs * f[:, self.tokens][0]
            room = float(own - bound.negative) / max(float(bound.positive - own), 1e-300)
            if room > ceiling:
                return room
            refused = torch.cat([refused, multipliers])
            self.prepared = self._widened(program, refused[-_JOINED:], _JOINING)
        return ceiling

    def _program(self) -> _Program:
        """Return the program to start with, made on first use."""
        if self.prepared is None:
            self.prepared = _program_on(self.row, _most_probable(self.row.probs, self.checker.columns))
        program: _Program = self.prepared
        return program

    def _rays(self, program: _Program, which: Tensor) -> tuple[Tensor, Tensor]:
        """Rays in the program's coordinates and bars: a token outside it has its own column at its ceiling for free."""
        tokens, probs = self.tokens[which], self.probs[which]
        bar = probs + self.ceiling * (probs * (program.member[tokens] >= 0))
        return self.row.basis[tokens] @ program.whitener, bar

    def _decide_widened(self, batch: Tensor, refused: Float[Tensor, "n width"]) -> None:
        program = self._program()
        for _ in range(_MAX_ROUNDS):
            batch = batch[self.decisions[batch] == 0]
            if not len(batch):
                return
            program = self._widened(program, refused[-_JOINED:], _JOINING)
            more, batch = self._pass(program, program.solver(self.box, len(batch)), batch)
            refused = torch.cat([refused, more])

    def _ask(self, program: _Program, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ask a batch at a time, the first tokens first: their multipliers often keep later ones."""
        solver = program.solver(self.box, len(tokens))
        answers = []
        while len(tokens):
            batch, tokens = tokens[: solver.batch], tokens[solver.batch :]
            answers.append(self._pass(program, solver, batch))
            tokens = tokens[self.decisions[tokens] == 0]
        refused, left = (torch.cat(parts) for parts in zip(*answers, strict=True))
        is_pending = self.decisions[left] == 0
        return refused[is_pending], left[is_pending]

    def _pass(self, program: _Program, solver: InteriorPoint, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Ask every token of the batch once; return the multipliers that the vocabulary refused, and their tokens."""
        outcome = solver.solve(*self._rays(program, batch))
        cut, keep = (outcome.status == -1).nonzero()[:, 0], (outcome.status == 1).nonzero()[:, 0]
        self.decisions[batch[cut]] = -1
        if self.prove:
            for n in cut.tolist():
                self._prove_cut(int(batch[n]), program, outcome.u[n])
        batch, multipliers = batch[keep], outcome.multipliers[keep] @ program.whitener.T
        for which, part in split(_VERIFIED_TOGETHER, batch, multipliers):
            self._verify(part[self.decisions[which] == 0])
        left = self.decisions[batch] == 0
        return multipliers[left], batch[left]

    def _verify(self, multipliers: Float[Tensor, "n width"]) -> None:
        """Keep every pending token that one of the multipliers keeps over the whole vocabulary."""
        f = multipliers @ self.row.basis.T
        bound = bound_of(f, self.row.probs)
        s = self.ceiling
        rounding = 64 * _EPSILON * (1 + s) * (multipliers.abs() @ self.checker.largest)
        limit = (s * bound.positive + bound.negative) * (1 + MARGIN) + rounding
        gain = (1 + s) * self.probs * f[:, self.tokens]
        kept = gain > limit[:, None]
        new = (kept.any(0) & (self.decisions == 0)).nonzero()[:, 0]
        self.decisions[new] = 1
        if self.prove:
            for n in new.tolist():
                first = kept[:, n].nonzero()[0, 0]
                margin = float(gain[first, n] / (s * bound.positive[first] + bound.negative[first])) - 1
                self.proofs[n] = Certificate(
                    int(self.tokens[n]), Decision.KEPT, multipliers[first].clone(), margin=margin
                )

    def _widened(self, program: _Program, refused: Float[Tensor, "n width"], joining: int) -> _Program:
        """Add the `joining` columns that each refused multiplier pays most for, bundle the rest by the signs of some.

        In bundles on which f has one sign T is exact: the same l is not taken for a proof again.
        """
        f = refused @ self.row.basis.T
        cost = torch.maximum(self.ceiling * f, -f).mul_(self.row.probs)
        cost[:, program.singles] = -torch.inf
        dearest = cost.topk(min(joining, cost.shape[1]), dim=1).indices.flatten()
        chosen = torch.zeros_like(self.row.probs, dtype=torch.bool)
        chosen[program.singles] = chosen[dearest] = True
        return _program_on(self.row, chosen.nonzero()[:, 0], f[-_BITS:] > 0)

    def _prove_cut(self, n: int, program: _Program, u: Float[Tensor, " k"]) -> None:
        """From sum p-hat u b = bar b_i to a distribution without token i: mix with p-hat until p_i = 0."""
        token = int(self.tokens[n])
        inside = program.member >= 0
        full = torch.where(inside, u[program.member.clamp_min(0)], 0)
        full[token] -= 1 + self.ceiling * float(inside[token])
        probs = self.row.probs * (1 + full / -full[token])
        probs[token] = 0
        self.proofs[n] = Certificate(token, Decision.CUT, distribution=probs)


def _cloned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


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


def _program_on(row: _Row, singles: Int[Tensor, " singles"], signs: Tensor | None = None) -> _Program:
    """Make the program on single tokens; with `signs` [n, vocab] also on the others in bundles of equal signs."""
    singles = singles[row.probs[singles] > _NEGLIGIBLE]
    member = torch.full_like(row.probs, -1, dtype=torch.long)
    member[singles] = torch.arange(len(singles), device=member.device)
    probs, basis = row.probs[singles], row.basis[singles]
    if signs is not None:
        bundle, mass, mean = _bundles(row, member < 0, signs)
        member = torch.where((member < 0) & (bundle >= 0), bundle + len(singles), member)
        probs, basis = torch.cat([probs, mass]), torch.cat([basis, mean])
    gram = (basis.T * probs) @ basis
    # A ridge relative to the diagonal: directions that these columns hardly span stay representable.
    gram.diagonal().mul_(1 + 1e-9).add_(1e-300)
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whitener = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), unit, upper=False).T
    return _Program(singles, member, probs, basis @ whitener, whitener.contiguous())


def _bundles(row: _Row, free: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each free token's bundle (-1 for none), and the bundles' mass and mean."""
    places = 2.0 ** torch.arange(len(signs), device=signs.device, dtype=torch.float64)
    code = (places @ signs.double()).long()
    probs = torch.where(free, row.probs, 0)
    # One row a bundle; the basis's leading ones make the first sum the mass.
    total = probs.new_zeros(2 ** len(signs), len(probs)).scatter_(0, code[None], probs[None]) @ row.basis
    used = total[:, 0] > _NEGLIGIBLE
    number = torch.where(used, used.cumsum(0) - 1, -1)
    return torch.where(free, number[code], -1), total[used, 0], total[used] / total[used, :1]
