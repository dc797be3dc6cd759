"""Commands of the evaluation room: functions that the command line registers."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import typer
from rich.console import Console

from hf_longtrunc import LMInfinite, load_pretrained, trained_length
from hf_longtrunc.evaluation.perplexity import (
    compare_losses,
    default_edges,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
)
from hf_longtrunc.evaluation.records import append_records
from hf_longtrunc.evaluation.texts import python_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longtrunc.evaluation.records import Arm

_MARGIN = 16  # tokens at the end of a text cut anywhere that might have been others, had it gone on


def ppl(
    file: Annotated[typer.FileText, typer.Argument(encoding="utf-8", help="A text, or - for standard input.")] = "-",  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="LM-Infinite's window; the trained one if left out.")
    ] = None,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that stay visible.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Read so many tokens of the text.")] = 12_288,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many tokens before them.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    output_dir: Annotated[Path | None, typer.Option(help="Where perplexity.png and perplexity.jsonl go.")] = None,
) -> None:
    """Perplexity by position in a text: the unmodified model against LM-Infinite, on the same tokens in one run."""
    try:
        language_model, tokenizer = load_pretrained(model)
    except (OSError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(
            f"could not load {model or 'the default model'}: {error}", param_hint="--model"
        ) from error
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
