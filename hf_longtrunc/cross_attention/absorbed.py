"""A decoder's cross-attention modules, found by running them, and the weights of their heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_longtrunc.cross_attention.retrieved_attention import Heads
from hf_longtrunc.models import bound, parameters_of, weight_and_bias

if TYPE_CHECKING:
    from collections.abc import Callable

# Names of the same thing in different families.
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q", "k", "v", "o"),
)
_STATES = ("key_value_states", "encoder_hidden_states")
_MASKS = ("attention_mask", "mask")
_HEAD_DIMS = ("head_dim", "key_value_proj_dim")
_DROPOUTS = ("attention_dropout", "dropout")


@dataclass(frozen=True)
class CrossAttention:
    """One cross-attention module."""

    module: Any
    names: tuple[str, str, str, str]  # of the attributes that hold its query, key, value and output projections
    forward: Callable[..., Any]  # the module's own
    outputs: int  # length of the tuple that it returns: the attention's output, then weights

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the decoder's hidden states, the encoder's, and the mask, out of a call's arguments."""
        given = bound(self.module, args, kwargs)
        return given["hidden_states"], _states_in(given), next((given[name] for name in _MASKS if name in given), None)

    def query(self, hidden: Tensor) -> Tensor:
        """Return queries [rows, heads, new, head_dim] of hidden states [rows, new, width]."""
        query: Tensor = getattr(self.module, self.names[0])(hidden)
        return query.view(*query.shape[:2], -1, self._head_dim).transpose(1, 2)

    def heads(self) -> Heads:
        """Return the layer's weights by head; groups of heads that share keys and values have theirs repeated."""
        key_weight, key_bias = self._by_head(self.names[1])
        value_weight, value_bias = self._by_head(self.names[2])
        module = self.module
        dropout = next((getattr(module, name) for name in _DROPOUTS if hasattr(module, name)), 0.0)
        softcap = getattr(module, "attn_logit_softcapping", None)
        dropout = dropout if module.training else 0.0
        return Heads(key_weight, key_bias, value_weight, value_bias, module.scaling, softcap, dropout)

    def _by_head(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a projection's weight [heads, head_dim, width] and bias [heads, head_dim]."""
        layer = getattr(self.module, name)
        weight, bias = weight_and_bias(layer, layer.in_features, differentiable=True)
        group = getattr(self.module, self.names[0]).out_features // len(bias)
        weight, bias = weight.view(-1, self._head_dim, weight.shape[1]), bias.view(-1, self._head_dim)
        if group == 1:
            return weight, bias
        return weight.repeat_interleave(group, dim=0), bias.repeat_interleave(group, dim=0)

    def output(self, values: Tensor) -> Any:
        """Return the module's answer for its heads' outputs [rows, heads, new, head_dim], without attention weights."""
        projected = getattr(self.module, self.names[3])(values.transpose(1, 2).flatten(2))
        return (projected, *[None] * (self.outputs - 1))

    @property
    def _head_dim(self) -> int:
        return next(int(getattr(self.module, name)) for name in _HEAD_DIMS if hasattr(self.module, name))


def cross_attention_modules(decoder: nn.Module, run: Callable[[], Any]) -> list[CrossAttention]:
    """Return the modules of `decoder` that are given encoder states while `run()` runs it.

    Query, key, value and output projections must have known names, and one argument must be a mask over the encoder
    states alone.
    """
    found: dict[nn.Module, CrossAttention] = {}

    def note(names: tuple[str, str, str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if _states_in(bound(module, args, kwargs)) is not None and isinstance(output, tuple):
                found[module] = CrossAttention(module, names, module.forward, len(output))

        return hook

    hooks = [
        module.register_forward_hook(note(names), with_kwargs=True)
        for module in decoder.modules()
        for names in _PROJECTIONS
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names) and _is_readable(module)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _is_readable(module: nn.Module) -> bool:
    """Return whether a module has a scaling, a size of its heads, and a mask over the encoder states alone.

    Without such a mask it attends to other keys in the same softmax (T5Gemma 2).
    """
    has_mask = not set(_MASKS).isdisjoint(parameters_of(module))
    return has_mask and hasattr(module, "scaling") and any(hasattr(module, name) for name in _HEAD_DIMS)


def _states_in(given: dict[str, Any]) -> Any:
    return next((given[name] for name in _STATES if given.get(name) is not None), None)
