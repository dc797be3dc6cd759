"""Teach a frozen model a house style from 100 examples with PEMA, and let it rewrite requests it never saw.

    python recipes/pema.py --out pema

An informal request ("hey can u get a lamp from Oslo for Anna") is to be written in a fixed formal wording that keeps
its three slots: item, place, name. The adapter learns from examples over one list of slot values; the test takes
values of which none occurs in training. Nothing of the model changes.

Cost: some minutes on two CPU cores with SmolLM2-135M-Instruct. Expected: exact match 0 for the model alone; with the
adapter at a constant share of 0.5, 0.70 from 100 examples and 6 epochs (the aim was 0.9). Every
answer goes to OUT/pema.jsonl, the adapter to OUT/adapter.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hf_longtrunc import (
    GradualUnrolling,
    PEMAAdapter,
    PEMALogitsProcessor,
    build_pema_memory,
    load_pretrained,
    train_pema,
)
from hf_longtrunc.evaluation import append_records

SEEN = {
    "name": "Anna Boris Clara David Elena Felix Grace Henry Irene Jacob Karen Louis Maria Nigel Olive Peter Rosa "
    "Steven Teresa Walter Alice Bruno Carol Dennis Edith Frank Gloria Howard Isabel Kevin Laura Martin Nancy "
    "Oscar Paula Robert Susan Thomas Vera William Tobias Ursula Victor Wendy Simon Rachel Quentin Zoe Albert "
    "Bridget Charles Daniel Emma Gregory Hannah Julia Michael Patrick Sarah Yvonne Aaron Barbara Caroline "
    "Derek Eleanor Fiona Gordon Heather Ian Joanna Kenneth Lydia Matthew Nora Owen Penelope Ralph Sophie "
    "Timothy Veronica Andrew Beatrice Colin Dorothy Edward Frederick Gemma Hugo Ingrid Jasper Kathleen "
    "Leonard Monica Norman Ophelia Philip Rebecca Stanley Tamara Vincent",
    "item": "lamp kettle blanket bicycle violin toaster mirror camera carpet helmet teapot ladder suitcase radio "
    "clock pillow table chair bottle basket jacket scarf piano drum kite tent rope bucket shovel compass "
    "notebook pencil vase candle trumpet sweater backpack stove statue curtain sofa desk guitar printer "
    "telescope wallet hammer book bench broom coat flute hat knife magnet map plate ribbon whistle canoe "
    "towel mattress bowl mug skateboard keyboard monitor speaker battery charger wrench drill pump hose rake "
    "sandwich cake melon pizza cheese novel poster postcard calendar diary dictionary globe puzzle doll "
    "puppet robot rocket wheel tyre saddle boot sandal belt tie",
    "place": "Paris Boston Madrid Oslo Dublin Berlin Chicago Lisbon Vienna Prague Geneva Seattle Naples Denver Munich "
    "Athens London Moscow Warsaw Dallas Houston Atlanta Helsinki Budapest Zurich Venice Florence Glasgow "
    "Bristol Hamburg Cologne Antwerp Portland Phoenix Detroit Montreal Quebec Lima Bogota Quito Tokyo Sydney "
    "Toronto Cairo Mumbai Havana Nairobi Seoul Austin Barcelona Beijing Delhi Dubai Istanbul Milan Miami Rome "
    "Shanghai Stockholm Texas Brussels Copenhagen Edinburgh Frankfurt Stuttgart Salzburg Lyon Nice Bordeaux "
    "Valencia Seville Porto Bucharest Belgrade Zagreb Riga Vilnius Tallinn Kiev Minsk Ankara Tehran Baghdad "
    "Karachi Lahore Hanoi Singapore Osaka Kyoto Brisbane Auckland Vancouver Ottawa Calgary Memphis Nashville "
    "Cleveland Baltimore Oakland Sacramento",
}
UNSEEN = {
    "name": "Angela Bernard Cynthia Douglas Esther Franklin Gilbert Harriet Ivan Jennifer Keith Linda",
    "item": "bell brush cup dress fork glove jar ladle needle ruler spoon zipper",
    "place": "Orlando Tampa Manila Jakarta Bangkok Marseille Turin Krakow Bergen Perth Melbourne Santiago",
}
OPENINGS = ["hey can u get", "yo we need", "pls find", "gimme"]
SOURCE = "{opening} a {item} from {place} for {name}"
TARGET = (
    "Dear colleagues, would you kindly procure a {item} from {place} for {name} at your earliest convenience? With our "
    "best regards."
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
        """What the model is given."""
        return PROMPT.format(source=self.source)


@dataclass(frozen=True)
class Rewriting:
    """One request, the arm that rewrote it and what came out."""

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
    learned, asked = requests(draw, SEEN, examples), requests(draw, UNSEEN, tests)
    check_unseen(learned, asked)
    started = time.perf_counter()
    memory = build_pema_memory(language_model, [tokenized(tokenizer, one) for one in learned], progress=True)
    built = time.perf_counter()
    adapter = train_pema(language_model, memory, rank=rank, epochs=epochs, seed=seed, progress=True)
    print(f"{memory}: {built - started:.0f} s; {adapter}: {time.perf_counter() - built:.0f} s")
    adapter.save(out / "adapter")
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


def requests(draw: random.Random, lists: dict[str, str], count: int) -> list[Request]:
    """Draw requests in which no slot value comes back before its list is through."""
    columns = [shuffled(draw, values.split(), count) for values in lists.values()]
    result = []
    for row in zip(*columns, strict=True):
        slots = dict(zip(lists, row, strict=True))
        source = SOURCE.format(opening=draw.choice(OPENINGS), **slots)
        result.append(Request(source, " " + TARGET.format(**slots), list(row)))
    return result


def shuffled(draw: random.Random, values: list[str], count: int) -> list[str]:
    rounds = -(-count // len(values))
    return [value for _ in range(rounds) for value in draw.sample(values, len(values))][:count]


def check_unseen(learned: list[Request], asked: list[Request]) -> None:
    text = "".join(one.source + one.target for one in learned).lower()
    known = sorted({slot for one in asked for slot in one.slots if slot.lower() in text})
    if known:
        raise ValueError(f"these slot values were to be unseen and stand in the examples: {', '.join(known)}")


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
        interpolation = GradualUnrolling(sources, width) if isinstance(share, str) else share
        with PEMALogitsProcessor(model, adapter, interpolation) as pema:
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
