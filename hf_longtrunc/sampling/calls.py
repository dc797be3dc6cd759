"""The running call of `generate`, as a processor finds it: its mode, and the other processors of its list.

transformers hands a processor ids and scores, and nothing else of the call. Whether it samples and which processors
follow is read from the frames of the callers (`LogitsProcessorList.__call__` and the decoding loop), in this file only.
Outside of them (a decoding loop of one's own, a compiled processor) nothing is known and no warning is given.

A plain `logits_processor=[...]` leaves no other way: no decoding loop passes keywords to the list, `generate` shows a
processor no config, and scores reveal beams (log-probabilities) but neither greedy decoding nor later processors.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_longtrunc.models import unwrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

CUTTING = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# Warpers are functions of the scores alone: they can be run twice.
WARPERS = (*CUTTING, TemperatureLogitsWarper)
# Packages with processors that let only some tokens through.
_GRAMMARS = ("guidance", "llguidance", "lmformatenforcer", "outlines", "outlines_core", "xgrammar")
# Score changes within a row that differ by more than this are no rounding.
_MOVED = 1e-3
# Frames searched: from a processor's __call__ out to the decoding loop, past traces and wrappers.
_DEPTH = 32

_NEUTRAL: dict[str, bool | float | None] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": None,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "sequence_bias": None,
}


def sampling_settings(model: Any) -> dict[str, bool | float | None]:
    """Return arguments of `generate` that switch sampling on and transformers' own samplers and penalties off.

    Examples:
        >>> eta = EtaLogitsProcessor(2e-3)
        >>> text = model.generate(ids, **sampling_settings(model), max_new_tokens=4, logits_processor=[eta])

    transformers cuts to 50 tokens by default (`top_k`), and a model's own `generation_config` may hold more: each
    changes the tokens that a processor of yours keeps, or the scores that it reads. Beams, lengths and special tokens
    stay as the model has them. `model` may be a wrapper.

    Raises:
        TypeError: the model does not generate.
    """
    config = getattr(unwrapped(model), "generation_config", None)
    if config is None:
        raise TypeError(f"model must be a transformers model that generates, got {type(model).__name__}")
    return {name: value for name, value in _NEUTRAL.items() if hasattr(config, name)}


def is_sampling() -> bool:
    """Return whether the running call draws from the scores, unlike greedy decoding and beams; True outside of one."""
    config = _generation_config()
    if config is None:
        return True
    return bool(getattr(config, "do_sample", True)) and (getattr(config, "num_beams", None) or 1) == 1


def rows_per_prompt() -> int | None:
    """Return the number of rows for each prompt: beams or returned sequences. None outside of `generate`."""
    config = _generation_config()
    if config is None:
        return None
    return max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)


def neighbours(processor: Any) -> tuple[list[Any], list[Any]]:
    """Return the processors that the running call applies before `processor`, and those after it."""
    frame = next(iter(_frames()), None)
    processors = [] if frame is None else list(_flat(frame.f_locals["self"]))
    for place, each in enumerate(processors):
        if each is processor:
            return processors[:place], processors[place + 1 :]
    return [], []


def changes_one_token(others: list[Any]) -> bool:
    """Return whether one of `others` can have an effect on a row with a single token left."""
    return not all(isinstance(each, LogitNormalization) for each in others)


def warn_of_cuts(processor: Any, others: list[Any]) -> bool:
    """Warn if one of `others`, which run after `processor`, cuts tokens that it keeps; return whether one does."""
    return _warn(
        processor, [each for each in others if isinstance(each, CUTTING)], "behind", "cuts tokens that it keeps"
    )


def warn_of_reshaping(processor: Any, others: list[Any], scores: Tensor) -> bool:
    """Warn if `others`, which run before `processor`, change the distribution; return whether they do."""
    reshaping = [each for each in others if not isinstance(getattr(each, "processors", None), list)]
    if not reshaping or _is_reshaped(scores) is False:
        return False
    what = "changes the model's distribution, about which it proves nothing then"
    return _warn(processor, reshaping, "in front of", what)


def warn_where_attached(processors: list[Any], built: list[Any]) -> None:
    """Warn once for each of the attached `processors` that a later one of the list `built` cuts; reads no frame."""
    for place, each in enumerate(built):
        if each in processors and getattr(each, "_is_unwarned", False):
            each._is_unwarned = not warn_of_cuts(each, built[place + 1 :])


def refuse_grammars(processor: Any, others: list[Any]) -> None:
    """Raise ValueError if one of `others`, which run after `processor`, lets only some tokens through."""
    for each in others:
        package = type(each).__module__.partition(".")[0]
        if package in _GRAMMARS or isinstance(each, PrefixConstrainedLogitsProcessor):
            raise ValueError(
                f"{type(each).__name__} of {package} runs behind {type(processor).__name__}, which may have cut all "
                "tokens that it lets through, and then none is left to draw: put it in front, "
                f"logits_processor=[{type(each).__name__}, {type(processor).__name__}]"
            )


def refuse_empty_rows(processor: Any, scores: Tensor) -> None:
    """Raise ValueError if a row of `scores` [rows, V] has no token left; costs a pass and a host synchronisation."""
    empty = (scores.amax(-1) == -torch.inf).nonzero()[:, 0].tolist()
    if empty:
        in_front = [type(each).__name__ for each in neighbours(processor)[0]]
        raise ValueError(
            f"row {empty[0]} has no token left: all scores that {type(processor).__name__} is handed are -inf. "
            f"{' and '.join(dict.fromkeys(in_front)) or 'What runs in front of it'} removed every token: a grammar "
            "that has ended lets nothing through but the end of the text (set eos_token_id), and constraints may "
            "contradict each other"
        )


def _frames() -> Iterable[FrameType]:
    """Return the frame of the processor list that runs the caller, then those around it; none outside of a list."""
    return () if torch.compiler.is_compiling() else _frames_from(sys._getframe(1))


def _frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    is_inside = False
    for _ in range(_DEPTH):
        if frame is None:
            return
        is_inside = is_inside or frame.f_code is LogitsProcessorList.__call__.__code__
        if is_inside:
            yield frame
        frame = frame.f_back


def _generation_config() -> Any:
    """Return the config of the running call of `generate`, None outside of one."""
    configs = (frame.f_locals.get("generation_config") for frame in _frames())
    return next((config for config in configs if config is not None), None)


def _is_reshaped(scores: Tensor) -> bool | None:
    """Return whether `scores` [rows, V] are another distribution than the model's; None outside of `generate`.

    Compared with the model's output, since a processor may change the loop's copy in place (xgrammar's does).
    """
    for frame in _frames():
        model = frame.f_locals.get("next_token_logits")
        if isinstance(model, Tensor) and model.shape == scores.shape:
            output = getattr(frame.f_locals.get("outputs"), "logits", None)
            if isinstance(output, Tensor) and output.ndim == 3 and output[:, -1].shape == scores.shape:
                model = output[:, -1].to(model)
            moved = torch.where(model.isinf(), 0, scores - model.to(scores.device))
            return bool((moved.amax(-1) - moved.amin(-1) > _MOVED).any())
    return None


def _warn(processor: Any, others: list[Any], place: str, what: str) -> bool:
    if others:
        names = " and ".join(dict.fromkeys(type(each).__name__ for each in others))
        warnings.warn(
            f"generate() runs {names} {place} {type(processor).__name__}, and so {what}: pass "
            "**sampling_settings(model) to generate() to turn transformers' own off, or ignore this if you want both",
            stacklevel=2,
        )
    return bool(others)


def _flat(processors: Iterable[Any]) -> Iterator[Any]:
    """Yield processors in the order in which they run, each followed by the ones that it holds and runs itself."""
    for processor in processors:
        yield processor
        inner = getattr(processor, "processors", None)
        if isinstance(inner, list):
            yield from _flat(inner)
