"""How `SupportChecker` proves its decisions; notation and definitions are those of `support`.

The program is solved on the most probable columns (`interior_point`) up to the first proof. A kept token's l is
verified over the whole vocabulary in float64. Where it fails, the columns that it misjudged are added, the others are
bundled by the sign that it gives them, and the program is solved again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.sampling.interior_point import MARGIN, InteriorPoint, bound_of, split

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from hf_longtrunc.sampling.support import SupportChecker

_EPSILON = torch.finfo(torch.float64).eps
_MAX_ROUNDS = 12
_VERIFIED_TOGETHER = 16
# Most tokens are cut on these few columns in these few iterations.
_SIFTING_COLUMNS = 128
_SIFTING_ITERATIONS = 8
_SIFTING_PAYS = 4
# Columns added for each multiplier that fails on the whole vocabulary, and for how many multipliers.
_JOINING = 32
_JOINED = 8
# The other tokens are bundled by the signs of f under this many of those multipliers.
_BITS = 4
# Where many tokens are left, programs that grow by a few columns of some of their multipliers serve all of them.
_SPREAD = 32
_JOINING_TOGETHER = 16
# Columns of less probability than this are left out.
_NEGLIGIBLE = 1e-30


class Decision(IntEnum):
    """The proved answer about a token."""

    CUT = -1
    UNDECIDED = 0
    KEPT = 1


@dataclass(frozen=True, eq=False)
class Certificate:
    """The proof of one decision, in float64.

    Attributes:
        token: its id.
        decision: kept, cut or undecided.
        multipliers: of a kept token below tau: l [rank + 1], the constant's first, with
            sum_j p-hat_j (s max(f_j, 0) + max(-f_j, 0)) < sigma p-hat_i f_i, f_j = l . (1, W_j).
        distribution: of a cut token: p [vocabulary] with p_i = 0, 0 <= p <= sigma p-hat, and p-hat's sum and W^T p-hat.
        margin: of a kept token below tau: sigma p-hat_i f_i over the sum, less 1. The search stops at the first proof;
            others may have a larger margin.

    All are None where p-hat_i >= tau (kept), where p-hat_i = 0 (cut), and where nothing is proved.
    """

    token: int
    decision: Decision
    multipliers: Tensor | None = None
    distribution: Tensor | None = None
    margin: float | None = None


class _Program(NamedTuple):
    """The linear program on some columns of a row: single tokens first, then bundles of tokens that share one u.

    A u on these columns, zero for tokens in no column, is feasible on the vocabulary too.
    """

    singles: Int[Tensor, " singles"]
    member: Int[Tensor, " vocab"]  # the column that each token belongs to, -1 for none
    probs: Float[Tensor, " k"]
    basis: Float[Tensor, "k width"]
    whitener: Float[Tensor, "width width"]  # its coordinates = b @ whitener; l = whitener @ (its l)

    def solver(self, ceiling: float, rays: int) -> InteriorPoint:
        return InteriorPoint(self.basis, self.probs, ceiling, rays)


class SupportRow:
    """One row's p-hat and basis (its first column is 1), prepared once to decide its tokens one by one."""

    def __init__(self, checker: SupportChecker, probs: Float[Tensor, " vocab"], basis: Float[Tensor, "vocab width"]):
        self.checker, self.probs, self.basis = checker, probs, basis

    @cached_property
    def first_program(self) -> _Program:
        """The program on the row's most probable tokens."""
        return _program_on(self, _most_probable(self.probs, self.checker.columns))

    @torch.inference_mode()
    def decide(self, token: int, tau: float) -> Decision:
        """Decide one token at `tau`."""
        work = TokenDecisions(self, tau, torch.tensor([token], device=self.probs.device))
        work.decide()
        return Decision(int(work.decisions[0]))


class TokenDecisions:
    """Decides some tokens of one row at one tau, by programs on a part of the columns; each proof is verified on all.

    With `limit`, only the first `limit` undecided tokens are decided. With `prove`, certificates are kept.
    """

    def __init__(self, row: SupportRow, tau: float, tokens: Tensor, prove: bool = False, limit: int | None = None):
        self.row, self.tokens, self.prove, self.limit = row, tokens, prove, limit
        self.ceiling = tau / (1 - tau)  # s
        self.probs = row.probs[tokens]
        self.decisions = (self.probs >= tau).to(torch.int8) - (self.probs <= 0).to(torch.int8)
        self.proofs: dict[int, Certificate] = {}

    @cached_property
    def program(self) -> _Program:
        """The program to start with: the row's first one until `largest_ceiling` finds a better one."""
        return self.row.first_program

    def certificates(self) -> list[Certificate]:
        """Return the certificate of each token, in order."""
        pairs = zip(self.tokens.tolist(), self.decisions.tolist(), strict=True)
        return [self.proofs.get(n, Certificate(token, Decision(d))) for n, (token, d) in enumerate(pairs)]

    def _pending(self) -> Tensor:
        return ((self.decisions == 0) & (self.probs > 0))[: self.limit].nonzero()[:, 0]

    def sift(self) -> None:
        """Cut the easy tokens, on few columns and in few steps: most of them, at a fraction of the cost."""
        pending = self._pending()
        if len(pending) < _SIFTING_PAYS:
            return
        program = _program_on(self.row, self.row.probs.topk(min(_SIFTING_COLUMNS, len(self.row.probs))).indices)
        solver = program.solver(self.ceiling, len(pending))
        rays, thresholds = self._rays(program, pending)
        cut = solver.screen(rays, thresholds)
        for part in torch.split((~cut).nonzero()[:, 0], solver.batch):
            cut[part] = solver.solve(rays[part], thresholds[part], iterations=_SIFTING_ITERATIONS).status == -1
        self.decisions[pending[cut]] = -1
        self.row.checker.checked += int(cut.sum())

    def decide(self) -> None:
        """Decide the pending tokens: together on programs that grow, then the few that are left on their own."""
        pending = self._pending()
        self.row.checker.checked += len(pending)
        if not len(pending):
            return
        program = self.program
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
        self.row.checker.undecided += int((self.decisions[pending] == 0).sum())

    def largest_ceiling(self, ceiling: float) -> float:
        """Return the largest s at which the best multipliers at `ceiling` provably keep the token; `ceiling` if cut."""
        self.ceiling = ceiling
        refused = self.row.basis.new_zeros(0, self.row.basis.shape[1])
        for _ in range(_MAX_ROUNDS):
            program = self.program
            result = program.solver(self.ceiling, 1).solve(*self._rays(program, torch.arange(1)), settle=1.0)
            if int(result.status[0]) != 1:
                return ceiling
            multipliers = result.multipliers @ program.whitener.T
            f = multipliers @ self.row.basis.T
            bound = bound_of(f, self.row.probs)
            own = self.probs * f[:, self.tokens][0]
            room = float(own - bound.negative) / max(float(bound.positive - own), 1e-300)
            if room > ceiling:
                return room
            refused = torch.cat([refused, multipliers])
            self.program = self._widened(program, refused[-_JOINED:], _JOINING)
        return ceiling

    def _rays(self, program: _Program, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return rays in the program's coordinates and their thresholds."""
        tokens, probs = self.tokens[which], self.probs[which]
        # A token that is no column of the program contributes its own at its ceiling: a lower threshold.
        threshold = probs + self.ceiling * (probs * (program.member[tokens] >= 0))
        return self.row.basis[tokens] @ program.whitener, threshold

    def _decide_widened(self, batch: Tensor, refused: Float[Tensor, "n width"]) -> None:
        program = self.program
        for _ in range(_MAX_ROUNDS):
            batch = batch[self.decisions[batch] == 0]
            if not len(batch):
                return
            program = self._widened(program, refused[-_JOINED:], _JOINING)
            more, batch = self._pass(program, program.solver(self.ceiling, len(batch)), batch)
            refused = torch.cat([refused, more])

    def _ask(self, program: _Program, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ask about a batch at a time, the first tokens first: their multipliers often keep later ones."""
        solver = program.solver(self.ceiling, len(tokens))
        answers = []
        while len(tokens):
            batch, tokens = tokens[: solver.batch], tokens[solver.batch :]
            answers.append(self._pass(program, solver, batch))
            tokens = tokens[self.decisions[tokens] == 0]
        refused, left = (torch.cat(parts) for parts in zip(*answers, strict=True))
        is_pending = self.decisions[left] == 0
        return refused[is_pending], left[is_pending]

    def _pass(self, program: _Program, solver: InteriorPoint, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for each token of the batch; return the multipliers that fail on the vocabulary, and their tokens."""
        result = solver.solve(*self._rays(program, batch))
        cut, keep = (result.status == -1).nonzero()[:, 0], (result.status == 1).nonzero()[:, 0]
        self.decisions[batch[cut]] = -1
        if self.prove:
            for n in cut.tolist():
                self._prove_cut(int(batch[n]), program, result.u[n])
        batch, multipliers = batch[keep], result.multipliers[keep] @ program.whitener.T
        for which, part in split(_VERIFIED_TOGETHER, batch, multipliers):
            self._verify(part[self.decisions[which] == 0])
        left = self.decisions[batch] == 0
        return multipliers[left], batch[left]

    def _verify(self, multipliers: Float[Tensor, "n width"]) -> None:
        """Keep every pending token that one of the multipliers keeps over the whole vocabulary."""
        f = multipliers @ self.row.basis.T
        bound = bound_of(f, self.row.probs)
        s = self.ceiling
        rounding = 64 * _EPSILON * (1 + s) * (multipliers.abs() @ self.row.checker.largest)
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
        """Add the `joining` dearest columns of each refused multiplier, bundle the rest by the signs of some."""
        # In bundles on which f has one sign T is exact: the same l is not taken for a proof again.
        f = refused @ self.row.basis.T
        cost = torch.maximum(self.ceiling * f, -f).mul_(self.row.probs)
        cost[:, program.singles] = -torch.inf
        dearest = cost.topk(min(joining, cost.shape[1]), dim=1).indices.flatten()
        chosen = torch.zeros_like(self.row.probs, dtype=torch.bool)
        chosen[program.singles] = chosen[dearest] = True
        return _program_on(self.row, chosen.nonzero()[:, 0], f[-_BITS:] > 0)

    def _prove_cut(self, n: int, program: _Program, u: Float[Tensor, " k"]) -> None:
        """Turn sum p-hat u b = t b_i into a distribution without token i: mix with p-hat until p_i = 0."""
        token = int(self.tokens[n])
        inside = program.member >= 0
        full = torch.where(inside, u[program.member.clamp_min(0)], 0)
        full[token] -= 1 + self.ceiling * float(inside[token])
        probs = self.row.probs * (1 + full / -full[token])
        probs[token] = 0
        self.proofs[n] = Certificate(token, Decision.CUT, distribution=probs)


def _most_probable(probs: Float[Tensor, " vocab"], count: int) -> Int[Tensor, " k"]:
    """Return about `count` of the most probable tokens: any set is correct, a full `topk` costs more than a solve."""
    if len(probs) > 16 * count and count >= 256:
        smallest = probs[::16].topk(count // 16).values[-1]
        columns = (probs >= smallest).nonzero()[:, 0]
        if count // 2 <= len(columns) <= 2 * count:
            return columns
    return probs.topk(min(count, len(probs))).indices


def _program_on(row: SupportRow, singles: Int[Tensor, " singles"], signs: Tensor | None = None) -> _Program:
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


def _bundles(row: SupportRow, free: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each free token's bundle (-1 for none), and the bundles' mass and mean."""
    places = 2.0 ** torch.arange(len(signs), device=signs.device, dtype=torch.float64)
    code = (places @ signs.double()).long()
    probs = torch.where(free, row.probs, 0)
    # One row a bundle; the basis's leading ones make the first sum the mass.
    total = probs.new_zeros(2 ** len(signs), len(probs)).scatter_(0, code[None], probs[None]) @ row.basis
    used = total[:, 0] > _NEGLIGIBLE
    number = torch.where(used, used.cumsum(0) - 1, -1)
    return torch.where(free, number[code], -1), total[used, 0], total[used] / total[used, :1]
