"""Changes to one model that are taken back together."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


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
