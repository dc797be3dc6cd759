"""Truncation samplers as transformers logits processors: `model.generate(logits_processor=[...])`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_longtrunc.arguments import number, one_of, whole
from hf_longtrunc.sampling.calls import (
    draws_by_itself,
    neighbours,
    warn_of_cuts,
    warn_of_penalties,
    warn_of_temperature,
)
from hf_longtrunc.sampling.cutoffs import (
    Softmax,
    below_threshold,
    draw,
    epsilon_log_threshold,
    eta_log_threshold,
    p_less_log_threshold,
    set_zero,
    softmax_rows,
    top_n_sigma_log_threshold,
)
from hf_longtrunc.sampling.support import Decision, SupportChecker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc.sampling.basis import SoftmaxBasis
    from hf_longtrunc.sampling.support import Variant


# Scores that go through a processor at a time: 2 MB in fp32, which with their temporaries stay in the caches.
_CACHED = 2**19


class _ThresholdLogitsProcessor(LogitsProcessor):
    """Removes the tokens whose probability lies under a bar that `_log_threshold` draws for each row."""

    supports_continuous_batching = True
    _parameter = ""  # the attribute that may hold one value a row

    def __init__(self, *, min_tokens_to_keep: int, filter_value: float):
        self.min_tokens_to_keep = whole("min_tokens_to_keep", min_tokens_to_keep, least=1)
        self.filter_value = _checked_filter_value(filter_value)
        self._is_unwarned = True

    def _log_threshold(self, rows: Softmax) -> Tensor:
        raise NotImplementedError

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [..., V] with `filter_value` in place of every removed token.

        Kept scores keep their bits and their dtype. `input_ids` is not read. A row with a NaN or +inf in it, or with
        nothing but -inf, comes back unchanged, so that the sampler after it reports it.

        Warns once, where transformers' own samplers run behind it and cut what it keeps.
        """
        self._check_call(input_ids)
        scores = _checked_scores(scores)
        if self._in_parts(scores):
            result = torch.empty_like(scores)
            size = max(1, _CACHED // scores.shape[1])
            for part, out in zip(torch.split(scores, size), torch.split(result, size), strict=True):
                self._truncated(part, out)
            return result
        return self._truncated(scores)

    def _truncated(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        rows = softmax_rows(scores)
        cut = below_threshold(scores, rows, self._log_threshold(rows), self.min_tokens_to_keep)
        removed = scores.new_full((), _representable(self.filter_value, scores))
        return torch.where(cut, removed, scores, out=out)

    def _in_parts(self, scores: Tensor) -> bool:
        """Whether some rows at a time are faster: where the temporaries of all of them fall out of a CPU's caches.

        Not with one value a row, whose rows it would have to follow.
        """
        if torch.compiler.is_compiling() or scores.device.type != "cpu" or scores.ndim != 2 or scores.requires_grad:
            return False
        return scores.numel() >= 2 * _CACHED and not isinstance(getattr(self, self._parameter, None), Tensor)

    def threshold(self, scores: Tensor) -> Tensor:
        """Return the bar that each row of `scores` [..., V] is held against, as a probability [..., 1]."""
        return self._log_threshold(softmax_rows(_checked_scores(scores))).exp()

    def _check_call(self, input_ids: Tensor | None) -> None:
        value = getattr(self, self._parameter, None)
        if input_ids is not None and input_ids.ndim == 1 and isinstance(value, Tensor):
            raise ValueError(
                f"{self._parameter} has one value a row, and continuous batching mixes the rows of requests: use one "
                "value for all, or generate()"
            )
        if self._is_unwarned and input_ids is not None:
            self._is_unwarned = not warn_of_cuts(self, neighbours(self)[1])

    def __repr__(self) -> str:
        value = getattr(self, self._parameter, None)
        shown = f"{value.tolist()}" if isinstance(value, Tensor) else f"{value:g}"
        return f"{type(self).__name__}({self._parameter}={shown})"


class EtaLogitsProcessor(_ThresholdLogitsProcessor):
    """Eta-sampling: remove the tokens with p < eta = min(epsilon, sqrt(epsilon) * exp(-H)).

    H is the entropy, in nats, of the full softmax of the scores that the processor is handed. Passed in `generate`'s
    list it runs before temperature, top-k and top-p, so that is the model's own distribution at temperature 1, as the
    method defines it. The most probable token always stays.

    Args:
        epsilon: in (0, 1). The paper's range is 3e-4 to 4e-3, smaller for larger models. Or one value a row: a list or
            a tensor [rows], or [prompts] of a batch whose beams or returns stand together, as `generate` lays them out.
        min_tokens_to_keep: so many of the most probable tokens stay whatever the bar; ties with the last one stay too.
        filter_value: the score that a removed token gets; what the scores' dtype cannot hold becomes its lowest value.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range; a number of values that does not fit
            the rows; scores that are no floating-point tensor or have no token in them.

    Cost: one `exp` and two sums over the vocabulary; no sort, no host synchronisation; on a CPU a large batch goes
    through in parts of 2 MB. Rows are independent of their batch to the bit. Works with `generate` in every mode that
    takes a processor list, and through `attach_processors` in those that take none. `sampling_settings(model)` are the
    arguments that leave it alone.

    Source: Hewitt, Manning, Liang 2022, "Truncation Sampling as Language Model Desmoothing", arXiv 2210.15191,
    section 4.2. Deviations: none.
    """

    _parameter = "epsilon"

    def __init__(
        self,
        epsilon: float | Sequence[float] | Tensor,
        *,
        min_tokens_to_keep: int = 1,
        filter_value: float = -math.inf,
    ):
        self.epsilon = _checked_epsilon(epsilon)
        super().__init__(min_tokens_to_keep=min_tokens_to_keep, filter_value=filter_value)

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return eta_log_threshold(rows, self.epsilon)


class EpsilonLogitsProcessor(EtaLogitsProcessor):
    """Epsilon-sampling: remove the tokens with p < epsilon, the most probable one excepted.

    Arguments, errors, cost and guarantees are those of `EtaLogitsProcessor`. The paper's range for epsilon is 3e-4 to
    9e-4.

    Source: Hewitt, Manning, Liang 2022, arXiv 2210.15191, section 4.1. Deviations: none.
    """

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return epsilon_log_threshold(rows, self.epsilon)


class TopNSigmaLogitsProcessor(_ThresholdLogitsProcessor):
    """Top-n-sigma sampling: remove the tokens whose logit lies more than n standard deviations below the largest.

    The method takes the bulk of the logits for Gaussian noise and what stands far above it for signal, so it assumes
    that the scores have such a bulk. The kept set is the same at every temperature. Errors and guarantees are those of
    `EtaLogitsProcessor`; cost: one pass over the vocabulary more.

    Args:
        n: above 0; the paper takes 1. Or one value a row, as for `EtaLogitsProcessor`.
        min_tokens_to_keep: as for `EtaLogitsProcessor`.
        filter_value: as for `EtaLogitsProcessor`.

    Source: Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", arXiv 2411.07641. Deviations: the deviation is that
    of the whole row, divided by V and not by V - 1; tokens at -inf, removed by an earlier processor, do not enter it.
    """

    _parameter = "n"

    def __init__(
        self, n: float | Sequence[float] | Tensor = 1.0, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf
    ):
        super().__init__(min_tokens_to_keep=min_tokens_to_keep, filter_value=filter_value)
        self.n = _one_or_a_row("n", n, above=0)

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return top_n_sigma_log_threshold(rows, self.n)


class PLessLogitsProcessor(_ThresholdLogitsProcessor):
    """P-less sampling: remove the tokens less probable than two draws from the row are to agree, sum of p^2.

    There is nothing to set. The bar follows the distribution that the processor is handed: at temperature 1 in
    `generate`'s list; behind temperature, as the paper has it, by `attach_processors(..., after_warpers=True)`.
    The most probable token always stays. Guarantees are those of `EtaLogitsProcessor`; cost: one `exp` more.

    Args:
        normalized: take (V sum p^2 - 1) / (V - 1), a laxer bar: 0 for a flat row, which keeps all of its tokens.
        min_tokens_to_keep: as for `EtaLogitsProcessor`.
        filter_value: as for `EtaLogitsProcessor`.

    Raises:
        TypeError, ValueError: as for `EtaLogitsProcessor`.

    Source: Tan, Wu, Howard 2025, "p-less Sampling", arXiv 2509.23234. Deviations: none.
    """

    def __init__(self, *, normalized: bool = False, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(min_tokens_to_keep=min_tokens_to_keep, filter_value=filter_value)
        if not isinstance(normalized, bool):
            raise TypeError(f"normalized must be True or False, got {normalized!r}")
        self.normalized = normalized

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return p_less_log_threshold(rows, self.normalized)

    def __repr__(self) -> str:
        return f"PLessLogitsProcessor(normalized={self.normalized})"


class BasisAwareLogitsProcessor(LogitsProcessor):
    """Basis-aware truncation: below the plain threshold, keep the tokens whose true probability is provably not zero.

    The model's error lies in the few directions that its output embedding cannot express. A token is cut only if some
    distribution with the same image in `basis`, nowhere above p-hat / (1 - tau), gives it probability zero; tau is the
    threshold of eta- or epsilon-sampling, so the kept set contains theirs. The theory holds at temperature 1.

    Args:
        basis: of the model that generates: `SoftmaxBasis.from_model(model)`.
        epsilon: in (0, 1), the parameter of `cutoff`; or one value a row, as for `EtaLogitsProcessor`. The kept set
            grows with the rank: match it again for each rank (`hf-longtrunc match`).
        cutoff: "eta" or "epsilon", which threshold tau is.
        mode: "sample" draws here, without replacement until a token is kept, and leaves exactly that token: samples of
            p-hat restricted to the kept set, a check for each draw below the bar. "mask" removes exactly the cut
            tokens: deterministic, for beams and for further samplers, at a solve for every token near the bar. Where
            `generate` does not draw each row's token by itself (beams, `do_sample=False`), "sample" masks too.
        variant: "paper", or "official" for the authors' code, which lets p go below zero and keeps fewer tokens.
        generator: of the draws in sample mode; a list gives every row its own, which makes a row's draws independent
            of its batch. None takes torch's.
        max_tries: after so many refused draws take the most probable token, as the official code does after 10; None
            goes on until a token is kept.
        floor: in mask mode tokens of less probability are cut without a proof.
        limit: in mask mode None decides every token below the bar. A number bounds the time of a flat row: so many of
            its tokens, the most probable ones, are decided, and of the others those kept that the same proofs cover.
        filter_value: the score that a removed token gets.

    The most probable token always stays, and a row of equal scores comes back unchanged: all its tokens are most
    probable ones. Undecided tokens count as cut; `checker.checked` and `checker.undecided` count.

    Raises:
        TypeError, ValueError: a bad argument; scores of another vocabulary than the basis has; continuous batching
            (`generate_batch`, serving), whose static shapes leave no room for proofs.

    Warns once, where transformers' own samplers cut what it keeps, where a temperature comes behind a token that is
    drawn already, or a penalty in front of it changes the distribution: the proofs are about the model's own.

    Source: Finlayson et al. 2023, arXiv 2310.01693, section 5 and algorithm 1. Deviations: see `SupportChecker`.
    """

    # Declared unsupported, it would be left out there with a line in the log; this way it is called, and refuses.
    supports_continuous_batching = True

    def __init__(
        self,
        basis: SoftmaxBasis,
        epsilon: float | Sequence[float] | Tensor,
        *,
        cutoff: Literal["eta", "epsilon"] = "eta",
        mode: Literal["sample", "mask"] = "sample",
        variant: Variant = "paper",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        max_tries: int | None = None,
        floor: float = 1e-6,
        limit: int | None = None,
        filter_value: float = -math.inf,
    ):
        self.checker = SupportChecker(basis, variant=variant)
        self.epsilon = _checked_epsilon(epsilon)
        self.cutoff = one_of("cutoff", cutoff, ("eta", "epsilon"))
        self.mode = one_of("mode", mode, ("sample", "mask"))
        self.max_tries = None if max_tries is None else whole("max_tries", max_tries, least=1)
        self.floor = number("floor", floor, least=0, below=1)
        self.limit = None if limit is None else whole("limit", limit, least=1)
        self.generator = generator
        self.filter_value = _checked_filter_value(filter_value)
        self._is_unwarned = True

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [rows, V] with `filter_value` in place of every removed token.

        A row that is no distribution, or whose scores are all equal, comes back unchanged.
        """
        if input_ids is not None and input_ids.ndim == 1:
            raise ValueError(
                "BasisAwareLogitsProcessor cannot be used in continuous batching (generate_batch() and serving): use "
                "generate()"
            )
        self._check_vocabulary(_checked_scores(scores))
        draws = self.mode == "sample" and draws_by_itself()
        if self._is_unwarned and input_ids is not None:
            before, behind = neighbours(self)
            # A lone token is not cut by the samplers behind, nor moved by a temperature.
            warn_of_what_follows = warn_of_temperature if draws else warn_of_cuts
            is_warned = [warn_of_what_follows(self, behind), warn_of_penalties(self, before)]
            self._is_unwarned = not any(is_warned)
        rows = softmax_rows(scores)
        bar = self._log_threshold(rows)
        plain = ~below_threshold(scores, rows, bar) & (scores > -math.inf)
        tau = bar.double().exp()
        # Nothing to decide in a broken row (its bar is NaN) nor in one whose tokens are all most probable.
        decidable = (~bar.isnan() & (scores != scores.amax(-1, keepdim=True)).any(-1, keepdim=True))[:, 0]
        kept = self._draw(scores, rows, plain, tau, decidable) if draws else self._mask(scores, plain, tau, decidable)
        return scores.masked_fill(~kept & decidable[:, None], _representable(self.filter_value, scores))

    def threshold(self, scores: Tensor) -> Tensor:
        """Return tau for each row of `scores` [..., V]: the bar below which a token needs a proof, [..., 1]."""
        return self._log_threshold(softmax_rows(_checked_scores(scores))).exp()

    def margins(self, scores: Tensor, tau: Tensor, tokens: Tensor) -> Tensor:
        """Return the margins of the proofs that keep `tokens` [rows, n] of `scores` [rows, V] below tau [rows, 1].

        See `Certificate.margin`; NaN where a token has no such proof. Cost: 1 to 2 ms a token, as for a check.
        """
        proofs = self.checker.certify(scores, tau.double(), tokens)
        margins = [math.nan if proof.margin is None else proof.margin for proof in proofs]
        return torch.tensor(margins, dtype=torch.float64).reshape(tokens.shape)

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return (eta_log_threshold if self.cutoff == "eta" else epsilon_log_threshold)(rows, self.epsilon)

    def _mask(self, scores: Tensor, plain: Tensor, tau: Tensor, decidable: Tensor) -> Tensor:
        kept = plain.clone()
        if decidable.any():
            kept[decidable] |= self.checker.kept(scores[decidable], tau[decidable], floor=self.floor, limit=self.limit)
        return kept

    def _draw(self, scores: Tensor, rows: Softmax, plain: Tensor, tau: Tensor, decidable: Tensor) -> Tensor:
        """One token a row, drawn without replacement until it is a kept one."""
        drawn = draw(rows.tree, self._uniform(len(scores), scores.device))
        refused = decidable & ~plain.gather(1, drawn)[:, 0]
        for row in refused.nonzero()[:, 0].tolist():
            levels = [level[row : row + 1].clone() for level in rows.tree]
            drawn[row] = self._first_kept(scores, row, levels, plain[row], tau[row], int(drawn[row]))
        return torch.zeros_like(plain).scatter_(1, drawn, True)

    def _first_kept(self, scores: Tensor, n: int, tree: list[Tensor], plain: Tensor, tau: Tensor, token: int) -> int:
        """Go on from `token`, drawn for row n and below tau, to one that is kept."""
        row, generator = self.checker.row(scores[n], float(tau)), self._generator(n)
        tries = 1
        while not (plain[token] or row.decide(token) is Decision.KEPT):
            if tries == self.max_tries:
                return int(scores[n].argmax())
            set_zero(tree, token)
            token = int(draw(tree, _uniform(1, generator, scores.device)))
            tries += 1
        return token

    def _uniform(self, rows: int, device: torch.device) -> Tensor:
        """One number in [0, 1) a row [rows, 1], each from the row's own generator where there are several."""
        if self.generator is None or isinstance(self.generator, torch.Generator):
            return _uniform(rows, self.generator, device)
        if len(self.generator) != rows:
            raise ValueError(
                f"generator must be one torch.Generator or one for each of the {rows} rows of the batch "
                f"(num_return_sequences and beams count), got {len(self.generator)}"
            )
        every = [_uniform(1, generator, device) for generator in self.generator]
        return torch.cat(every) if every else _uniform(0, None, device)

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


def _uniform(rows: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    # Drawn where the generator lives.
    there = device if generator is None else generator.device
    return torch.rand(rows, 1, dtype=torch.float64, generator=generator, device=there).to(device)


def _one_or_a_row(name: str, value: object, **bounds: float) -> float | Tensor:
    """Return a number, or a float64 tensor of one number a row, on the CPU, where their logarithms are taken."""
    if isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1):
        values = value if isinstance(value, (list, tuple)) else value.tolist()
        if not len(values):
            raise ValueError(f"{name} must be a number or one for every row, got none")
        numbers = [number(f"{name}[{place}]", each, **bounds) for place, each in enumerate(values)]
        return torch.tensor(numbers, dtype=torch.float64)
    return number(name, value, **bounds)


def _checked_epsilon(epsilon: object) -> float | Tensor:
    return _one_or_a_row("epsilon", epsilon, above=0, below=1)


def _representable(filter_value: float, scores: Tensor) -> float:
    return filter_value if filter_value == -math.inf else max(filter_value, torch.finfo(scores.dtype).min)


def _checked_filter_value(filter_value: object) -> float:
    return -math.inf if filter_value == -math.inf else number("filter_value", filter_value)


def _checked_scores(scores: Tensor) -> Tensor:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be a floating-point tensor [..., vocabulary], got {scores.dtype}")
    if scores.shape[-1] == 0:
        raise ValueError(f"scores must have at least one token in the last dimension, got shape {tuple(scores.shape)}")
    return scores
