"""The long part of `hf-longtrunc demo`: a text past the trained window, and a question at its end."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from hf_longtrunc import LMInfinite, trained_length
from hf_longtrunc.cli import common
from hf_longtrunc.cli.demo_parts import heading
from hf_longtrunc.cli.ppl import PICTURE, RECORDS, read_tokens
from hf_longtrunc.evaluation import (
    append_records,
    cache_bytes,
    default_edges,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
    python_reference,
    start_stream,
)
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from hf_longtrunc.evaluation.records import Arm

# What the long text is given near its end, and what is asked behind it.
NOTE = "\n\nNote: The key to the storeroom hangs behind the green clock.\n\n"
QUESTION = "\n\nQuestion: Where does the key to the storeroom hang?\nAnswer: The key to the storeroom hangs"
NOTE_DISTANCE = 200


@dataclass(frozen=True)
class Reading:
    """One reading of the long text: each token's loss, the answer to the question at its end, the cache's size."""

    losses: Tensor
    answer: str
    cache_bytes: int


def past_the_window(
    model: Any, tokenizer: Any, folder: Path, *, text: str | None = None, tokens: int | None = None, console: Console
) -> dict[str, Any]:
    """Read a text past the trained window, unmodified and under LM-Infinite, and ask both about its last page.

    The text is Python's own language reference unless one is given. `tokens` of it are read, by default three eighths
    more than the trained window; LM-Infinite's window is a quarter of the trained one. The picture and the records go
    to `folder`. Cost: two readings.
    """
    window = trained_length(model.config)
    tokens = tokens or window * 11 // 8
    heading(console, f"LM-Infinite: {tokens:,} tokens for a model that was trained on {window:,}")
    ids = read_tokens(StringIO(python_reference() if text is None else text), tokenizer, tokens)
    place = max(1, len(ids) - NOTE_DISTANCE)
    note, question = (torch.tensor(tokenizer(part).input_ids) for part in (NOTE, QUESTION))
    ids = torch.cat([ids[:place], note, ids[place:], question])
    arms: dict[str, Arm] = {"unmodified": nullcontext, "LM-Infinite": LMInfinite(window_length=max(1, window // 4))}
    readings: dict[str, Reading] = {}
    common.notes().print(f"reading {len(ids):,} tokens twice: some three minutes of processor time")
    for name, arm in arms.items():
        with arm(model):
            readings[name] = read_and_answer(model, tokenizer, ids.to(model.device), name)
    losses = {name: reading.losses for name, reading in readings.items()}
    records = perplexity_records(model, losses, arms, default_edges(window, len(ids)))
    console.print(perplexity_table(records))
    table = Table(title="what the model answered", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "answer", "cache, MiB"):
        table.add_column(column, justify="right" if column == "cache, MiB" else "left")
    for name, reading in readings.items():
        table.add_row(name, escape(reading.answer), f"{reading.cache_bytes / 2**20:.0f}")
    console.print(f"[dim]{NOTE_DISTANCE} tokens before the end:[/dim] {NOTE.strip()}")
    console.print(f"[dim]at the end:[/dim] {' '.join(QUESTION.split())}\n")
    console.print(table)
    append_records(folder / RECORDS, records)
    common.save_picture(plot_perplexity(losses, trained_window=window), folder / PICTURE)
    answers = {name: {"answer": each.answer, "cache bytes": each.cache_bytes} for name, each in readings.items()}
    return {"tokens": len(ids), "trained window": window, **answers, "records": [vars(record) for record in records]}


@torch.no_grad()
def read_and_answer(model: Any, tokenizer: Any, ids: Tensor, name: str, *, chunk: int = 512, most: int = 16) -> Reading:
    """Read `ids` [n] by chunks through the model's cache, and continue them greedily by at most `words` tokens."""
    cache, logits = start_stream(model, ids[None, :1])
    losses = []
    with tqdm(total=len(ids), desc=f"reading, {name}", unit="tok", disable=not common.is_watched()) as bar:
        for part in torch.split(ids[None, 1:], chunk, dim=1):
            read = model(input_ids=part, use_cache=True, **{CACHE: cache}).logits
            before = torch.cat([logits[0, -1:], read[0, :-1]]).float()
            losses.append(torch.nn.functional.cross_entropy(before, part[0], reduction="none").cpu())
            logits = read
            bar.update(part.shape[1])
    answer: list[int] = []
    while len(answer) < most and tokenizer.eos_token_id not in answer[-1:]:
        token = logits[:, -1:].argmax(-1)
        answer.append(int(token))
        logits = model(input_ids=token, use_cache=True, **{CACHE: cache}).logits
    text = tokenizer.decode(answer, skip_special_tokens=True).strip().partition("\n")[0]
    return Reading(torch.cat(losses), text, cache_bytes(cache))
