"""Names that a package offers and imports on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy_names(
    package: str, names: Mapping[str, str], moved: Mapping[str, str] | None = None
) -> Callable[[str], object]:
    """Return the `__getattr__` of a package that imports its names from its files on first use.

    Args:
        package: its name.
        names: file -> the names in it, in one string.
        moved: file of recipes/instruments -> names that it has now; they raise ImportError, which says so.
    """
    files = {name: f"{package}.{file}" for file, line in names.items() for name in line.split()}
    gone = {name: f"recipes/instruments/{file}.py" for file, line in (moved or {}).items() for name in line.split()}

    def getattribute(name: str) -> object:
        if name in gone:  # an AttributeError would lose its message in `from package import name`
            raise ImportError(f"{package}.{name} moved to {gone[name]} of the repository: copy it from there")
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(sorted(files))}")
        return getattr(import_module(files[name]), name)

    return getattribute
