"""Empty tables and axes, and the errors that say what to install for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_longtrunc.extras import import_extra, import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table


def new_table(*headings: str, title: str) -> Table:
    """Return a rich table without rows."""
    table: Table = import_extra("rich.table", "a table", "eval").Table(*headings, title=title)
    return table


def new_axes(width: float, height: float) -> Axes:
    """Return matplotlib Axes of their own figure, in inches, open at the top and on the right."""
    axes: Axes
    _, axes = import_pyplot("a picture").subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
