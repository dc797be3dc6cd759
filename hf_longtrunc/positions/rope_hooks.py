"""How drawn position ids reach a model's rotary modules, past everything that reads `position_ids` for other reasons.

transformers reads the borders of packed documents from `position_ids` and would read every jump as another. So the ids
travel beside them, as the argument `rope_position_ids` of the model or of its decoder. A hook before the model's
forward takes them out of the arguments, and a hook before each rotary module puts them in the place of the
`position_ids` that the module is called with. A hook behind the forward raises if no rotary module asked for them.

What one forward was given is kept by thread, until the next forward of the thread: gradient checkpointing may run a
layer again. A copy of a model with a door (of `copy.deepcopy`, `pickle`, an average of weights) has a closed one.
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


class Door:
    """The hooks on one model, and the ids of the forward that is running in each thread.

    torch's compiler cannot follow values kept by thread: compiled models break their graph at the hooks.
    """

    def __init__(self, is_open: bool = True) -> None:
        self.is_open = is_open
        self._forward = _Forward()
        self._latest: Tensor | None = None
        self._num_threads = 0

    def __reduce__(self) -> tuple[type[Door], tuple[bool]]:
        """Copy and pickle as a closed door: the copy is not what was attached to."""
        return Door, (False,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def take(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the ids out of the arguments of a model, or of its decoder called alone."""
        if not self.is_open and _has_open_door(model):
            return args, kwargs
        ids, forward = kwargs.pop(ROPE_IDS, None), self._forward
        ids = ids if model.training else None
        if ids is not None and not self.is_open:
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
    def leave(self, model: Any, args: Any, output: Any) -> None:
        """Raise at the end of a forward whose ids reached no rotary module."""
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
    def rotate(self, rotary: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Put the ids in the place of the `position_ids` that a rotary module is called with."""
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
        if not self.is_open:
            return None
        if self._forward.is_known:
            return self._forward.ids
        if self._num_threads > 1 and self._latest is not None:
            raise ValueError(
                "a rotary module was called in a thread that ran no forward, and several threads have run forwards of "
                "this model with CREAM: whose positions are meant cannot be known. Run it in one thread"
            )
        return self._latest  # autograd's own thread, which runs a checkpointed layer again


class _Forward(threading.local):
    """What the forward of one thread was given; another thread finds it empty."""

    of: Any = None  # the module whose call began it
    ids: Tensor | None = None
    is_known = False
    is_asked_for = False


def open_door(model: Any) -> Handle:
    """Put a door on a causal language model or on the one inside a PEFT, DDP or FSDP wrapper.

    Raises:
        TypeError: it is no such model.
        ValueError: it is compiled, has no rotary modules, or has an open door already.
    """
    owner = attachable(model, "CreamCollator")
    rotaries = rotaries_of(owner)
    if is_attached(owner):
        raise ValueError("a CreamCollator is attached to this model already: detach() that one first")
    door, decoder = Door(), decoder_of(owner)
    handle = Handle("CreamCollator", owner, f"{len(rotaries)} rotary modules rotate by {ROPE_IDS} in training mode")
    for module in {id(module): module for module in (owner, decoder)}.values():
        handle.undo(module.register_forward_pre_hook(door.take, with_kwargs=True).remove)
        handle.undo(module.register_forward_hook(door.leave, always_call=True).remove)
    for rotary in rotaries:
        handle.undo(rotary.register_forward_pre_hook(door.rotate, with_kwargs=True).remove)
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
    """Tell whether a model, whatever wraps it, has an open door."""
    return _has_open_door(unwrapped(model))


def _has_open_door(module: Any) -> bool:
    hooks = getattr(module, "_forward_pre_hooks", {})
    return any(isinstance(door := getattr(hook, "__self__", None), Door) and door.is_open for hook in hooks.values())
