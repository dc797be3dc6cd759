"""Retrieval by prompt length and depth, unmodified and under LM-Infinite: needles, variables and key-value pairs.

    python recipes/retrieval.py --lengths 500,1000,2000 --out retrieval
    python recipes/retrieval.py --text some_novel.txt --lengths 2000,7000,12000 --out retrieval

Five batteries: one needle, one of four needles, two needles of two numbers each, variables that point to variables, and
a dictionary of uuids. With --variants the one of four needles also with the question first and as a second turn, and
with --chat all needles in the model's chat template. With --text, perplexity of the last 512 tokens before each length
is printed too. The easier passkey is recipes/passkey.py. An interrupted run continues: records are appended to
OUT/retrieval.jsonl.

Cost: five times that of recipes/passkey.py. Expect: the unmodified model finds a single needle and a pair of the
dictionary in a short prompt; several needles at once in part; a model of this size follows no variables.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.evaluation import PerplexityRecord, compare_losses, perplexity_records, perplexity_table
from instruments.retrieval import (
    KeyValuePrompts,
    NeedlePrompts,
    VariablePrompts,
    plot_retrieval,
    retrieval_table,
    retrieval_tasks,
    run_retrieval,
)


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "500,1000",
    depths: Annotated[str, typer.Option(help="Depths in [0, 1].")] = "0,0.5,1",
    prompts: Annotated[int, typer.Option(help="Prompts per cell.")] = 2,
    text: Annotated[
        Path | None, typer.Option(help="A text to take the filler from; left out: repeated filler.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    window: Annotated[int | None, typer.Option(help="LM-Infinite's window; the trained one if left out.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Needles in the tokenizer's chat template.")] = False,
    variants: Annotated[bool, typer.Option("--variants", help="Also the question first, and a second turn.")] = False,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 16,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for retrieval.jsonl and retrieval.png.")] = Path("retrieval"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    arms: dict[str, Any] = {
        "unmodified": nullcontext,
        "LM-Infinite": LMInfinite(num_sink_tokens=sinks, window_length=window),
    }
    filler = None if text is None else text.read_text(encoding="utf-8")
    batteries: list[Any] = [
        NeedlePrompts(tokenizer, filler, chat=chat),
        NeedlePrompts(tokenizer, filler, keys=4, chat=chat),
        NeedlePrompts(tokenizer, filler, keys=2, values=2, queries=2, chat=chat),
        VariablePrompts(tokenizer, filler, hops=2),
        KeyValuePrompts(tokenizer),
    ]
    if variants:
        batteries += [
            NeedlePrompts(tokenizer, filler, keys=4, chat=chat, question_first=True),
            NeedlePrompts(tokenizer, filler, keys=4, chat=chat, second_turn=True),
        ]
    grid = [int(length) for length in lengths.split(",")], [float(depth) for depth in depths.split(",")]
    tasks = retrieval_tasks(*grid, prompts_per_cell=prompts, seed=seed)
    records = run_retrieval(language_model, batteries, tasks, arms, path=out / "retrieval.jsonl", progress=True)
    Console().print(retrieval_table(records))
    plot_retrieval(records)[0].figure.canvas.print_figure(out / "retrieval.png", dpi=130)
    if filler is not None:
        Console().print(perplexity_table(continuation(language_model, tokenizer, filler, arms, grid[0])))


def continuation(
    model: Any, tokenizer: Any, text: str, arms: dict[str, Any], lengths: list[int]
) -> list[PerplexityRecord]:
    """Return each arm's perplexity of the last 512 tokens before each length, from one reading of the text."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: max(lengths)])
    losses = compare_losses(model, ids, arms, progress=True)
    ends = [length - 1 for length in sorted(lengths) if length <= len(ids)]
    return [record for end in ends for record in perplexity_records(model, losses, arms, [max(0, end - 512), end])]


if __name__ == "__main__":
    typer.run(main)
