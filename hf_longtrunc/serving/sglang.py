"""Truncation samplers as SGLang's custom logit processor."""

from __future__ import annotations

import json
import logging
import pickle
from typing import TYPE_CHECKING, Any

from hf_longtrunc.serving.rows import parse_request, truncate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_LOGGER = logging.getLogger(__name__)


class TruncationLogitProcessor:
    """The truncation samplers, XTC and DRY by request, as a `CustomLogitProcessor` of SGLang.

    Start the server with `--enable-custom-logit-processor`, and send with a request

        {"custom_logit_processor": TruncationLogitProcessor.to_str(),
         "sampling_params": {"custom_params": {"eta": 2e-3}, "top_k": -1}}

    Examples:
        >>> TruncationLogitProcessor()(torch.tensor([[4.0, 3.0, 0.0]]), [{"epsilon": 0.1}])
        tensor([[4., 3., -inf]])

    `hf_longtrunc.serving.rows` lists the names. The class does not import SGLang: the server loads it by name from its
    own environment, where hf_longtrunc must be installed. SGLang runs custom processors before its temperature, top-k,
    top-p and min-p, on the model's distribution at temperature 1, but not under speculative decoding.

    SGLang checks no parameters before a request enters the batch, and an exception would end the whole batch. So a
    request with a wrong parameter is not truncated, and the log says why.
    """

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any] | None] | None = None) -> Tensor:
        """Return a copy of `logits` [rows, V], cut by each row's own parameters; ValueError if one is missing."""
        parameters = [None] * len(logits) if custom_param_list is None else list(custom_param_list)
        if len(parameters) != len(logits):
            raise ValueError(
                f"custom_param_list must have one entry for each of {len(logits)} rows, got {len(parameters)}"
            )
        requests = [_asked(each) for each in parameters]
        return truncate(logits, requests, [_text(each) for each in parameters])

    @classmethod
    def to_str(cls) -> str:
        """Return the string for requests: the class by its module and name."""
        return json.dumps({"callable": pickle.dumps(cls).hex()})


def _asked(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return parse_request(parameters)
    except (TypeError, ValueError) as error:
        _LOGGER.warning("a request is not truncated: %s", error)
        return {}


def _text(parameters: Mapping[str, Any] | None) -> list[int]:
    request = (parameters or {}).get("__req__")  # SGLang's own request object
    return [] if request is None else [*request.origin_input_ids, *request.output_ids]
