"""Mean scores over prompt length and depth, as a table and as heat maps, with numbers of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_longtrunc.evaluation import wilson_interval
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.extras import import_pyplot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from rich.table import Table


def score_table(records: Sequence[Any], names: Sequence[str], *, title: str) -> Table:
    """Lay mean scores out as a rich table: a row per value of the fields `names` and length, a column per depth.

    A row's mean is followed by its 95 % interval, see `wilson_interval`, and its prompts: "5 x 4" are five cells of
    four. Where the cells of a row hold different numbers, each has its own in brackets.
    """
    depths = sorted({record.depth for record in records})
    table = new_table(*names, "tokens", title=title)
    for column in [*(f"{depth:.0%}" for depth in depths), "mean", "95 %", "prompts"]:
        table.add_column(column, justify="right", no_wrap=True)
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for record in records:
        rows.setdefault((*(getattr(record, name) for name in names), record.length), []).append(record)
    for (*row, length), inside in rows.items():
        cells = [[record for record in inside if record.depth == depth] for depth in depths]
        is_even = len({len(cell) for cell in cells}) == 1
        means = [f"{mean_score(cell):.2f}" + ("" if is_even else f" ({len(cell)})") if cell else "" for cell in cells]
        low, high = wilson_interval(mean_score(inside), len(inside))
        count = f"{len(cells)} x {len(cells[0])}" if is_even else str(len(inside))
        table.add_row(*row, f"{length:,}", *means, f"{mean_score(inside):.2f}", f"{low:.2f}-{high:.2f}", count)
    return table


def plot_scores(records: Sequence[Any], across: str, down: Sequence[str], *, inside: str = "depth") -> list[Axes]:
    """Draw heat maps of mean scores over prompt length and depth, row by row; a cell says of how many prompts.

    A column of maps per value of the field `across`, a row of maps per value of the fields `down`, and in each map a
    row per value of the field `inside`, depth unless it is named.
    """
    plt = import_pyplot("a picture")
    groups: dict[tuple[Any, ...], dict[Any, list[Any]]] = {}
    for record in records:
        row = groups.setdefault(tuple(getattr(record, name) for name in down), {})
        row.setdefault(getattr(record, across), []).append(record)
    columns = list(dict.fromkeys(getattr(record, across) for record in records))
    lengths = sorted({record.length for record in records})
    rows = list(dict.fromkeys(getattr(record, inside) for record in records))
    rows = sorted(rows) if inside == "depth" else rows
    size = (1.5 + len(columns) * max(2.2, 1 + 0.6 * len(lengths)), 0.5 + len(groups) * (1.2 + 0.4 * len(rows)))
    _, grid = plt.subplots(
        len(groups), len(columns), sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for row, (names, by_column) in zip(grid, groups.items(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            _heat_map(axes, by_column.get(column, []), lengths, rows, inside)
            axes.set_title("\n".join([str(column), *names]), fontsize=9)
        row[0].set_ylabel("kind of question" if inside == "battery" else inside)
    for axes in grid[-1]:
        axes.set_xlabel("prompt (tokens)")
    return [axes for row in grid for axes in row]


def mean_score(records: Sequence[Any]) -> float:
    """Return the mean score, NaN where there are no records."""
    return sum(record.score for record in records) / len(records) if records else float("nan")


def _heat_map(axes: Axes, records: Sequence[Any], lengths: Sequence[int], rows: Sequence[Any], field: str) -> None:
    cells: dict[tuple[int, int], list[Any]] = {(x, y): [] for x in range(len(lengths)) for y in range(len(rows))}
    for record in records:
        cells[lengths.index(record.length), rows.index(getattr(record, field))].append(record)
    means = [[mean_score(cells[x, y]) for x in range(len(lengths))] for y in range(len(rows))]
    axes.imshow(means, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (x, y), inside in cells.items():
        if inside:
            color = "white" if means[y][x] < 0.5 else "black"
            words = f"{means[y][x]:.2f}\nn = {len(inside)}"
            axes.text(x, y, words, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(rows)), [f"{row:.0%}" if field == "depth" else str(row) for row in rows])
