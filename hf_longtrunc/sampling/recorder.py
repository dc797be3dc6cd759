"""Records the kept sets of a generation: a `SamplingMask` for each row or request."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from hf_longtrunc.sampling.attach import attach_processors
from hf_longtrunc.sampling.calls import is_sampling, neighbours, refuse_empty_rows
from hf_longtrunc.sampling.mask import SamplingMask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from hf_longtrunc.handles import Handle


class _Generation(threading.local):
    """One thread's generation: the prompt's length, the ids of the last call, and a mask of all rows for each step."""

    def __init__(self) -> None:
        self.prompt_length = 0
        self.ids: Tensor | None = None  # [rows, length], on the CPU
        self.steps: list[SamplingMask] = []

    def __reduce__(self) -> tuple[type[_Generation], tuple[()]]:
        """Copy and pickle as empty: a generation belongs to its thread."""
        return _Generation, ()

    def follow(self, ids: Tensor) -> None:
        """Continue with the step after `ids`, go back to it (speculation), or start another generation."""
        length, last = ids.shape[1], self.ids
        step = length - self.prompt_length
        is_same = last is not None and len(last) == len(ids) and 0 < step <= len(self.steps)
        if is_same and last is not None and (len(ids) == 1 or step == len(self.steps)):
            # A single row may come back with another last token, which speculation drew instead of a refused one.
            shared = self.prompt_length if len(ids) == 1 else length - 1
            is_same = torch.equal(ids[:, :shared], last[:, :shared])
        else:
            is_same = False
        if not is_same:
            self.prompt_length, step = length, 0
        self.ids = ids
        del self.steps[step:]


class SamplingMaskRecorder(LogitsProcessor):
    """Records the kept set of every step that a model samples from, for `truncated_log_probs`.

    Examples:
        >>> recorder = SamplingMaskRecorder()
        >>> with attach_processors(model, [EtaLogitsProcessor(2e-3)]), recorder.attach(model):
        ...     sequences = model.generate(ids, **sampling_settings(model), max_new_tokens=4)
        >>> [len(mask) for mask in recorder.take()]  # a mask for each row: step t is of the t-th new token
        [4]

    It runs after all processors and warpers, transformers' own included, changes nothing, and records the tokens of
    non-zero fp32 probability. It follows speculative decoding. In `generate_batch` and serving it records by request,
    with `ContinuousBatchingConfig(per_request_processors=True)`: `requests` maps request ids to masks. Each thread has
    a record of its own.

    Cost: a pass over the scores, V / 8 bytes to the host and some 50 microseconds a row and step.
    """

    # Declared unsupported, it would be left out there; so it is called, and records or refuses.
    supports_continuous_batching = True

    def __init__(self) -> None:
        self._generation = _Generation()
        self._requests: dict[str, list[SamplingMask]] = {}
        # transformers looks up here which class replaces this one; no other class is touched.
        CLASSIC_TO_CB_PROCESSORS_MAP[SamplingMaskRecorder] = _ByRequest

    def attach(self, model: Any) -> Handle:
        """Record everything that `model` samples until the handle is detached; `with` does that by itself."""
        return attach_processors(model, [self], after_warpers=True)

    def take(self) -> list[SamplingMask]:
        """Return a mask for each row of this thread's last generation, a step a new token, and forget it.

        Steps past the end of a row (it ended early, or speculation went further) have no meaning.
        """
        steps, self._generation.steps = self._generation.steps, []
        self._generation.ids = None
        return [
            SamplingMask.cat([step[row : row + 1] for step in steps]) for row in range(len(steps[0]) if steps else 0)
        ]

    @property
    def requests(self) -> dict[str, SamplingMask]:
        """The masks of `generate_batch` and serving by request id; `clear()` forgets them."""
        return {name: SamplingMask.cat(steps) for name, steps in self._requests.items()}

    def clear(self) -> None:
        """Forget everything recorded."""
        self._generation = _Generation()
        self._requests.clear()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record the step and return `scores` [rows, V] as they are; ValueError where they are not drawn from."""
        if input_ids.ndim == 1:
            raise ValueError(
                "SamplingMaskRecorder cannot tell requests apart here: pass continuous_batching_config="
                "ContinuousBatchingConfig(per_request_processors=True)"
            )
        refuse_empty_rows(self, scores)
        self._generation.follow(input_ids.detach().cpu())
        if not self._generation.steps:
            self._check_call()
        self._generation.steps.append(_kept(scores))
        return scores

    def _check_call(self) -> None:
        if not is_sampling():
            raise ValueError(
                "SamplingMaskRecorder records what is sampled, and this call takes beams or the most probable token: "
                "pass do_sample=True and num_beams=1, or detach it"
            )
        drawn = [each for each in neighbours(self)[0] if getattr(each, "mode", None) == "sample"]
        if drawn:
            raise ValueError(
                f"{type(drawn[0]).__name__} draws the token by itself and leaves nothing else to be recorded: give it "
                "mode='mask'"
            )

    def __repr__(self) -> str:
        return f"<SamplingMaskRecorder: {len(self._generation.steps):,} steps, {len(self._requests):,} requests>"


class _ByRequest(ContinuousBatchingLogitsProcessor):
    """A recorder in continuous batching: the requests of the rows change at every step."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, recorder: SamplingMaskRecorder):
        self.recorder = recorder
        self.names: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        self.names = [each.state.request_id for each in requests_with_new_token]
        return torch.zeros(len(self.names), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "SamplingMaskRecorder cannot record inside a CUDA graph: pass "
                "ContinuousBatchingConfig(use_cuda_graph=False, per_request_processors=True)"
            )
        kept = _kept(scores[: len(self.names)])
        for row, name in enumerate(self.names):
            self.recorder._requests.setdefault(name, []).append(kept[row : row + 1])
        return scores


def _kept(scores: Tensor) -> SamplingMask:
    """Return the tokens of non-zero fp32 probability, for any filter value."""
    above = scores.float() - scores.amax(-1, keepdim=True).float()
    return SamplingMask.from_kept(above.exp() > 0)
