"""Eta-sampling by request in transformers' own continuous batching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from hf_longtrunc.arguments import number
from hf_longtrunc.sampling.cutoffs import below_threshold, eta_log_threshold, softmax_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class _Between(type):
    """What transformers checks a request's value against, before the request enters the batch."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, float) and 0 < value < 1


class NumberBetween0And1(float, metaclass=_Between):
    """The type of a request's eta."""


class EtaByRequest(LogitsProcessor):
    """Eta-sampling in continuous batching, where each request may bring an eta of its own.

        config = ContinuousBatchingConfig(per_request_processors=True)
        with attach_processors(model, [EtaByRequest(2e-3)]):
            with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
                manager.add_request(ids, eta=0.01)
                manager.add_request(other_ids)  # 2e-3

    Kept sets are those of `EtaLogitsProcessor`, to the bit. Without `per_request_processors` all requests get the
    default. transformers refuses a request whose eta is no number between 0 and 1; the others go on.

    Args:
        eta: in (0, 1), the epsilon of `EtaLogitsProcessor` for requests that name none.

    Raises:
        TypeError, ValueError: another eta.
    """

    supports_continuous_batching = True

    def __init__(self, eta: float):
        self.eta = number("eta", eta, above=0, below=1)
        # transformers looks up here what a processor of this class becomes; no other class is touched.
        CLASSIC_TO_CB_PROCESSORS_MAP[EtaByRequest] = _EtaByRequest

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return a copy of `scores` [..., V], -inf in place of what the default cuts."""
        rows = softmax_rows(scores)
        return scores.masked_fill(below_threshold(scores, rows, eta_log_threshold(rows, self.eta)), -math.inf)


class _EtaByRequest(ContinuousBatchingLogitsProcessor):
    """One logarithm a request, float32 in the int32 storage that transformers keeps for all arguments."""

    supported_kwargs: dict[str, type] = {"eta": NumberBetween0And1}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, processor: EtaByRequest):
        self.eta = processor.eta

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(_stored([self.eta]).expand_as(int32_tensor))

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        return _stored([each.state.logit_processor_kwargs.get("eta", self.eta) for each in requests_with_new_token])

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        rows = softmax_rows(scores)
        log_eta = tensor_arg[: len(scores)].view(torch.float32)[:, None]
        bar = torch.minimum(log_eta / 2 - rows.entropy, log_eta)  # `eta_log_threshold` of values on the device
        return scores.masked_fill(below_threshold(scores, rows, bar), -math.inf)


def _stored(etas: list[float]) -> Tensor:
    return torch.tensor([math.log(eta) for eta in etas], dtype=torch.float32).view(torch.int32)
