"""What a processor can find out about the call of `generate` that runs it, and the arguments that leave it alone.

transformers hands a processor ids and scores, and nothing of the call: neither whether it samples, nor which processors
come behind. Both stand in the frames of its callers, in `LogitsProcessorList.__call__` and in the decoding loop, and
are read there, in this file only. Where they cannot be found (a loop of one's own, a compiled processor) nothing is
known and nothing is warned of.

There is no simpler way while a plain `logits_processor=[...]` is to be right: no decoding loop passes the list a
keyword, `generate` tells a processor of no config, and scores alone tell beams (log-probabilities) but neither greedy
decoding nor what comes behind. A processor that is attached could be told, one in a list could not.
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
# What lets only some tokens through: the packages whose processors do, and transformers' own.
_GRAMMARS = ("guidance", "llguidance", "lmformatenforcer", "outlines", "outlines_core", "xgrammar")
# Two scores that differ by so much more from the model's than others do were changed, whatever was rounded.
_MOVED = 1e-3
# Frames between a processor's __call__ and the decoding loop: watchers and wrappers stand in between.
_DEPTH = 16

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
    """Return the arguments of `generate` that leave a truncation processor alone: sampling, everything else off.

    >>> eta = EtaLogitsProcessor(2e-3)
    >>> text = model.generate(ids, **sampling_settings(model), max_new_tokens=4, logits_processor=[eta])

    transformers cuts to 50 tokens by default (`top_k`), and a model's own `generation_config` may hold a temperature,
    a top-p, a repetition penalty, guidance or a bias: each of them changes what the processor kept, or what it saw.
    Beams, lengths and special tokens stay as the model has them.

    Args:
        model: a transformers model that generates, or a wrapper of one.

    Returns:
        Neutral values of the samplers and penalties that the installed transformers knows.
    """
    config = unwrapped(model).generation_config
    return {name: value for name, value in _NEUTRAL.items() if hasattr(config, name)}


def draws_by_itself() -> bool:
    """Return whether the running call draws each row's next token from what the processors leave.

    Greedy decoding and beams do not. True where there is no call of `generate` to be seen.
    """
    frame = _list_frame()
    for _ in range(_DEPTH):
        if frame is None:
            break
        if "generation_config" in frame.f_code.co_varnames:
            config = frame.f_locals.get("generation_config")
            return bool(getattr(config, "do_sample", True)) and (getattr(config, "num_beams", None) or 1) == 1
        frame = frame.f_back
    return True


def neighbours(processor: Any) -> tuple[list[Any], list[Any]]:
    """Return the processors that the running call applies in front of `processor` and behind it."""
    frame = _list_frame()
    processors = [] if frame is None else list(_flat(frame.f_locals["self"]))
    for place, each in enumerate(processors):
        if each is processor:
            return processors[:place], processors[place + 1 :]
    return [], []


def acts_behind(others: list[Any]) -> bool:
    """Return whether one of the processors behind would find nothing to do where one token alone is left."""
    return not all(isinstance(each, LogitNormalization) for each in others)


def is_reshaped(scores: Tensor) -> bool | None:
    """Return whether `scores` [rows, V] are another distribution than the model's; None where that cannot be seen.

    The model's scores stand in the frame of the decoding loop; its output is compared, since processors may change the
    loop's copy in place (xgrammar's does). Masks count: what is renormalised is changed.
    """
    frame = _list_frame()
    for _ in range(_DEPTH):
        if frame is None:
            return None
        model = frame.f_locals.get("next_token_logits")
        if isinstance(model, Tensor) and model.shape == scores.shape:
            output = getattr(frame.f_locals.get("outputs"), "logits", None)
            if isinstance(output, Tensor) and output.ndim == 3 and output[:, -1].shape == scores.shape:
                model = output[:, -1].to(model)
            moved = torch.where(model.isinf(), 0, scores - model.to(scores.device))
            return bool((moved.amax(-1) - moved.amin(-1) > _MOVED).any())
        frame = frame.f_back
    return None


def rows_a_prompt() -> int | None:
    """Return how many rows `generate` makes of a prompt, its beams or returns; None where there is no call of it."""
    frame = _list_frame()
    for _ in range(_DEPTH):
        if frame is None:
            return None
        config = frame.f_locals.get("generation_config")
        if config is not None:
            return max(getattr(config, "num_beams", None) or 1, getattr(config, "num_return_sequences", None) or 1)
        frame = frame.f_back
    return None


def _list_frame() -> FrameType | None:
    """Return the frame of the processor list that runs the one that asks."""
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is LogitsProcessorList.__call__.__code__:
            return frame
        frame = frame.f_back
    return None


def warn_of_cuts(processor: Any, others: list[Any]) -> bool:
    """Warn if one of `others`, which run behind `processor`, cuts what it keeps; say whether that was so."""
    return _warn(
        processor, [each for each in others if isinstance(each, CUTTING)], "behind", "cuts tokens that it keeps"
    )


def warn_of_reshaping(processor: Any, others: list[Any], scores: Tensor) -> bool:
    """Warn if `others`, which run in front of `processor`, change the distribution that it needs unchanged."""
    reshaping = [each for each in others if not isinstance(getattr(each, "processors", None), list)]
    if not reshaping or is_reshaped(scores) is False:
        return False
    what = "changes the model's distribution, about which it proves nothing then"
    return _warn(processor, reshaping, "in front of", what)


def warn_where_attached(processors: list[Any], built: list[Any]) -> None:
    """Warn of what stands behind attached `processors` in the list that a generation runs, each of them once.

    Here no frame is asked: `generate_batch` runs its processors in frames of its own, or in none.
    """
    for place, each in enumerate(built):
        if each in processors and getattr(each, "_is_unwarned", False):
            each._is_unwarned = not warn_of_cuts(each, built[place + 1 :])


def refuse_grammars(processor: Any, others: list[Any]) -> None:
    """Raise ValueError if one of `others`, which run behind `processor`, lets only some tokens through."""
    for each in others:
        package = type(each).__module__.partition(".")[0]
        if package in _GRAMMARS or isinstance(each, PrefixConstrainedLogitsProcessor):
            raise ValueError(
                f"{type(each).__name__} of {package} runs behind {type(processor).__name__}, which may have cut all "
                "tokens that it lets through, and then none is left to draw: put it in front, "
                f"logits_processor=[{type(each).__name__}, {type(processor).__name__}]"
            )


def refuse_empty_rows(processor: Any, scores: Tensor) -> None:
    """Raise ValueError where a row of `scores` [rows, V] has no token left, with the names of what removed them.

    The sampler's own words are "probability tensor contains inf, nan or element < 0". Cost: a pass over the scores and
    a host synchronisation.
    """
    empty = (scores.amax(-1) == -torch.inf).nonzero()[:, 0].tolist()
    if empty:
        in_front = [type(each).__name__ for each in neighbours(processor)[0]]
        raise ValueError(
            f"row {empty[0]} has no token left: all scores that {type(processor).__name__} is handed are -inf. "
            f"{' and '.join(dict.fromkeys(in_front)) or 'What runs in front of it'} removed every token: a grammar "
            "that has ended lets nothing through but the end of the text (set eos_token_id), and constraints may "
            "contradict each other"
        )


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
    """Yield processors in the order in which they run; those that others hold and run stand behind their holder."""
    for processor in processors:
        yield processor
        inner = getattr(processor, "processors", None)
        if isinstance(inner, list):
            yield from _flat(inner)
