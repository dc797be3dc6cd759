"""`hf-longtrunc scrolls`: SCROLLS' official scores of a model, unmodified and patched."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from hf_longtrunc.cli import common
from hf_longtrunc.evaluation.scrolls_metrics import METRICS

if TYPE_CHECKING:
    from hf_longtrunc.evaluation.records import Arm
    from hf_longtrunc.evaluation.scrolls import ScrollsRecord

Task = Enum("Task", {name: name for name in METRICS}, type=str)  # type: ignore[misc]


def scrolls(
    task: Annotated[Task, Argument(help="One of the seven tasks.")],
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    data: Annotated[Path | None, Option(help="Folder, zip or JSON lines; the hub's if left out.")] = None,
    split: Annotated[str, Option(help="Split to read; the test split's outputs are private.")] = "validation",
    limit: Annotated[int | None, Option(min=1, help="Only the first so many examples.")] = None,
    max_tokens: Annotated[int | None, Option(min=1, help="Cut the end of longer documents.")] = None,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Tokens of a prediction; the task's number if left out.")
    ] = None,
    lm_infinite: common.WithLMInfinite = False,
    window: common.Window = None,
    sinks: common.Sinks = 16,
    unlimiformer: Annotated[bool, Option("--unlimiformer", help="Run Unlimiformer too, on the whole text.")] = False,
    output_dir: Annotated[Path, Option(help="For all results; a run resumes from its records.")] = Path("scrolls"),
    force: common.Force = False,
    as_json: common.AsJson = False,
) -> None:
    """SCROLLS' official scores of a model, unmodified and patched, on the same examples in one run."""
    name = str(task.value)
    written = {
        (arm, what): f"{name}_{arm}_{what}.json"
        for arm, is_wanted in (("unmodified", True), ("lm-infinite", lm_infinite), ("unlimiformer", unlimiformer))
        if is_wanted
        for what in ("predictions", "metrics")
    }
    common.check_outputs(output_dir, *written.values(), f"{name}.png", force=force)
    from hf_longtrunc import Unlimiformer
    from hf_longtrunc.evaluation.scrolls import Rows, evaluate, plot_scrolls, predictions, run, scrolls_table
    from hf_longtrunc.saving import replacing

    rows = Rows(name, data, split=split, limit=limit)
    try:
        examples = sum(1 for _ in rows)  # a broken line is found before the work
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{rows.file} is no UTF-8 text: {error.reason}", param_hint="--data") from error
    if not examples:
        raise typer.BadParameter(f"{rows.file} holds no example", param_hint="--data")
    arms = common.arms(lm_infinite, window, sinks)
    whole: dict[str, Arm] = {"unlimiformer": Unlimiformer()} if unlimiformer else {}
    asked = *common.load(model, dtype, device), name, rows
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "path": output_dir / f"{name}.jsonl"}
    records = run(*asked, arms, max_tokens=max_tokens, **options, progress=common.is_watched())
    records += run(*asked, whole, **options, progress=common.is_watched())
    scores = {arm: evaluate(name, predictions(records, arm), rows) for arm in (*arms, *whole)}
    for (arm, what), file in written.items():
        content = scores[arm] if what == "metrics" else predictions(records, arm)
        with replacing(output_dir / file) as partial:
            partial.write_text(json.dumps(content, indent=4), encoding="utf-8")
    common.save_picture(plot_scrolls(scores), output_dir / f"{name}.png")
    common.notes().print(f"records, predictions, metrics: [bold]{escape(str(output_dir / name))}*[/bold]")
    if as_json:
        common.print_json(scores)
    else:
        common.results().print(scrolls_table(scores))
        common.results().print(_lengths(records))


def _lengths(records: list[ScrollsRecord]) -> str:
    cut = sum(record.cut_tokens > 0 for record in records)
    longest = max(record.prompt_tokens for record in records)
    return f"{cut} of {len(records)} prompts were cut; the longest read had {longest:,} tokens."
