"""Truncation samplers as transformers logits processors: `model.generate(logits_processor=[...])`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_longtrunc.arguments import check_float, check_int
from hf_longtrunc.sampling.calls import (
    neighbours,
    refuse_empty_rows,
    refuse_grammars,
    rows_per_prompt,
    warn_of_cuts,
)
from hf_longtrunc.sampling.cutoffs import CUTOFFS, Softmax, below, column, softmax_rows, threshold_of, xtc_cut
from hf_longtrunc.sampling.dry import Dry

if TYPE_CHECKING:
    from collections.abc import Sequence

    Values = float | Sequence[float] | Tensor  # one for all rows, or one a row


# Scores that go through a processor at a time: 2 MB in fp32, which with their temporaries stay in the caches.
_CACHED = 2**19


class _TruncatingLogitsProcessor(LogitsProcessor):
    """Removes the tokens of each row that `_cut` marks."""

    supports_continuous_batching = True
    _parameter = ""  # the attribute that may hold one value a row

    def __init__(self, filter_value: float):
        self.filter_value = check_filter_value(filter_value)
        self._is_unwarned = True

    def _cut(self, scores: Tensor, rows: Softmax) -> Tensor:
        raise NotImplementedError

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [..., V] with `filter_value` in place of every removed token.

        A row with a NaN or +inf comes back unchanged, so that sampling reports it. So does a row of -inf alone, except
        in `generate` on a CPU, where it raises ValueError and names the processors that removed every token.
        """
        self._check_call(input_ids)
        scores = check_scores(scores)
        # Elsewhere the look would stop the host at every step.
        if input_ids is not None and input_ids.ndim == scores.ndim == 2 and scores.device.type == "cpu":
            refuse_empty_rows(self, scores)
        if self._in_parts(scores):
            result = torch.empty_like(scores)
            size = max(1, _CACHED // scores.shape[1])
            for part, out in zip(torch.split(scores, size), torch.split(result, size), strict=True):
                self._truncated(part, out)
            return result
        return self._truncated(scores)

    def _truncated(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        removed = scores.new_full((), representable(self.filter_value, scores))
        return torch.where(self._cut(scores, softmax_rows(scores)), removed, scores, out=out)

    def _in_parts(self, scores: Tensor) -> bool:
        """Return whether to take some rows at a time, so that temporaries stay in a CPU's caches."""
        if torch.compiler.is_compiling() or scores.device.type != "cpu" or scores.ndim != 2 or scores.requires_grad:
            return False
        return scores.numel() >= 2 * _CACHED and not isinstance(getattr(self, self._parameter, None), Tensor)

    def _check_call(self, input_ids: Tensor | None) -> None:
        if input_ids is None:
            return
        value = getattr(self, self._parameter, None)
        if input_ids.ndim == 1 and isinstance(value, Tensor):
            raise ValueError(
                f"{self._parameter} has one value a row, and continuous batching mixes the rows of requests: use one "
                "value for all, or generate()"
            )
        if (
            isinstance(value, Tensor)
            and (rows := rows_per_prompt()) is not None
            and len(value) * rows != len(input_ids)
        ):
            raise ValueError(
                f"{self._parameter} has {len(value)} values, and generate() runs {len(input_ids)} rows, {rows} for "
                "each prompt: give one value for every prompt"
            )
        if self._is_unwarned:
            behind = neighbours(self)[1]
            refuse_grammars(self, behind)
            self._is_unwarned = not warn_of_cuts(self, behind)

    def __repr__(self) -> str:
        value = getattr(self, self._parameter, None)
        shown = f"{value.tolist()}" if isinstance(value, Tensor) else f"{value:g}"
        return f"{type(self).__name__}({self._parameter}={shown})"


class _CutoffLogitsProcessor(_TruncatingLogitsProcessor):
    """Removes the tokens below the threshold of `cutoffs.CUTOFFS[_name]`."""

    _name = ""

    def __init__(self, value: Values, min_tokens_to_keep: int, filter_value: float):
        self.min_tokens_to_keep = check_int("min_tokens_to_keep", min_tokens_to_keep, minimum=1)
        super().__init__(filter_value)
        if self._parameter:
            setattr(
                self, self._parameter, check_float_per_row(self._parameter, value, **(CUTOFFS[self._name].bounds or {}))
            )

    def threshold(self, scores: Tensor) -> Tensor:
        """Return each row's threshold as a probability [..., 1], for `scores` [..., V]."""
        rows = softmax_rows(check_scores(scores))
        return (self._z_threshold(rows) - rows.log_total).exp()

    def _z_threshold(self, rows: Softmax) -> Tensor:
        return threshold_of(self._name, rows, getattr(self, self._parameter) if self._parameter else 1.0)

    def _cut(self, scores: Tensor, rows: Softmax) -> Tensor:
        return below(scores, rows, self._z_threshold(rows), self.min_tokens_to_keep)


class EtaLogitsProcessor(_CutoffLogitsProcessor):
    """Eta-sampling: remove the tokens with p < eta = min(epsilon, sqrt(epsilon) * exp(-H)).

    Examples:
        >>> settings = sampling_settings(model)
        >>> text = model.generate(ids, **settings, max_new_tokens=4, logits_processor=[EtaLogitsProcessor(2e-3)])

    H is the entropy, in nats, of the full softmax of the scores. In `generate`'s list the processor runs on the model's
    distribution at temperature 1, as the method defines it. The most probable token always stays.

    Args:
        epsilon: in (0, 1). The paper's range is 3e-4 to 4e-3, smaller for larger models. Or one value a row: a list or
            a tensor [rows], or [prompts] for all beams or returns of each prompt.
        min_tokens_to_keep: this many of the most probable tokens always stay, ties with the last one too.
        filter_value: the score of removed tokens, at least the lowest value of the scores' dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range; a number of values that does not fit
            the rows; scores that are no floating-point tensor or have no token in them.

    Cost: one `exp` and two sums over the vocabulary; no sort, no host synchronisation. A row's result does not depend
    on the batch, bit for bit. Works in every mode of `generate`, through `attach_processors` where it takes no list.

    Source: Hewitt, Manning, Liang 2022, "Truncation Sampling as Language Model Desmoothing", arXiv 2210.15191,
    section 4.2. Deviations: none.
    """

    _name, _parameter = "eta", "epsilon"
    epsilon: float | Tensor

    def __init__(self, epsilon: Values, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(epsilon, min_tokens_to_keep, filter_value)


class EpsilonLogitsProcessor(EtaLogitsProcessor):
    """Epsilon-sampling: remove the tokens with p < epsilon, the most probable one excepted.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> EpsilonLogitsProcessor(0.05)(None, scores)
        tensor([[4., 3., -inf, -inf]])

    Arguments, errors and cost as for `EtaLogitsProcessor`; the paper's range for epsilon is 3e-4 to 9e-4.

    Source: Hewitt, Manning, Liang 2022, arXiv 2210.15191, section 4.1. Deviations: none.
    """

    _name = "epsilon"


class TopNSigmaLogitsProcessor(_CutoffLogitsProcessor):
    """Top-n-sigma sampling: remove the tokens with a logit more than n standard deviations below the largest.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> TopNSigmaLogitsProcessor(1.0)(None, scores)
        tensor([[4., 3., -inf, -inf]])

    The method assumes that most logits are Gaussian noise and that the tokens far above them are meant. The kept set is
    the same at every temperature. Other arguments and errors as for `EtaLogitsProcessor`; one pass over the vocabulary
    more.

    Args:
        n: above 0; the paper takes 1. Or one value a row.

    Source: Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", arXiv 2411.07641. Deviations: the standard
    deviation divides by V, not V - 1, and leaves out tokens at -inf.
    """

    _name, _parameter = "top_n_sigma", "n"
    n: float | Tensor

    def __init__(self, n: Values = 1.0, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(n, min_tokens_to_keep, filter_value)


class PLessLogitsProcessor(_CutoffLogitsProcessor):
    """P-less sampling: remove the tokens with p < sum of p^2, the chance that two draws from the row agree.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> PLessLogitsProcessor()(None, scores)
        tensor([[4., -inf, -inf, -inf]])

    It has no parameter. In `generate`'s list it sees the distribution at temperature 1; the paper applies it after
    temperature: `attach_processors(..., after_warpers=True)`. The most probable token always stays. Other arguments and
    errors as for `EtaLogitsProcessor`; one `exp` more.

    Args:
        normalized: take (V sum p^2 - 1) / (V - 1), a lower threshold: 0 for a flat row, which keeps all of its tokens.

    Source: Tan, Wu, Howard 2025, "p-less Sampling", arXiv 2509.23234. Deviations: none.
    """

    def __init__(self, *, normalized: bool = False, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(1.0, min_tokens_to_keep, filter_value)
        if not isinstance(normalized, bool):
            raise TypeError(f"normalized must be True or False, got {normalized!r}")
        self.normalized = normalized
        self._name = "p_less_norm" if normalized else "p_less"

    def __repr__(self) -> str:
        return f"PLessLogitsProcessor(normalized={self.normalized})"


class TopHLogitsProcessor(_CutoffLogitsProcessor):
    """Top-H sampling: keep the most probable tokens as long as their terms -p log p sum to `top_h` of the entropy.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> TopHLogitsProcessor(0.4)(None, scores)
        tensor([[4., -inf, -inf, -inf]])

    Ties with the last kept token stay. Other arguments and errors as for `EtaLogitsProcessor`. Cost: the 128 most
    probable tokens are put in order, more where the share reaches further; one host synchronisation.

    Args:
        top_h: in (0, 1]; the paper takes 0.4. Or one value a row.

    Source: Potraghloo et al. 2025, "Top-H Decoding", arXiv 2509.02510, and its authors' code. Deviation: that code and
    transformers' `TopHLogitsWarper` renormalise the 100 most probable tokens first; here all tokens count.
    """

    _name = _parameter = "top_h"
    top_h: float | Tensor

    def __init__(self, top_h: Values = 0.4, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(top_h, min_tokens_to_keep, filter_value)


class MinKLogitsProcessor(_CutoffLogitsProcessor):
    """Min-k sampling: keep the tokens before the steepest drop, the largest (s_i - s_{i+1}) / i of the sorted scores.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> MinKLogitsProcessor()(None, scores)
        tensor([[4., 3., -inf, -inf]])

    The kept set is the same at every temperature; ties with the last kept token stay. Other arguments and errors as for
    `EtaLogitsProcessor`, cost as for `TopHLogitsProcessor`.

    Args:
        tau: at least 0; at least floor(tau / (largest score - smallest)) tokens stay, which a nearly flat row needs.
            The paper takes 3. Or one value a row.

    Source: Ding et al. 2026, "Min-k Sampling", arXiv 2604.11012, section 3. Deviation: a drop to a token at -inf does
    not count.
    """

    _name, _parameter = "min_k", "tau"
    tau: float | Tensor

    def __init__(self, tau: Values = 3.0, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        super().__init__(tau, min_tokens_to_keep, filter_value)


class XTCLogitsProcessor(_TruncatingLogitsProcessor):
    """XTC (exclude top choices): with some probability, remove the tokens above a threshold but the least probable one.

    Examples:
        >>> scores = torch.tensor([[4.0, 3.0, 0.0, -4.0]])
        >>> XTCLogitsProcessor(threshold=0.1, probability=1.0)(None, scores)
        tensor([[-inf, 3., 0., -4.]])

    Each row and step draws one number to decide. Put the processor after truncation samplers, which leave no improbable
    token to be chosen instead. Errors as for `EtaLogitsProcessor`.

    Args:
        threshold: in (0, 1); at 0.5 or more at most one token reaches it, and nothing is removed. Or one value a row.
        probability: in [0, 1]. Or one value a row.
        generator: for the decisions; a list gives every row its own, which makes a row independent of its batch. None
            takes torch's.
        filter_value: as for `EtaLogitsProcessor`.

    Source: p-e-w 2024, text-generation-webui, pull request 6335. Deviation: end-of-text and line breaks are no
    exceptions.
    """

    _parameter = "threshold"

    def __init__(
        self,
        threshold: Values = 0.1,
        probability: Values = 0.5,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        filter_value: float = -math.inf,
    ):
        super().__init__(filter_value)
        self.threshold = check_float_per_row("threshold", threshold, gt=0, lt=1)
        self.probability = check_float_per_row("probability", probability, minimum=0, maximum=1)
        self.generator = generator

    def _cut(self, scores: Tensor, rows: Softmax) -> Tensor:
        log_threshold, probability = (
            column([law(each) for each in value.tolist()], rows) if isinstance(value, Tensor) else law(value)
            for value, law in ((self.threshold, math.log), (self.probability, float))
        )
        decided = uniform(rows.z[..., 0].numel(), self.generator, scores.device).reshape(rows.log_total.shape)
        return xtc_cut(rows, log_threshold, decided < probability)

    def _in_parts(self, scores: Tensor) -> bool:
        return False


class DRYLogitsProcessor(LogitsProcessor):
    r"""DRY (don't repeat yourself): lower the scores of tokens that would continue a repetition of the text.

    Examples:
        >>> DRYLogitsProcessor(0.8)(torch.tensor([[5, 6, 7, 5, 6]]), torch.zeros(1, 8))[0, 5:]
        tensor([ 0.0000,  0.0000, -0.8000])

    If the last n tokens of the text occur earlier in it, n >= allowed_length, the token that followed them there loses
    multiplier * base^(n - allowed_length). Put it before truncation samplers, since it changes the distribution that
    they cut. Left padding is part of the text: pass its id among `sequence_breakers`.

    Args:
        multiplier: at least 0, which penalises nothing. Or one value a row, as for `EtaLogitsProcessor`.
        base: at least 1.
        allowed_length: at least 1; shorter repetitions cost nothing.
        window: read only this many of the last tokens; None reads all.
        sequence_breakers: ids of tokens that end a match, such as line breaks and quotation marks;
            `tokenizer.encode("a\n", add_special_tokens=False)[-1]` is that of a line break.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range; continuous batching
            (`generate_batch`), which hands over no text.

    Source: p-e-w 2024, text-generation-webui, pull request 5677. Deviations: none.
    """

    # Declared unsupported, it would be left out there with a line in the log; so it is called, and refuses.
    supports_continuous_batching = True

    def __init__(
        self,
        multiplier: Values = 0.8,
        base: float = 1.75,
        allowed_length: int = 2,
        *,
        window: int | None = None,
        sequence_breakers: Sequence[int] = (),
    ):
        self.multiplier = check_float_per_row("multiplier", multiplier, minimum=0)
        values = self.multiplier.tolist() if isinstance(self.multiplier, Tensor) else [self.multiplier]
        options = {"base": base, "allowed_length": allowed_length, "window": window}
        self.settings = [
            Dry(multiplier=value, sequence_breakers=tuple(sequence_breakers), **options)  # type: ignore[arg-type]
            for value in values
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [rows, V] of the tokens after `input_ids` [rows, length], penalties subtracted."""
        if input_ids.ndim == 1:
            raise ValueError(
                "DRYLogitsProcessor cannot be used in continuous batching (generate_batch()), whose calls do not hold "
                "the text: use generate()"
            )
        if check_scores(scores).ndim != 2 or len(scores) != len(input_ids):
            raise ValueError(f"scores must be [{len(input_ids)}, V], a row a text, got shape {tuple(scores.shape)}")
        if len(scores) % len(self.settings):
            raise ValueError(f"{len(self.settings)} multipliers, one a row, do not fit {len(scores)} rows")
        if not len(scores):
            return scores
        each, ids = len(scores) // len(self.settings), input_ids.cpu().numpy()
        return torch.stack([self.settings[n // each].penalised(row, ids[n]) for n, row in enumerate(scores)])

    def __repr__(self) -> str:
        return f"DRYLogitsProcessor({self.settings[0] if len(self.settings) == 1 else self.settings})"


def uniform(rows: int, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device) -> Tensor:
    """Return one float64 number in [0, 1) for each row [rows, 1], from the row's own generator if there are several."""
    if generator is None or isinstance(generator, torch.Generator):
        # Drawn where the generator lives.
        there = device if generator is None else generator.device
        return torch.rand(rows, 1, dtype=torch.float64, generator=generator, device=there).to(device)
    if len(generator) != rows:
        raise ValueError(
            f"generator must be one torch.Generator or one for each of the {rows} rows of the batch "
            f"(num_return_sequences and beams count), got {len(generator)}"
        )
    return torch.cat([torch.empty(0, 1, device=device), *(uniform(1, each, device) for each in generator)])


def check_float_per_row(name: str, value: object, **bounds: float) -> float | Tensor:
    """Return a checked number, or a float64 tensor on the CPU with one for each row."""
    if isinstance(value, (list, tuple)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1):
        values = value if isinstance(value, (list, tuple)) else value.tolist()
        if not len(values):
            raise ValueError(f"{name} must be a number or one for every row, got none")
        numbers = [check_float(f"{name}[{place}]", each, **bounds) for place, each in enumerate(values)]
        return torch.tensor(numbers, dtype=torch.float64)
    return check_float(name, value, **bounds)


def representable(filter_value: float, scores: Tensor) -> float:
    """Return `filter_value`, or the lowest value of the scores' dtype where that cannot hold it."""
    return filter_value if filter_value == -math.inf else max(filter_value, torch.finfo(scores.dtype).min)


def check_filter_value(filter_value: object) -> float:
    """Return -inf or another finite number."""
    return -math.inf if filter_value == -math.inf else check_float("filter_value", filter_value)


def check_scores(scores: Tensor) -> Tensor:
    """Return `scores`; raise unless they are floating-point rows."""
    if not scores.is_floating_point():
        raise TypeError(f"scores must be a floating-point tensor [..., vocabulary], got {scores.dtype}")
    if scores.shape[-1] == 0:
        raise ValueError(f"scores must have at least one token in the last dimension, got shape {tuple(scores.shape)}")
    return scores
