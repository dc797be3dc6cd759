"""One attention layer under LM-Infinite against full and windowed attention, all sides in one process.

    python recipes/benchmarks/lm_infinite.py --out bench            # CUDA when there is one, else the CPU's sizes
    python recipes/benchmarks/lm_infinite.py --device cpu

Prefill of n tokens: full causal attention (the fastest kernel that `scaled_dot_product_attention` finds for it), a
plain sliding window (FlexAttention; on a CPU one masked call of `scaled_dot_product_attention` a block of 512 queries),
LM-Infinite as such calls too (`path="sdpa"`), on CUDA by the other paths (sdpa, eager), and LM-Infinite
as it is run, its rotations included. Decode of one token: full attention over the n keys, plain attention over S + L
keys, and LM-Infinite's cache update and attention. The sides take turns; medians, of processor time where one thread
computes; every ratio is against a side of the same run.

CUDA: 32 query heads, 8 key-value heads, d = 128, L = 4096, S = 16, bf16, n = 8k..131k, then n = 1M for its memory. CPU:
8 and 2 heads, d = 64, L = 1024, S = 16, fp32, n = 4k..32k; microseconds per token show that time is linear in n. Last,
a whole model (SmolLM2-135M-Instruct unless named), unmodified and patched: a token decoded after S + L tokens, with the
same number of keys on either side, and with --prompts whole prompts. --layers limits it to the first layers, and on
CUDA the decoding step is also compiled. --windows and --dtypes repeat the prefill.

Cost: a few minutes on an H100, most of them for compiling FlexAttention; about five on a CPU core.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path  # noqa: TC003  typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.attention.kernels import Scoring, sdpa_attention
from hf_longtrunc.attention.lambda_attention import LONG_PROMPTS, LambdaAttention, SinkWindowLaw
from hf_longtrunc.attention.padding import PaddingState
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.attention.rope import Rotation
from hf_longtrunc.evaluation import append_records

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128  # FlexAttention's block of queries and of keys
_PATHS = ("sdpa", "eager")  # of a prompt on CUDA, where FlexAttention is the default


class Layer(NamedTuple):
    """Sizes of one attention layer and of LM-Infinite in it."""

    heads: int
    kv_heads: int
    dim: int
    window: int
    sinks: int
    dtype: torch.dtype
    device: str

    @property
    def scoring(self) -> Scoring:
        """Scale of the dot products, and the rotation."""
        return Scoring(self.dim**-0.5, rotation=self.rotation)

    def tokens(self, n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return random queries, keys and values of n tokens."""
        heads = self.heads, self.kv_heads, self.kv_heads
        return tuple(torch.randn(batch, h, n, self.dim, dtype=self.dtype, device=self.device) for h in heads)  # type: ignore[return-value]

    @property
    def law(self) -> SinkWindowLaw:
        """Return the visible keys and their distances."""
        return SinkWindowLaw(self.sinks, self.window, self.window)

    @property
    def rotation(self) -> Rotation:
        """Half-split layout, base 10,000."""
        exponents = torch.arange(0, self.dim, 2, device=self.device, dtype=torch.float64) / self.dim
        return Rotation(10_000**-exponents)


@dataclass(frozen=True)
class Timing:
    """One line of a table and of the JSON-lines file."""

    task: str
    side: str
    n: int
    batch: int
    median_ms: float
    peak_mib: float
    device: str
    window: int
    dtype: str


def measured(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the milliseconds of a call and the peak MiB that it adds on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, since = torch.cuda.memory_allocated(), time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - since
        return seconds * 1e3, (torch.cuda.max_memory_allocated() - before) / 2**20
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return (clock() - started) * 1e3, 0.0


def window_blocks(n: int, window: int, device: str) -> BlockMask:
    """Build the sliding window's mask from block indices: `create_block_mask` makes an n x n tensor first."""
    from torch.nn.attention.flex_attention import BlockMask

    row = torch.arange(-(-n // _BLOCK), device=device)
    first = ((row * _BLOCK - window + 1).clamp_min(0)) // _BLOCK
    # A block is full where its oldest key is still in the window of its newest query, and before the diagonal.
    first_full = torch.minimum((((row + 1) * _BLOCK - window).clamp_min(0) + _BLOCK - 1) // _BLOCK, row)
    columns = torch.arange(len(row), device=device, dtype=torch.int32)
    counts = first_full - first + 1  # the blocks that the window's far edge cuts, and the diagonal
    partial = first[:, None] + columns
    partial = torch.where(columns == counts[:, None] - 1, row[:, None], partial).clamp_max(len(row) - 1)
    full = (first_full[:, None] + columns).clamp_max(len(row) - 1)
    counts, partial, full_counts, full = (
        x.to(torch.int32)[None, None].contiguous() for x in (counts, partial, row - first_full, full)
    )
    return BlockMask.from_kv_blocks(
        *(counts, partial, full_counts, full, _BLOCK),
        mask_mod=lambda batch, head, i, j: (j <= i) & (i - j < window),
        seq_lengths=(n, n),
    )


def prefill_sides(layer: Layer, n: int) -> dict[str, Callable[[], object]]:
    """Return the sides that read a prompt of n tokens."""
    query, key, value = layer.tokens(n)
    positions = torch.arange(n, device=layer.device)[None]
    sinks = key[:, :, : layer.sinks], value[:, :, : layer.sinks]

    def full() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def windowed(path: str, sinks: tuple[Tensor, Tensor] | None) -> Tensor:
        call = LambdaAttention(*(query, key, value, positions, positions), sinks, layer.law, layer.scoring)
        return call.attend(path)

    sides: dict[str, Callable[[], object]] = {"full": full}
    if layer.device == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        blocks = window_blocks(n, layer.window, layer.device)
        sides["window only"] = lambda: flex(query, key, value, block_mask=blocks, enable_gqa=True)
    else:
        sides["window only"] = lambda: windowed("sdpa", None)
    sides["masked"] = lambda: windowed("sdpa", sinks)
    if layer.device == "cuda":
        sides |= {path: partial(windowed, path, sinks) for path in _PATHS}
    sides["LM-Infinite"] = lambda: windowed("auto", sinks)
    return sides


def offered(layer: Layer, console: Console) -> tuple[str, ...]:
    """Return the other paths that run here, and say of those that do not why."""
    found = []
    for path in _PATHS if layer.device == "cuda" else ():
        try:
            prefill_sides(layer, 4 * _BLOCK)[path]()
        except Exception as error:  # whatever it is, the other sides are to be measured
            console.print(f"{path} is left out: {type(error).__name__}: {error}")
        else:
            found.append(path)
    return tuple(found)


def quickest(rows: list[Timing]) -> str:
    """Say which path took least time at each size."""
    rows = [row for row in rows if row.side in (*_PATHS, "LM-Infinite")]
    sizes = dict.fromkeys(row.n for row in rows)
    best = [min((row for row in rows if row.n == n), key=lambda row: row.median_ms) for n in sizes]
    named = ", ".join(f"{row.side} at {row.n:,}" for row in best)
    return f"quickest: {named}; LM-Infinite is {LONG_PROMPTS!r} there, which lambda_attention.py names in one place"


def decode_sides(layer: Layer, n: int, batch: int) -> dict[str, Callable[[], object]]:
    """Return the sides that decode the token after n tokens."""
    query, key, value = layer.tokens(1, batch)
    _, all_keys, all_values = layer.tokens(n, batch)
    few = slice(0, layer.sinks + layer.window)
    few_keys, few_values = all_keys[:, :, few].contiguous(), all_values[:, :, few].contiguous()
    cache = filled_cache(layer, all_keys, all_values)
    device = torch.device(layer.device)

    def plain(keys: Tensor, values: Tensor) -> Tensor:
        # The heads of a group become the queries of their key head: the kernel reads every key once.
        grouped = query.view(batch, layer.kv_heads, -1, layer.dim)
        return F.scaled_dot_product_attention(grouped, keys, values)

    # Made once a step, not once a layer, so not timed: slots, distances, the rotation of the sinks.
    i = torch.full((1, 1), n, device=device)
    j = cache.key_positions(cache.padding_state, device)
    distances = layer.law.distance(i, j)[:, 0]
    assert cache.rotation is not None
    assert cache.all_visible(cache.padding_state)
    offsets = (i - j - distances)[:, : layer.sinks]
    rotation = cache.rotation.cos_sin(offsets, layer.dtype)
    plan = cache.write_plan(1, device, PaddingState())._replace(sink_rotation=rotation)

    def lm_infinite() -> Tensor:
        cache.prepare_update(plan)
        keys, values = cache.update(key, value)
        cache.commit()
        grouped = query.view(batch, layer.kv_heads, -1, layer.dim)
        return sdpa_attention(grouped, keys, values, None, layer.scoring, None)

    return {
        "full": lambda: plain(all_keys, all_values),
        "S + L keys": lambda: plain(few_keys, few_values),
        "LM-Infinite": lm_infinite,
    }


def filled_cache(layer: Layer, key: Tensor, value: Tensor) -> RingCacheLayer:
    """Return the ring after these tokens."""
    cache = RingCacheLayer(layer.sinks, layer.window, layer.rotation)
    cache.prepare_update(cache.write_plan(key.shape[2], key.device, PaddingState()))
    cache.update(key, value)
    cache.commit()
    return cache


def models(name: str | None, layers: int | None, sinks: int, window: int, device: str) -> dict[str, Any]:
    """Return a model, or the first of its layers, as it is, patched, and on CUDA patched with its step compiled."""
    plain, _ = load_pretrained(name, device=device)
    plain.model.layers = plain.model.layers[:layers]
    plain.config.num_hidden_layers = len(plain.model.layers)
    sides = {"unmodified": plain}
    for compiled in (True, False) if device == "cuda" else (False,):
        patched = copy.deepcopy(plain)
        handle = LMInfinite(num_sink_tokens=sinks, window_length=window).attach(patched)
        if compiled:
            handle.compile(mode="reduce-overhead")
        sides["compiled" if compiled else "LM-Infinite"] = patched
    return sides


def prompt_sides(sides: dict[str, Any], n: int) -> dict[str, Callable[[], object]]:
    """Return the sides that `generate` one token after a prompt of n random tokens."""
    some = sides["unmodified"]
    tokens = torch.randint(some.config.vocab_size, (1, n), device=some.device)

    def reading(model: Any) -> Callable[[], object]:
        return lambda: model.generate(tokens, max_new_tokens=1, do_sample=False)

    return {side: reading(model) for side, model in sides.items() if side != "compiled"}


def model_sides(sides: dict[str, Any], n: int) -> dict[str, Callable[[], object]]:
    """Return the sides that decode the token after n random tokens, by each model."""
    some = sides["unmodified"]
    tokens = torch.randint(some.config.vocab_size, (1, n), device=some.device)

    def decoding(model: Any) -> Callable[[], object]:
        inputs: dict[str, Any] = {}
        model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
        model(tokens, logits_to_keep=1, **inputs)
        return lambda: model(tokens[:, :1], **inputs)

    return {side: decoding(model) for side, model in sides.items()}


def cache_mib(layer: Layer, n: int) -> tuple[float, float]:
    """Return the MiB of one layer's LM-Infinite cache and of an ordinary one, after n tokens at batch 1."""
    _, key, value = layer.tokens(n)
    cache = filled_cache(layer, key, value)
    return cache.nbytes / 2**20, (key.nbytes + value.nbytes) / 2**20


def timings(
    task: str, n: int, batch: int, sides: dict[str, Callable[[], object]], layer: Layer, repeats: int
) -> list[Timing]:
    """Let the sides take turns, the first turn (on CUDA two) left out."""
    turns: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    warm_up = 2 if layer.device == "cuda" else 1
    for _ in range(repeats + warm_up):
        for side, run in sides.items():
            turns[side].append(measured(run, layer.device))
    rows = []
    for side, taken in turns.items():
        median = statistics.median(milliseconds for milliseconds, _ in taken[warm_up:])
        peak, dtype = taken[-1][1], str(layer.dtype).removeprefix("torch.")
        rows.append(Timing(task, side, n, batch, median, peak, layer.device, layer.window, dtype))
    return rows


def timing_table(rows: list[Timing], title: str) -> Table:
    """Lay out a line per size: each side's median, the last side's ratio to each of the others and time per token."""
    sides = list(dict.fromkeys(row.side for row in rows))
    ours = sides[-1]
    table = Table("n", title=title)
    for column in [*(f"{side} ms" for side in sides), *(f"/ {side}" for side in sides[:-1]), "us/token", "peak MiB"]:
        table.add_column(column, justify="right")
    for n in dict.fromkeys(row.n for row in rows):
        at = {row.side: row for row in rows if row.n == n}
        times = [f"{at[side].median_ms:.3f}" for side in sides]
        ratios = [f"{at[ours].median_ms / at[side].median_ms:.2f}" for side in sides[:-1]]
        new_tokens = n if at[ours].task in ("prefill", "prompt") else at[ours].batch
        per_token = f"{at[ours].median_ms * 1e3 / new_tokens:.2f}"
        table.add_row(f"{n:,}", *times, *ratios, per_token, f"{at[ours].peak_mib:,.0f}")
    return table


@torch.inference_mode()
def main(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; left out: CUDA when there is one.")] = None,
    sizes: Annotated[str, typer.Option(help="Values of n; left out: the device's.")] = "",
    largest: Annotated[int | None, typer.Option(help="Leave out larger n than this.")] = None,
    windows: Annotated[str, typer.Option(help="Windows of the layer; left out: the device's one.")] = "",
    dtypes: Annotated[
        str, typer.Option(help="Of the layer, such as float32,bfloat16; left out: the device's one.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed calls of which the median is taken.")] = 10,
    parts: Annotated[str, typer.Option(help="What to measure.")] = "prefill,decode,model,million",
    sides: Annotated[str, typer.Option(help="Of the prefill; left out: all.")] = "",
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the whole model.")] = None,
    model_windows: Annotated[
        str, typer.Option(help="Its windows, separated by commas; empty: leave it out.")
    ] = "1024,4096",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts for the whole model.")] = "",
    layers: Annotated[int | None, typer.Option(help="Keep so many layers of the whole model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for lm_infinite.jsonl.")] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    console, on_cuda = Console(width=120), device == "cuda"
    layer = (
        Layer(32, 8, 128, 4096, 16, torch.bfloat16, device)
        if on_cuda
        else Layer(8, 2, 64, 1024, 16, torch.float32, device)
    )
    name = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}, {layer}")
    usual = [2**13, 2**14, 2**15, 2**16, 2**17] if on_cuda else [2**12, 2**13, 2**14, 2**15]
    lengths = [n for n in numbers(sizes) or usual if n <= (largest or n)]

    def shown(rows: list[Timing], title: str) -> None:
        console.print(timing_table(rows, title))
        if out is not None:
            append_records(out / "lm_infinite.jsonl", rows)

    wanted = parts.split(",")
    if "prefill" in wanted:
        for dtype in dtypes.split(",") if dtypes else [str(layer.dtype).removeprefix("torch.")]:
            for window in numbers(windows) or [layer.window]:
                each = layer._replace(window=window, dtype=getattr(torch, dtype))
                wanted_sides = sides.split(",") if sides else ["full", "window only", "masked", "LM-Infinite"]
                rows = prefill(each, lengths, repeats, [*offered(each, console), *wanted_sides])
                shown(rows, f"prefill, batch 1, L = {window}, {dtype}")
                if on_cuda:
                    console.print(quickest(rows))
    if "decode" in wanted:
        for batch in (1, 8) if on_cuda else (1,):
            rows = [
                row
                for n in lengths
                for row in timings("decode", n, batch, decode_sides(layer, n, batch), layer, 10 * repeats)
            ]
            shown(rows, f"decode of one token after n, batch {batch}")
        for n in lengths:
            ours, ordinary = cache_mib(layer, n)
            console.print(f"cache of one layer after {n:,} tokens: {ours:.2f} MiB, ordinary {ordinary:.2f} MiB")
    for window in numbers(model_windows) if "model" in wanted else []:
        whole = models(model, layers, layer.sinks, window, device)
        every = layer._replace(window=window, dtype=next(whole["unmodified"].parameters()).dtype)
        n, depth = layer.sinks + window, f"L = {window}, {whole['unmodified'].config.num_hidden_layers} layers"
        shown(
            timings("model", n, 1, model_sides(whole, n), every, 10 * repeats),
            f"decode of one token by a whole model after n = S + L, {depth}",
        )
        rows = [
            row for n in numbers(prompts) for row in timings("prompt", n, 1, prompt_sides(whole, n), every, repeats)
        ]
        if rows:
            shown(rows, f"a prompt of n tokens given to generate, {depth}")
    if "million" in wanted and on_cuda and largest is None:
        shown(prefill(layer, [2**20], 1, ["LM-Infinite"]), "prefill of a million tokens")


def numbers(written: str) -> list[int]:
    return [int(number) for number in written.split(",") if number]


def prefill(layer: Layer, lengths: list[int], repeats: int, sides: list[str]) -> list[Timing]:
    """Time the named sides of the prefill."""
    rows = []
    for n in lengths:
        chosen = {side: run for side, run in prefill_sides(layer, n).items() if side in sides}
        rows += timings("prefill", n, 1, chosen, layer, repeats)
    return rows


if __name__ == "__main__":
    typer.run(main)
