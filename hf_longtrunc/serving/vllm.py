"""Truncation samplers as a logits processor of vLLM, for both of its model runners."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_longtrunc.serving.rows import truncate, wanted

if TYPE_CHECKING:
    from torch import Tensor


class TruncationLogitsProcessor:
    """Eta, epsilon, top-n-sigma and p-less sampling by request, in vLLM.

        vllm serve MODEL --logits-processors hf_longtrunc.serving.vllm:TruncationLogitsProcessor

    and with a request `"vllm_xargs": {"eta": 2e-3}` (HTTP) or `SamplingParams(extra_args={"eta": 2e-3})`;
    `hf_longtrunc.serving.rows` lists the names. Requests that name none are left alone.

    One class meets both interfaces. The model runner V1 makes it with (vllm_config, device, is_pin_memory), tells it of
    the batch by `update_state` and calls `apply(logits)`: there a row is a request. The model runner V2 makes it with
    (vllm_config, req_states), tells it of requests by `add_request` and calls `apply(logits, context)`: there rows
    change places at every step, a request may own several, and `context` says whose each is. Both runners take
    subclasses of their own base only: where vLLM is installed the class is registered with both. It is loaded by name
    and never as an entry point, since an entry point of one form stops the engine of the other for everybody.

    vLLM applies it to raw logits, before temperature, top-k and top-p, on the model's distribution at temperature 1.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        self._requests: dict[int, dict[str, float]] = {}  # by row (V1) or by request's slot (V2)

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
        for row, params, *_ in batch_update.added:
            self.add_request(row, params)
        for source, goal, direction in batch_update.moved:
            moved, other = self._requests.pop(source, None), self._requests.pop(goal, None)
            if moved is not None:
                self._requests[goal] = moved
            if other is not None and getattr(direction, "name", direction) == "SWAP":
                self._requests[source] = other

    def add_request(self, req_idx: int, params: Any) -> bool:
        """Take in the request in slot `req_idx`; say whether it asks for anything."""
        asked = _asked(params)
        self._requests.pop(req_idx, None)
        if asked:
            self._requests[req_idx] = asked
        return bool(asked)

    def apply_staged_writes(self) -> None:
        """Do nothing: nothing is staged."""

    def apply(self, logits: Tensor, context: Any = None) -> Tensor:
        """Return `logits` [rows, V], cut in each row by what its request asks."""
        on_host = range(len(logits)) if context is None else context.idx_mapping_np.tolist()
        if not any(slot in self._requests for slot in on_host):
            return logits
        slots = on_host if context is None else context.expanded_idx_mapping.tolist()
        return truncate(logits, [self._requests.get(slot, {}) for slot in slots])


def _asked(params: Any) -> dict[str, float]:
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
