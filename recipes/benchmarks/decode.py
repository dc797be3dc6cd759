"""One decoded token of a whole layer stack, unmodified and patched, with the same number of keys, in turns.

    python recipes/benchmarks/decode.py --out bench

SmolLM2-135M-Instruct unless another model is named, without its head; caches hold random keys. LM-Infinite and
StreamingLLM keep a window of 1,024 tokens, dual chunk attention the model's own chunks. A ratio is the median over
turns of the patched time by the unmodified one, with its quartiles; processor time on one thread. About a minute on
one core.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  typer reads the annotations
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM, load_pretrained
from hf_longtrunc.attention.context import PASSTHROUGH, set_context
from hf_longtrunc.attention.padding import PaddingState
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.evaluation import append_records
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.models import CACHE

WINDOW = 1024
ARMS: list[tuple[Any, int]] = [
    (LMInfinite(window_length=WINDOW), WINDOW + 16),
    (StreamingLLM(window_length=WINDOW), WINDOW + 4),
    (DualChunkAttention(), 8192),
]


@dataclass(frozen=True)
class Decoding:
    """One line of the table and of the JSON-lines file."""

    technique: str
    keys: int
    unmodified_ms: float
    patched_ms: float
    ratio: float
    lower_quartile: float
    upper_quartile: float
    turns: int
    layers: int


@torch.inference_mode()
def main(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of another model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep so many layers; left out: all.")] = None,
    turns: Annotated[int, typer.Option(help="Tokens a side.")] = 24,
    out: Annotated[Path | None, typer.Option(help="Folder for decode.jsonl.")] = None,
) -> None:
    plain, _ = load_pretrained(model)
    plain.model.layers = plain.model.layers[:layers]
    plain.config.num_hidden_layers = len(plain.model.layers)
    patched = copy.deepcopy(plain)
    columns = ("technique", "keys", "unmodified", "patched", "ratio", "quartiles")
    table = new_table(*columns, title=f"one decoded token of {len(plain.model.layers)} layers, {turns} turns")
    for technique, keys in ARMS:
        with technique(patched):
            row = measured(type(technique).__name__, plain, patched, keys, turns)
        table.add_row(
            row.technique,
            f"{keys:,}",
            f"{row.unmodified_ms:.1f} ms",
            f"{row.patched_ms:.1f} ms",
            f"{row.ratio:.2f}x",
            f"{row.lower_quartile:.2f} to {row.upper_quartile:.2f}",
        )
        if out is not None:
            append_records(out / "decode.jsonl", [row])
    Console().print(table)


def measured(technique: str, plain: Any, patched: Any, keys: int, turns: int) -> Decoding:
    """Let both sides decode tokens in turns; the first three turns are left out."""
    caches = [(side, filled_cache(side, keys)) for side in (plain, patched)]
    times: list[list[float]] = []
    for _ in range(turns + 3):
        times.append([seconds(side, cache) for side, cache in caches])
    unmodified, ours = zip(*times[3:], strict=True)
    ratios = [b / a for a, b in zip(unmodified, ours, strict=True)]
    lower, middle, upper = quantiles(ratios, n=4)
    layers = len(plain.model.layers)
    return Decoding(technique, keys, median(unmodified) * 1e3, median(ours) * 1e3, middle, lower, upper, turns, layers)


def seconds(model: Any, cache: Any) -> float:
    """Return the processor time of one token."""
    token = torch.tensor([[7]])
    started = time.process_time()
    model.model(token, **{CACHE: cache})
    return time.process_time() - started


def filled_cache(model: Any, keys: int) -> Any:
    """Return the cache that `generate` builds, with random keys."""
    inputs: dict[str, Any] = {}
    model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
    config, cache = model.config, inputs[CACHE]
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    before = set_context(PASSTHROUGH)  # a cache with a law of its own takes keys from a patched model alone
    for layer in cache.layers:
        key, value = torch.randn(2, 1, heads, keys, dim)
        if isinstance(layer, RingCacheLayer):
            layer.prepare_update(layer.write_plan(keys, key.device, PaddingState()))
        layer.update(key, value)
        if isinstance(layer, RingCacheLayer):
            layer.commit()
    set_context(before)
    return cache


if __name__ == "__main__":
    typer.run(main)
