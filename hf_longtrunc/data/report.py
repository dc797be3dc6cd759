"""A table and a plot that compare a packing plan with concatenating and slicing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.data.packing import Packing
from hf_longtrunc.extras import import_extra, import_pyplot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from rich.table import Table


def packing_table(packing: Packing) -> Table:
    """Return a rich table of `packing.stats()` and of concatenation: rows, cut documents, dropped documents and tokens.

    Examples:
        >>> packing_table(best_fit_decreasing([3, 2, 4], seq_length=5)).columns[1].header
        'best fit'
    """
    _check_plan(packing)
    box = import_extra("rich.box", "a table", "eval")
    from rich.table import Table

    stats = packing.stats()
    documents, ideal = int(stats["documents"]), int(stats["ideal_rows"])
    title = f"{documents:,} documents, {stats['tokens']:,} tokens in rows of {packing.seq_length:,}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "best fit", "concatenation"):
        table.add_column(heading, justify="right" if heading else "left")
    cut, cut_there = int(stats["truncated_documents"]), int(stats["truncated_by_concatenation"])
    table.add_row("rows", f"{stats['rows']:,}", f"{ideal:,}")
    table.add_row("filled", f"{stats['efficiency']:.3%}", f"{stats['tokens'] / ideal / packing.seq_length:.3%}")
    table.add_row("documents cut", f"{cut:,} ({cut / documents:.1%})", f"{cut_there:,} ({cut_there / documents:.1%})")
    table.add_row("pieces in a row", f"{stats['documents_per_row']:.1f}", "")
    table.add_row("documents left out", f"{stats['dropped_documents']:,}", "0")
    table.add_row("tokens left out", f"{stats['dropped_tokens']:,}", "0")
    return table


def plot_packing(packing: Packing, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
    """Plot the fill of the rows, and the lengths of documents that this plan and concatenation cut.

    Args:
        packing: the plan: `PackedDataset.packing`.
        axes: two matplotlib axes to draw into; None makes a figure of two.

    Returns:
        The two axes.

    Examples:
        >>> fills, cuts = plot_packing(best_fit_decreasing([3, 2, 4], seq_length=5))
        >>> cuts.get_xlabel()
        'tokens in the document'
    """
    _check_plan(packing)
    if axes is None:
        axes = import_pyplot("plot_packing").subplots(1, 2, figsize=(11, 4), layout="constrained")[1]
    fills_axes: Any
    cuts_axes: Any
    fills_axes, cuts_axes = axes
    fills = packing.fills() / packing.seq_length
    fills_axes.hist(fills, bins=np.linspace(0, 1, 51), log=True)
    fills_axes.set(xlabel="part of the row that holds tokens", ylabel="rows", xlim=(0, 1))
    fills_axes.set_title(f"rows of {packing.seq_length:,}: {fills.mean():.2%} full", loc="left")
    lengths = packing.document_lengths
    bins = np.geomspace(1, max(2, int(lengths.max()) + 1), 40)
    cuts_axes.hist(lengths, bins=bins, color="0.85", label="documents")
    cuts_axes.hist(lengths[packing.cut_by_concatenation()], bins=bins, histtype="step", label="cut by concatenation")
    cuts_axes.hist(lengths[packing.cut_documents()], bins=bins, histtype="step", label="cut by best fit")
    cuts_axes.axvline(packing.seq_length, color="0.5", linestyle=":", label="length of a row")
    cuts_axes.set(xscale="log", yscale="log", xlabel="tokens in the document", ylabel="documents")
    cuts_axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="small"
    )  # covers nothing
    return fills_axes, cuts_axes


def _check_plan(packing: object) -> None:
    if not isinstance(packing, Packing):
        raise TypeError(f"packing must be a plan, such as PackedDataset.packing, got {type(packing).__name__}")
