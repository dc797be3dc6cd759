"""A decoding step under Unlimiformer against full cross-attention over all states and against truncation.

    python recipes/benchmarks/unlimiformer.py --out bench
    python recipes/benchmarks/unlimiformer.py --indexes "Flat;HNSW32;IVF256,Flat:nprobe=16" --states 65536

A BART decoder of random weights (4 layers, 4 heads, width 256) is given n random encoder states, fp32, batch 1:

- full: the unmodified model over all n, which keeps keys and values of every state in every layer;
- Unlimiformer: each head its best 1024 of n, from the states alone;
- truncation: the unmodified model over the first 1024.

Each side and n runs in a process of its own, on one thread: processor milliseconds of a step (the median of all but the
first; the first builds the keys and values of "full"), and its peak memory above that before the
states were made. A side that would need more than --gib is left out. With --indexes a second table compares
FAISS indexes with the exact search over the same states: milliseconds to build and to search, and recall.

Cost: three minutes on one CPU core.
"""

from __future__ import annotations

import resource
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hf_longtrunc import Datastore, FaissDatastore, Unlimiformer
from hf_longtrunc.evaluation import append_records

WIDTH, LAYERS, HEADS, WINDOW = 256, 4, 4, 1024
SIDES = ("full", "Unlimiformer", "truncation")


@dataclass(frozen=True)
class Step:
    """The cost of a decoding step over n states."""

    side: str
    states: int
    first_ms: float
    step_ms: float
    peak_mib: float
    states_mib: float


def decoder() -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=128, d_model=WIDTH, max_position_embeddings=WINDOW, encoder_layers=1, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=4 * WIDTH,
        init_std=0.1, forced_eos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = BartForConditionalGeneration(config)
    return model.eval()


@torch.inference_mode()
def measured(side: str, n: int, steps: int) -> Step:
    """Decode `steps` tokens in this process."""
    torch.set_num_threads(1)
    model, clock = decoder(), [0.0]
    model.get_decoder().register_forward_hook(lambda *_: clock.append(time.process_time()))
    arm: Any = Unlimiformer(top_k=WINDOW, window=WINDOW) if side == "Unlimiformer" else nullcontext
    with arm(model):
        before = _peak_mib()
        states = torch.empty(1, WINDOW if side == "truncation" else n, WIDTH).normal_()
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        clock[:] = [time.process_time()]
        model.generate(encoder_outputs=BaseModelOutput(states), attention_mask=mask, max_new_tokens=steps)
    times = [(after - since) * 1e3 for since, after in pairwise(clock)]
    return Step(side, n, times[0], statistics.median(times[1:]), _peak_mib() - before, states.nbytes / 2**20)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def step_table(rows: list[Step]) -> Table:
    """Lay out a line per n: each side's milliseconds and memory, and Unlimiformer's ratios to the others."""
    table = Table("states", title="one decoding step, one thread; peak memory of states and all that is made of them")
    milliseconds, mebibytes = ([f"{side} {unit}" for side in SIDES] for unit in ("ms", "MiB"))
    for column in (*milliseconds, "/ full", "/ trunc.", *mebibytes, "/ states"):
        table.add_column(column, justify="right")
    for n in dict.fromkeys(row.states for row in rows):
        at = {row.side: row for row in rows if row.states == n}
        ours = at["Unlimiformer"]
        times = [f"{at[side].step_ms:.1f}" if side in at else "" for side in SIDES]
        ratios = [f"{ours.step_ms / at[side].step_ms:.2f}" if side in at else "" for side in ("full", "truncation")]
        memory = [f"{at[side].peak_mib:,.0f}" if side in at else "" for side in SIDES]
        table.add_row(f"{n:,}", *times, *ratios, *memory, f"{ours.peak_mib / ours.states_mib:.2f}")
    return table


def index_table(kinds: list[str], n: int, k: int) -> Table:
    """Compare indexes with the exact search: states in clusters, as an encoder's are, one query a head."""
    torch.manual_seed(0)
    states = torch.randn(n // 64, WIDTH).repeat_interleave(64, 0) + 0.5 * torch.randn(n // 64 * 64, WIDTH)
    queries = torch.randn(HEADS, WIDTH)
    table = Table("index", title=f"search of the best {k} of {len(states):,} states, {HEADS} queries")
    for column in ("build ms", "search ms", "recall"):
        table.add_column(column, justify="right")
    for kind in ("exact", *kinds):
        since = time.process_time()
        store = Datastore(states) if kind == "exact" else FaissDatastore(states, kind)
        build = (time.process_time() - since) * 1e3
        times = []
        for _ in range(5):
            since = time.process_time()
            store.search(queries, k)
            times.append((time.process_time() - since) * 1e3)
        recall = store.recall(queries, k) if isinstance(store, FaissDatastore) else 1.0
        table.add_row(kind, f"{build:,.0f}", f"{statistics.median(times):.1f}", f"{recall:.2f}")
    return table


def main(
    states: Annotated[str, typer.Option(help="Numbers of encoder states.")] = "1024,4096,16384,65536,262144,1048576",
    steps: Annotated[int, typer.Option(help="Tokens decoded for each figure.")] = 6,
    gib: Annotated[float, typer.Option(help="Leave out a side that would hold more.")] = 3.0,
    indexes: Annotated[str | None, typer.Option(help="FAISS kinds to compare, separated by semicolons.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for unlimiformer.jsonl.")] = None,
) -> None:
    torch.set_num_threads(1)
    console, rows = Console(width=160), list[Step]()
    console.print(f"BART decoder, {LAYERS} layers, {HEADS} heads, width {WIDTH}, fp32; torch {torch.__version__}, CPU")
    sizes = [int(n) for n in states.split(",")]
    for n in sizes:
        for side in SIDES:
            copies = 1 + 2 * LAYERS if side == "full" else 1
            if side == "truncation" or n * WIDTH * 4 * copies <= gib * 2**30:
                with get_context("fork").Pool(1) as process:
                    rows.append(process.apply(measured, (side, n, steps)))
                if out is not None:
                    append_records(out / "unlimiformer.jsonl", rows[-1:])
    console.print(step_table(rows))
    if indexes is not None:
        console.print(index_table(indexes.split(";"), max(sizes), WINDOW))


if __name__ == "__main__":
    typer.run(main)
