"""Processors attached to a model: for modes of generation without a `logits_processor` list, or after the warpers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, LogitNormalization, LogitsProcessorList, WatermarkLogitsProcessor

from hf_longtrunc.handles import Handle
from hf_longtrunc.models import unwrapped
from hf_longtrunc.sampling.calls import warn_where_attached

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Processor = Callable[[Tensor, Tensor], Tensor]

_ALWAYS_LAST = (WatermarkLogitsProcessor, LogitNormalization)


def attach_processors(model: Any, processors: Sequence[Processor], *, after_warpers: bool = False) -> Handle:
    """Run `processors` in everything that `model` generates, `generate_batch` included, until they are detached.

    Examples:
        >>> with attach_processors(model, [EtaLogitsProcessor(2e-3)], after_warpers=True):
        ...     text = model.generate(ids, do_sample=True, temperature=0.7, top_k=0, max_new_tokens=2)

    By default they run where `generate(logits_processor=...)` runs its list: after penalties and constraints, before
    temperature, top-k and top-p, on the model's distribution at temperature 1. A processor that is also in the call's
    own list runs once.

    Args:
        model: a transformers model that generates, or a wrapper of one. Only this instance is changed.
        processors: callables (input_ids, scores) -> scores, run in this order.
        after_warpers: run them on the distribution that is about to be sampled; only watermarking and renormalisation
            follow.

    Returns:
        A handle; the end of its `with` block or `handle.detach()` detaches them. Blocks nest.

    Raises:
        TypeError: `model` does not generate, or a processor is not callable.
    """
    attached = checked_processors(processors)

    def join(build: Callable[..., LogitsProcessorList], *args: Any, **kwargs: Any) -> LogitsProcessorList:
        if after_warpers:
            return _after_warpers(build(*args, **kwargs), attached)
        # transformers merges the call's own list into the one that it builds, and takes each processor once.
        given = kwargs.pop("logits_processor", None) or []
        built = build(*args, logits_processor=LogitsProcessorList([*given, *attached]), **kwargs)
        warn_where_attached(attached, built)
        return built

    place = "behind the warpers" if after_warpers else "in front of the warpers"
    names = ", ".join(map(repr, attached)) or "nothing"
    return rebuild_processor_list(model, join, "attach_processors", f"{names} {place} of all that it generates")


def rebuild_processor_list(
    model: Any, rebuild: Callable[..., LogitsProcessorList], technique: str, changed: str
) -> Handle:
    """Let `rebuild(build, *args, **kwargs)` make the processor list of every generation until the handle is detached.

    `build` is the model's own `_get_logits_processor`, which all modes of generation call.
    """
    owner = unwrapped(model)  # wrappers forward generate() to it
    if not isinstance(unwrapped(model), GenerationMixin):
        raise TypeError(
            f"model must be a transformers model with generate() or a wrapper of one, got {type(model).__name__}; "
            "pass the instance whose generate() you call"
        )
    build = owner._get_logits_processor
    handle = Handle(technique, owner, changed)
    handle.set(owner, "_get_logits_processor", lambda *args, **kwargs: rebuild(build, *args, **kwargs))
    handle.refuse_copies(owner, advice="detach first, copy or save it, and attach again")
    return handle


def _after_warpers(processors: LogitsProcessorList, attached: list[Processor]) -> LogitsProcessorList:
    end = len(processors)
    while end and isinstance(processors[end - 1], _ALWAYS_LAST):
        end -= 1
    new = [processor for processor in attached if processor not in processors]
    return LogitsProcessorList([*processors[:end], *new, *processors[end:]])


def checked_processors(processors: Sequence[Processor]) -> list[Processor]:
    """Return a list of callables; raise TypeError for anything else."""
    if not isinstance(processors, (list, tuple)):
        raise TypeError(f"processors must be a list of processors, got {type(processors).__name__}; write [processor]")
    for index, processor in enumerate(processors):
        if not callable(processor):
            raise TypeError(f"processors[{index}] must be callable, got {type(processor).__name__}")
        if isinstance(processor, type):
            name = processor.__name__
            raise TypeError(f"processors[{index}] must be a processor, got the class {name}; write {name}(...)")
    return list(processors)
