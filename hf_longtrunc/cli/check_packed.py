"""`hf-longtrunc check-packed`: do documents packed in one row see each other in this model, and in which calls."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads it)
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common


def check_packed(
    model: Annotated[str | None, Argument(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    dtype: common.DType = None,
    device: common.Device = None,
    rows: Annotated[
        Path | None, Option(help="Packed rows: what `pack` or materialize() wrote, jsonl, parquet.")
    ] = None,
    seq_length: Annotated[int, Option(min=32, help="Tokens of a made-up row, where no rows are named.")] = 64,
    as_json: common.AsJson = False,
) -> None:
    """Try every way to hand packed rows to a model, and say in which of them documents stay apart."""
    packed = made_up(seq_length) if rows is None else rows_of(rows)
    from rich.table import Table

    from hf_longtrunc import BestFitPackingCollator, try_packed

    loaded, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    collator = BestFitPackingCollator(max(len(row["input_ids"]) for row in packed), tokenizer, layout="rows")
    batch = collator(packed)
    found = try_packed(loaded, [{name: batch[name][row] for name in batch} for row in range(len(packed))])
    kinds = list(dict.fromkeys(kind for _, kind in found))
    if as_json:
        common.print_json({attention: {kind: found[attention, kind] for kind in kinds} for attention, _ in found})
        return
    table = Table(title=f"documents packed in rows, {type(loaded).__name__}", title_justify="left")
    for heading in ("attention", *kinds):
        table.add_column(heading)
    for attention in dict.fromkeys(attention for attention, _ in found):
        table.add_row(attention, *(found[attention, kind] for kind in kinds))
    common.results().print(table)


def made_up(seq_length: int) -> list[dict[str, Any]]:
    """Return a row of documents of 8, 16 and more tokens."""
    lengths = [8, 16, seq_length - 24]
    positions = [place for length in lengths for place in range(length)]
    return [{"input_ids": [3 + (7 * place) % 40 for place in range(seq_length)], "position_ids": positions}]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the first two rows of a folder or file of packed rows."""
    import datasets

    if not common.is_watched():
        datasets.disable_progress_bars()
    if not path.exists():
        raise typer.BadParameter(f"no such file or folder: {path}", param_hint="--rows")
    if path.is_dir():
        folder = path / "dataset" if (path / "dataset").is_dir() else path  # the first is what `pack` writes
        rows: Any = datasets.load_from_disk(str(folder))
    elif path.suffix in (".jsonl", ".json", ".parquet"):
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (StopIteration, datasets.exceptions.DatasetsError) as error:
            raise typer.BadParameter(f"{path} is empty, or no {kind}: {error}", param_hint="--rows") from error
    else:
        raise typer.BadParameter(f"rows are a folder, jsonl, json or parquet, got {path}", param_hint="--rows")
    if isinstance(rows, dict) or not {"position_ids", "seq_lengths"} & set(rows.column_names):
        raise typer.BadParameter(
            f"{path} holds no packed rows: they have position_ids or seq_lengths next to input_ids", param_hint="--rows"
        )
    return [rows[index] for index in range(min(2, len(rows)))]
