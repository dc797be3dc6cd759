"""What patches of a model share: changes taken back together, the block that they last for, and the check of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Changes(ExitStack):
    """What was done to a model, each change with its undoing: `close()` takes all of it back, the last one first.

    `callback(undo)` notes any undoing; `set(owner, name, value)` changes an attribute and notes its own.
    """

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the instance itself, past any `__setattr__` of its class."""
        attributes = owner.__dict__
        if name in attributes:
            self.callback(attributes.__setitem__, name, attributes[name])
        else:
            self.callback(attributes.pop, name)
        attributes[name] = value


@contextmanager
def attached(technique: Any, model: Any) -> Iterator[Any]:
    """Patch `model` for the block and yield it."""
    patch = technique.attach(model)
    try:
        yield model
    finally:
        patch.detach()


def disagreement(before: Tensor, after: Tensor) -> float | None:
    """Return how far a patch moved the states of a few tokens; None if no farther than rounding in their dtype may."""
    difference = float((after - before).double().norm())
    tolerance = 0.1 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return None if difference <= tolerance * float(before.double().norm()) else difference
