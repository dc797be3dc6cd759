"""Hooks that pass drawn position ids to a model's rotary modules.

transformers reads document boundaries from `position_ids`, and a jump in drawn ids would look like a boundary. So the
ids are a separate argument, `rope_position_ids`, of the model or its decoder. A hook before the model's forward removes
the argument; a hook before each rotary module replaces the module's `position_ids` by it; a hook after the forward
raises if no rotary module was called.

Each thread keeps the ids of its last forward until its next one, as gradient checkpointing may run a layer again. The
hooks of a copied model (`copy.deepcopy`, `pickle`, averaged weights) are disabled.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.handles import Handle
from hf_longtrunc.models import attachable, decoder_of, rotary_modules, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ROPE_IDS = "rope_position_ids"


class RopePositionHooks:
    """The hooks of one model, with the ids of the running forward of each thread.

    torch.compile cannot trace thread-local values: a compiled model has a graph break at each hook.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._forward = _Forward()
        self._latest: Tensor | None = None
        self._num_threads = 0

    def __reduce__(self) -> tuple[type[RopePositionHooks], tuple[bool]]:
        """Copy and pickle as disabled hooks: CREAM was not attached to the copy."""
        return RopePositionHooks, (False,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pre_forward(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Remove the ids from the arguments of a model, or of its decoder if it is called alone."""
        if not self.enabled and _has_enabled_hooks(model):
            return args, kwargs
        ids, forward = kwargs.pop(ROPE_IDS, None), self._forward
        ids = ids if model.training else None
        if ids is not None and not self.enabled:
            raise ValueError(
                f"this {type(model).__name__} is a copy of a model that CREAM is attached to, and is not attached "
                "itself: it would be trained at ordinary positions. Call CreamCollator.attach(copy)"
            )
        if forward.of is None:
            forward.of = model
        if forward.of is model or ids is not None:  # the decoder within a model's forward keeps what the model took
            self._num_threads += not forward.is_known
            forward.ids, forward.is_known = ids, True
            forward.is_asked_for = False
            self._latest = ids
        return args, kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def post_forward(self, model: Any, args: Any, output: Any) -> None:
        """Raise at the end of a forward with ids if no rotary module was called."""
        forward = self._forward
        if forward.of is not model:
            return
        forward.of = None
        if forward.ids is not None and not forward.is_asked_for and output is not None:  # None: forward raised
            raise ValueError(
                f"{type(model).__name__} took {ROPE_IDS} and none of its rotary modules was called: it would be "
                "trained at ordinary positions, so CREAM cannot serve it"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pre_rotary(self, rotary: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Replace the `position_ids` of a rotary module by the ids."""
        ids = self._ids()
        if ids is None:
            return args, kwargs
        given = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        if given.ndim != 2 or given.shape[-1] != ids.shape[-1]:
            raise ValueError(
                f"the model rotates positions of shape {list(given.shape)}, the batch has {ROPE_IDS} of "
                f"{list(ids.shape)}: something between them adds tokens (prompt tuning) or axes of position "
                "(multimodal models), which CREAM cannot serve"
            )
        self._forward.is_asked_for = True
        ids = ids.to(given.device)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": ids}
        return (args[0], ids, *args[2:]), kwargs

    def _ids(self) -> Tensor | None:
        if not self.enabled:
            return None
        if self._forward.is_known:
            return self._forward.ids
        if self._num_threads > 1 and self._latest is not None:
            raise ValueError(
                "a rotary module was called in a thread that ran no forward, and several threads have run forwards of "
                "this model with CREAM: it cannot be known which thread's positions are meant. Run it in one thread"
            )
        return self._latest  # autograd's own thread, which runs a checkpointed layer again


class _Forward(threading.local):
    """The running forward of one thread: its module and its ids."""

    of: Any = None  # the module whose call began it
    ids: Tensor | None = None
    is_known = False
    is_asked_for = False


def attach_hooks(model: Any) -> Handle:
    """Attach the hooks to a causal language model, or to the one inside a PEFT, DDP or FSDP wrapper.

    Raises:
        TypeError: no such model.
        ValueError: the model is compiled, has no rotary modules, or has enabled hooks already.
    """
    owner = attachable(model, "CreamCollator")
    rotaries = rotaries_of(owner)
    if is_attached(owner):
        raise ValueError("a CreamCollator is attached to this model already: detach() that one first")
    hooks, decoder = RopePositionHooks(), decoder_of(owner)
    handle = Handle("CreamCollator", owner, f"{len(rotaries)} rotary modules rotate by {ROPE_IDS} in training mode")
    for module in {id(module): module for module in (owner, decoder)}.values():
        handle.undo(module.register_forward_pre_hook(hooks.pre_forward, with_kwargs=True).remove)
        handle.undo(module.register_forward_hook(hooks.post_forward, always_call=True).remove)
    for rotary in rotaries:
        handle.undo(rotary.register_forward_pre_hook(hooks.pre_rotary, with_kwargs=True).remove)
    return handle


def rotaries_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the rotary modules of a transformers model's decoder; raise ValueError if there are none."""
    rotaries = rotary_modules(decoder_of(model))
    if not rotaries:
        raise ValueError(
            f"{type(model).__name__} has no rotary modules: its positions (ALiBi, learned or none) cannot be spread "
            "over a longer window, and training it with CREAM would do nothing"
        )
    return rotaries


def is_attached(model: Any) -> bool:
    """Tell whether a model, wrapped or not, has enabled hooks."""
    return _has_enabled_hooks(unwrapped(model))


def _has_enabled_hooks(module: Any) -> bool:
    owners = (getattr(hook, "__self__", None) for hook in getattr(module, "_forward_pre_hooks", {}).values())
    return any(isinstance(owner, RopePositionHooks) and owner.enabled for owner in owners)
