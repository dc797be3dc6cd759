"""Truncation samplers as a logits processor of vLLM, for both of its model runners."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_longtrunc.serving.rows import parse_request, truncate

if TYPE_CHECKING:
    from torch import Tensor

_LOGGER = logging.getLogger(__name__)


class TruncationLogitsProcessor:
    """The truncation samplers, XTC and DRY by request, in vLLM.

        vllm serve MODEL --logits-processors hf_longtrunc.serving.vllm:TruncationLogitsProcessor

    and with a request `"vllm_xargs": {"eta": 2e-3}` (HTTP) or `SamplingParams(extra_args={"eta": 2e-3})`;
    `hf_longtrunc.serving.rows` lists the names. Requests that name none are left alone; wrong values and misspelt names
    are refused with status 400. Runs on raw logits, before temperature, top-k and top-p. XTC's decisions do not follow
    a request's seed. DRY needs the text, which the model runner V2 does not hand over: there it is left out with a
    warning in the log.

    One class serves both model runners. V1 calls (vllm_config, device, is_pin_memory), `update_state` and
    `apply(logits)`, with a request in each row. V2 calls (vllm_config, req_states), `add_request` and
    `apply(logits, context)`, which maps rows to requests. The class is registered with the base of each.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        # By row (V1) or request slot (V2): parameters, and in V1 the prompt and the growing output.
        self._requests: dict[int, tuple[dict[str, Any], list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError where a request's arguments are wrong, before it enters the batch."""
        try:
            _asked(sampling_params)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy requests would keep their token, but sampled ones change."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the batch of the model runner V1: removed, added and moved requests."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._add(row, self._wanted(params), prompt or [], output)
        for source, goal, direction in batch_update.moved:
            moved, other = self._requests.pop(source, None), self._requests.pop(goal, None)
            if moved is not None:
                self._requests[goal] = moved
            if other is not None and getattr(direction, "name", direction) == "SWAP":
                self._requests[source] = other

    def add_request(self, req_idx: int, params: Any) -> bool:
        """Add the request in slot `req_idx`; return whether it names a sampler."""
        asked = self._wanted(params)
        if asked.pop("dry", None):
            _LOGGER.warning("DRY is left out: vLLM's model runner V2 does not hand the text to logits processors")
        return self._add(req_idx, asked, [], [])

    def _wanted(self, params: Any) -> dict[str, Any]:
        """Return a request's parameters."""
        return _asked(params)

    def _add(self, row: int, asked: dict[str, Any], prompt: list[int], output: list[int]) -> bool:
        self._requests.pop(row, None)
        if asked:
            self._requests[row] = asked, prompt, output
        return bool(asked)

    def apply_staged_writes(self) -> None:
        """Do nothing; V2 calls it before each step."""

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return `logits` [rows, V], each row cut as its request asks."""
        on_host = range(len(logits)) if context is None else context.idx_mapping_np.tolist()
        if not any(slot in self._requests for slot in on_host):
            return logits
        slots = on_host if context is None else context.expanded_idx_mapping.tolist()
        requests = [self._requests.get(slot, ({}, [], [])) for slot in slots]
        texts = [[*prompt, *output] if "dry" in asked else [] for asked, prompt, output in requests]
        return truncate(logits, [asked for asked, *_ in requests], texts)


def _asked(params: Any) -> dict[str, Any]:
    return parse_request(getattr(params, "extra_args", None))


def _register() -> None:
    """Register the class as a subclass of the base of each model runner that the installed vLLM has."""
    if find_spec("vllm") is None:
        return
    for home in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        try:
            base: Any = import_module(home).LogitsProcessor
        except (ImportError, AttributeError):
            continue
        base.register(TruncationLogitsProcessor)


_register()
