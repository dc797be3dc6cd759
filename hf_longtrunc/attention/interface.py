"""A patch's entries in transformers' registries, attention and mask, and the copies of configs that name them.

The two functions hold no reference to a model. They read everything from the module and the mask they are given.
"""

from __future__ import annotations

import copy
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_longtrunc.attention.context import (
    MORE_THAN_CAUSAL,
    PASSTHROUGH,
    AttentionCall,
    DeferredMask,
    ForwardContext,
    get_context,
)
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.probe import LayerProbe
from hf_longtrunc.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hf_longtrunc.handles import Handle

_ROWS = 256  # of a mask that are compared at once


def register(handle: Handle, model: Any, name: str, original: str) -> None:
    """Register both functions under `name`, for a model with the attention `original`, until it is detached or gone."""
    functions: tuple[Any, Any] = _attention, _mask
    for registry, function in zip((AttentionInterface, AttentionMaskInterface), functions, strict=True):
        registry.register(name, partial(function, original))
        handle.undo(weakref.finalize(model, registry._global_mapping.pop, name, None))


def _attention(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Compute attention by the context that travels as the mask; other layers get the model's own."""
    if isinstance(attention_mask, DeferredMask):
        raise ValueError(
            "layers of a patched model were run outside its decoder's forward, in which positions are "
            "found: detach first"
        )
    if isinstance(attention_mask, ForwardContext):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = module._hf_longtrunc_layer
        scoring = Scoring(scale, kwargs.get("softcap"), None, kwargs.get("s_aux"), dropout, layer.rotation)
        call = AttentionCall(layer, query, key, value, attention_mask, scoring)
        return module._hf_longtrunc_attend(call).transpose(1, 2).contiguous(), None
    probe = get_context()
    if isinstance(probe, LayerProbe):
        output = probe.attend(module, query, key, value, attention_mask, None)
        return output.transpose(1, 2).contiguous(), None
    native: Any = AttentionInterface._global_mapping.get(original)
    if original == "eager":
        native = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[Tensor, Any] = native(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _mask(original: str, *, local_size: int | None = None, **kwargs: Any) -> Any:
    """Return the running decoder's context; layers that were trained with a window get their own mask."""
    context = get_context()
    own: Any = AttentionMaskInterface._global_mapping[original]
    native = partial(own, local_size=local_size, **kwargs)
    if local_size is not None or context is PASSTHROUGH:
        return native()
    is_causal = partial(_is_causal, **kwargs)
    if context is None:
        return DeferredMask(kwargs["attention_mask"], is_causal, native)
    if not is_causal():
        if isinstance(context, LayerProbe):
            raise UnsupportedModelError(
                "it asks for a mask in which tokens see later ones, as in an encoder, and the mask that limits "
                "distances is causal"
            )
        raise ValueError(MORE_THAN_CAUSAL)
    return context


def _is_causal(mask_function: Any, q_length: int, q_offset: int, **kwargs: Any) -> bool:
    """Return whether a requested mask hides the future and nothing else, padding aside."""
    if mask_function is causal_mask_function:
        return True
    kwargs |= {"attention_mask": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    for start in range(0, q_length, _ROWS):
        rows: dict[str, Any] = {**kwargs, "q_length": min(_ROWS, q_length - start), "q_offset": q_offset + start}
        wanted, causal = (sdpa_mask(mask_function=which, **rows) for which in (mask_function, causal_mask_function))
        if not torch.equal(wanted, causal):  # type: ignore[arg-type]
            return False
    return True


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
