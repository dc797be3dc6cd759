"""Empty tables and axes, and the errors that say what to install for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.extras import import_pyplot, missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


def new_table(*headings: str, title: str) -> Table:
    """Return a rich table without rows."""
    try:
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise missing("a table", "rich", "eval") from error
    return Table(*headings, title=title)


def new_axes(width: float, height: float) -> Axes:
    """Return matplotlib Axes of their own figure, in inches, open at the top and on the right."""
    axes: Axes
    _, axes = import_pyplot("a picture").subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
