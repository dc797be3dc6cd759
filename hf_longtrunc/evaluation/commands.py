"""Commands of the evaluation room: functions that the command line registers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import typer
from rich.console import Console

from hf_longtrunc import LMInfinite, Unlimiformer, load_pretrained, trained_length
from hf_longtrunc.evaluation.perplexity import (
    compare_losses,
    default_edges,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
)
from hf_longtrunc.evaluation.records import append_records
from hf_longtrunc.evaluation.scrolls import (
    METRICS,
    Rows,
    ScrollsRecord,
    evaluate,
    plot_scrolls,
    predictions,
    run,
    scrolls_table,
)
from hf_longtrunc.evaluation.texts import python_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longtrunc.evaluation.records import Arm

Model = Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")]
Window = Annotated[int | None, typer.Option(min=1, help="LM-Infinite's window; the trained one if left out.")]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens that stay visible.")]
WithLMInfinite = Annotated[bool, typer.Option("--lm-infinite", help="Run LM-Infinite too, side by side.")]

_MARGIN = 16  # tokens at the end of a text cut anywhere that might have been others, had it gone on


def ppl(
    file: Annotated[typer.FileText, typer.Argument(encoding="utf-8", help="A text, or - for standard input.")] = "-",  # type: ignore[assignment]
    model: Model = None,
    window: Window = None,
    sinks: Sinks = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Read so many tokens of the text.")] = 12_288,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many tokens before them.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    output_dir: Annotated[Path | None, typer.Option(help="Where perplexity.png and perplexity.jsonl go.")] = None,
) -> None:
    """Perplexity by position in a text: the unmodified model against LM-Infinite, on the same tokens in one run."""
    language_model, tokenizer = _load(model)
    input_ids = _read_tokens(file, tokenizer, skip + tokens)[skip:]
    if len(input_ids) < 2:
        raise typer.BadParameter(f"at least 2 tokens are needed, the text has {len(input_ids)}", param_hint="FILE")
    arm = LMInfinite(num_sink_tokens=sinks, window_length=window)
    try:
        with arm(language_model):
            trained_length(language_model.config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    _compare(language_model, input_ids, arm, chunk=chunk, folder=output_dir, console=Console())


def scrolls(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(METRICS)}.")],
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder, zip or JSON-lines file; fetched from the hub if left out.")
    ] = None,
    split: Annotated[str, typer.Option(help="The test split's outputs are private.")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut the end of longer documents; the whole text if left out.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a prediction; the task's own number if left out.")
    ] = None,
    lm_infinite: WithLMInfinite = False,
    window: Window = None,
    sinks: Sinks = 16,
    unlimiformer: Annotated[
        bool, typer.Option("--unlimiformer", help="Run Unlimiformer too, on the whole text whatever --max-tokens says.")
    ] = False,
    output_dir: Annotated[Path, typer.Option(help="Records, predictions, metrics and picture.")] = Path("scrolls"),
) -> None:
    """SCROLLS' official scores of a model, unmodified and patched, on the same examples in one run."""
    arms = _arms(lm_infinite, window, sinks)
    whole: dict[str, Arm] = {"unlimiformer": Unlimiformer()} if unlimiformer else {}
    try:
        rows = Rows(task, data, split=split, limit=limit)
        language_model, tokenizer = _load(model)
        asked = language_model, tokenizer, task, rows
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "path": output_dir / f"{task}.jsonl"}
        records = run(*asked, arms, max_tokens=max_tokens, **options, progress=True)
        records += run(*asked, whole, **options, progress=True)
        results = {arm: evaluate(task, predictions(records, arm), rows) for arm in (*arms, *whole)}
    except (OSError, ModuleNotFoundError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    _report_scrolls(task, records, results, output_dir, Console())


def lm_eval(
    tasks: Annotated[list[str], typer.Argument(help="Names of lm-evaluation-harness' tasks.")],
    model: Model = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples a task.")] = None,
    lengths: Annotated[str | None, typer.Option(help="RULER's prompt lengths in tokens, e.g. 4096,8192.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Refuse longer prompts; unmodified: the trained window if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    lm_infinite: WithLMInfinite = False,
    window: Window = None,
    sinks: Sinks = 16,
    output_dir: Annotated[Path, typer.Option(help="Where lm_eval.jsonl goes.")] = Path("lm_eval"),
) -> None:
    """lm-evaluation-harness on a model, unmodified and patched; a prompt that does not fit is an error, never cut."""
    try:
        from hf_longtrunc.evaluation.harness import harness_table, run_harness

        sizes = [int(length) for length in lengths.split(",")] if lengths else None
        settings = {"limit": limit, "lengths": sizes, "max_length": max_length, "batch_size": batch_size}
        arms = _arms(lm_infinite, window, sinks)
        records = run_harness(*_load(model), tasks, arms, **settings, path=output_dir / "lm_eval.jsonl")  # type: ignore[arg-type]
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(harness_table(records))


def _arms(lm_infinite: bool, window: int | None, sinks: int) -> dict[str, Arm]:
    """Return the arms that a command compares: the unmodified model and each patch that was asked for."""
    arms: dict[str, Arm] = {"unmodified": nullcontext}
    if lm_infinite:
        arms["lm-infinite"] = LMInfinite(num_sink_tokens=sinks, window_length=window)
    return arms


def _report_scrolls(
    task: str, records: list[ScrollsRecord], results: dict[str, dict[str, Any]], folder: Path, console: Console
) -> None:
    for arm, result in results.items():
        for what, content in {"predictions": predictions(records, arm), "metrics": result}.items():
            (folder / f"{task}_{arm}_{what}.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
    console.print(scrolls_table(results))
    cut = sum(record.cut_tokens > 0 for record in records)
    longest = max(record.prompt_tokens for record in records)
    console.print(f"{cut} of {len(records)} prompts were cut; the longest read had {longest:,} tokens.")
    plot_scrolls(results).figure.canvas.print_figure(folder / f"{task}.png", dpi=150)
    console.print(f"records, predictions, metrics, picture: [bold]{folder / task}*[/bold]", highlight=False)


def past_the_window(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    text: str | None = None,
    tokens: int = 12_288,
    console: Console,
) -> None:
    """Read a text to half as far again as the model's window, unmodified and under LM-Infinite: the demo's part.

    The text is Python's own language reference unless one is given; the picture and the records go to `folder`. Cost:
    two readings of `tokens` tokens.
    """
    console.rule("LM-Infinite: reading past the trained window")
    source = python_reference() if text is None else text
    input_ids = _read_tokens(StringIO(source), tokenizer, tokens)
    _compare(model, input_ids, LMInfinite(), folder=folder, console=console)


def _load(model: str | None) -> tuple[Any, Any]:
    try:
        return load_pretrained(model)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(
            f"could not load {model or 'the default model'}: {error}", param_hint="--model"
        ) from error


def _compare(
    model: Any, input_ids: Tensor, arm: LMInfinite, *, chunk: int = 512, folder: Path | None, console: Console
) -> None:
    window = trained_length(model.config)
    arms: dict[str, Arm] = {"unmodified": nullcontext, "LM-Infinite": arm}
    losses = compare_losses(model, input_ids, arms, chunk=chunk, progress=True)
    records = perplexity_records(model, losses, arms, default_edges(window, len(input_ids)))
    console.print(perplexity_table(records))
    console.print(f"{len(input_ids):,} tokens; the model was trained on windows of {window:,}.")
    if folder is not None:
        append_records(folder / "perplexity.jsonl", records)
        plot_perplexity(losses, trained_window=window).figure.canvas.print_figure(folder / "perplexity.png", dpi=150)
        console.print(f"picture: [bold]{folder / 'perplexity.png'}[/bold]")


def _read_tokens(stream: TextIO, tokenizer: Any, limit: int) -> Tensor:
    """Return the first `limit` token ids of a text, reading no more of it than they need: it may have no end."""
    text, ids = "", list[int]()
    while len(ids) < limit + _MARGIN and (more := stream.read(8 * (limit + _MARGIN - len(ids)))):
        text += more
        ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:limit])
