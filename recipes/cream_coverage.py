"""Which relative distances of the long window training meets: CREAM, the draw of its official code, and PoSE.

    python recipes/cream_coverage.py --documents 3000
    python recipes/cream_coverage.py --picture cream.png

Every document is as long as the trained window N and is given positions for a window of f N. A distance is met if it
occurs between two tokens of some document; all pairs are counted.

Cost: a few seconds. Expect: everything is met at (4096, 8) and (8192, 4); at (4096, 64) the official draw meets 72 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hf_longtrunc import CreamPositions, contiguous_positions, pose_positions
from hf_longtrunc.evaluation import append_records
from instruments.distances import distances_seen

SIZES = (4096, 8), (8192, 4), (4096, 64)
SCHEMES: dict[str, Any] = {
    "CREAM": CreamPositions(),
    "CREAM, official draw": CreamPositions.official(),
    "PoSE": pose_positions,
}


@dataclass(frozen=True)
class Coverage:
    """Share of the distances 0 to f N - 1 that a scheme meets."""

    window: int
    factor: int
    scheme: str
    documents: int
    met: float


def main(
    documents: Annotated[int, typer.Option(help="Drawn for every scheme.")] = 3000,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for coverage.jsonl.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw 1,000 documents for a window of 8 x 4,096 there.")] = None,
) -> None:
    if picture is not None:
        draw(picture, *SIZES[0], 1000, seed)
        return
    table = Table("N", "f", *SCHEMES, title=f"relative distances met in {documents:,} documents")
    for window, factor in SIZES:
        records = []
        for name, scheme in SCHEMES.items():
            seen = distances_seen(scheme, window, window, factor, documents, seed)
            records.append(Coverage(window, factor, name, documents, float((seen > 0).mean())))
        if out is not None:
            append_records(out / "coverage.jsonl", records)
        table.add_row(f"{window:,}", str(factor), *(f"{record.met:.2%}" for record in records))
    Console().print(table)


def draw(path: Path, window: int, factor: int, draws: int, seed: int) -> None:
    """Draw one column a scheme: the ids of some documents, and in how many documents each distance occurs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    schemes: dict[str, Any] = {"CREAM": CreamPositions(), "PoSE": pose_positions, "contiguous": contiguous_positions}
    figure, panels = plt.subplots(2, 3, sharex=True, sharey="row", figsize=(12, 6), layout="constrained")
    generator, documents = np.random.default_rng(0), 40
    least = factor * window // 400  # a run of a few tokens is drawn as a dot
    for column, (name, scheme) in enumerate(schemes.items()):
        seen = distances_seen(scheme, window, window, factor, draws, seed)
        for document in range(documents):
            ids = scheme(window, window, factor, generator)
            runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
            begins, ends = [run[0] - least for run in runs], [run[-1] + least for run in runs]
            panels[0, column].hlines([document] * len(runs), begins, ends, linewidth=2.5)
        panels[0, column].set(xlabel="position id")
        panels[0, column].set_title(name, loc="left")
        panels[0, column].tick_params(labelbottom=True)
        panels[1, column].fill_between(range(factor * window), seen / draws, step="mid", linewidth=0)
        panels[1, column].axvline(window, color="0.5", linestyle=":")
        panels[1, column].set_title(f"{(seen > 0).mean():.2%} of the distances met", loc="left", fontsize="medium")
        panels[1, column].set_xlabel("distance between two tokens")
    panels[0, 0].set_ylabel("document")
    panels[1, 0].set(ylabel="part of documents with\nthis distance", yscale="log", ylim=(0.5 / draws, 1.5))
    panels[1, 0].set_xlim(-2 * least, factor * window + 2 * least)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    typer.run(main)
