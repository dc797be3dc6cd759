"""`hf-longtrunc ppl`: perplexity by position, unmodified and under LM-Infinite."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer reads the annotations when it runs)
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer import Argument, Option

from hf_longtrunc.cli import common

if TYPE_CHECKING:
    from torch import Tensor

    from hf_longtrunc.evaluation.records import Arm

PICTURE, RECORDS = "perplexity.png", "perplexity.jsonl"
_MARGIN = 16  # tokens at the end of a text cut anywhere that might have been others, had it gone on


def ppl(
    file: Annotated[str, Argument(help="A text, or - for standard input.")] = "-",
    model: common.Model = None,
    dtype: common.DType = None,
    device: common.Device = None,
    window: common.Window = None,
    sinks: common.Sinks = 16,
    tokens: Annotated[int, Option(min=2, help="Read so many tokens of the text.")] = 12_288,
    skip: Annotated[int, Option(min=0, help="Leave out so many tokens before them.")] = 0,
    chunk: Annotated[int, Option(min=1, help="Tokens per forward.")] = 512,
    output_dir: Annotated[Path | None, Option(help=f"For {PICTURE}, and {RECORDS}, which is appended to.")] = None,
    force: common.Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Perplexity by position in a text: the unmodified model against LM-Infinite, on the same tokens in one run."""
    common.check_file(file)
    if output_dir is not None:
        common.check_outputs(output_dir, PICTURE, force=force)
    from contextlib import nullcontext

    from hf_longtrunc import LMInfinite, trained_length
    from hf_longtrunc.evaluation import (
        append_records,
        compare_losses,
        default_edges,
        perplexity_records,
        perplexity_table,
        plot_perplexity,
    )

    language_model, tokenizer = common.load(model, dtype, device, needs="a causal LM")
    with common.open_text(file) as stream:
        input_ids = read_tokens(stream, tokenizer, skip + tokens)[skip:]
    if len(input_ids) < 2:
        raise typer.BadParameter(f"at least 2 tokens are needed, the text has {len(input_ids)}", param_hint="FILE")
    arms: dict[str, Arm] = {
        "unmodified": nullcontext,
        "LM-Infinite": LMInfinite(num_sink_tokens=sinks, window_length=window),
    }
    try:
        trained = trained_length(language_model.config)
        with arms["LM-Infinite"](language_model):
            pass  # a family that it cannot patch is refused before anything is read
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    losses = compare_losses(language_model, input_ids, arms, chunk=chunk, progress=common.is_watched())
    records = perplexity_records(language_model, losses, arms, default_edges(trained, len(input_ids)))
    console = common.results(is_quiet=as_json)
    console.print(perplexity_table(records))
    console.print(f"{len(input_ids):,} tokens; the model was trained on windows of {trained:,}.")
    if output_dir is not None:
        append_records(output_dir / RECORDS, records)
        common.save_picture(plot_perplexity(losses, trained_window=trained), output_dir / PICTURE)
    if as_json:
        common.print_json([vars(record) for record in records])


def read_tokens(stream: TextIO, tokenizer: Any, limit: int) -> Tensor:
    """Return the first `limit` token ids of a text, reading no more of it than they need: it may have no end."""
    import torch

    text, ids = "", list[int]()
    while len(ids) < limit + _MARGIN and (more := stream.read(8 * (limit + _MARGIN - len(ids)))):
        text += more
        ids = tokenizer(text, verbose=False).input_ids
    return torch.tensor(ids[:limit])
