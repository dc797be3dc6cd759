"""A model made ready for a longer window by transformers' own means, so that nothing of ours is needed to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedConfig

from hf_longtrunc.positions.collator import find_rotaries, is_attached

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["yarn", "ntk", "linear"]


def extend_context(
    model_or_config: PreTrainedModel | PreTrainedConfig | Any,
    factor: int,
    method: Method = "yarn",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Scale a model's rotary positions to `factor` times its trained window, in its config and in the live model.

    Writes `rope_parameters` of a stock type and `max_position_embeddings`, and builds the rotary modules anew; a
    checkpoint saved afterwards loads in plain transformers. Do it before `CreamCollator.attach` and before training:
    the model is meant to be trained at these frequencies and served at the same ones, whatever the length of the text.

    Args:
        model_or_config: a causal language model, a PEFT wrapper of one, or a config. A config object that several
            models share is changed for all of them, but only this model's rotary modules are built anew.
        factor: how many times the window; at least 2.
        method: "yarn" divides slow frequencies by the factor and leaves fast ones (Peng et al. 2023); "ntk" raises the
            base to theta * factor ** (d / (d - 2)) for d rotary dimensions; "linear" divides all frequencies.
        tokenizer: its `model_max_length` is set to the new window.

    Returns:
        The new window, factor times the old `max_position_embeddings`.

    Raises:
        TypeError, ValueError: a bad argument; a config without rotary positions or window; one that is scaled already
            (another rope_type than "default"); a model with CREAM attached. Nothing is changed then.

    Where a config holds one set of parameters a layer type, that of the full-attention layers is scaled.
    """
    is_config = isinstance(model_or_config, PreTrainedConfig)
    config = model_or_config if is_config else getattr(model_or_config, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"model_or_config must be a transformers model or its config, got {type(model_or_config).__name__}"
        )
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise TypeError(f"factor must be a whole number, got {factor!r} of type {type(factor).__name__}")
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    if method not in ("yarn", "ntk", "linear"):
        raise ValueError(f"method must be 'yarn', 'ntk' or 'linear', got {method!r}")
    config = config.get_text_config(decoder=True)
    window = _window(config)
    parameters = _full_attention_parameters(config)
    scaled = _scaled(parameters, config, window, factor, method)
    rotaries = [] if is_config else _rotaries(model_or_config)
    parameters.clear()
    parameters.update(scaled)
    config.max_position_embeddings = window * factor
    for parent, name, module in rotaries:
        device = next(module.buffers()).device
        setattr(parent, name, type(module)(module.config).to(device))
    if tokenizer is not None:
        tokenizer.model_max_length = window * factor
    return window * factor


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
        return {**kept, "rope_type": "default", "rope_theta": float(theta) * factor ** (dim / (dim - 2))}
    scaled = {**kept, "rope_type": method, "rope_theta": theta, "factor": float(factor)}
    # Left out, transformers takes the new window for the original one.
    return {**scaled, "original_max_position_embeddings": window} if method == "yarn" else scaled


def _rotary_dim(config: Any, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rotaries(model: Any) -> list[tuple[nn.Module, str, Any]]:
    """Return each rotary module with its parent and its name there."""
    decoder, rotaries = find_rotaries(model)
    if is_attached(decoder):
        raise ValueError("a CreamCollator is attached to this model: extend_context comes before attach()")
    return [
        (parent, name, child)
        for parent in decoder.modules()
        for name, child in parent.named_children()
        if any(child is rotary for rotary in rotaries)
    ]
