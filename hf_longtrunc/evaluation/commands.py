"""Commands of the evaluation room: functions that the command line registers."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import typer
from rich.console import Console

from hf_longtrunc import LMInfinite, load_pretrained
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
    file: Annotated[str, typer.Argument(help="A text file, or - for standard input.")] = "-",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    window: Annotated[int | None, typer.Option(help="LM-Infinite's window; the trained one if left out.")] = None,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Read so many tokens of the text.")] = 12_288,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many tokens before them.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Folder for perplexity.png and perplexity.jsonl.")] = None,
) -> None:
    """Perplexity by position in a text, the unmodified model against LM-Infinite, on the same tokens in one run."""
    language_model, tokenizer = load_pretrained(model)
    with sys.stdin if file == "-" else open(file, encoding="utf-8") as stream:
        input_ids = _read_tokens(stream, tokenizer, skip + tokens)[skip:]
    arms: dict[str, Arm] = {
        "unmodified": nullcontext,
        "LM-Infinite": LMInfinite(num_sink_tokens=sinks, window_length=window),
    }
    _compare(Console(), language_model, input_ids, arms, chunk=chunk, out=out)


def past_the_window(
    console: Console, model: Any, tokenizer: Any, *, text: str | None = None, tokens: int = 10_240
) -> None:
    """Show what happens past the trained window, unmodified and under LM-Infinite: the demo's part.

    The text is Python's own language reference unless one is given. Cost: two readings of `tokens` tokens; with the
    default model a few minutes on two cores.
    """
    stream = python_reference() if text is None else text
    input_ids = torch.tensor(tokenizer(stream[: tokens * 16], verbose=False).input_ids[:tokens])
    _compare(console, model, input_ids, {"unmodified": nullcontext, "LM-Infinite": LMInfinite()})


def _compare(
    console: Console, model: Any, input_ids: Tensor, arms: dict[str, Arm], *, chunk: int = 512, out: Path | None = None
) -> None:
    if len(input_ids) < 2:
        raise typer.BadParameter(f"the text holds {len(input_ids)} tokens, at least 2 are needed")
    window = model.config.get_text_config().max_position_embeddings
    losses = compare_losses(model, input_ids, arms, chunk=chunk, progress=True)
    records = perplexity_records(model, losses, arms, default_edges(window, len(input_ids)))
    console.print(perplexity_table(records))
    console.print(f"{len(input_ids):,} tokens; the model was trained on windows of {window:,}.")
    if out is not None:
        append_records(out / "perplexity.jsonl", records)
        plot_perplexity(losses, trained_window=window).figure.canvas.print_figure(out / "perplexity.png", dpi=150)
        console.print(f"Wrote {out / 'perplexity.jsonl'} and {out / 'perplexity.png'}")


def _read_tokens(stream: TextIO, tokenizer: Any, limit: int) -> Tensor:
    """Return the first `limit` token ids of a text, reading no more of it than they need: it may have no end."""
    text, ids = "", list[int]()
    while len(ids) < limit + _MARGIN and (more := stream.read(8 * (limit + _MARGIN - len(ids)))):
        text += more
        ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:limit])
