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

`support_proofs` finds the proofs.

Invariants:
- "kept" and "cut" need a proof that holds by a relative margin of 1e-8, rounding included; a token with neither proof
  within the limits of work is "undecided", and counted.
- a row's decisions depend on that row, tau and the token alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_longtrunc.arguments import check_float, check_int
from hf_longtrunc.sampling.basis import SoftmaxBasis
from hf_longtrunc.sampling.support_proofs import Certificate, SupportRow, TokenDecisions

_MAX_ITERATIONS = 60
# tau above this is "every threshold": s stays representable.
_TAU_MAX = 0.999


class SupportChecker:
    """Decides tokens of rows of scores by basis-aware truncation, each with a proof.

    Examples:
        >>> checker = SupportChecker(SoftmaxBasis.from_model(model, rank=8))
        >>> scores = model(ids).logits[0, -1].detach()
        >>> checker.kept(scores, tau=0.01).shape
        torch.Size([96])

    Args:
        basis: of the output embedding of the model that made the scores; moved to the scores' device on first use.
        columns: how many of the most probable tokens the linear programs start with.

    Attributes:
        checked, undecided: tokens below tau that the checker was asked about, and those left without a proof. Kept sets
            leave undecided tokens out, since keeping asks for a proof.

    Cost on one idle CPU thread at V = 49152, rank 20 (docs: results/sampling.md): 1 to 2 ms a check, row included.
    Memory: V * (rank + 1) float64 for the basis, and 16 vectors of V while a batch is verified.

    Source: Finlayson et al. 2023, arXiv 2310.01693, section 5. Deviations: exact where the published code depends on a
    solver's tolerance; the authors' generation code leaves 0 <= p out, which keeps fewer tokens and never others.
    """

    def __init__(self, basis: SoftmaxBasis, *, columns: int = 512):
        if not isinstance(basis, SoftmaxBasis):
            raise TypeError(f"basis must be a SoftmaxBasis, got {type(basis).__name__}; see SoftmaxBasis.from_model")
        self.basis = basis
        self.columns = check_int("columns", columns, minimum=1)
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

        Tokens with p-hat >= tau stay. Of those with floor <= p-hat < tau, the `limit` most probable ones are decided
        (None: all); another token stays if one of their proofs covers it too. All others are cut. `limit` bounds the
        time and loses a few kept tokens (docs: results/sampling.md).
        """
        floor = check_float("floor", floor, minimum=0, lt=1)
        limit = None if limit is None else check_int("limit", limit, minimum=1)
        rows, taus = self._rows(scores, tau)
        masks = [self._kept(row, float(each), floor, limit).clone() for row, each in zip(rows, taus, strict=True)]
        return torch.stack(masks).reshape(scores.shape)

    def critical_threshold(self, scores: Tensor, tokens: Tensor, *, tolerance: float = 1e-4) -> Tensor:
        """Return tau* of `tokens` [*rows, n]: each is kept at every tau below it and cut at tau* * (1 + tolerance).

        The paper's basis-aware probability: p-hat_i <= tau*_i. The value is a proved lower bound, at most 0.999, which
        stands for "never cut"; a solve that ends undecided leaves it at the bound proved so far. Float64. Cost: some 5
        to 10 checks a token.
        """
        tolerance = check_float("tolerance", tolerance, gt=0)
        rows, _ = self._rows(scores, 0.5)
        wanted = self._tokens(scores, tokens).reshape(len(rows), -1).tolist()
        pairs = zip(map(self._row, rows), wanted, strict=True)
        values = [[self._critical(row, token, tolerance) for token in ids] for row, ids in pairs]
        return torch.tensor(values, dtype=torch.float64, device=scores.device).reshape(tokens.shape)

    @torch.inference_mode()
    def row(self, scores: Tensor) -> SupportRow:
        """Return one row of scores [V] prepared for `decide(token, tau)`: its shared work is done once."""
        self._rows(scores, 0.5)
        return self._row(scores)

    # Inference mode saves a fifth of the time of so many small operations; results are cloned outside of it.
    @torch.inference_mode()
    def _over_rows(
        self, scores: Tensor, tau: float | Tensor, tokens: Tensor, proofs: list[Certificate] | None
    ) -> Tensor:
        rows, taus = self._rows(scores, tau)
        wanted = self._tokens(scores, tokens).reshape(len(rows), -1)
        decisions = []
        for row, each, ids in zip(rows, taus, wanted, strict=True):
            work = TokenDecisions(self._row(row), float(each), ids, proofs is not None)
            work.decide()
            decisions.append(work.decisions)
            if proofs is not None:
                proofs += work.certificates()
        return torch.stack(decisions).reshape(tokens.shape)

    @torch.inference_mode()
    def _kept(self, scores: Tensor, tau: float, floor: float, limit: int | None) -> Tensor:
        row = self._row(scores)
        tokens = ((row.probs >= floor) & (row.probs < tau)).nonzero()[:, 0]
        work = TokenDecisions(row, tau, tokens[row.probs[tokens].argsort(descending=True)], limit=limit)
        work.sift()
        work.decide()
        mask = row.probs >= tau
        mask[work.tokens[work.decisions == 1]] = True
        return mask

    @torch.inference_mode()
    def _critical(self, row: SupportRow, token: int, tolerance: float) -> float:
        """Iterate as Dinkelbach does: the l that is best at one s gives the largest s that it can prove."""
        p = float(row.probs[token])
        if not 0 < p < _TAU_MAX:
            return min(p, _TAU_MAX)
        low, s_max = p / (1 - p), _TAU_MAX / (1 - _TAU_MAX)
        work = TokenDecisions(row, p, row.probs.new_tensor([token]).long())
        for _ in range(_MAX_ITERATIONS):
            s = low * (1 + tolerance)
            if s >= s_max:
                return _TAU_MAX
            reach = work.largest_ceiling(s)
            if reach <= s:
                break
            low = reach
        return low / (1 + low)

    def _row(self, scores: Tensor) -> SupportRow:
        probs, basis, softcap = scores.double().softmax(-1), self._basis, self.basis.softcap
        # NaN and +inf spread over the whole row.
        if not bool(probs[0].isfinite()):
            raise ValueError("scores must be finite or -inf, at least one of them finite, in every row")
        if softcap is not None:
            _check_capped(scores, softcap)
            # d logits / d hidden = diag(1 - (z / cap)^2) W: the error is orthogonal to those columns.
            slope = (1 - (scores.double() / softcap).square()).clamp_min(0).nan_to_num(0)
            basis = torch.cat([basis[:, :1], basis[:, 1:] * slope[:, None]], dim=1)
        return SupportRow(self, probs, basis)

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


def critical_threshold(basis: SoftmaxBasis, scores: Tensor, tokens: Tensor, *, tolerance: float = 1e-4) -> Tensor:
    """Return tau* of tokens: `SupportChecker(basis).critical_threshold(scores, tokens)`.

    Examples:
        >>> scores = model(ids).logits[0, -1].detach()
        >>> bounds = critical_threshold(SoftmaxBasis.from_model(model, rank=8), scores, torch.tensor([3, 5]))
        >>> bool((bounds >= scores.double().softmax(-1)[[3, 5]]).all())
        True
    """
    return SupportChecker(basis).critical_threshold(scores, tokens, tolerance=tolerance)


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
