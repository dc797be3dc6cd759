"""Truncation samplers by request in transformers' continuous batching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from hf_longtrunc.arguments import check_choice, check_float
from hf_longtrunc.sampling.cutoffs import CUTOFFS, below, softmax_rows, xtc_cut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_XTC = "xtc_probability"
_SWITCH = {"minimum": 0, "maximum": 1}  # XTC's probability too
_WORDS = {"gt": "above", "minimum": "at least", "lt": "below", "maximum": "at most"}
_OFF = math.nan  # a threshold that no token lies below


class TruncationByRequest(LogitsProcessor):
    """One truncation sampler in continuous batching, with a value for each request.

    Examples:
        >>> TruncationByRequest("epsilon", 0.1)(None, torch.tensor([[4.0, 3.0, 0.0]]))
        tensor([[4., 3., -inf]])


        config = ContinuousBatchingConfig(per_request_processors=True)
        with attach_processors(model, [TruncationByRequest("eta", 2e-3), TruncationByRequest("top_h")]):
            with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
                manager.add_request(ids, eta=0.01)
                manager.add_request(other_ids, top_h=0.4)  # and eta=2e-3

    Kept sets equal those of the processors. Without `per_request_processors` all requests get the default. transformers
    refuses a request with a value that is no float in the sampler's range, and serves the others. DRY is not available:
    it needs the text, and transformers batches a step before it knows the last one's tokens.

    Args:
        name: "eta", "epsilon", "top_n_sigma", "p_less", "p_less_norm" (1.0 is on), "top_h", "min_k" or
            "xtc_probability".
        default: for requests without a value; None leaves them alone.
        xtc_threshold: for "xtc_probability", the same for all requests.

    Raises:
        TypeError, ValueError: another name, a value outside its range.
    """

    supports_continuous_batching = True
    _is_unwarned = True  # `attach_processors` warns once of later samplers

    def __init__(self, name: str, default: float | None = None, *, xtc_threshold: float = 0.1):
        self.name = check_choice("name", name, (*CUTOFFS, _XTC))
        self.bounds = _SWITCH if name == _XTC else CUTOFFS[name].bounds or _SWITCH
        self.default = None if default is None else check_float("default", default, **self.bounds)
        self._log_threshold = math.log(check_float("xtc_threshold", xtc_threshold, gt=0, lt=1))
        # transformers looks up here which class replaces this one; no other class is touched.
        CLASSIC_TO_CB_PROCESSORS_MAP[TruncationByRequest] = _ByRequest

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [..., V], cut by the default value."""
        return self.cut(scores, self.prepared(self.default))

    def prepared(self, value: float | None) -> float:
        """Return the argument of the threshold for a user's value."""
        if value is None or (self.name in CUTOFFS and CUTOFFS[self.name].bounds is None and not value):
            return 0.0 if self.name == _XTC else _OFF
        return value if self.name == _XTC else CUTOFFS[self.name].prepared(value)

    def cut(self, scores: Tensor, value: float | Tensor) -> Tensor:
        """Return a copy of `scores` cut by prepared values: one for all rows, or a column."""
        rows = softmax_rows(scores)
        if self.name == _XTC:
            decided = torch.rand(rows.log_total.shape, device=scores.device) < value
            return scores.masked_fill(xtc_cut(rows, self._log_threshold, decided), -math.inf)
        return scores.masked_fill(below(scores, rows, CUTOFFS[self.name].threshold(rows, value)), -math.inf)


class _ByRequest(ContinuousBatchingLogitsProcessor):
    """One prepared number a request, as float32 in transformers' int32 storage for arguments."""

    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, processor: TruncationByRequest):
        self.processor = processor
        self.supported_kwargs = {processor.name: _range(processor.name, processor.bounds)}

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(self._stored([self.processor.default]).expand_as(int32_tensor))

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        name, default = self.processor.name, self.processor.default
        return self._stored([each.state.logit_processor_kwargs.get(name, default) for each in requests_with_new_token])

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return self.processor.cut(scores, tensor_arg[: len(scores)].view(torch.float32)[:, None])

    def _stored(self, values: Sequence[float | None]) -> Tensor:
        prepared = [self.processor.prepared(value) for value in values]
        return torch.tensor(prepared, dtype=torch.float32).view(torch.int32)


def _range(name: str, bounds: Any) -> type:
    """Return a type for transformers' isinstance check of a request's value: a float within `bounds`."""

    class Between(type):
        def __instancecheck__(cls, value: object) -> bool:
            try:
                return isinstance(value, float) and check_float(name, value, **bounds) == value
            except ValueError:
                return False

    limits = " and ".join(f"{_WORDS[name]} {bound:g}" for name, bound in bounds.items())
    return Between(f"float that is {limits}", (float,), {})
