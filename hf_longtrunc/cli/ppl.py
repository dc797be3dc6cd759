"""`hf-longtrunc ppl`: perplexity by position, unmodified and under LM-Infinite."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from hf_longtrunc.cli.common import (
    AsJson,
    Force,
    Model,
    Sinks,
    Window,
    check_file,
    check_outputs,
    draw_without_a_screen,
    is_watched,
    load,
    open_text,
    print_json,
    results,
    save_picture,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from hf_longtrunc import LMInfinite
    from hf_longtrunc.evaluation import PerplexityRecord
    from hf_longtrunc.evaluation.records import Arm

PICTURE, RECORDS = "perplexity.png", "perplexity.jsonl"
_MARGIN = 16  # tokens at the end of a text cut anywhere that might have been others, had it gone on


def ppl(
    file: Annotated[str, typer.Argument(help="A text, or - for standard input.")] = "-",
    model: Model = None,
    window: Window = None,
    sinks: Sinks = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Read so many tokens of the text.")] = 12_288,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many tokens before them.")] = 0,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    output_dir: Annotated[
        Path | None, typer.Option(help=f"Where {PICTURE} goes, and {RECORDS}, which is appended to.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity by position in a text: the unmodified model against LM-Infinite, on the same tokens in one run."""
    check_file(file)
    if output_dir is not None:
        check_outputs(output_dir, PICTURE, force=force)
    from hf_longtrunc import LMInfinite, trained_length

    language_model, tokenizer = load(model, needs="a causal LM")
    with open_text(file) as stream:
        input_ids = read_tokens(stream, tokenizer, skip + tokens)[skip:]
    if len(input_ids) < 2:
        raise typer.BadParameter(f"at least 2 tokens are needed, the text has {len(input_ids)}", param_hint="FILE")
    arm = LMInfinite(num_sink_tokens=sinks, window_length=window)
    try:
        with arm(language_model):
            trained_length(language_model.config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    records = compare(language_model, input_ids, arm, chunk=chunk, folder=output_dir, console=results(is_quiet=as_json))
    if as_json:
        print_json([vars(record) for record in records])


def compare(
    model: Any,
    input_ids: Tensor,
    arm: LMInfinite,
    *,
    chunk: int = 512,
    folder: Path | None = None,
    console: Console,
) -> list[PerplexityRecord]:
    """Read the tokens unmodified and under `arm`, print the table, and write picture and records to `folder`."""
    from contextlib import nullcontext

    from hf_longtrunc import trained_length
    from hf_longtrunc.evaluation import (
        append_records,
        compare_losses,
        default_edges,
        perplexity_records,
        perplexity_table,
        plot_perplexity,
    )

    window = trained_length(model.config)
    arms: dict[str, Arm] = {"unmodified": nullcontext, "LM-Infinite": arm}
    losses = compare_losses(model, input_ids, arms, chunk=chunk, progress=is_watched())
    records = perplexity_records(model, losses, arms, default_edges(window, len(input_ids)))
    console.print(perplexity_table(records))
    console.print(f"{len(input_ids):,} tokens; the model was trained on windows of {window:,}.")
    if folder is not None:
        append_records(folder / RECORDS, records)
        draw_without_a_screen()
        figure: Any = plot_perplexity(losses, trained_window=window).figure
        save_picture(figure, folder / PICTURE)
    return records


def read_tokens(stream: TextIO, tokenizer: Any, limit: int) -> Tensor:
    """Return the first `limit` token ids of a text, reading no more of it than they need: it may have no end."""
    import torch

    text, ids = "", list[int]()
    while len(ids) < limit + _MARGIN and (more := stream.read(8 * (limit + _MARGIN - len(ids)))):
        text += more
        ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:limit])
