"""Passages that a host hands back with its answers: whether they are the right ones, and what they cost.

    python recipes/receipts.py --texts great_expectations.txt,pride_and_prejudice.txt --out receipts

exports the model with LM-Infinite and a finder. Its chats are one message: a stretch of a novel that states a fact of
each kind once (`FactText`, phrasings that nothing was chosen on), and a question
about it. The prompts that the folder makes for a stretch's questions are answered together, which takes a third of the
time. Questions about the first stretch are also sent to the folder one by one, timed, and the answers compared. An
answer is right if it holds the value asked for and no other fact's. A question for which no passage stands out is
counted, and not answered.

Cost: with SmolLM2-135M-Instruct on one CPU core three minutes. A run that was cut off goes on where it stopped.
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
from hf_longtrunc.evaluation.intervals import wilson_interval
from hf_longtrunc.hosting import export
from hf_longtrunc.hosting.find_and_read import find_and_shorten
from instruments.fact_text import NOTHING, FactText

SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@dataclass(frozen=True)
class Receipt:
    """One question about a stretch of a novel.

    Attributes:
        right: whether the first passage holds the fact.
        finding: processor seconds of finding it; of the first question that includes indexing the text.
        hosted: the folder's own answer; None where it was not asked.
        seconds: processor seconds of that answer, finding included.
    """

    novel: str
    trial: int
    number: int
    kind: str
    question: str
    read: int
    kept: int
    passage: str
    score: float
    right: bool
    answer: str | None
    strict: float
    finding: float
    hosted: str | None = None
    seconds: float | None = None


def main(
    texts: Annotated[str, typer.Option(help="Novels, separated by commas.")],
    each: Annotated[int, typer.Option(help="Stretches of each novel.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a stretch.")] = 2500,
    window: Annotated[int, typer.Option(help="LM-Infinite's.")] = 1024,
    finder: Annotated[str, typer.Option(help="encoder or bm25")] = "encoder",
    part: Annotated[str, typer.Option(help="Whose phrasings: choose or report.")] = "report",
    timed: Annotated[int, typer.Option(help="Stretches whose questions are sent one by one too.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("receipts"),
) -> None:
    torch.set_num_threads(1)
    path = out / "receipts.jsonl"
    known = {(record.novel, record.trial) for record in read_records(path, Receipt)}
    technique = LMInfinite(window_length=window)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(None, Path(scratch, "endless"), technique, finder=finder).folder
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        cells = [(Path(text), trial) for text in texts.split(",") for trial in range(each)]
        for number, (novel, trial) in enumerate(tqdm(cells, disable=not sys.stderr.isatty())):
            if (novel.stem, trial) not in known:
                text = FactText(novel.read_text(encoding="utf-8"), tokenizer, length, trial, part=part)
                append_records(path, asked(model, tokenizer, technique, finder, text, novel.stem, number < timed))
    report(read_records(path, Receipt))


def asked(
    model: Any, tokenizer: Any, technique: Any, finder: str, text: FactText, novel: str, is_timed: bool
) -> list[Receipt]:
    """Return the records of a text's questions."""
    questions = [each for each in text.questions if each.kind not in (*NOTHING, "follow-up", "two hops")]
    prompts, found, finding = [], [], []
    for question in questions:
        chat = [{"role": "user", "content": f"{text.text}\n\n{question.text}"}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids)
        since = time.process_time()
        found.append(find_and_shorten(model, tokenizer, prompts[-1], finder, "None") or (prompts[-1], []))
        finding.append(round(time.process_time() - since, 4))
    rows = [short[0].tolist() for short, passages in found if passages]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with technique(model):
        made = type(model).generate(model, **batch, **SETTINGS)[:, batch["input_ids"].shape[1] :]
    answers = iter(tokenizer.batch_decode(made, skip_special_tokens=True))
    records = []
    for number, (question, (short, passages)) in enumerate(zip(questions, found, strict=True)):
        answer = next(answers) if passages else None
        passage = passages[0].text if passages else ""
        hosted, seconds = None, None
        if is_timed and passages:
            since = time.process_time()
            output = model.generate(prompts[number], tokenizer=tokenizer, return_dict_in_generate=True, **SETTINGS)
            seconds = round(time.process_time() - since, 3)
            hosted = tokenizer.decode(output.sequences[0, prompts[number].shape[1] :], skip_special_tokens=True)
            assert output.reading["passages"][0]["text"] == passage
        records.append(
            Receipt(
                novel=novel,
                trial=text.trial,
                number=number,
                kind=question.kind,
                question=question.text,
                read=prompts[number].shape[1],
                kept=short.shape[1],
                passage=passage,
                score=round(passages[0].score, 4) if passages else 0.0,
                right=" ".join(question.stated[0].split()) in " ".join(passage.split()),
                answer=answer,
                strict=question.scores(answer or "")[1],
                finding=finding[number],
                hosted=hosted,
                seconds=seconds,
            )
        )
    return records


def report(records: list[Receipt]) -> None:
    """Print the shares, with n and intervals, and the seconds."""
    answered = [each for each in records if each.answer is not None]
    right = [each for each in answered if each.strict]
    print(f"{len(records)} questions about texts of {median(each.read for each in records):,.0f} tokens (median)")
    share("a passage stands out", (each.answer is not None for each in records))
    share("its answer is right", (bool(each.strict) for each in answered))
    for novel in [*sorted({each.novel for each in records}), ""]:
        name = f", {novel}" if novel else ""
        share(
            f"right answers whose passage holds the fact{name}",
            (r.right for r in right if r.novel == novel or not novel),
        )
    share("wrong answers whose passage holds the fact", (each.right for each in answered if not each.strict))
    hosted = [each for each in records if each.seconds is not None]
    share("the folder's own answers that are the same", (each.hosted == each.answer for each in hosted))
    seconds = sum(each.seconds or 0 for each in hosted)
    later = [each.finding for each in records if each.number]
    first = [each.finding for each in records if not each.number]
    part = 100 * median(later) * len(hosted) / max(1e-9, seconds)
    print(f"processor seconds of an answer: {seconds / max(1, len(hosted)):.2f}")
    print(f"to find, in an indexed text: {median(later):.3f} ({part:.1f} %); with indexing it: {median(first):.2f}")
    print(f"tokens that the model reads for an answer: {median(each.kept for each in answered):,.0f} (median)")


def share(what: str, yes: Iterable[bool]) -> None:
    found = list(yes)
    mean = sum(found) / max(1, len(found))
    low, high = wilson_interval(mean, max(1, len(found)))
    print(f"{what}: {sum(found)} of {len(found)} = {mean:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    typer.run(main)
