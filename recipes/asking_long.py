"""`ask` on texts of up to a million tokens: right passages, answers, time and memory, and a saved index.

    python recipes/asking_long.py --texts a.txt,b.txt --lengths 16000,128000,1000000 --each 2,2,1 --out asking-long

The texts are joined to one, facts are hidden in stretches of it (`FactText`), and `ask` is called as a user calls it.
The first text of each length is indexed, timed, saved and loaded; the others add questions. Lengths ascend: a process
never gives its peak of memory back, so each ratio is an upper bound.

Cost: a million tokens take the encoder some six minutes of one CPU core that computes in bfloat16.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

from hf_longtrunc import TextIndex, ask, load_pretrained
from hf_longtrunc.asking.answers import default_finder, peak_bytes
from hf_longtrunc.evaluation import wilson_interval
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.records import Journal
from instruments.fact_text import SHARED, FactText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class LongTextRecord:
    """One text; `right` and `strict` hold a 0 or 1 for each question that it answers in one place."""

    finder: str
    length: int
    trial: int
    units: int
    index_seconds: float
    index_processor_seconds: float
    question_seconds: list[float]
    peak_bytes: int
    kinds: list[str]
    right: list[int]
    strict: list[int]
    loaded_answers_the_same: bool | None


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    lengths: Annotated[str, typer.Option(help="Tokens of a text, ascending.")] = "16000,128000,1000000",
    each: Annotated[str, typer.Option(help="Texts of each length.")] = "2,2,1",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; all-MiniLM-L6-v2 if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for asking_long.jsonl.")] = Path("asking-long"),
) -> None:
    torch.set_num_threads(1)
    language_model, tokenizer = load_pretrained(model)
    novel = "\n\n".join(Path(text).read_text(encoding="utf-8") for text in texts.split(","))
    results = tuple(field.name for field in fields(LongTextRecord) if field.name not in ("finder", "length", "trial"))
    journal, records = Journal(out / "asking_long.jsonl", LongTextRecord, results), []
    finder = default_finder(encoder)
    for length, count in zip(map(int, lengths.split(",")), map(int, each.split(",")), strict=True):
        for trial in range(count):
            measure = partial(measured, language_model, tokenizer, finder, novel, length, trial)
            records.append(journal.once({"finder": finder.identity, "length": length, "trial": trial}, measure))
    Console(width=None if Console().is_terminal else 160).print(long_table(records))


def measured(model: Any, tokenizer: Any, finder: Any, novel: str, length: int, trial: int) -> dict[str, Any]:
    """Index one text, ask about it, and save and load the index of the first."""
    text = FactText(novel, tokenizer, length, trial)
    started = time.perf_counter(), time.process_time()
    index = TextIndex(text.text, finder, progress=True)
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    asked = [q for q in text.questions if q.kind in (*SHARED, "unshared")]
    answers = ask(model, tokenizer, index, [q.text for q in asked], max_new_tokens=24)
    units, same = len(index), None
    if trial == 0:
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            del index  # a user holds one of the two
            loaded = TextIndex.load(folder, text.text, finder)
        again = ask(model, tokenizer, loaded, [q.text for q in asked[:8]], max_new_tokens=24)
        same = [(a.text, a.passages) for a in again] == [(a.text, a.passages) for a in answers[:8]]
    return {
        "units": units,
        "index_seconds": round(seconds[0], 2),
        "index_processor_seconds": round(seconds[1], 2),
        "question_seconds": [round(answer.seconds, 3) for answer in answers],
        "peak_bytes": peak_bytes(model) or 0,
        "kinds": [q.kind for q in asked],
        "right": [int(q.is_read_in(a.passages)) for q, a in zip(asked, answers, strict=True)],
        "strict": [int(q.scores(a.text)[1]) for q, a in zip(asked, answers, strict=True)],
        "loaded_answers_the_same": same,
    }


def long_table(records: Sequence[LongTextRecord]) -> Table:
    """Lay out a row a length: shares with interval and n, seconds, and ratios to the first length."""
    headings: tuple[str, ...] = (
        "tokens",
        "words shared: right passage",
        "right answer",
        "none shared: right passage",
        "right answer",
    )
    headings += ("index s", "processor s", "a token, ratio", "question s", "peak MiB", "ratio", "loaded same")
    table = new_table(*headings, title="ask on long texts: shares with 95 % interval and n")
    base = min(records, key=lambda record: (record.length, record.trial))
    for length in sorted({record.length for record in records}):
        own = [record for record in records if record.length == length]
        pairs = [p for r in own for p in zip(r.kinds, r.right, r.strict, strict=True)]
        shared, none = ([p for p in pairs if (p[0] in SHARED) is wanted] for wanted in (True, False))
        first = own[0]
        ratio = (first.index_processor_seconds / length) / (base.index_processor_seconds / base.length)
        seconds = sorted(s for record in own for s in record.question_seconds)
        table.add_row(
            f"{length:,}",
            *(_share([int(p[k]) for p in some]) for some in (shared, none) for k in (1, 2)),
            f"{first.index_seconds:.1f}",
            f"{first.index_processor_seconds:.1f}",
            f"{ratio:.2f}",
            f"{seconds[len(seconds) // 2]:.2f}",
            f"{max(r.peak_bytes for r in own) / 2**20:,.0f}",
            f"{max(r.peak_bytes for r in own) / max(r.peak_bytes for r in records if r.length == base.length):.3f}",
            str(first.loaded_answers_the_same),
        )
    return table


def _share(hits: Sequence[int]) -> str:
    share = sum(hits) / len(hits)
    low, high = wilson_interval(share, len(hits))
    return f"{share:.2f} ({low:.2f}-{high:.2f}, {len(hits)})"


if __name__ == "__main__":
    typer.run(main)
