"""A hybrid past its window: a byte model of convolutions and attention, trained at 256 bytes, read to 8,192.

    python recipes/hybrid_tiny.py --texts folder_of_novels --held-out moby_dick.txt,sherlock_holmes.txt --out hybrid

No pretrained hybrid lies on the package index, so one is trained here: LFM2's layers (two short convolutions, two of
full attention), 0.2 million parameters, on the bytes of every text of the folder that is not held out. The held-out
texts are read: perplexity a byte by position, unmodified and under LM-Infinite, with the defaults (16 sinks, and the
trained window) and without sinks; nothing was chosen on it. A convolution sees three bytes at any length:
only attention breaks past 256 bytes. The bytes of the cache are printed too.

Cost: two minutes on one CPU core. The trained model is kept in OUT/model, and a second run reads
with it. The picture is drawn from the records: `python recipes/hybrid_tiny.py --redraw --out docs/evidence/hybrid`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import trange
from transformers import Lfm2Config, Lfm2ForCausalLM

from hf_longtrunc import LMInfinite
from hf_longtrunc.evaluation import append_records, cache_bytes, compare_losses, read_records, start_stream
from hf_longtrunc.models import CACHE

WINDOW = 256
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)
ARMS: dict[str, Any] = {
    "unmodified": nullcontext,
    "no sinks": LMInfinite(num_sink_tokens=0),
    "LM-Infinite": LMInfinite(),
}


@dataclass(frozen=True)
class ByteLoss:
    """Negative log-likelihood a byte in one bin of positions of one stretch of text."""

    text: str
    stretch: int
    arm: str
    start: int
    end: int
    nll: float


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one row after `seen` bytes of text."""

    arm: str
    seen: int
    cache_bytes: int


def new_model() -> Lfm2ForCausalLM:
    kinds = ["conv", "full_attention"] * 2
    config = Lfm2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Lfm2ForCausalLM(config)


def train(data: Tensor, steps: int, rows: int, learning_rate: float) -> Lfm2ForCausalLM:
    """Train on random stretches of 257 bytes, next-byte cross-entropy, AdamW with a warm-up and a cosine."""
    model, draw = new_model(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    with trange(steps, desc="training") as bar:
        for _ in bar:
            starts = torch.randint(len(data) - WINDOW - 1, (rows, 1), generator=draw)
            ids = data[starts + torch.arange(WINDOW)]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def read_bytes(path: Path) -> Tensor:
    return torch.tensor(list(path.read_bytes()))


def mean_losses(model: Any, texts: dict[str, Tensor], tokens: int, stretches: int) -> list[ByteLoss]:
    """Read stretches of the texts, and return their mean losses by arm and bin."""
    rows = []
    for ids in texts.values():
        starts = torch.linspace(0, len(ids) - tokens, stretches).long()[:, None]
        rows.append(ids[starts + torch.arange(tokens)])
    losses = compare_losses(model, torch.cat(rows), ARMS, chunk=512, progress=True)
    names = [(name, stretch) for name in texts for stretch in range(stretches)]
    edges = [edge for edge in EDGES if edge <= tokens]
    return [
        ByteLoss(*name, arm, start, end, float(row[start:end].mean()))
        for arm, of_arm in losses.items()
        for name, row in zip(names, of_arm, strict=True)
        for start, end in pairwise(edges)
    ]


def plot(means: list[ByteLoss]) -> Any:
    """Draw perplexity against position on a logarithmic scale, a line an arm and a point a bin; return the Axes."""
    from matplotlib import pyplot

    axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")[1]
    bins = sorted({(mean.start, mean.end) for mean in means})
    for others, arm in enumerate(ARMS):  # the first is thick, the others are dashes over it: each is seen
        style: dict[str, Any] = (
            {"linewidth": 1.5, "linestyle": (0, (4, 1 + 2 * others))} if others else {"linewidth": 3}
        )
        found = [exp(fmean(each.nll for each in means if (each.arm, each.start) == (arm, start))) for start, _ in bins]
        axes.plot([(start + end) / 2 for start, end in bins], found, marker="o", label=arm, **style)
    axes.axvline(WINDOW, color="grey", linestyle=":", linewidth=1, label="trained window")
    axes.set(xscale="log", xlabel="position (bytes; each point the mean of a bin)", ylabel="perplexity a byte")
    axes.set_xticks([(start + end) / 2 for start, end in bins], [f"{start:,}-{end:,}" for start, end in bins])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)  # above: it covers no line
    return axes


def table_of(means: list[ByteLoss]) -> Table:
    """Lay out perplexities, each above its 95 % interval over stretches: a row an arm, a column a bin.

    The last row is the unmodified model's over LM-Infinite's, stretch by stretch.
    """
    bins = sorted({(mean.start, mean.end) for mean in means})
    table = Table("arm", *(f"{start:,}-{end:,}" for start, end in bins), title="perplexity a byte")
    nll = {
        (arm, start): torch.tensor([mean.nll for mean in means if (mean.arm, mean.start) == (arm, start)])
        for arm in ARMS
        for start, _ in bins
    }
    for arm in ARMS:
        table.add_row(arm, *(cell(nll[arm, start]) for start, _ in bins))
    differences = (nll["unmodified", start] - nll["LM-Infinite", start] for start, _ in bins)
    table.add_row("unmodified\n/ LM-Infinite", *map(cell, differences))
    return table


def cell(nll: Tensor) -> str:
    middle, margin = float(nll.mean()), 1.96 * float(nll.std()) / len(nll) ** 0.5
    return f"{exp(middle):.2f}\n{exp(middle - margin):.2f}-{exp(middle + margin):.2f}"


@torch.inference_mode()
def cache_sizes(model: Any, ids: Tensor) -> list[CacheSize]:
    """Read the beginning of a text and return what its cache holds; the unmodified model reads less, for its time."""
    sizes = []
    for name, lengths in {"unmodified": [1_000, 10_000], "LM-Infinite": [1_000, 10_000, 100_000]}.items():
        with ARMS[name](model):
            for length in lengths:
                cache, _ = start_stream(model, ids[None, :1])
                for piece in torch.split(ids[None, 1:length], 1024, dim=1):
                    model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
                sizes.append(CacheSize(name, length, cache_bytes(cache)))
    return sizes


def main(
    texts: Annotated[Path, typer.Option(help="Folder of texts, *.txt.")] = Path(),
    held_out: Annotated[str, typer.Option(help="Those that are read and not trained on, separated by commas.")] = "",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 800,
    rows: Annotated[int, typer.Option(help="Stretches of 256 bytes a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Its highest value.")] = 4e-3,
    tokens: Annotated[int, typer.Option(help="Bytes of each stretch that is read.")] = 8192,
    stretches: Annotated[int, typer.Option(help="Stretches of each text that is held out.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for model, records and picture.")] = Path("hybrid_tiny"),
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw the picture of records in OUT; nothing is read.")
    ] = False,
) -> None:
    console = Console()
    if redraw:
        plot(read_records(out / "perplexity.jsonl", ByteLoss)).figure.savefig(out / "perplexity.png", dpi=130)
        return
    files = {path.name: path for path in sorted(texts.glob("*.txt"))}
    missing = [name for name in held_out.split(",") if name not in files]
    if missing:
        raise typer.BadParameter(f"not in {texts}: {', '.join(missing)}", param_hint="--held-out")
    if (out / "model").exists():
        model: Any = Lfm2ForCausalLM.from_pretrained(out / "model")
    else:
        data = [read_bytes(path) for name, path in files.items() if name not in held_out.split(",")]
        model = train(torch.cat(data), steps, rows, learning_rate)
        model.save_pretrained(out / "model")
    model.eval()
    held = {name: read_bytes(files[name]) for name in held_out.split(",")}
    means = mean_losses(model, held, tokens, stretches)
    append_records(out / "perplexity.jsonl", means)
    console.print(table_of(means))
    console.print(f"{stretches} stretches of each of {held_out}; below each value 1.96 standard errors either way")
    sizes = cache_sizes(model, next(iter(held.values())))
    append_records(out / "cache.jsonl", sizes)
    for size in sizes:
        console.print(f"{size.arm}: {size.cache_bytes:,} bytes of cache after {size.seen:,} bytes of text")
    plot(means).figure.savefig(out / "perplexity.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
