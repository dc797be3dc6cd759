"""`hf-longtrunc lm-eval`: EleutherAI's lm-evaluation-harness on a model, unmodified and patched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common


def lm_eval(
    tasks: Annotated[list[str], Argument(help="Names of lm-evaluation-harness' tasks.")],
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    limit: Annotated[int | None, Option(min=1, help="Only so many samples a task.")] = None,
    lengths: Annotated[str | None, Option(help="RULER's prompt lengths in tokens, e.g. 4096,8192.")] = None,
    max_length: Annotated[int | None, Option(min=1, help="Refuse longer prompts.")] = None,
    batch_size: Annotated[int, Option(min=1, help="Prompts at a time.")] = 1,
    lm_infinite: common.WithLMInfinite = False,
    window: common.Window = None,
    sinks: common.Sinks = 16,
    output_dir: Annotated[Path, Option(help="For lm_eval.jsonl, from which a run resumes.")] = Path("lm_eval"),
    as_json: common.AsJson = False,
) -> None:
    """lm-evaluation-harness on a model, unmodified and patched; a prompt that does not fit is an error, never cut."""
    common.check_outputs(output_dir, force=False)
    sizes = None if lengths is None else _lengths(lengths)
    from hf_longtrunc.evaluation.harness import harness_table, run_harness

    records = run_harness(
        *common.load(model, dtype, device),
        tasks,
        common.arms(lm_infinite, window, sinks),
        limit=limit,
        lengths=sizes,
        max_length=max_length,
        batch_size=batch_size,
        path=output_dir / "lm_eval.jsonl",
    )
    if as_json:
        common.print_json([vars(record) for record in records])
    else:
        common.results().print(harness_table(records))


def _lengths(text: str) -> list[int]:
    lengths = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(lengths) < 1:
        raise typer.BadParameter(
            f"expected whole numbers of at least 1 with commas between, got {text!r}", param_hint="--lengths"
        )
    return lengths
