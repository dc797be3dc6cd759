"""Mean scores over prompt length and depth, as a table and as heat maps."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from rich.table import Table


def score_table(records: Sequence[Any], names: Sequence[str], *, title: str) -> Table:
    """Lay mean scores out as a rich table: a row per value of the fields `names` and length, a column per depth."""
    depths = sorted({record.depth for record in records})
    table = new_table(*names, "tokens", title=title)
    for column in [*(f"{depth:.0%}" for depth in depths), "mean", "prompts"]:
        table.add_column(column, justify="right")
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for record in records:
        rows.setdefault((*(getattr(record, name) for name in names), record.length), []).append(record)
    for (*row, length), inside in rows.items():
        cells = [[record for record in inside if record.depth == depth] for depth in depths]
        means = [f"{mean_score(cell):.2f}" if cell else "" for cell in [*cells, inside]]
        table.add_row(*row, f"{length:,}", *means, str(len(inside)))
    return table


def plot_scores(records: Sequence[Any], across: str, down: Sequence[str]) -> list[Axes]:
    """Draw heat maps of mean scores over prompt length and depth, row by row.

    A column of maps per value of the field `across`, a row of maps per value of the fields `down`.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise missing("a picture", "matplotlib", "eval") from error
    groups: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    for record in records:
        row = groups.setdefault(tuple(getattr(record, name) for name in down), {})
        row.setdefault(getattr(record, across), []).append(record)
    columns = list(dict.fromkeys(getattr(record, across) for record in records))
    lengths, depths = (sorted({getattr(record, name) for record in records}) for name in ("length", "depth"))
    size = (1.5 + len(columns) * max(2.2, 1 + 0.6 * len(lengths)), 0.5 + len(groups) * (1.2 + 0.4 * len(depths)))
    _, grid = plt.subplots(
        len(groups), len(columns), sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for row, (names, by_column) in zip(grid, groups.items(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            _heat_map(axes, by_column.get(column, []), lengths, depths)
            axes.set_title("\n".join([str(column), *names]), fontsize=9)
        row[0].set_ylabel("depth")
    for axes in grid[-1]:
        axes.set_xlabel("prompt (tokens)")
    return [axes for row in grid for axes in row]


def mean_score(records: Sequence[Any]) -> float:
    """Return the mean score, NaN where there are no records."""
    return sum(record.score for record in records) / len(records) if records else float("nan")


def _heat_map(axes: Axes, records: Sequence[Any], lengths: Sequence[int], depths: Sequence[float]) -> None:
    cells = [
        [mean_score([r for r in records if (r.length, r.depth) == (length, depth)]) for length in lengths]
        for depth in depths
    ]
    axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (y, row), x in product(enumerate(cells), range(len(lengths))):
        if not math.isnan(row[x]):  # something was asked there
            color = "white" if abs(row[x] - 0.5) > 0.35 else "black"  # both ends of the scale are dark
            axes.text(x, y, f"{row[x]:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
