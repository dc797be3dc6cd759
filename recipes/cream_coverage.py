"""Which relative distances of the long window training meets: CREAM, the draw of its official code, and PoSE.

    python recipes/cream_coverage.py --documents 3000

Every document is as long as the trained window N and is given positions for a window of f N. A distance is met if it
occurs between two tokens of some document; all pairs are counted.

Cost: a few seconds. Expect: everything is met at (4096, 8) and (8192, 4); at (4096, 64) the official draw meets 72 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_longtrunc import CreamPositions, pose_positions
from hf_longtrunc.evaluation import append_records
from hf_longtrunc.positions.cream import distances_seen

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
) -> None:
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


if __name__ == "__main__":
    typer.run(main)
