"""What LM-Infinite claims, measured on one model and one GPU: flat perplexity, constant memory, constant speed.

    python recipes/lm_infinite.py --text moby_dick.txt --out lm_infinite
    python recipes/lm_infinite.py --text moby_dick.txt --parts perplexity --tokens 16384 --starts 2000   # on a CPU

perplexity: by position, each arm on the same stretches of the text: unmodified, S = 16 with each window (the trained
one and 2048), and S = 0 with the first. SmolLM2-135M-Instruct on Moby Dick, bf16, two stretches of 65,536 tokens:
unmodified 40 before the trained window of 8,192 and thousands after it; S = 16 stays at 36 to 50; S = 0 is nearly
twice that.
streaming: tokens per second, one token at a time, and the bytes of the cache, after 10k to 100k tokens seen.
prompt: a single prompt of 131k and of a million tokens (the text, over and over) through `generate`, time and memory.

Cost: with SmolLM2-135M-Instruct a few minutes on a data-centre GPU. The kernels are in benchmarks/lm_infinite.py.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_longtrunc import LMInfinite, load_pretrained, trained_length
from hf_longtrunc.evaluation import (
    append_records,
    cache_bytes,
    compare_losses,
    default_edges,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
    start_stream,
)
from hf_longtrunc.models import CACHE

_TIMED_TOKENS, _WARM_UP = 200, 20


@dataclass(frozen=True)
class StreamSpeed:
    """Speed and memory once `seen` tokens have been read, one at a time from there on."""

    arm: str
    seen: int
    tokens_per_second: float
    cache_mib: float
    peak_gpu_mib: float


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def perplexity(console: Console, model: Any, rows: Tensor, windows: list[int], chunk: int, out: Path) -> None:
    window = trained_length(model.config)
    arms: dict[str, Any] = {"unmodified": nullcontext}
    for sinks, length in [*((16, length) for length in windows), (0, windows[0])]:
        arms[f"S={sinks}, L={length}"] = LMInfinite(num_sink_tokens=sinks, window_length=length)
    since = time.perf_counter()
    losses = compare_losses(model, rows, arms, chunk=chunk, progress=True)
    records = perplexity_records(model, losses, arms, default_edges(window, rows.shape[1]))
    console.print(perplexity_table(records))
    console.print(f"{rows.shape[0]} x {rows.shape[1]:,} tokens, {time.perf_counter() - since:.0f} s for all arms")
    append_records(out / "perplexity.jsonl", records)
    plot_perplexity(losses, trained_window=window).figure.canvas.print_figure(out / "perplexity.png", dpi=150)


@torch.inference_mode()
def streaming(model: Any, ids: Tensor, arm: LMInfinite, stops: list[int], chunk: int) -> list[StreamSpeed]:
    """Read ids [1, n] in chunks up to each of the stops, and from there one token at a time for a while."""
    speeds = []
    with arm(model):
        cache, _ = start_stream(model, ids[:, :1])
        for stop in stops:
            for piece in torch.split(ids[:, cache.get_seq_length() : stop], chunk, dim=1):
                model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            for step in range(_WARM_UP + _TIMED_TOKENS):
                if step == _WARM_UP:
                    synchronize()
                    since = time.perf_counter()
                token = ids[:, stop + step : stop + step + 1]
                model(input_ids=token, use_cache=True, **{CACHE: cache})
            synchronize()
            speed = _TIMED_TOKENS / (time.perf_counter() - since)
            peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
            speeds.append(StreamSpeed(repr(arm), stop, speed, cache_bytes(cache) / 2**20, peak))
    return speeds


def prompt(console: Console, model: Any, ids: Tensor, n: int) -> None:
    """Read one prompt of n tokens in one call of `generate`, under LM-Infinite."""
    row = ids.repeat(-(-n // len(ids)))[None, :n].to(model.device)
    with LMInfinite()(model):
        since = time.perf_counter()
        cache, _ = start_stream(model, row)
        synchronize()
    seconds = time.perf_counter() - since
    peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    size = cache_bytes(cache) / 2**20
    console.print(f"prompt of {n:,} tokens: {seconds:.1f} s, cache {size:.1f} MiB, peak {peak:,.0f} MiB of GPU memory")


def speed_table(speeds: list[StreamSpeed]) -> Table:
    table = Table("arm", title="streaming, one token at a time")
    for column in ("tokens seen", "tokens/s", "cache MiB", "peak GPU MiB"):
        table.add_column(column, justify="right")
    for row in speeds:
        numbers = f"{row.tokens_per_second:.1f}", f"{row.cache_mib:.1f}", f"{row.peak_gpu_mib:,.0f}"
        table.add_row(row.arm, f"{row.seen:,}", *numbers)
    return table


def main(
    text: Annotated[Path, typer.Option(help="A long text.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    parts: Annotated[str, typer.Option(help="What to measure.")] = "perplexity,streaming,prompt",
    starts: Annotated[str, typer.Option(help="Where in the tokens each stretch begins.")] = "2000,100000",
    tokens: Annotated[int, typer.Option(help="Tokens per stretch.")] = 65_536,
    stops: Annotated[str, typer.Option(help="Tokens seen when the streaming speed is taken.")] = "10000,30000,100000",
    prompts: Annotated[str, typer.Option(help="Lengths of the prompts.")] = "131072,1048576",
    windows: Annotated[str | None, typer.Option(help="Windows; the trained one and 2048 if left out.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens per forward.")] = 2048,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("lm_infinite"),
) -> None:
    console = Console()
    language_model, tokenizer = load_pretrained(model)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    console.print(f"{device}, torch {torch.__version__}, {language_model.dtype}, {len(ids):,} tokens in {text.name}")
    trained = trained_length(language_model.config)
    lengths = [trained, 2048] if windows is None else [int(length) for length in windows.split(",")]
    if "perplexity" in parts.split(","):
        rows = torch.stack([ids[int(start) : int(start) + tokens] for start in starts.split(",")])
        perplexity(console, language_model, rows, lengths, chunk, out)
    if "streaming" in parts.split(","):
        seen = [int(stop) for stop in stops.split(",")]
        stream = ids.to(language_model.device)[None]
        for length in lengths:
            speeds = streaming(language_model, stream, LMInfinite(window_length=length), seen, chunk)
            console.print(speed_table(speeds))
            append_records(out / "streaming.jsonl", speeds)
    if "prompt" in parts.split(","):
        for n in prompts.split(","):
            prompt(console, language_model, ids, int(n))


if __name__ == "__main__":
    typer.run(main)
