"""A hybrid past its window: a byte model of convolutions and two attention layers, trained at 256 bytes, read to 8,192.

    python recipes/hybrid_tiny.py --text a.txt --text b.txt --eval-text c.txt --out hybrid_tiny

No pretrained hybrid lies on the package index, so one is trained here: LFM2's layers (short convolutions, and full
attention in every third layer), 1 million parameters, on bytes. Its convolutions see three bytes and never change;
what breaks past 256 bytes is attention, and that is what LM-Infinite limits. Printed and recorded: perplexity a byte by
position on a text that it was not trained on, unmodified and under LM-Infinite, and the bytes of the cache at the end.

Cost: some fifteen minutes on one CPU core; the trained model is kept in the output folder and not trained again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from tqdm import trange
from transformers import Lfm2Config, Lfm2ForCausalLM

from hf_longtrunc import LMInfinite
from hf_longtrunc.evaluation import (
    append_records,
    cache_bytes,
    compare_losses,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
    start_stream,
)
from hf_longtrunc.models import CACHE

WINDOW = 256


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one row after `seen` bytes of text."""

    arm: str
    seen: int
    cache_bytes: int


def new_model() -> Lfm2ForCausalLM:
    kinds = ["conv", "conv", "full_attention"] * 2
    config = Lfm2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        block_auto_adjust_ff_dim=False,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=4,
        num_key_value_heads=2,
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


@torch.inference_mode()
def cache_sizes(model: Any, ids: Tensor, arms: dict[str, Any], lengths: list[int]) -> list[CacheSize]:
    sizes = []
    for name, arm in arms.items():
        with arm(model):
            for length in lengths:
                row = ids.repeat(-(-length // len(ids)))[None, :length]
                cache, _ = start_stream(model, row[:, :1])
                for piece in torch.split(row[:, 1:], 1024, dim=1):
                    model(input_ids=piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
                sizes.append(CacheSize(name, length, cache_bytes(cache)))
    return sizes


def main(
    text: Annotated[list[Path], typer.Option(help="Texts to train on.")],
    eval_text: Annotated[Path, typer.Option(help="A text that is not among them.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1500,
    rows: Annotated[int, typer.Option(help="Stretches of 256 bytes a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Its highest value.")] = 2e-3,
    tokens: Annotated[int, typer.Option(help="Bytes of each stretch that is read.")] = 8192,
    stretches: Annotated[int, typer.Option(help="Stretches of the other text.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for model, records and picture.")] = Path("hybrid_tiny"),
) -> None:
    console = Console()
    if (out / "model").exists():
        model: Any = Lfm2ForCausalLM.from_pretrained(out / "model")
    else:
        model = train(torch.cat([read_bytes(path) for path in text]), steps, rows, learning_rate)
        model.save_pretrained(out / "model")
    model.eval()
    ids = read_bytes(eval_text)
    starts = torch.linspace(0, len(ids) - tokens, stretches).long()[:, None]
    arms: dict[str, Any] = {"unmodified": nullcontext, "LM-Infinite": LMInfinite(num_sink_tokens=8)}
    losses = compare_losses(model, ids[starts + torch.arange(tokens)], arms, chunk=512, progress=True)
    edges = [edge for edge in (0, 128, 256, 512, 1024, 2048, 4096, 8192) if edge <= tokens]
    records = perplexity_records(model, losses, arms, edges)
    console.print(perplexity_table(records))
    sizes = cache_sizes(model, ids, arms, [1_000, 10_000, 100_000])
    for size in sizes:
        console.print(f"{size.arm}: {size.cache_bytes:,} bytes of cache after {size.seen:,} bytes of text")
    append_records(out / "perplexity.jsonl", records)
    append_records(out / "cache.jsonl", sizes)
    plot_perplexity(losses, trained_window=WINDOW).figure.canvas.print_figure(out / "perplexity.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)
