"""What an exported folder's `custom_generate/generate.py` calls."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging

from hf_longtrunc import attach_processors
from hf_longtrunc.evaluation import read_ahead
from hf_longtrunc.hosting.settings import HostSettings
from hf_longtrunc.hosting.states import States
from hf_longtrunc.models import CACHE, unwrapped, weights_version

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

logger = logging.get_logger("hf_longtrunc")

_ASKING = 128  # last tokens of a prompt that are read in one forward where a question chooses what is read again
# Settings under which a call is not one row that is read from left to right: with what is no such setting.
_PLAIN = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "prompt_lookup_num_tokens": None}
_TEXT = {"input_ids", "attention_mask"}


@dataclass(frozen=True)
class Reading:
    """What of a prompt a technique lets the model see.

    Attributes:
        read: tokens of the prompt.
        kept: how many of them the model sees while it answers, or can look up.
        forgotten: how many it does not.
        window: the last tokens that it sees; None: all of them.
        reused: how many were read in an earlier request.
    """

    read: int
    kept: int
    forgotten: int
    window: int | None
    reused: int = 0


def reading_of(technique: Any, tokens: int, reused: int = 0) -> Reading:
    """Return what of a prompt of so many tokens a model sees under a technique."""
    sinks = getattr(technique, "num_sink_tokens", None)
    if sinks is None:
        return Reading(tokens, tokens, 0, None, reused)
    window = technique.window_length
    kept = min(tokens, sinks + window) if _retrieval(technique) is None else tokens
    return Reading(tokens, kept, tokens - kept, window, reused)


class _Host:
    """A model that exported folders generate with: one call at a time, and the caches between calls."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_generating = False
        self.states = States(0)


_hosts: WeakKeyDictionary[Any, _Host] = WeakKeyDictionary()
_guard = threading.Lock()


def hosted_generate(settings: str, model: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> object:
    """Generate as `model.generate` does, under the technique and sampler that an exported folder names.

    The model is patched for the call and is afterwards as it was; calls on one model wait for each other. A call with
    one text and nothing else (no beams, no padding, no cache of its own) goes on from the longest kept text that it
    begins with, so that a turn of a chat costs what is new in it. With `return_dict_in_generate=True` the output has a
    field `reading`, see `Reading`; a text of which something is forgotten is logged as a warning.

    Args:
        settings: JSON, see `HostSettings`.
        model: a transformers causal language model.
        inputs: prompts [rows, n], as the first argument of `model.generate`.
        *args: the arguments of `model.generate` that follow.
        **kwargs: likewise. `generation_config.cache_salt`, if there is one, shares kept texts only with calls of the
            same salt.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: the settings cannot be read, or the technique cannot patch this model.
    """
    chosen = HostSettings.from_json(settings)
    model = unwrapped(model)
    with _guard:
        host = _hosts.setdefault(model, _Host())
    generate = partial(type(model).generate, model)
    with host.lock, ExitStack() as patches:
        if host.is_generating:  # from inside: what reads ahead generates
            return generate(inputs, *args, **kwargs)
        patches.callback(setattr, host, "is_generating", False)
        host.is_generating = True
        weights = weights_version(model)
        patches.enter_context(chosen.technique(model))
        if processors := chosen.processors():
            patches.enter_context(attach_processors(model, processors))
        ids = None if args or not chosen.cache_bytes else _one_text(model, chosen, inputs, kwargs)
        reused = 0
        if ids is not None:
            host.states.limit = chosen.cache_bytes
            salt = getattr(_config(model, kwargs), "cache_salt", None)
            kwargs[CACHE], reused = _read(model, host.states, (settings, salt, weights), ids, _held_back(chosen))
        return _stated(generate(inputs, *args, **kwargs), chosen, inputs, kwargs, reused)


def _read(model: Any, states: States, address: object, ids: Tensor, held_back: int) -> tuple[Any, int]:
    """Return a cache that has read `ids` [1, n] but the last, and how many of these an earlier call had read."""
    text = ids[0].cpu()
    end = len(text) - held_back
    cache, reused, parent = states.find(address, text, end)
    if reused < end:
        cache = read_ahead(model, ids[:, reused:end], cache=cache)
    states.keep(address, text[:end], cache, parent)
    return cache, reused


def _held_back(settings: HostSettings) -> int:
    """Return how many of a prompt's last tokens `generate` itself reads."""
    return 1 if _retrieval(settings.technique) is None else _ASKING


def _one_text(model: Any, settings: HostSettings, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids [1, n] of a call whose prompt may be read beforehand; None where it may not."""
    retrieval = _retrieval(settings.technique)
    if model.training or (retrieval is not None and not getattr(retrieval, "ending_ids", ())):
        return None  # every forward of several tokens would ask
    given = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
    config = _config(model, kwargs)
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in _PLAIN}
    is_plain = (
        given <= _TEXT
        and kwargs.get(CACHE) is None
        and kwargs.get("assistant_model") is None
        and kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False
        and kwargs.get("cache_implementation", getattr(config, "cache_implementation", None)) is None
        and all(value is None or value == _PLAIN[name] for name, value in asked.items())
    )
    if not is_plain or not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
        return None
    is_whole = mask is None or (mask.shape == ids.shape and bool(mask.all()))
    return ids if is_whole and ids.shape[1] > _held_back(settings) else None


def _retrieval(technique: Any) -> Any:
    return getattr(technique, "retrieval", None)


def _config(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    config: GenerationConfig = kwargs.get("generation_config") or model.generation_config
    return config


def _stated(output: Any, settings: HostSettings, inputs: Any, kwargs: dict[str, Any], reused: int) -> Any:
    """Say what was forgotten, in the log and in the output where it has fields."""
    ids = kwargs.get("input_ids", inputs)
    if not isinstance(ids, torch.Tensor):
        return output
    reading = reading_of(settings.technique, ids.shape[-1], reused)
    if reading.forgotten:
        logger.warning(
            f"{reading.read:,} tokens read ({reading.reused:,} of them earlier), {reading.kept:,} kept, "
            f"{reading.forgotten:,} forgotten: the model sees the first {settings.technique.num_sink_tokens} and the "
            f"last {reading.window:,}"
        )
    if not isinstance(output, torch.Tensor):
        output["reading"] = asdict(reading)
    return output
