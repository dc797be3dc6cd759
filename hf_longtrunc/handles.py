"""The record of a technique's changes to a model, with which they are undone."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from hf_longtrunc.arguments import NamedSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self


_ABSENT: Any = object()


class PatchSettings(NamedSettings):
    """Base of a technique's settings, which become a patch when they are called with a model."""

    usage: ClassVar[str] = "patch a model by {name}(...)(model), or `with {name}(...)(model):`"

    def __enter__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name}(...) has no model to patch yet: write `with {name}(...)(model):`")

    def __exit__(self, *exception: object) -> None:
        """Do nothing: `with` needs this method before it calls `__enter__`."""


class Handle:
    """The changes that one technique has made to one model.

    `with technique(model) as handle:` takes them back at the end of the block, after an exception too;
    `handle = technique.attach(model)` keeps them until `handle.detach()`.

    Examples:
        >>> handle = LMInfinite(window_length=64).attach(model)
        >>> handle.detach()
        >>> handle.is_attached
        False

    A technique creates a handle and records each change in it: `set(owner, name, value)` for an attribute,
    `undo(function, *arguments)` for anything else. Changes are taken back in reverse order.

    Args:
        technique: shown by the repr.
        model: the instance that is changed.
        changed: the changed parts of the model, for the repr.
    """

    def __init__(self, technique: object, model: object, changed: str):
        self.technique = technique
        self._title = f"{technique} on {type(model).__name__}"
        self._changed = changed
        self._changes = ExitStack()
        self._sets: list[tuple[dict[str, Any], str, Any, Any]] = []  # attributes, name, before, after
        self.is_attached = True

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the instance itself, past any `__setattr__` of its class, until `detach()`."""
        attributes = owner.__dict__
        before = attributes.get(name, _ABSENT)
        self._sets.append((attributes, name, before, value))
        self._changes.callback(self._put, attributes, name, before)
        attributes[name] = value

    def _put(self, attributes: dict[str, Any], name: str, value: Any) -> None:
        if value is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value

    def undo(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function(*arguments)` at `detach()`."""
        self._changes.callback(function, *arguments)

    def refuse_copies(self, *owners: Any, advice: str) -> None:
        """Let `copy.deepcopy`, pickling and `nn.DataParallel`'s replicas of the owners fail with `advice`.

        A copy would share the attachment, and with it the modules of the model that it was copied from.
        """

        def refuse(*_: Any) -> Any:
            raise TypeError(
                f"{self._title} cannot be copied or pickled, nor replicated by DataParallel, while it is attached: "
                f"{advice}"
            )

        for owner in {id(owner): owner for owner in owners}.values():
            for name in ("__deepcopy__", "__reduce_ex__", "_replicate_for_data_parallel"):
                self.set(owner, name, refuse)

    @contextmanager
    def or_nothing(self) -> Iterator[None]:
        """Take everything back if the block, in which changes are made, raises."""
        try:
            yield
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing.

        Raises:
            RuntimeError: a later technique changed one of the attributes again; nothing is taken back.
        """
        latest = {(id(attributes), name): (attributes, name, after) for attributes, name, _, after in self._sets}
        for attributes, name, after in latest.values():
            if attributes.get(name, _ABSENT) is not after:
                raise RuntimeError(
                    f"{self._title} cannot be detached yet: {name} was changed again by something that was attached "
                    "after it; detach that first"
                )
        self._changes.close()
        self._sets.clear()
        self.is_attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = f"{self._changed}; detach() takes it back" if self.is_attached else "detached"
        return f"<{self._title}: {state}>"
