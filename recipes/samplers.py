"""Truncation samplers side by side: on a human text, and after a repeated phrase.

    python recipes/samplers.py --text some_novel.txt --tokens 1000 --out samplers
    python recipes/samplers.py --text some_novel.txt --new-tokens 512 --seeds 0,1,2 --out samplers

The first part measures, at each token of the text, whether a sampler keeps the author's token, and how much probability
it keeps; the second continues a phrase that is repeated five times. An interrupted run continues: records are appended
to OUT/truncation.jsonl and OUT/repetition.jsonl.

Cost: with SmolLM2-135M-Instruct on one CPU core some 30 s for 300 tokens of text and 12 samplers, and some 20 s for a
continuation of 128 tokens.
Expect: the picture joins each sampler's parameters, so the remaining entropy can be compared at equal total
variation. On 300 tokens of Moby Dick the four lie close together; eta leaves a little less than the others there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hf_longtrunc import EpsilonLogitsProcessor, EtaLogitsProcessor, load_pretrained
from instruments.truncation import (
    plot_repetition,
    plot_truncation,
    repetition_table,
    run_repetition,
    truncation_scores,
    truncation_table,
)

PHRASES = ["The capital of France is Paris.", "He opened the door and went down the stairs.", "and so on"]
SAMPLERS: dict[str, list[Any]] = {
    **{f"eta {value:g}": [EtaLogitsProcessor(value)] for value in (3e-4, 2e-3, 1e-2)},
    **{f"epsilon {value:g}": [EpsilonLogitsProcessor(value)] for value in (3e-4, 9e-4, 3e-3)},
    **{f"top-p {value:g}": [TopPLogitsWarper(value)] for value in (0.99, 0.95, 0.89)},
    **{f"top-k {value}": [TopKLogitsWarper(value)] for value in (500, 200, 50)},
}
DRAWN = ("eta 0.002", "epsilon 0.0009", "top-p 0.95", "top-k 50")


def main(
    text: Annotated[Path, typer.Option(help="A human text.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are read.")] = 500,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation.")] = 128,
    seeds: Annotated[str, typer.Option(help="Of the continuations.")] = "0",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records and pictures.")] = Path("samplers"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids[:tokens])
    scores = truncation_scores(language_model, ids, SAMPLERS, path=out / "truncation.jsonl", progress=True)
    console = Console()
    console.print(truncation_table(scores))
    plot_truncation(scores).figure.canvas.print_figure(out / "truncation.png", dpi=130)
    draws = {"plain": [], **{name: SAMPLERS[name] for name in DRAWN}}
    settings: dict[str, Any] = {"seeds": [int(seed) for seed in seeds.split(",")], "max_new_tokens": new_tokens}
    records = run_repetition(
        language_model, tokenizer, PHRASES, draws, **settings, path=out / "repetition.jsonl", progress=True
    )
    console.print(repetition_table(records))
    plot_repetition(records).figure.canvas.print_figure(out / "repetition.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
