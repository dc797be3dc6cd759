"""The battery of `ask`: facts that a novel states once, in its own manner of speech, and questions about them.

A `FactText` is a stretch of a novel with some twenty sentences in it (`facts.py`): a fact of each
kind at 5, 35, 65 or 95 % of the text, and others of its kind about other people with other values. Every second fact
lies across the edge of a block of 64 tokens. `run_find_and_read` asks about it under several finders, and with the
sentences of the fact itself in hand ("oracle"), which measures the reading model alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_longtrunc.asking.answers import find_passages
from hf_longtrunc.asking.passages import CONTEXT, GUIDANCE, UNITS
from hf_longtrunc.asking.prompt import PROMPT, chat_ids, fill_prompt, without_passages
from hf_longtrunc.asking.rerank import Reranker
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.intervals import wilson_interval
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings
from instruments import facts
from instruments.fact_text import DEPTHS, KINDS, NOTHING, SHARED, FactText

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from rich.table import Table

    from hf_longtrunc import TextIndex
    from hf_longtrunc.asking.finders import Finder
    from hf_longtrunc.asking.passages import Passage
    from instruments.fact_text import Question

ORACLE = "oracle"
_TOGETHER = 16  # prompts that are answered in one batch
_Prompts = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt, and the same less its passages; empty if it has none


@dataclass(frozen=True, kw_only=True)
class FindAndReadRecord(ModelRecord):
    """One question under one arm; the measurements begin at `tokens_read`.

    `turn` counts a conversation's questions, 1 is a question alone; `right` says whether all sentences that answer
    were read; `answer` is None where only the finder was asked.
    """

    arm: str
    settings: str
    filler: str
    part: str
    length: int
    trial: int
    seed: int
    kind: str
    depth: float
    question: str
    turn: int
    tokens_read: int
    found: bool
    right: bool
    expected: str
    answer: str | None
    lenient: float
    strict: float


def run_find_and_read(
    model: Any,
    tokenizer: Any,
    novels: Mapping[str, str],
    lengths: Iterable[int],
    arms: Mapping[str, Finder],
    *,
    texts: int = 1,
    part: str = "report",
    seed: int = 0,
    read: bool = True,
    trailing: bool = False,
    conversations: bool = False,
    kinds: Collection[str] = KINDS,
    count: int = 1,
    context: int = CONTEXT,
    hops: int = 1,
    reranked: Collection[str] = (),
    guidance: float = GUIDANCE,
    prompt: str = PROMPT,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[FindAndReadRecord]:
    """Ask the questions of several texts under each finder, and with the fact's own sentence in hand ("oracle").

    Args:
        model: a causal LM that generates; it decodes greedily, several questions in one batch.
        tokenizer: of it, with a padding token.
        novels: name -> text.
        lengths: of the texts, in tokens.
        arms: name -> finder.
        texts: of each novel and length.
        part: of the phrasings: "choose" or "report".
        seed: of the draws.
        read: whether the model answers; False asks the finders alone.
        trailing: ask each question twelve times, with one of twelve instructions after it.
        conversations: ask four questions of each text once more, as one conversation.
        kinds: of questions that are asked.
        count: see `hf_longtrunc.ask`.
        context: see there.
        hops: see there.
        reranked: arms in which the model compares the finder's best units, see `Reranker`; in the others it compares
            the best one with and without its neighbours.
        guidance: see `hf_longtrunc.ask`.
        prompt: see there.
        path: a JSON-lines file; a text with records in it is not asked again.
        progress: show a bar.

    Returns:
        A record a question and arm.

    Raises:
        ValueError: a novel is too short; a line of `path` that is no such record.
    """
    from hf_longtrunc import TextIndex

    results = ("tokens_read", "found", "right", "expected", "answer", "lenient", "strict")
    journal, records = Journal(path, FindAndReadRecord, results), []
    given = {"count": count, "context": context, "hops": hops}
    settings = f"{given} read={read} trailing={trailing} guidance={guidance:g} prompt={prompt!r}"
    cells = [(name, length, trial) for name in novels for length in lengths for trial in range(texts)]
    answered: dict[_Prompts, str] = {}
    for name, length, trial in tqdm(cells, desc="texts", disable=not progress):
        text = FactText(novels[name], tokenizer, length, trial, part=part, seed=seed)
        endings = [f" {each}" for each in facts.TRAILING] if trailing else [""]
        alone = [q for q in text.questions if q.kind in kinds and q.kind != "follow-up"]
        asked = [(q, 1, q.text + ending) for q in alone for ending in endings]
        talk = [
            next(q for q in text.questions if q.kind == kind) for kind in ("number", "follow-up", "place", "person")
        ]
        if conversations:
            asked += [(q, turn, q.text) for turn, q in enumerate(talk, 1) if turn > 1]
        for arm in [*arms, ORACLE]:
            finder = arms.get(arm)
            how = {**given, "reranker": Reranker(model, tokenizer, UNITS if arm in reranked else 1)}
            read_by = f"reranked {UNITS} " if arm in reranked else ""
            made_by = settings if finder is None else f"{finder.identity} {read_by}{settings}"
            fixed: dict[str, Any] = {
                "arm": arm,
                "settings": made_by,
                "filler": name,
                "part": part,
                "length": length,
                "trial": trial,
            }
            fixed |= {"seed": seed, **model_settings(model)}
            plans = [
                {**fixed, "kind": q.kind, "depth": q.depth, "question": said, "turn": turn} for q, turn, said in asked
            ]
            known = [journal.get(**plan) for plan in plans]
            if all(known):
                records += [record for record in known if record is not None]
                continue
            index = None if finder is None else TextIndex(text.text, finder)
            turns: list[tuple[str, str]] = []
            for turn in range(1, 5 if conversations else 2):
                group = [(q, said, plan) for (q, at, said), plan in zip(asked, plans, strict=True) if at == turn]
                prompts, passages = [], []
                for q, said, _ in group:
                    found, before = _passages(index, q, said, turns, **how)
                    passages.append(found)
                    ids = chat_ids(tokenizer, before, fill_prompt(prompt, found, said))
                    bare = chat_ids(tokenizer, before, without_passages(prompt, said)) if found else []
                    prompts.append((tuple(ids), tuple(bare)))
                if read:
                    _answer(model, tokenizer, [each for each in prompts if each not in answered], guidance, answered)
                for (q, _, plan), both, found in zip(group, prompts, passages, strict=True):
                    record = FindAndReadRecord(**plan, **_result(q, both[0], found, answered[both] if read else None))
                    journal.add(record)
                    records.append(record)
                if conversations:
                    first = next(n for n, (q, *_) in enumerate(group) if q == talk[turn - 1])
                    turns.append((talk[turn - 1].text, answered.get(prompts[first], "")))
    return records


def find_and_read_table(records: Sequence[FindAndReadRecord]) -> Table:
    """Lay the strict scores out: a row per kind and length, a column per arm with interval, n and right passages.

    Where nothing answers, a cell is the share of questions for which passages were read all the same.
    """
    arms = list(dict.fromkeys(record.arm for record in records))
    table = new_table("asked", "tokens", title="right answers (strict), 95 % interval, n; right passages read")
    for arm in arms:
        table.add_column(arm, justify="right")
    lengths = sorted({record.length for record in records})
    groups = {kind: [r for r in records if r.kind == kind and r.turn == 1] for kind in KINDS}
    groups["words shared"] = [r for r in records if r.kind in SHARED and r.turn == 1]
    groups["nothing answers"] = [r for r in records if r.kind in NOTHING and r.turn == 1]
    groups |= {f"turn {turn}": [r for r in records if r.turn == turn] for turn in (2, 3, 4)}
    rows = [
        (name, f"{at:,}", [r for r in inside if r.length == at]) for name, inside in groups.items() for at in lengths
    ]
    for name in ("words shared", "unshared"):
        for depth in DEPTHS:
            rows.append((f"{name}, at {depth:.0%}", "all", [r for r in groups[name] if r.depth == depth]))
    rows += [
        (name, "all", groups[name]) for name in ("words shared", "unshared", "two hops", *NOTHING, "nothing answers")
    ]
    for name, length, inside in rows:
        if inside:
            table.add_row(name, length, *(_cell([r for r in inside if r.arm == arm]) for arm in arms))
    return table


def paired_test(records: Sequence[FindAndReadRecord], one: str, other: str) -> tuple[int, int, float]:
    """Return how many questions only `one` answers, how many only `other`, and p of McNemar's exact two-sided test."""
    keys = ("filler", "part", "length", "trial", "seed", "question", "turn")
    score: dict[str, dict[tuple[Any, ...], float]] = {one: {}, other: {}}
    for record in records:
        if record.arm in score and record.expected:
            score[record.arm][tuple(getattr(record, key) for key in keys)] = record.strict
    return _mcnemar(score[one], score[other])


def turns_test(records: Sequence[FindAndReadRecord], arm: str) -> tuple[int, int, float]:
    """As `paired_test`, of questions in turns 2 to 4 of a conversation against the same facts asked for alone."""
    later: dict[tuple[Any, ...], float] = {}
    alone: dict[tuple[Any, ...], float] = {}
    for r in records:
        if r.arm == arm and r.expected:
            kind = "birth" if r.kind == "follow-up" else r.kind
            (alone if r.turn == 1 else later)[r.filler, r.part, r.length, r.trial, r.seed, kind, r.expected] = r.strict
    return _mcnemar(later, alone)


def _mcnemar(one: Mapping[Any, float], other: Mapping[Any, float]) -> tuple[int, int, float]:
    from math import comb

    both = one.keys() & other.keys()
    better = sum(one[key] > other[key] for key in both)
    worse = sum(one[key] < other[key] for key in both)
    n = better + worse
    tail = sum(comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return better, worse, min(1.0, 2 * tail)


def _cell(records: Sequence[FindAndReadRecord]) -> str:
    if not records:
        return ""
    if not records[0].expected:
        return f"read {sum(r.found for r in records) / len(records):.2f} ({len(records)})"
    right = f"{sum(r.right for r in records) / len(records):.2f}"
    if records[0].answer is None:
        return f"{right} ({len(records)})"
    share = sum(r.strict for r in records) / len(records)
    low, high = wilson_interval(share, len(records))
    return f"{share:.2f} ({low:.2f}-{high:.2f}, {len(records)}); {right}"


def _passages(
    index: TextIndex | None, question: Question, said: str, turns: list[tuple[str, str]], **how: Any
) -> tuple[list[Passage], list[tuple[str, str]]]:
    """Return the passages for a question, and the turns that it is read with."""
    from hf_longtrunc import Passage

    if index is None:
        found = [Passage(0, len(each), each, 1.0) for each in question.stated]
        return found, turns[-1:] if question.kind == "follow-up" else []
    return find_passages(index, said, turns, **how)


def _result(question: Question, ids: Sequence[int], found: Sequence[Passage], answer: str | None) -> dict[str, Any]:
    lenient, strict = question.scores(answer or "")
    result = {
        "tokens_read": len(ids),
        "found": bool(found),
        "right": question.is_read_in(found),
        "expected": question.expected,
    }
    return {**result, "answer": answer, "lenient": lenient, "strict": strict}


@torch.no_grad()
def _answer(
    model: Any, tokenizer: Any, prompts: Sequence[_Prompts], guidance: float, answered: dict[_Prompts, str]
) -> None:
    """Add the greedy answers to prompts, 24 tokens each, padded on the left in batches of like lengths."""
    from hf_longtrunc import GuidanceLogitsProcessor

    for is_guided in (False, True):
        those = [both for both in dict.fromkeys(prompts) if (bool(both[1]) and guidance != 1) is is_guided]
        todo = sorted(those, key=lambda both: len(both[0]))
        for first in range(0, len(todo), _TOGETHER):
            some = todo[first : first + _TOGETHER]
            ids, mask = _padded(tokenizer, [own for own, _ in some], model.device)
            processors = []
            if is_guided:
                bare = _padded(tokenizer, [bare for _, bare in some], model.device)
                processors.append(GuidanceLogitsProcessor(model, guidance, ids, *bare))
            said = model.generate(
                ids,
                attention_mask=mask,
                logits_processor=processors,
                max_new_tokens=24,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
            texts = tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
            answered.update(zip(some, texts, strict=True))


def _padded(tokenizer: Any, rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [rows, longest], padded on the left."""
    padding = [max(map(len, rows)) - len(row) for row in rows]
    ids = [[tokenizer.pad_token_id] * pad + list(row) for pad, row in zip(padding, rows, strict=True)]
    mask = [[0] * pad + [1] * len(row) for pad, row in zip(padding, rows, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
