"""Passkeys by prompt length and depth: the unmodified model, and LM-Infinite with and without reading distant keys.

    python recipes/passkey.py --lengths 1000,4000,7000,12000 --out passkey
    python recipes/passkey.py --text some_novel.txt --lengths 7500,16000 --window 2048 --arms top-k,blocks --out passkey

Arms: unmodified; LM-Infinite alone (window); with it each head's best 5 keys of the middle for the last row (paper),
its best 64 for the last 64 rows (top-k), or blocks that all heads choose together (blocks).

Cost: one prompt of 7,000 tokens takes SmolLM2-135M-Instruct about 35 s on one CPU core, and well under a second on a
data-centre GPU. An interrupted run continues: records are appended to OUT/passkey.jsonl.

Expect, in repeated filler: unmodified 1.0 up to 7,000 tokens and 0 past the trained window of 8,192; with window and
sinks alone, an answer only where the key stands in the window or among the sinks. In a novel the unmodified model is
worse inside its window already: 5 of 5 keys at 4,000 tokens, 2 of 5 (the two last depths) at 7,500.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import LMInfinite, TopBlocks, TopK, load_pretrained
from instruments.passkey import PasskeyPrompts, passkey_table, passkey_tasks, plot_passkey, run_passkey


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1000,4000,7000",
    depths: Annotated[str, typer.Option(help="Depths of the key in [0, 1].")] = "0.1,0.3,0.5,0.7,0.9",
    keys: Annotated[int, typer.Option(help="Keys per cell.")] = 2,
    text: Annotated[
        Path | None, typer.Option(help="A text to take the filler from; left out: repeated filler.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    window: Annotated[int | None, typer.Option(help="LM-Infinite's window; the trained one if left out.")] = None,
    arms: Annotated[str, typer.Option(help="Which arms, of the five above.")] = "unmodified,window,paper,top-k,blocks",
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16; float32 on a CPU if left out.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for passkey.jsonl and passkey.png.")] = Path("passkey"),
) -> None:
    language_model, tokenizer = load_pretrained(model, dtype=None if dtype is None else getattr(torch, dtype))
    retrievals = {"window": None, "paper": TopK(k=5, rows=1), "top-k": TopK(), "blocks": TopBlocks()}
    known: dict[str, Any] = {"unmodified": nullcontext} | {
        name: LMInfinite(num_sink_tokens=sinks, window_length=window, retrieval=retrieval)
        for name, retrieval in retrievals.items()
    }
    unknown = set(arms.split(",")) - set(known)
    if unknown:
        raise typer.BadParameter(f"--arms takes {', '.join(known)}; got {', '.join(sorted(unknown))}")
    chosen = {name: known[name] for name in arms.split(",")}
    prompts = PasskeyPrompts(tokenizer, None if text is None else text.read_text(encoding="utf-8"))
    grid = [int(length) for length in lengths.split(",")], [float(depth) for depth in depths.split(",")]
    tasks = passkey_tasks(*grid, keys_per_cell=keys, seed=seed)
    records = run_passkey(language_model, prompts, tasks, chosen, path=out / "passkey.jsonl", progress=True)
    Console().print(passkey_table(records))
    plot_passkey(records)[0].figure.canvas.print_figure(out / "passkey.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
