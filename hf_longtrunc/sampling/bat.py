"""Basis-aware truncation as a transformers logits processor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_longtrunc.arguments import check_choice, check_float, check_int
from hf_longtrunc.sampling.calls import (
    changes_one_token,
    is_sampling,
    neighbours,
    refuse_empty_rows,
    refuse_grammars,
    warn_of_cuts,
    warn_of_reshaping,
)
from hf_longtrunc.sampling.cutoffs import Softmax, below, draw, softmax_rows, threshold_of
from hf_longtrunc.sampling.processors import (
    check_filter_value,
    check_float_per_row,
    check_scores,
    representable,
    uniform,
)
from hf_longtrunc.sampling.support import SupportChecker
from hf_longtrunc.sampling.support_proofs import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc.sampling.basis import SoftmaxBasis
    from hf_longtrunc.sampling.processors import Values


class BasisAwareLogitsProcessor(LogitsProcessor):
    """Basis-aware truncation: keep tokens below the plain threshold if their true probability is provably not zero.

    Examples:
        >>> bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model, rank=8), 2e-3)
        >>> text = model.generate(ids, **sampling_settings(model), max_new_tokens=2, logits_processor=[bat])

    The model's error lies in the few directions that its output embedding cannot express. A token is cut only if some
    distribution with the same image in `basis`, nowhere above p-hat / (1 - tau), gives it probability zero. Tau is the
    threshold of eta- or epsilon-sampling, so the kept set contains theirs. The theory holds at temperature 1.

    Args:
        basis: of the model that generates: `SoftmaxBasis.from_model(model)`.
        epsilon: in (0, 1), the parameter of `cutoff`; or one value a row, as for `EtaLogitsProcessor`. The kept set
            grows with the rank: match epsilon again for each rank (`hf-longtrunc match`).
        cutoff: the threshold tau, "eta" or "epsilon".
        mode: "sample" draws a token without replacement until one is kept, and removes all others: a sample of p-hat
            restricted to the kept set, at one check for each draw below tau. "mask" removes exactly the cut tokens, at
            a solve for every token near tau; "sample" masks too where `generate` does not draw (beams,
            `do_sample=False`) and where another processor follows.
        generator: for the draws in sample mode; a list gives every row its own, which makes a row independent of its
            batch. None takes torch's.
        max_tries: after this many refused draws take the most probable token, as the official code does after 10; None
            goes on until a token is kept.
        floor: in mask mode less probable tokens are cut without a proof.
        limit: in mask mode decide only this many of the most probable tokens below tau, and keep others that the same
            proofs cover. It bounds the time of a flat row. None decides every token.
        filter_value: the score of removed tokens.

    The most probable token always stays, and a row of equal scores comes back unchanged. Undecided tokens count as cut;
    `checker.checked` and `checker.undecided` count.

    Raises:
        TypeError, ValueError: a bad argument; scores of another vocabulary than the basis has; continuous batching
            (`generate_batch`, serving), which has no room for proofs; a grammar that runs later.

    Warns once if a later sampler cuts tokens that are kept here, or if earlier processors (penalties, masks, a second
    model) changed the model's distribution, about which the proofs are.

    Source: Finlayson et al. 2023, arXiv 2310.01693, section 5 and algorithm 1. Deviations: see `SupportChecker`.
    """

    # Declared unsupported, it would be left out there with a line in the log; so it is called, and refuses.
    supports_continuous_batching = True

    def __init__(
        self,
        basis: SoftmaxBasis,
        epsilon: Values,
        *,
        cutoff: Literal["eta", "epsilon"] = "eta",
        mode: Literal["sample", "mask"] = "sample",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_tries: int | None = None,
        floor: float = 1e-6,
        limit: int | None = None,
        filter_value: float = -math.inf,
    ):
        self.checker = SupportChecker(basis)
        self.epsilon = check_float_per_row("epsilon", epsilon, gt=0, lt=1)
        self.cutoff = check_choice("cutoff", cutoff, ("eta", "epsilon"))
        self.mode = check_choice("mode", mode, ("sample", "mask"))
        self.max_tries = None if max_tries is None else check_int("max_tries", max_tries, minimum=1)
        self.floor = check_float("floor", floor, minimum=0, lt=1)
        self.limit = None if limit is None else check_int("limit", limit, minimum=1)
        self.generator = generator
        self.filter_value = check_filter_value(filter_value)
        self._is_unwarned = True

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [rows, V] with `filter_value` in place of every removed token."""
        if input_ids is not None and input_ids.ndim == 1:
            raise ValueError(
                "BasisAwareLogitsProcessor cannot be used in continuous batching (generate_batch() and serving): use "
                "generate()"
            )
        self._check_vocabulary(check_scores(scores))
        if input_ids is not None:
            refuse_empty_rows(self, scores)
        before, behind = neighbours(self) if input_ids is not None else ([], [])
        draws = self._draws(behind)
        if self._is_unwarned and input_ids is not None:
            refuse_grammars(self, behind)
            is_warned = [warn_of_cuts(self, behind), warn_of_reshaping(self, before, scores)]
            self._is_unwarned = not any(is_warned)
        rows, plain, tau, decidable = self._plain(scores)
        kept = self._draw(scores, rows, plain, tau, decidable) if draws else self._mask(scores, plain, tau, decidable)
        return scores.masked_fill(~kept & decidable[:, None], representable(self.filter_value, scores))

    def drawn_from(self, scores: Tensor, result: Tensor) -> Tensor:
        """Return the scores that a token is drawn from, for a trace; `result` is the processor's output for `scores`.

        That is `result` itself, or the scores of the kept set where sample mode left a single token, at a mask's cost.
        """
        if not self._draws(neighbours(self)[1]):
            return result
        _, plain, tau, decidable = self._plain(scores)
        return scores.masked_fill(~self._mask(scores, plain, tau, decidable) & decidable[:, None], -math.inf)

    def threshold(self, scores: Tensor) -> Tensor:
        """Return tau [..., 1] for `scores` [..., V]: tokens below it need a proof."""
        rows = softmax_rows(check_scores(scores))
        return (threshold_of(self.cutoff, rows, self.epsilon) - rows.log_total).exp()

    def margins(self, scores: Tensor, tau: Tensor, tokens: Tensor) -> Tensor:
        """Return the margins of the proofs that keep `tokens` [rows, n] of `scores` [rows, V] below tau [rows, 1].

        See `Certificate.margin`; NaN where a token has no such proof. Cost: 1 to 2 ms a token.
        """
        proofs = self.checker.certify(scores, tau.double(), tokens)
        margins = [math.nan if proof.margin is None else proof.margin for proof in proofs]
        return torch.tensor(margins, dtype=torch.float64).reshape(tokens.shape)

    def _draws(self, behind: list[Any]) -> bool:
        return self.mode == "sample" and is_sampling() and not changes_one_token(behind)

    def _plain(self, scores: Tensor) -> tuple[Softmax, Tensor, Tensor, Tensor]:
        """Return the rows' softmax, the plain kept set, tau [rows, 1], and the rows with anything to decide [rows]."""
        rows = softmax_rows(scores)
        threshold = threshold_of(self.cutoff, rows, self.epsilon)
        plain = ~below(scores, rows, threshold) & (scores > -math.inf)
        tau = (threshold - rows.log_total).double().exp()
        # Nothing to decide in a broken row (its threshold is NaN) nor in one whose tokens are all most probable.
        decidable = (~threshold.isnan() & (scores != scores.amax(-1, keepdim=True)).any(-1, keepdim=True))[:, 0]
        return rows, plain, tau, decidable

    def _mask(self, scores: Tensor, plain: Tensor, tau: Tensor, decidable: Tensor) -> Tensor:
        kept = plain.clone()
        if decidable.any():
            kept[decidable] |= self.checker.kept(scores[decidable], tau[decidable], floor=self.floor, limit=self.limit)
        return kept

    def _draw(self, scores: Tensor, rows: Softmax, plain: Tensor, tau: Tensor, decidable: Tensor) -> Tensor:
        """Draw one token a row, without replacement until one is kept."""
        drawn = draw(rows.weights, uniform(len(scores), self.generator, scores.device))
        refused = decidable & ~plain.gather(1, drawn)[:, 0]
        for row in refused.nonzero()[:, 0].tolist():
            weights = rows.weights[row : row + 1].clone()
            drawn[row] = self._first_kept(scores, row, weights, plain[row], tau[row], int(drawn[row]))
        return torch.zeros_like(plain).scatter_(1, drawn, True)

    def _first_kept(self, scores: Tensor, n: int, weights: Tensor, plain: Tensor, tau: Tensor, token: int) -> int:
        """Draw on from `token`, which is below tau, until a token of row n is kept."""
        row, generator = self.checker.row(scores[n]), self._generator(n)
        tries = 1
        while not (plain[token] or row.decide(token, float(tau)) is Decision.KEPT):
            if tries == self.max_tries:
                return int(scores[n].argmax())
            weights[0, token] = 0
            token = int(draw(weights, uniform(1, generator, scores.device)))
            tries += 1
        return token

    def _generator(self, row: int) -> torch.Generator | None:
        one = self.generator is None or isinstance(self.generator, torch.Generator)
        return self.generator if one else self.generator[row]  # type: ignore[return-value, index]

    def _check_vocabulary(self, scores: Tensor) -> None:
        size = self.checker.basis.vocab_size
        if scores.ndim != 2 or scores.shape[1] != size:
            raise ValueError(
                f"scores must have shape [rows, {size}], the vocabulary of the basis, got {tuple(scores.shape)}; "
                "make the basis from the model that generates: SoftmaxBasis.from_model(model)"
            )

    def __repr__(self) -> str:
        epsilon = self.epsilon.tolist() if isinstance(self.epsilon, Tensor) else f"{self.epsilon:g}"
        return f"BasisAwareLogitsProcessor({self.checker.basis!r}, epsilon={epsilon}, mode={self.mode!r})"
