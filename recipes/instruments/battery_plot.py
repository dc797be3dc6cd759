"""The plot of recipes/sampler_battery.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

PANELS = {
    "loss less the author's": "nats; 0 is the author's",
    "distinct 3-grams": "the nearer to the line, the better",
    "4-grams said before": "the nearer to the line, the better",
    "frontier": "the farther right, the better",
}


def plot_battery(written: Sequence[Any]) -> Figure:
    """Draw records of samplers: a panel per figure, a row per sampler, a colour per temperature, the author in grey."""
    names = [name for name in dict.fromkeys(record.sampler for record in written) if name != "human"]
    temperatures = sorted({record.temperature for record in written})
    figure, axes = plt.subplots(
        1, len(PANELS), sharey=True, figsize=(11, 0.42 * len(names) + 1.6), layout="constrained"
    )
    for (panel, said), each in zip(PANELS.items(), axes, strict=True):
        for record in written:
            value, half = record.figures[panel]
            if record.sampler == "human":
                each.axvline(value, color="0.4", linewidth=1)
                each.axvspan(value - half, value + half, color="0.4", alpha=0.12, linewidth=0)
                continue
            nth = temperatures.index(record.temperature)
            place = names.index(record.sampler) + 0.22 * (nth - (len(temperatures) - 1) / 2)
            each.errorbar(value, place, xerr=half, fmt="osD"[nth], color=f"C{nth}", markersize=4, linewidth=1)
        each.set_xlabel(f"{panel}\n{said}")
        each.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    marks = [
        Line2D([], [], color=f"C{n}", marker="osD"[n], linestyle="", label=f"temperature {t:g}")
        for n, t in enumerate(temperatures)
    ]
    figure.legend(
        handles=[*marks, Line2D([], [], color="0.4", label="the author")],
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    return figure
