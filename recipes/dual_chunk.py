"""Dual chunk attention past the trained window: perplexity by position, against LM-Infinite and the unmodified model.

    python recipes/dual_chunk.py --text a_novel.txt --out dual_chunk

Every arm reads the same stretch of the text. The table's last columns lie past the 8,192 tokens that
SmolLM2-135M-Instruct was trained on. "window re-computed" tells a text that grows harder from a model that reads it
worse: it is the unmodified model, which reads the last window again after every half window, so that each token past
the window has between a half and a whole window of text before it, at true distances. Cost: with that model and one CPU
core four minutes an arm for 16,384 tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM, load_pretrained, trained_length
from hf_longtrunc.evaluation import (
    append_records,
    compare_losses,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
)
from instruments.recomputed import recomputed_losses

RECOMPUTED = "window re-computed"


def main(
    text: Annotated[Path, typer.Option(help="A long text.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    start: Annotated[int, typer.Option(help="Where in the text's tokens the stretch begins.")] = 2000,
    tokens: Annotated[int, typer.Option(help="Tokens that are read.")] = 16_384,
    chunk: Annotated[int, typer.Option(help="Tokens per forward.")] = 1024,
    only: Annotated[str | None, typer.Option(help="Which arms, separated by semicolons; all if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records and picture.")] = Path("dual_chunk"),
) -> None:
    console = Console()
    language_model, tokenizer = load_pretrained(model)
    trained = trained_length(language_model.config)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids)[start : start + tokens]
    arms: dict[str, Any] = {
        "unmodified": nullcontext,
        RECOMPUTED: nullcontext,
        "LM-Infinite, a quarter": LMInfinite(window_length=trained // 4),
        "StreamingLLM, a quarter": StreamingLLM(num_sink_tokens=16, window_length=trained // 4),
        "dual chunk, trained on half": DualChunkAttention(trained_length=trained // 2),
        "dual chunk": DualChunkAttention(),
    }
    if only is not None:
        arms = {name: arms[name] for name in only.split(";")}
    whole = {name: arm for name, arm in arms.items() if name != RECOMPUTED}
    losses = compare_losses(language_model, ids, whole, chunk=chunk, progress=True)
    if RECOMPUTED in arms:
        losses[RECOMPUTED] = recomputed_losses(language_model, ids, trained, chunk=chunk, progress=RECOMPUTED)
    edges = [edge for edge in (0, 1, 2, 3, 4) if edge * (trained // 2) <= len(ids)]
    records = perplexity_records(language_model, losses, arms, [edge * (trained // 2) for edge in edges])
    console.print(perplexity_table(records))
    console.print(f"{len(ids):,} tokens of {text.name} from token {start:,} on")
    append_records(out / "perplexity.jsonl", records)
    plot_perplexity(losses, trained_window=trained).figure.canvas.print_figure(out / "perplexity.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
