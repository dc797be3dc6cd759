"""`generate` under the settings of an exported folder: its `custom_generate/generate.py` calls this."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from hf_longtrunc import AttentionTrace, attach_processors
from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation import read_ahead
from hf_longtrunc.hosting.find_and_read import find_and_shorten
from hf_longtrunc.hosting.settings import HostSettings
from hf_longtrunc.hosting.states import States
from hf_longtrunc.models import CACHE, unwrapped, weights_version

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

    from hf_longtrunc import Passage

logger = logging.get_logger("hf_longtrunc")

_ASKING = 192  # last tokens of a prompt that are read in one forward, so that retrieval sees the question whole
# Settings that make a call more than one row read from left to right, and their neutral values.
_PLAIN = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "prompt_lookup_num_tokens": None}
_TEXT = {"input_ids", "attention_mask"}
_STRETCH = 64  # tokens that are counted together where an answer's attention is asked for
_MOST = 8  # such stretches in a reading


@dataclass(frozen=True)
class Reading:
    """How much of a prompt the model sees under a technique.

    Attributes:
        read: tokens of the prompt.
        kept: those of them that the model sees while it answers, or can look up.
        forgotten: the others.
        window: the last tokens that it sees; None: all of them.
        reused: how many an earlier request had read.
        passages: read for the prompt's question instead of the prompt: `start` and `end` in characters of a message of
            the user, `source` its number, from "0" on. Empty: none stood out; None: none was looked for.
        attended: where the answer attended, most first: {"start", "end"} in tokens and {"share"} of its attention, the
            mean over its tokens, layers and heads; None: it was not asked for.

    Examples:
        >>> Reading(read=100, kept=80, forgotten=20, window=64).described()
        {'read': 100, 'kept': 80, 'forgotten': 20, 'window': 64, 'reused': 0}
    """

    read: int
    kept: int
    forgotten: int
    window: int | None
    reused: int = 0
    passages: tuple[Passage, ...] | None = None
    attended: tuple[dict[str, float], ...] | None = None

    def described(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without `passages` and `attended` if they were not asked for."""
        optional = ("passages", "attended")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}


def reading_of(technique: Any, tokens: int, reused: int = 0) -> Reading:
    """Return how much of a prompt of so many tokens a model sees under a technique.

    Examples:
        >>> reading_of(LMInfinite(num_sink_tokens=16, window_length=64), 100).forgotten
        20
    """
    tokens, window = check_int("tokens", tokens, minimum=0), getattr(technique, "window_length", None)
    if window is None:
        return Reading(tokens, tokens, 0, None, reused)
    kept = min(tokens, technique.num_sink_tokens + window) if _retrieval(technique) is None else tokens
    return Reading(tokens, kept, tokens - kept, window, reused)


class _Host:
    """A model that exported folders generate with: one call at a time; caches are kept between calls.

    It lies in the model's own attributes, so that it goes with the model. A copy of the model has a new one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_generating = False
        self.states = States(0)
        self._tokenizer: Any = None

    def __reduce__(self) -> tuple[type[_Host], tuple[()]]:
        return _Host, ()

    def tokenizer_of(self, model: Any) -> Any:
        """Return the tokenizer in the model's folder."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"finding passages needs the model's tokenizer, which is not in {model.name_or_path!r}: pass "
                    "tokenizer=... to generate"
                ) from error
        return self._tokenizer


def host_of(model: Any) -> _Host:
    """Return the state of a model between calls."""
    host: _Host = vars(model).setdefault("_hf_longtrunc_host", _Host())
    return host


def hosted_generate(settings: str, model: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> object:
    """Generate as `model.generate` does, under the technique and sampler that an exported folder names.

    The model is patched for the call; calls on one model wait for each other. A call with one text and nothing else
    (no beams, no padding, no cache of its own) continues the longest kept text that it begins with: a turn of a chat
    costs its new tokens only.
    With `return_dict_in_generate=True` the output has a field `reading`, see `Reading`. Forgotten tokens are logged as
    a warning.

    Args:
        settings: JSON, see `HostSettings`.
        model: a transformers causal language model.
        inputs: prompts [rows, n], as the first argument of `model.generate`.
        *args: the arguments of `model.generate` that follow.
        **kwargs: of `model.generate`. With `generation_config.cache_salt`, kept texts are shared only with calls of the
            same salt. `trace_attention=True` adds to `reading` where the answer attended, see `AttentionTrace`; not
            where a passage is read instead of the prompt.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: the settings cannot be read, or the technique cannot patch this model.

    Examples:
        >>> settings = HostSettings(technique=LMInfinite(num_sink_tokens=16, window_length=64)).to_json()
        >>> output = hosted_generate(settings, model, ids, max_new_tokens=4, return_dict_in_generate=True)
        >>> output.reading["read"], output.reading["forgotten"]
        (100, 20)
    """
    chosen = HostSettings.from_json(settings)
    model = unwrapped(model)
    host = host_of(model)
    generate = partial(type(model).generate, model)
    with host.lock, ExitStack() as patches:
        if host.is_generating:  # a call from inside: reading ahead generates
            return generate(inputs, *args, **kwargs)
        patches.callback(setattr, host, "is_generating", False)
        host.is_generating = True
        config = _config(model, kwargs)
        notes = vars(config).pop("longtrunc_notes", None)
        is_traced = kwargs.pop("trace_attention", vars(config).pop("longtrunc_trace", False))
        salt = repr(getattr(config, "cache_salt", None))
        weights = weights_version(model)
        patch = patches.enter_context(chosen.technique.attach(model))
        if processors := chosen.processors():
            patches.enter_context(attach_processors(model, processors))
        row, passages = None if args else _one_row(model, inputs, kwargs), None
        if row is not None and (found := _found(chosen, model, host, row, kwargs.get("tokenizer"), salt)) is not None:
            short, passages = found
            if passages:
                read, kept = row.shape[1], short.shape[1]
                reading = replace(reading_of(chosen.technique, read), kept=kept, forgotten=read - kept)
                reading = replace(reading, passages=tuple(passages))
                _log(reading, chosen.technique, notes)
                output = generate(**_asking(config, row, short, kwargs))
                return _with_reading(_with_prompt(output, row, short.shape[1]), reading)
        reused = 0
        if row is not None and _may_be_kept(model, chosen, row, kwargs):
            host.states.limit = chosen.cache_bytes
            kwargs[CACHE], reused = _read(model, host.states, (settings, salt, weights), row, _held_back(chosen))
        ids = kwargs.get("input_ids", inputs)
        if not isinstance(ids, torch.Tensor):
            return generate(inputs, *args, **kwargs)
        reading = reading_of(chosen.technique, ids.shape[-1], reused)
        reading = reading if passages is None else replace(reading, passages=())
        _log(reading, chosen.technique, notes)
        trace = patches.enter_context(AttentionTrace(patch, stretch=_STRETCH)) if is_traced else None
        output = generate(inputs, *args, **kwargs)
        if trace is not None:
            reading = replace(reading, attended=_attended(trace))
            if notes is not None:
                notes[-1] = reading
        return _with_reading(output, reading)


def _attended(trace: AttentionTrace) -> tuple[dict[str, float], ...]:
    """Return the stretches of the first row that an answer attended to most, and their shares."""
    masses = [record.mass[0] for record in trace.records]
    length = max(map(len, masses))
    mean = torch.stack([torch.nn.functional.pad(mass.float(), (0, length - len(mass))) for mass in masses]).mean(0)
    best = mean.topk(min(_MOST, length))
    return tuple(
        {"start": n * _STRETCH, "end": (n + 1) * _STRETCH, "share": round(share, 4)}
        for share, n in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if share > 0
    )


def _with_reading(output: Any, reading: Reading) -> Any:
    if not isinstance(output, torch.Tensor):
        output["reading"] = reading.described()
    return output


def _found(
    settings: HostSettings, model: Any, host: _Host, ids: Tensor, tokenizer: Any, salt: object
) -> tuple[Tensor, list[Passage]] | None:
    """Return a shorter prompt and its passage, see `find_and_shorten`; None where nothing would be forgotten."""
    if settings.finder is None or not reading_of(settings.technique, ids.shape[1]).forgotten:
        return None
    tokenizer = tokenizer or host.tokenizer_of(model)
    found = find_and_shorten(model, getattr(tokenizer, "tokenizer", tokenizer), ids, settings.finder, salt)
    return None if found is not None and found[0].shape[1] > ids.shape[1] else found


def _asking(config: Any, ids: Tensor, short: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call for a shorter prompt; `max_length` leaves as many new tokens as before."""
    changed = {**kwargs, "inputs": None, "input_ids": short, "attention_mask": torch.ones_like(short)}
    for name in ("max_new_tokens", "max_length"):
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None:
            if name == "max_length" and value > ids.shape[1]:
                changed |= {"max_length": None, "max_new_tokens": value - ids.shape[1]}
            break
    return changed


def _with_prompt(output: Any, whole: Tensor, short: int) -> Any:
    """Return an output in which sequences begin with the whole prompt, as every caller expects."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    sequences = torch.cat([whole.expand(len(sequences), -1), sequences[:, short:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    if CACHE in output:
        output[CACHE] = None  # it has not read what the caller thinks
    return output


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


def _one_row(model: Any, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Return the ids [1, n] of a call with one text without padding and nothing else to read; None for other calls."""
    given = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
    if model.training or not given <= _TEXT or kwargs.get(CACHE) is not None:
        return None
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1:
        return None
    return ids if mask is None or (mask.shape == ids.shape and bool(mask.all())) else None


def _may_be_kept(model: Any, settings: HostSettings, ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a prompt may be read beforehand, from a cache of an earlier call."""
    retrieval, config = _retrieval(settings.technique), _config(model, kwargs)
    if retrieval is not None and not getattr(retrieval, "ending_ids", ()):
        return False  # every forward of several tokens would ask
    asked = {name: kwargs.get(name, getattr(config, name, None)) for name in _PLAIN}
    return (
        settings.cache_bytes > 0
        and ids.shape[1] > _held_back(settings)
        and kwargs.get("assistant_model") is None
        and kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False
        and kwargs.get("cache_implementation", getattr(config, "cache_implementation", None)) is None
        and all(value is None or value == _PLAIN[name] for name, value in asked.items())
    )


def _retrieval(technique: Any) -> Any:
    return getattr(technique, "retrieval", None)


def _config(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    config: GenerationConfig = kwargs.get("generation_config") or model.generation_config
    return config


def _log(reading: Reading, technique: Any, notes: list[Reading] | None) -> None:
    """Log how much the model reads and forgets, and note it for the server, before the answer: a stream ends early."""
    if notes is not None:
        notes.append(reading)
    if reading.passages:
        (passage,) = reading.passages
        logger.warning(
            f"{reading.read:,} tokens searched, {reading.kept:,} read: characters {passage.start:,} to "
            f"{passage.end:,} of the user's message {passage.source} (score {passage.score:.2f})"
        )
    elif reading.forgotten:
        logger.warning(
            f"{reading.read:,} tokens read ({reading.reused:,} of them earlier), {reading.kept:,} kept, "
            f"{reading.forgotten:,} forgotten: the model sees the first {technique.num_sink_tokens} and the "
            f"last {reading.window:,}"
        )
