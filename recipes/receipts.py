"""Passages that a host hands back with its answers: whether they are the right ones, and what they cost.

    python recipes/receipts.py --texts great_expectations.txt,pride_and_prejudice.txt --out receipts

exports the model with LM-Infinite and a finder, and sends it chats of one message: a stretch of a novel that states a
fact of each kind once (`hf_longtrunc.evaluation.find_and_read.FactText`, the phrasings that nothing was chosen on), and
a question about it. An answer is right if it holds the value asked for and no other fact's. Of the right answers it
prints how many name the passage with the fact, and of all answers how long finding took.

Cost: with SmolLM2-135M-Instruct on one CPU core some 2 s a question. A run that was cut off goes on where it stopped.
Expect: the right passage in at least 90 % of right answers; finding at most 10 % of an answer's time.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable  # noqa: TC003 (typer reads the annotations when it runs)
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longtrunc import LMInfinite
from hf_longtrunc.evaluation import append_records, read_records
from hf_longtrunc.evaluation.find_and_read import NOTHING, FactText
from hf_longtrunc.evaluation.heat_maps import wilson_interval
from hf_longtrunc.hosting import export, find_and_read

NEW = 24  # tokens of an answer


@dataclass(frozen=True)
class Receipt:
    """One question; `source` is the novel, `right` says whether the first passage holds the fact."""

    source: str
    trial: int
    kind: str
    question: str
    answer: str
    strict: float
    read: int
    kept: int
    right: bool
    passage: str
    score: float
    seconds: float
    finding: float
    indexed: bool


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    each: Annotated[int, typer.Option(help="Stretches of each novel.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a stretch.")] = 2500,
    window: Annotated[int, typer.Option(help="LM-Infinite's.")] = 1024,
    finder: Annotated[str, typer.Option(help="encoder or bm25")] = "encoder",
    part: Annotated[str, typer.Option(help="Whose phrasings: choose or report.")] = "report",
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("receipts"),
) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "receipts.jsonl"
    known = {(record.source, record.trial): record for record in read_records(path, Receipt)} if path.exists() else {}
    finding: list[float] = []
    find = find_and_read.find_and_shorten

    def timed(*args: Any) -> Any:
        since = time.perf_counter()
        found = find(*args)
        finding.append(time.perf_counter() - since)
        return found

    sys.modules["hf_longtrunc.hosting.generate"].find_and_shorten = timed  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(None, Path(scratch, "endless"), LMInfinite(window_length=window), finder=finder).folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        cells = [(Path(text), trial) for text in texts.split(",") for trial in range(each)]
        for novel, trial in tqdm(cells, disable=not sys.stderr.isatty()):
            if (novel.stem, trial) in known:
                continue
            fact_text = FactText(novel.read_text(encoding="utf-8"), tokenizer, length, trial, part=part)
            records: list[Receipt] = []
            for question in fact_text.questions:
                if question.kind in (*NOTHING, "follow-up", "two hops"):
                    continue
                message = f"{fact_text.text}\n\n{question.text}"
                ids: Any = tokenizer.apply_chat_template(
                    [{"role": "user", "content": message}],
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                since = time.perf_counter()
                made = model.generate(**ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
                seconds = time.perf_counter() - since
                answer = tokenizer.decode(made.sequences[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
                passages = made.reading["passages"]
                if passages:
                    assert message[passages[0]["start"] : passages[0]["end"]] == passages[0]["text"]
                passage = passages[0]["text"] if passages else ""
                fact = " ".join(question.stated[0].split())
                records.append(
                    Receipt(
                        source=novel.stem,
                        trial=trial,
                        kind=question.kind,
                        question=question.text,
                        answer=answer,
                        strict=question.scores(answer)[1],
                        read=made.reading["read"],
                        kept=made.reading["kept"],
                        right=fact in " ".join(passage.split()),
                        passage=passage,
                        score=passages[0]["score"] if passages else 0.0,
                        seconds=round(seconds, 3),
                        finding=round(finding[-1], 4),
                        indexed=bool(records),
                    )
                )
            append_records(path, records)
    report(read_records(path, Receipt))


def report(records: list[Receipt]) -> None:
    """Print the shares, with n and intervals, and the seconds."""
    print(f"{len(records)} questions about texts of {median(each.read for each in records):,.0f} tokens")
    correct = [each for each in records if each.strict]
    for source in sorted({each.source for each in records}):
        share(f"  right answers, {source}", (bool(each.strict) for each in records if each.source == source))
    share("right answers", (bool(each.strict) for each in records))
    share("right answers whose first passage holds the fact", (each.right for each in correct))
    share("all answers whose first passage holds the fact", (each.right for each in records))
    for kind, some in (
        ("a text that was indexed before", [each for each in records if each.indexed]),
        ("a new text", [each for each in records if not each.indexed]),
    ):
        part = 100 * sum(each.finding for each in some) / max(1e-9, sum(each.seconds for each in some))
        print(
            f"{kind}, {len(some)} answers: {median(each.seconds for each in some):.2f} s an answer, of which finding "
            f"takes {median(each.finding for each in some):.3f} s (medians; {part:.1f} % of all seconds)"
        )
    print(f"tokens read by the model: {median(each.kept for each in records):,.0f} (median)")


def share(what: str, yes: Iterable[bool]) -> None:
    found = list(yes)
    mean = sum(found) / max(1, len(found))
    low, high = wilson_interval(mean, max(1, len(found)))
    print(f"{what}: {sum(found)} of {len(found)} = {mean:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    typer.run(main)
