"""Truncation samplers as a logits processor of vLLM, for both of its model runners."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_longtrunc.serving.rows import truncate, wanted

if TYPE_CHECKING:
    from torch import Tensor

_LOGGER = logging.getLogger(__name__)


class TruncationLogitsProcessor:
    """The truncation samplers, XTC and DRY by request, in vLLM.

        vllm serve MODEL --logits-processors hf_longtrunc.serving.vllm:TruncationLogitsProcessor

    and with a request `"vllm_xargs": {"eta": 2e-3}` (HTTP) or `SamplingParams(extra_args={"eta": 2e-3})`;
    `hf_longtrunc.serving.rows` lists the names. Requests that name none are left alone; a name that is nearly one of
    these is refused with status 400, as a value outside its range is. DRY reads the text, which the model runner V2
    does not hand to a processor: there it is left out, and the log says so. XTC's decisions do not follow a request's
    seed.

    One class meets both interfaces. The model runner V1 makes it with (vllm_config, device, is_pin_memory), tells it of
    the batch by `update_state` and calls `apply(logits)`: there a row is a request. The model runner V2 makes it with
    (vllm_config, req_states), tells it of requests by `add_request` and calls `apply(logits, context)`: there rows
    change places at every step, a request may own several, and `context` says whose each is. Both runners take
    subclasses of their own base only: where vLLM is installed the class is registered with both. It is loaded by name
    and never as an entry point, since an entry point of one form stops the engine of the other for everybody.

    vLLM applies it to raw logits, before temperature, top-k and top-p, on the model's distribution at temperature 1.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        # By row (V1) or by request's slot (V2): what is asked, and V1's prompt and list that it adds to.
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
        """Follow the batch of the model runner V1: requests that left, came and changed places."""
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
        """Take in the request in slot `req_idx`; say whether it asks for anything."""
        asked = self._wanted(params)
        if asked.pop("dry", None):
            _LOGGER.warning("DRY is left out: vLLM's model runner V2 does not hand the text to logits processors")
        return self._add(req_idx, asked, [], [])

    def _wanted(self, params: Any) -> dict[str, Any]:
        """Return what a request asks for."""
        return _asked(params)

    def _add(self, row: int, asked: dict[str, Any], prompt: list[int], output: list[int]) -> bool:
        self._requests.pop(row, None)
        if asked:
            self._requests[row] = asked, prompt, output
        return bool(asked)

    def apply_staged_writes(self) -> None:
        """Do nothing: nothing is staged."""

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return `logits` [rows, V], cut in each row by what its request asks."""
        on_host = range(len(logits)) if context is None else context.idx_mapping_np.tolist()
        if not any(slot in self._requests for slot in on_host):
            return logits
        slots = on_host if context is None else context.expanded_idx_mapping.tolist()
        requests = [self._requests.get(slot, ({}, [], [])) for slot in slots]
        texts = [[*prompt, *output] if "dry" in asked else [] for asked, prompt, output in requests]
        return truncate(logits, [asked for asked, *_ in requests], texts)


def _asked(params: Any) -> dict[str, Any]:
    return wanted(getattr(params, "extra_args", None))


def _register() -> None:
    """Make the class a subclass of what each of vLLM's model runners asks for, as far as the installed one has them."""
    if find_spec("vllm") is None:
        return
    for home in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        try:
            base: Any = import_module(home).LogitsProcessor
        except (ImportError, AttributeError):
            continue
        base.register(TruncationLogitsProcessor)


_register()
