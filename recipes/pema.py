"""Teach a frozen model a house style from 100 examples with PEMA, and let it rewrite requests it never saw.

    python recipes/pema.py --out pema

A note ("yo client 916 still owes 1689 on order 37162") is to be written in a fixed formal wording that keeps its three
slots: order, amount, client. None of the values asked about occurs in training. Nothing of the model changes.

Cost: five minutes on two CPU cores with SmolLM2-135M-Instruct, half of them for learning. Expected: exact match 0 for
the model alone, at least 0.9 with the adapter at a constant share of 0.5. Every answer goes to OUT/pema.jsonl, the
adapter to OUT/adapter.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_longtrunc import (
    PEMA,
    GradualUnrolling,
    PEMAAdapter,
    build_pema_memory,
    load_pretrained,
    train_pema,
)
from hf_longtrunc.evaluation import append_records

if TYPE_CHECKING:
    from collections.abc import Collection

# A slot is a number of so many digits. The values asked about do not occur in training.
SLOTS = {"order": 5, "amount": 4, "client": 3}
OPENINGS = ["hey", "yo", "pls note", "fyi"]
SOURCE = "{opening} client {client} still owes {amount} on order {order}"
TARGET = (
    "Dear Sir or Madam, may we kindly remind client {client} that {amount} euros remain outstanding on order {order}. "
    "With our best regards."
)
PROMPT = "Informal request: {source}\nFormal request:"


@dataclass(frozen=True)
class Request:
    """A request, how it is to be written, and what must not get lost on the way."""

    source: str
    target: str
    slots: list[str]

    @property
    def prompt(self) -> str:
        """Return the prompt of a request."""
        return PROMPT.format(source=self.source)


@dataclass(frozen=True)
class Rewriting:
    """One request, the arm that rewrote it, and the result."""

    arm: str
    source: str
    target: str
    answer: str
    exact: bool
    slots_kept: float
    seconds: float
    examples: int
    seed: int


def main(
    examples: Annotated[int, typer.Option(help="Requests to learn from.")] = 100,
    tests: Annotated[int, typer.Option(help="Requests over unseen slot values.")] = 40,
    epochs: Annotated[int, typer.Option(help="Passes over the memory.")] = 6,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 512,
    batch: Annotated[int, typer.Option(help="Requests in a forward.")] = 40,
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for pema.jsonl and the adapter.")] = Path("pema"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    draw = random.Random(seed)
    learned = requests(draw, examples)
    asked = requests(draw, tests, known={slot for one in learned for slot in one.slots})
    started = time.perf_counter()
    memory = build_pema_memory(language_model, [tokenized(tokenizer, one) for one in learned], progress=True)
    built = time.perf_counter()
    adapter = train_pema(language_model, memory, rank=rank, epochs=epochs, seed=seed, progress=True)
    print(f"{memory}: {built - started:.0f} s; {adapter}: {time.perf_counter() - built:.0f} s")
    adapter.save_pretrained(out / "adapter")
    shown = "".join(f"{one.prompt}{one.target}\n\n" for one in learned[:3])
    arms = {
        "model alone": ("", None),
        "PEMA, constant 0.5": ("", 0.5),
        "PEMA, constant 0.7": ("", 0.7),
        "model alone, 3 examples in the prompt": (shown, None),
        "PEMA, gradual unrolling from 0.9": ("", "gradual"),
        "PEMA alone": ("", 1.0),
    }
    records = []
    for arm, (shots, share) in arms.items():
        for start in range(0, len(asked), batch):
            some = asked[start : start + batch]
            began = time.perf_counter()
            answers = rewrite(language_model, tokenizer, adapter, some, shots, share)
            seconds = (time.perf_counter() - began) / len(some)
            new = [
                Rewriting(
                    arm=arm,
                    source=one.source,
                    target=one.target.strip(),
                    answer=answer,
                    exact=answer == one.target.strip(),
                    slots_kept=sum(slot in answer for slot in one.slots) / len(one.slots),
                    seconds=round(seconds, 3),
                    examples=examples,
                    seed=seed,
                )
                for one, answer in zip(some, answers, strict=True)
            ]
            append_records(out / "pema.jsonl", new)
            records += new
    Console().print(table(records))


def requests(draw: random.Random, count: int, known: Collection[str] = ()) -> list[Request]:
    """Draw requests with distinct slot values, none of them in `known`."""
    result: list[Request] = []
    used = set(known)
    while len(result) < count:
        slots = {name: str(draw.randrange(10 ** (digits - 1), 10**digits)) for name, digits in SLOTS.items()}
        if used.isdisjoint(slots.values()):
            used.update(slots.values())
            source = SOURCE.format(opening=draw.choice(OPENINGS), **slots)
            result.append(Request(source, " " + TARGET.format(**slots), list(slots.values())))
    return result


def tokenized(tokenizer: Any, one: Request) -> dict[str, list[int]]:
    prompt = tokenizer(one.prompt)["input_ids"]
    target = [*tokenizer(one.target)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}


def rewrite(
    model: Any, tokenizer: Any, adapter: PEMAAdapter, asked: list[Request], shots: str, share: float | str | None
) -> list[str]:
    """Return the first line of each answer, written greedily."""
    inputs = tokenizer([shots + one.prompt for one in asked], return_tensors="pt", padding=True).to(model.device)
    width = inputs["input_ids"].shape[1]
    options = {**inputs, "do_sample": False, "max_new_tokens": 40}
    if share is None:
        sequences = model.generate(**options)
    else:
        sources = [len(tokenizer(one.source)["input_ids"]) for one in asked]
        interpolation = (
            GradualUnrolling(source_length=sources, prompt_length=width) if isinstance(share, str) else share
        )
        with PEMA(adapter, interpolation=interpolation)(model) as pema:
            sequences = model.generate(**options, logits_processor=[pema])
    texts = tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)
    return [text.strip().partition("\n")[0].strip() for text in texts]


def table(records: list[Rewriting]) -> Table:
    result = Table(title="Requests over unseen slot values", caption=f"{records[0].target!r}")
    for heading in ("arm", "exact match", "slots kept", "s a request", "first answer"):
        result.add_column(heading, overflow="fold")
    for arm, group in groupby(records, key=lambda record: record.arm):
        rows = list(group)
        exact, kept, seconds = (mean(getattr(row, name) for row in rows) for name in ("exact", "slots_kept", "seconds"))
        result.add_row(arm, f"{exact:.3f}", f"{kept:.3f}", f"{seconds:.2f}", rows[0].answer)
    return result


if __name__ == "__main__":
    typer.run(main)
