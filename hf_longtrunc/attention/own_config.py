"""Giving a model copies of its configs while it is patched, and carrying a user's edits back."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from torch import nn

    from hf_longtrunc.handles import Handle


def set_own_configs(handle: Handle, model: Any, decoder: Any, name: str) -> list[PreTrainedConfig]:
    """Let every module of the model hold a copy of its config until detach; the decoder's call their attention `name`.

    A config object may be shared with other models, and is saved with this one: neither must see the name. Edits of the
    copies are carried back at detach.

    Returns:
        The copies that name the attention.
    """
    named = []
    memo: dict[int, Any] = {}
    originals: dict[int, PreTrainedConfig] = {}
    mine = {id(config) for part in decoder.modules() for config in _configs(part).values()}
    mine.add(id(model.config.get_text_config(decoder=True)))  # a multimodal model asks for masks with it
    for module in model.modules():
        for attribute, config in _configs(module).items():
            handle.set(module, attribute, copy.deepcopy(config, memo))
            _inner_configs(config, originals)
    for key, original in originals.items():
        own = memo[key]
        if key in mine:
            own._attn_implementation_internal = name
            named.append(own)
        handle.undo(_update_config, original, own, copy.deepcopy(_fields(own)))
    return named


def _configs(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """Return the configs that a module holds itself, by their names."""
    return {name: value for name, value in module.__dict__.items() if isinstance(value, PreTrainedConfig)}


def _inner_configs(config: PreTrainedConfig, found: dict[int, PreTrainedConfig]) -> None:
    """Add a config and those inside it to `found`, by their ids."""
    if id(config) not in found:
        found[id(config)] = config
        for value in config.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                _inner_configs(value, found)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own fields, without the configs inside it and the name of its attention."""
    fields = config.__dict__.items()
    return {
        name: value
        for name, value in fields
        if not isinstance(value, PreTrainedConfig) and name != "_attn_implementation_internal"
    }


def _update_config(original: PreTrainedConfig, own: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Make the changes in the original config that were made in its copy since it had the fields `before`."""
    now = _fields(own)
    for name, value in now.items():
        if name not in before or value != before[name]:
            original.__dict__[name] = value
    for name in before.keys() - now.keys():
        original.__dict__.pop(name, None)
