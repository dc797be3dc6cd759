"""Names that a package offers and imports on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy_names(
    package: str, homes: Mapping[str, str], moved: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Return a module's `__getattr__` that finds each name of `homes` in the module it is mapped to.

    A name of `moved` raises ImportError, which names the file of the repository that has it now.
    """

    def getattribute(name: str) -> object:
        if moved and name in moved:  # an AttributeError would lose its message in `from package import name`
            raise ImportError(f"{package}.{name} moved to {moved[name]} of the repository: copy it from there")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(homes))}")
        return getattr(import_module(homes[name]), name)

    return getattribute
