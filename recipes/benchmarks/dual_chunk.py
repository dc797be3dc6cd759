"""One layer under dual chunk attention against full causal attention: a prompt, a token, a token with selected blocks.

    python recipes/benchmarks/dual_chunk.py

Heads and width are those of SmolLM2-135M (9 query heads, 3 of keys, 64 wide), s = 6,144, c = 8,192, fp32. Both sides
run in turns in this process; a ratio is the median over turns of ours by theirs, processor time on a CPU.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from torch.nn.functional import scaled_dot_product_attention

from hf_longtrunc.attention.block_scores import Selection
from hf_longtrunc.attention.dual_chunk import ChunkLaw, dual_chunk_attention
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.rope import Rotation
from hf_longtrunc.evaluation.display import new_table

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS, GROUPS, WIDTH = 9, 3, 64
CHUNK, TRAINED = 6144, 8192
KEYS_CHOSEN = 4 * (64 + 2 * 16)  # what `TopBlocks.for_chat` reads


def main(
    prompts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "8192,16384",
    keys: Annotated[str, typer.Option(help="Keys that a token sees.")] = "16384,32768",
    repeats: Annotated[int, typer.Option(help="Turns.")] = 5,
    device: str = "cpu",
) -> None:
    table = new_table("what", "keys", "by full attention", title=f"dual chunk attention, one layer, {device}")
    for n in map(int, prompts.split(",")):
        table.add_row("prompt", f"{n:,}", f"{ratio(*sides(n, n, device, False), repeats, device):.2f}x")
    for n in map(int, keys.split(",")):
        for name, chosen in (("token", False), (f"token, {KEYS_CHOSEN} keys chosen", True)):
            table.add_row(name, f"{n:,}", f"{ratio(*sides(1, n, device, chosen), 40 * repeats, device):.2f}x")
    Console().print(table)


def sides(new: int, keys: int, device: str, chosen: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the last `new` of so many tokens under dual chunk attention, and under full causal attention."""
    draw = torch.Generator(device).manual_seed(0)

    def tokens(heads: int, n: int) -> Any:
        return torch.randn(1, heads, n, WIDTH, device=device, generator=draw)

    query, key, value = tokens(HEADS, new), tokens(GROUPS, keys), tokens(GROUPS, keys)
    frequencies = 100_000.0 ** (-torch.arange(WIDTH // 2, dtype=torch.float64, device=device) / (WIDTH // 2))
    law, scoring = ChunkLaw(CHUNK, TRAINED), Scoring(WIDTH**-0.5, rotation=Rotation(frequencies))
    emphasis = None
    if chosen:
        positions = torch.randperm(keys // 2, device=device, generator=draw)[None, :KEYS_CHOSEN]
        emphasis = Selection(positions, torch.full(positions.shape, 8.0, device=device))

    def ours() -> object:
        return dual_chunk_attention(query, key, value, None, law, scoring, emphasis)

    def full() -> object:
        return scaled_dot_product_attention(query, key, value, is_causal=new > 1, enable_gqa=True)

    return ours, full


def ratio(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, device: str) -> float:
    """Return the median over turns of the time of ours by that of theirs."""

    def seconds(run: Callable[[], object]) -> float:
        clock = time.process_time if device == "cpu" else time.perf_counter
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    seconds(ours), seconds(theirs)
    return median(seconds(ours) / seconds(theirs) for _ in range(repeats))


if __name__ == "__main__":
    typer.run(main)
