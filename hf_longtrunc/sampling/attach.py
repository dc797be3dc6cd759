"""Processors for the generation modes that take no `logits_processor` list, and for the place after the warpers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, LogitNormalization, LogitsProcessorList, WatermarkLogitsProcessor

from hf_longtrunc.models import without_peft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    Processor = Callable[[Tensor, Tensor], Tensor]

_ALWAYS_LAST = (WatermarkLogitsProcessor, LogitNormalization)


@contextmanager
def attach_processors(model: Any, processors: Sequence[Processor], *, after_warpers: bool = False) -> Iterator[None]:
    """Run `processors` in everything that `model` generates inside the block, `generate_batch` and serving included.

    By default they join where `generate(logits_processor=...)` puts them: after the penalties and constraints, before
    temperature, top-k and top-p, on the model's distribution at temperature 1. With `after_warpers=True` they see the
    distribution that is about to be sampled (only watermarking and renormalisation come later). A processor that is
    also in the call's own list runs once.

    Args:
        model: a transformers model that generates, or a PEFT wrapper of one. Nothing but this instance is touched.
        processors: callables (input_ids, scores) -> scores, run in this order.
        after_warpers: put them behind the warpers instead of in front.

    Raises:
        TypeError: `model` does not generate, or a processor is not callable.

    On leaving the block, an exception included, the model is as it was; blocks nest.
    """
    attached = _checked_processors(processors)

    def join(build: Callable[..., LogitsProcessorList], *args: Any, **kwargs: Any) -> LogitsProcessorList:
        if after_warpers:
            return _after_warpers(build(*args, **kwargs), attached)
        # transformers merges the call's own list into the one that it builds, and takes each processor once.
        given = kwargs.pop("logits_processor", None) or []
        return build(*args, logits_processor=LogitsProcessorList([*given, *attached]), **kwargs)

    with rebuild_processor_list(model, join):
        yield


@contextmanager
def rebuild_processor_list(model: Any, rebuild: Callable[..., LogitsProcessorList]) -> Iterator[None]:
    """Let `rebuild(build, *args, **kwargs)` make the processor list of every generation in the block.

    `build` is the model's own `_get_logits_processor`, the one door that all modes of generation pass: `generate`
    calls it with keywords, continuous batching with the generation config alone.
    """
    owner = _generating_instance(model)
    build = owner._get_logits_processor
    earlier = owner.__dict__.get("_get_logits_processor")
    owner._get_logits_processor = lambda *args, **kwargs: rebuild(build, *args, **kwargs)
    try:
        yield
    finally:
        if earlier is None:
            del owner._get_logits_processor
        else:
            owner._get_logits_processor = earlier


def _after_warpers(processors: LogitsProcessorList, attached: list[Processor]) -> LogitsProcessorList:
    end = len(processors)
    while end and isinstance(processors[end - 1], _ALWAYS_LAST):
        end -= 1
    new = [processor for processor in attached if processor not in processors]
    return LogitsProcessorList([*processors[:end], *new, *processors[end:]])


def _generating_instance(model: Any) -> Any:
    # PEFT forwards generate() to the model that it wraps: the attribute must sit there to be seen.
    model = without_peft(model)
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"model must be a transformers model with generate() or a PEFT wrapper of one, got {type(model).__name__}; "
            "pass the instance whose generate() you call"
        )
    return model


def _checked_processors(processors: Sequence[Processor]) -> list[Processor]:
    if not isinstance(processors, (list, tuple)):
        raise TypeError(f"processors must be a list of processors, got {type(processors).__name__}; write [processor]")
    for index, processor in enumerate(processors):
        if not callable(processor):
            raise TypeError(f"processors[{index}] must be callable, got {type(processor).__name__}")
    return list(processors)
