"""The cost of planning here, in TRL and in lightbinpack, on the same lengths; and the gain of a packed training step.

    python recipes/benchmarks/packing.py [--documents 1000000] [--large]

Expected (tables: docs/results/packing.md): a million documents in <= 0.15 s and <= 80 bytes each, >= 40x TRL's
loop, the same number of rows as TRL's over the whole set; a histogram of a thousand million documents in < 0.1 s.

All sides get the same array of piece lengths, cut before the clock starts, in one process; a figure is CPU
seconds, the fastest of the turns. TRL's own search tree runs in the loop of its packing; moving tokens is left out.
"global" packs the whole set at once, "shipped" the 1,000 documents at a time that `trl.pack_dataset` sees. TRL and
lightbinpack are left out where they are not installed. `--large` adds 1e7 documents from lengths to rows.
"""

from __future__ import annotations

import argparse
import platform
import time
import tracemalloc
from collections import defaultdict, deque
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import BestFitPackingCollator, best_fit_decreasing, pack
from hf_longtrunc.data.packing import plan_rows
from hf_longtrunc.data.stream import PackedStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

SHIPPED_BATCH = 1000  # documents that datasets.map hands to TRL at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    arguments = parser.parse_args()
    console = Console(width=110)
    console.print(f"{platform.machine()}, numpy {np.__version__}, torch {torch.__version__}; CPU seconds, fastest turn")
    lengths = lognormal(arguments.documents)
    for seq_length in arguments.seq_length:
        console.print(planners(lengths, seq_length, arguments.turns))
        console.print(memory_and_histogram(lengths, seq_length))
    console.print(a_few_at_a_time(lengths[:60_000], arguments.seq_length))
    if arguments.large:
        console.print(large(lognormal(10_000_000)))
    if not arguments.no_training:
        console.print(training())


def lognormal(documents: int) -> NDArray[np.int64]:
    """Lengths like a web corpus: median 490 tokens, mean 900, one in ten over 2048."""
    return np.maximum(2, np.random.default_rng(0).lognormal(6.2, 1.1, documents)).astype(np.int64)


def planners(lengths: NDArray[np.int64], seq_length: int, turns: int) -> Table:
    plan = best_fit_decreasing(lengths, seq_length, min_piece=1)
    stats = plan.stats()
    pieces, ideal = plan.length.astype(np.int64), int(stats["ideal_rows"])
    cut, cut_there = (stats[f"truncated_{how}"] / len(lengths) for how in ("documents", "by_concatenation"))
    title = f"{len(lengths):,} documents, {cut:.1%} of them cut ({cut_there:.1%} by slicing a concatenation)"
    table = Table(title=f"{title}, {len(pieces):,} pieces, rows of {seq_length:,}", title_justify="left")
    for heading in ("", "CPU s", "ratio", "rows", "over ideal"):
        table.add_column(heading, justify="right" if heading else "left")
    fastest: float | None = None
    for name, call, repeats in contestants(pieces, seq_length, turns):
        seconds, rows = timed(call, repeats)
        fastest = fastest or seconds
        table.add_row(name, f"{seconds:.3f}", f"{seconds / fastest:.1f}x", f"{rows:,}", f"{rows / ideal - 1:+.4%}")
        if name == "TRL, global":
            assert rows == len(plan), "best-fit decreasing has one number of rows"
    return table


def contestants(pieces: NDArray[np.int64], seq_length: int, turns: int) -> Iterator[tuple[str, Callable[[], int], int]]:
    yield "here", lambda: len(best_fit_decreasing(pieces, seq_length, min_piece=1)), 2 * turns + 1
    if find_spec("lightbinpack") is not None:
        import lightbinpack

        as_list = pieces.tolist()
        yield "lightbinpack obfd (C++)", lambda: len(lightbinpack.obfd(as_list, seq_length)), turns
    if find_spec("trl") is not None:
        yield "TRL, global", lambda: trl_rows(pieces, seq_length, len(pieces)), 1
        yield "TRL bfd_split, shipped", lambda: trl_rows(pieces, seq_length, SHIPPED_BATCH), 1
    yield "slicing a concatenation (TRL wrapped)", lambda: -(-int(pieces.sum()) // seq_length), turns


def trl_rows(pieces: NDArray[np.int64], seq_length: int, batch: int) -> int:
    from trl.data_utils import _SegmentTree

    return sum(
        len(_with_tree(_SegmentTree(seq_length), pieces[start : start + batch], seq_length))
        for start in range(0, len(pieces), batch)
    )


def _with_tree(tree: Any, pieces: NDArray[np.int64], seq_length: int) -> list[list[int]]:
    """Sequential best-fit decreasing: `tree` finds the smallest space that fits, rows of equal space queue up."""
    rows: list[list[int]] = []
    waiting: defaultdict[int, deque[list[int]]] = defaultdict(deque)
    tree.add(seq_length)
    order = np.argsort(-pieces, kind="stable")
    for item, size in zip(order.tolist(), pieces[order].tolist(), strict=True):
        space = tree.search(size)
        queue = waiting[space]
        if queue:
            row = queue.popleft()
            if not queue and space < seq_length:
                tree.remove(space)
        else:
            row = []
            rows.append(row)
        row.append(item)
        if space > size:
            waiting[space - size].append(row)
            tree.add(space - size)
    return rows


def timed(call: Callable[[], int], turns: int) -> tuple[float, int]:
    best = float("inf")
    for _ in range(turns):
        start = time.process_time()
        rows = call()
        best = min(best, time.process_time() - start)
    return best, rows


def memory_and_histogram(lengths: NDArray[np.int64], seq_length: int) -> str:
    tracemalloc.start()
    best_fit_decreasing(lengths, seq_length)
    peak = tracemalloc.get_traced_memory()[1] / len(lengths)
    tracemalloc.stop()
    histogram = np.bincount(np.minimum(lengths, seq_length), minlength=seq_length + 1) * (10**9 // len(lengths) + 1)
    seconds, rows = timed(lambda: plan_rows(histogram, seq_length).num_rows, 3)
    return (
        f"peak {peak:.0f} bytes a document; histogram of {histogram.sum():,} planned in {seconds:.3f} s ({rows:,} rows)"
    )


def a_few_at_a_time(lengths: NDArray[np.int64], seq_lengths: list[int]) -> Table:
    """Count the rows of a collator, which plans a batch, and of a stream, which plans a pool, over one plan of all."""
    table = Table(title=f"{len(lengths):,} documents, rows over packing all at once", title_justify="left")
    for heading in ("", *(f"rows of {length:,}" for length in seq_lengths), "million tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    at_once = {length: len(best_fit_decreasing(lengths, length)) for length in seq_lengths}
    for batch in (8, 32, 1024):
        parts = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
        rows = {length: sum(len(best_fit_decreasing(part, length)) for part in parts) for length in seq_lengths}
        over = [f"{rows[length] / at_once[length] - 1:+.3%}" for length in seq_lengths]
        table.add_row(f"collator, {batch:,} documents a batch", *over, "")
    documents = [{"input_ids": np.zeros(length, np.int32)} for length in lengths.tolist()]
    for pool in (1024, 4096, 16_384):
        streams = [PackedStream(documents, length, pool_size=pool) for length in seq_lengths]
        timings = [timed(lambda stream=stream: sum(1 for _ in stream), 1) for stream in streams]  # type: ignore[misc]
        over = [f"{rows / at_once[length] - 1:+.3%}" for length, (_, rows) in zip(seq_lengths, timings, strict=True)]
        speed = " / ".join(f"{lengths.sum() / seconds / 1e6:.0f}" for seconds, _ in timings)
        table.add_row(f"stream, pool of {pool:,}", *over, speed)
    return table


def large(lengths: NDArray[np.int64]) -> str:
    seconds, rows = timed(lambda: len(best_fit_decreasing(lengths, 2048)), 1)
    return f"{len(lengths):,} documents, from lengths to rows of 2,048: {seconds:.2f} s CPU, {rows:,} rows"


def training(seq_length: int = 512, documents: int = 64) -> Table:
    """Train a small Llama for a step on the same short documents, padded to the longest and packed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_small_llama()).train()
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(4.2, 0.8, documents), 2, seq_length).astype(int)
    examples = [{"input_ids": rng.integers(3, 2048, n)} for n in lengths]
    packed = pack(examples, seq_length)
    batches = {"padded": _padded(examples), "packed": BestFitPackingCollator(seq_length)(list(packed))}
    table = Table(title=f"a training step on {documents} documents, {lengths.sum():,} tokens", title_justify="left")
    for heading in ("", "shape", "CPU s", "tokens/s", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    seconds = {name: timed(lambda batch=batch: _step(model, batch), 3)[0] for name, batch in batches.items()}  # type: ignore[misc]
    for name, batch in batches.items():
        shape = "x".join(map(str, batch["input_ids"].shape))
        speed = lengths.sum() / seconds[name]
        table.add_row(name, shape, f"{seconds[name]:.2f}", f"{speed:,.0f}", f"{seconds['padded'] / seconds[name]:.2f}x")
    return table


def _small_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4
    )


def _padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(example["input_ids"]) for example in examples)
    ids = np.stack([np.pad(example["input_ids"], (0, width - len(example["input_ids"]))) for example in examples])
    tokens = torch.from_numpy(ids)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": tokens.masked_fill(tokens == 0, -100)}


def _step(model: Any, batch: dict[str, Any]) -> int:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return 0


if __name__ == "__main__":
    main()
