"""The two functions that a patch registers with transformers: attention, and the mask that goes with it.

They hold no reference to a model. They read everything from the module and the mask they are given.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
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
    from torch import Tensor

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
