"""Rotary positions scaled to a longer window by transformers' own rope types: plain transformers loads the result."""

from __future__ import annotations

import copy
import tempfile
import warnings
from math import inf, nextafter
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.models import attachable, decoder_of, unwrapped
from hf_longtrunc.positions.cream import LAST_POSITION
from hf_longtrunc.positions.rope_hooks import is_attached, rotaries_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Method = Literal["yarn", "ntk", "linear"]
MOST = 512  # times the window; a larger factor is a length


def extend_context(
    model_or_config: PreTrainedModel | PreTrainedConfig | Any,
    factor: int,
    method: Method = "yarn",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Scale a model's rotary positions to `factor` times its trained window, in its config and in the live model.

    Writes `rope_parameters` of a stock type and `max_position_embeddings`, and rebuilds the rotary modules. A
    checkpoint saved afterwards loads in plain transformers. Call it before `CreamCollator.attach` and before training:
    training and inference then use the same frequencies, for texts of any length.

    Args:
        model_or_config: a causal language model, a PEFT or DDP wrapper of one, or a config. A config that several
            models share changes for all of them, but only this model's rotary modules are rebuilt.
        factor: new window over trained window, 2 to 512; not a length.
        method: "yarn" divides slow frequencies by the factor and leaves fast ones (Peng et al. 2023); "ntk" raises the
            base to theta * factor ** (d / (d - 2)) for d rotary dimensions; "linear" divides all frequencies.
        tokenizer: its `model_max_length` is set to the new window.

    Returns:
        The new window, factor times the old `max_position_embeddings`.

    Raises:
        TypeError, ValueError: a bad argument; a config without rotary positions or window; a scaled config (another
            rope_type than "default", or a rope_theta that is no whole number, as after "ntk"); a config that
            transformers refuses after scaling, such as Phi-3's with "yarn"; a compiled model, or one with CREAM
            attached. Model and config are unchanged then.

    If a config has rotary parameters for each layer type, those of the full-attention layers are scaled. The
    checkpoint of a PEFT adapter has no config: scale the base model again before you load the adapter on it.

    Examples:
        >>> config = copy.deepcopy(model.config)
        >>> extend_context(config, 4), config.max_position_embeddings
        (256, 256)
        >>> config.rope_parameters["rope_type"], config.rope_parameters["factor"]
        ('yarn', 4.0)
    """
    factor = check_int("factor", factor, minimum=2)
    check_choice("method", method, ("yarn", "ntk", "linear"))
    is_config = isinstance(model_or_config, PreTrainedConfig)
    model: Any = None if is_config else _scalable(model_or_config)
    whole_config: Any = model_or_config if is_config else model.config
    config: Any = whole_config.get_text_config(decoder=True)
    window = _window(config)
    if factor > MOST:
        raise ValueError(
            f"factor is how many times the trained window of {window}, at most {MOST}, got {factor}: for a window of "
            f"{factor} tokens pass {max(2, -(-factor // window))}"
        )
    if window * factor > LAST_POSITION:
        raise ValueError(
            f"factor must be at most {LAST_POSITION // window} for a window of {window}: fp32 angles do not tell "
            f"positions beyond {LAST_POSITION} apart, got {factor}"
        )
    # A copy is changed and tested first: if it fails, model and config are unchanged.
    scaled = copy.deepcopy(config)
    parameters = _full_attention_parameters(scaled)
    new = _scaled(parameters, scaled, window, factor, method)
    parameters.clear()
    parameters.update(new)
    scaled.max_position_embeddings = window * factor
    _try_out(scaled, method)
    rotaries = [] if is_config else _rebuilt_rotaries(model, scaled, method)
    current = _full_attention_parameters(config)
    current.clear()
    current.update(new)
    config.max_position_embeddings = window * factor
    for parent, name, module in rotaries:
        module.config = config
        setattr(parent, name, module)
    if tokenizer is not None:
        tokenizer.model_max_length = window * factor
    if hasattr(model_or_config, "peft_config"):
        warnings.warn(
            "the checkpoint of a PEFT adapter holds neither config nor window: loaded on the plain base model it would "
            f"be read at {window} tokens. Call extend_context(base_model, {factor}, {method!r}) before loading it, or "
            "merge the adapter and save the whole model",
            stacklevel=2,
        )
    return window * factor


def warn_of_adapter(model: Any) -> None:
    """Warn if the base model of a PEFT adapter, as saved on disk, has another window than the model in training."""
    for adapter in getattr(model, "peft_config", {}).values():
        name, config = adapter.base_model_name_or_path, unwrapped(model).config
        try:
            loaded = type(config).from_pretrained(name or "no name", local_files_only=True)
        except (OSError, ValueError):  # nothing is known of the base
            continue
        then, now = _window(loaded.get_text_config(decoder=True)), _window(config.get_text_config(decoder=True))
        if then != now:
            warnings.warn(
                f"the checkpoints of a PEFT adapter hold neither config nor window: its base model {name!r}, loaded "
                f"anew, reads {then} tokens, and the model in training {now}. Save the base model after extend_context "
                "and put the adapter on what from_pretrained makes of that folder; or call extend_context on the base "
                "model, as for this training, before the adapter is loaded on it; or merge it and save the whole model",
                stacklevel=2,
            )


def _scalable(model: Any) -> Any:
    if not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(
            f"model_or_config must be a transformers model, a PEFT or DDP wrapper of one, or its config, got "
            f"{type(model).__name__}"
        )
    owner = attachable(model, "extend_context")
    if is_attached(owner):
        raise ValueError("a CreamCollator is attached to this model: extend_context comes before attach()")
    return owner


def _try_out(config: Any, method: Method) -> None:
    """Write and read a config as a checkpoint does, make its frequencies, and raise ValueError if that fails."""
    try:
        make = ROPE_INIT_FUNCTIONS.get(config.rope_parameters.get("rope_type", ""))
        if make is not None:  # "default" has none, and sets for layer types are tried out with the live model only
            make(config, torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            type(config).from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"{type(config).__name__} cannot be scaled by {method!r}: transformers fails on the scaled config "
            f"({type(error).__name__}: {error})"
            + ("" if method == "ntk" else '. method="ntk" changes nothing but rope_theta')
        ) from error


def _window(config: PreTrainedConfig) -> int:
    window = getattr(config, "max_position_embeddings", None)
    if not isinstance(window, int):
        raise ValueError(f"{type(config).__name__} has no max_position_embeddings: the trained window is unknown")
    return window


def _full_attention_parameters(config: Any) -> dict[str, Any]:
    """Return the set of rotary parameters, of `config` itself, that the full-attention layers use."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ValueError(f"{type(config).__name__} has no rope_parameters: the model has no rotary positions to scale")
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested and "full_attention" not in nested:
        raise ValueError(f"rope_parameters holds sets for {', '.join(nested)}, and none for full_attention to scale")
    chosen: dict[str, Any] = parameters["full_attention"] if nested else parameters
    kind = chosen.get("rope_type", chosen.get("type", "default"))
    theta = chosen.get("rope_theta")
    if kind == "default" and theta is not None and not float(theta).is_integer():
        raise ValueError(
            f'the model\'s positions are scaled already: rope_theta {theta} is no whole number, as "ntk" leaves it. '
            "Scaling twice is not defined. Start from the unscaled model, or train at the window it has"
        )
    if kind != "default":
        raise ValueError(
            f"the model's positions are scaled already (rope_type {kind!r}, {_written(chosen)}): scaling twice is not "
            "defined. Start from the unscaled model (rope_type 'default', its original window in "
            "max_position_embeddings), or train at the window it has, without extend_context"
        )
    return chosen


def _written(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items() if name in _SCALES) or "no factor"


_SCALES = ("factor", "original_max_position_embeddings")


def _scaled(parameters: dict[str, Any], config: Any, window: int, factor: int, method: Method) -> dict[str, Any]:
    kept = {name: value for name, value in parameters.items() if name != "type"}
    theta = kept.get("rope_theta") or getattr(config, "rope_theta", None) or config.default_theta
    if method == "ntk":
        dim = _rotary_dim(config, kept)
        if dim < 4:
            raise ValueError(f'method "ntk" needs 4 rotary dimensions or more: the base changes nothing of {dim}')
        base = float(theta) * factor ** (dim / (dim - 2))
        # By a whole number it would not be known as scaled: few dimensions give one.
        return {**kept, "rope_type": "default", "rope_theta": nextafter(base, inf) if base.is_integer() else base}
    scaled = {**kept, "rope_type": method, "rope_theta": theta, "factor": float(factor)}
    # Left out, transformers takes the new window for the original one.
    return {**scaled, "original_max_position_embeddings": window} if method == "yarn" else scaled


def _rotary_dim(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rebuilt_rotaries(model: Any, config: PreTrainedConfig, method: Method) -> list[tuple[nn.Module, str, Any]]:
    """Return new rotary modules made of a scaled config, each with its parent and its name there."""
    rotaries = {id(rotary) for rotary in rotaries_of(model)}
    rebuilt = []
    for parent in decoder_of(model).modules():
        for name, child in parent.named_children():
            if id(child) in rotaries:
                try:
                    module = type(child)(config).to(next(child.buffers()).device)
                except Exception as error:
                    raise ValueError(
                        f"{type(config).__name__} cannot be scaled by {method!r}: its {type(child).__name__} cannot be "
                        f"made of the scaled config ({type(error).__name__}: {error})"
                    ) from error
                rebuilt.append((parent, name, module.train(child.training)))
    return rebuilt
