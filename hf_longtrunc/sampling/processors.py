"""Truncation samplers as transformers logits processors: `model.generate(logits_processor=[...])`."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING

from transformers import LogitsProcessor

from hf_longtrunc.sampling.cutoffs import (
    Softmax,
    below_threshold,
    epsilon_log_threshold,
    eta_log_threshold,
    softmax_rows,
)

if TYPE_CHECKING:
    from torch import Tensor


class _ThresholdLogitsProcessor(LogitsProcessor):
    """Removes the tokens whose probability lies under a bar that `_log_threshold` draws for each row."""

    supports_continuous_batching = True

    def __init__(self, epsilon: float, *, min_tokens_to_keep: int = 1, filter_value: float = -math.inf):
        self.epsilon = _checked_epsilon(epsilon)
        self.min_tokens_to_keep = _checked_min_tokens(min_tokens_to_keep)
        self.filter_value = _checked_filter_value(filter_value)

    def _log_threshold(self, rows: Softmax) -> Tensor:
        raise NotImplementedError

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [..., V] with `filter_value` in place of every removed token.

        Kept scores keep their bits and their dtype. `input_ids` is not read. A row with a NaN or +inf in it, or with
        nothing but -inf, comes back unchanged, so that the sampler after it reports it.
        """
        rows = softmax_rows(_checked_scores(scores))
        cut = below_threshold(scores, rows, self._log_threshold(rows), self.min_tokens_to_keep)
        return scores.masked_fill(cut, self.filter_value)

    def threshold(self, scores: Tensor) -> Tensor:
        """Return the bar that each row of `scores` [..., V] is held against, as a probability [..., 1]."""
        return self._log_threshold(softmax_rows(_checked_scores(scores))).exp()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(epsilon={self.epsilon:g})"


class EtaLogitsProcessor(_ThresholdLogitsProcessor):
    """Eta-sampling: remove the tokens with p < eta = min(epsilon, sqrt(epsilon) * exp(-H)).

    H is the entropy, in nats, of the full softmax of the scores that the processor is handed. Passed in `generate`'s
    list it runs before temperature, top-k and top-p, so that is the model's own distribution at temperature 1, as the
    method defines it. The most probable token always stays.

    Args:
        epsilon: in (0, 1). The paper's range is 3e-4 to 4e-3, smaller for larger models.
        min_tokens_to_keep: so many of the most probable tokens stay whatever the bar; ties with the last one stay too.
        filter_value: the score that a removed token gets.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    Cost: one `exp` and two sums over the vocabulary; no sort, no host synchronisation. Rows are independent of their
    batch to the bit. Works with `generate` in every mode that takes a processor list, and through
    `attach_processors` in those that take none.

    Source: Hewitt, Manning, Liang 2022, "Truncation Sampling as Language Model Desmoothing", arXiv 2210.15191,
    section 4.2. Deviations: none.
    """

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return eta_log_threshold(rows, self.epsilon)


class EpsilonLogitsProcessor(_ThresholdLogitsProcessor):
    """Epsilon-sampling: remove the tokens with p < epsilon, the most probable one excepted.

    Arguments, errors, cost and guarantees are those of `EtaLogitsProcessor`. The paper's range for epsilon is 3e-4 to
    9e-4.

    Source: Hewitt, Manning, Liang 2022, arXiv 2210.15191, section 4.1. Deviations: none.
    """

    def _log_threshold(self, rows: Softmax) -> Tensor:
        return epsilon_log_threshold(rows, self.epsilon)


def _checked_epsilon(epsilon: object) -> float:
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise TypeError(f"epsilon must be a number in (0, 1), got {epsilon!r} of type {type(epsilon).__name__}")
    if not 0 < float(epsilon) < 1:
        raise ValueError(f"epsilon must lie in (0, 1), got {epsilon!r}; the paper uses 3e-4 (large models) to 4e-3")
    return float(epsilon)


def _checked_min_tokens(min_tokens_to_keep: object) -> int:
    if isinstance(min_tokens_to_keep, bool) or not isinstance(min_tokens_to_keep, int):
        raise TypeError(
            f"min_tokens_to_keep must be a whole number, got {min_tokens_to_keep!r} of type "
            f"{type(min_tokens_to_keep).__name__}"
        )
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep must be at least 1, got {min_tokens_to_keep}")
    return min_tokens_to_keep


def _checked_filter_value(filter_value: object) -> float:
    if isinstance(filter_value, bool) or not isinstance(filter_value, Real):
        raise TypeError(f"filter_value must be a number, got {filter_value!r} of type {type(filter_value).__name__}")
    if not float(filter_value) < math.inf:
        raise ValueError(f"filter_value must be finite or -inf, got {filter_value}; -inf removes a token for good")
    return float(filter_value)


def _checked_scores(scores: Tensor) -> Tensor:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be a floating-point tensor [..., vocabulary], got {scores.dtype}")
    if scores.shape[-1] == 0:
        raise ValueError(f"scores must have at least one token in the last dimension, got shape {tuple(scores.shape)}")
    return scores
