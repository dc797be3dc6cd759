"""The battery of `ask`: facts that a novel states once, in its own manner of speech, and questions about them.

A `FactText` is a stretch of a novel with some twenty sentences in it (`hf_longtrunc.evaluation.facts`): a fact of each
kind at 5, 35, 65 or 95 % of the text, and others of its kind about other people with other values. Every second fact
lies across the edge of a block of 64 tokens. `run_find_and_read` asks about it under several finders, and with the
sentences of the fact itself in hand ("oracle"), which measures the reading model alone.
"""

from __future__ import annotations

import random
import re
import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_longtrunc.asking.answers import find_passages
from hf_longtrunc.asking.passages import CONTEXT, GUIDANCE, UNITS
from hf_longtrunc.asking.prompt import PROMPT, chat_ids, fill_prompt, without_passages
from hf_longtrunc.asking.rerank import Reranker
from hf_longtrunc.evaluation import facts
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.intervals import wilson_interval
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from rich.table import Table

    from hf_longtrunc import TextIndex
    from hf_longtrunc.asking.finders import Finder
    from hf_longtrunc.asking.passages import Passage

DEPTHS = (0.05, 0.35, 0.65, 0.95)
BLOCK = 64  # tokens: every second fact lies across an edge of such blocks
ORACLE = "oracle"
SHARED = ("number", "attribute", "similar", "paraphrase", "place", "person", "birth")
NOTHING = ("off-topic", "unknown name", "unsaid")
KINDS = (*SHARED, "unshared", "two hops", "follow-up", *NOTHING)
_UNSHARED = 7  # facts of a text whose question shares no word with them
_TOGETHER = 16  # prompts that are answered in one batch
_Prompts = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt, and the same less its passages; empty if it has none


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        kind: one of `KINDS`.
        depth: where its fact stands, from 0 to 1.
        text: the question.
        stated: the sentences that answer it; none where nothing does.
        expected: the word that a right answer holds; empty where nothing answers.
        wrong: the values of the other facts of this kind, which a right answer does not hold.
    """

    kind: str
    depth: float
    text: str
    stated: tuple[str, ...] = ()
    expected: str = ""
    wrong: tuple[str, ...] = ()

    def scores(self, answer: str) -> tuple[float, float]:
        """Return (lenient, strict): the value is in the answer; and no value of another fact is."""
        lenient = bool(self.expected) and _holds(answer, self.expected)
        return float(lenient), float(lenient and not any(_holds(answer, value) for value in self.wrong))

    def is_read_in(self, passages: Sequence[Passage]) -> bool:
        """Whether all sentences that answer are in the passages; False where nothing answers."""
        read = [" ".join(each.text.split()) for each in passages]
        return bool(self.stated) and all(any(" ".join(s.split()) in part for part in read) for s in self.stated)


class FactText:
    """A stretch of a novel with facts in it, and questions about them.

    Args:
        novel: the text that facts are hidden in, at least ten times as long in characters as `length` in tokens.
        tokenizer: a fast one; the length is counted in its tokens.
        length: of the text, in tokens, to within a few.
        trial: which draw; another one in every novel. The stretch begins at the same place for every length.
        part: of the phrasings: "choose" or "report".
        seed: of the draws.

    Attributes:
        text: the stretch with its facts.
        questions: one of each kind, seven of "unshared", two each of those that nothing answers. The last of a
            conversation, "follow-up", is about the person of the first, "number", and does not name them.

    Raises:
        ValueError: the novel is too short.
    """

    def __init__(self, novel: str, tokenizer: Any, length: int, trial: int, *, part: str = "report", seed: int = 0):
        draw = random.Random(f"{seed}/{part}/{trial}/{zlib.crc32(novel.encode())}")
        self.length, self.trial, self.part = length, trial, part
        self.questions, stated = _drawn(draw, trial, part)
        start = _sentence_end(novel, int(draw.uniform(0.02, 0.3) * len(novel)))
        sizes = tokenizer([f" {sentence}" for _, sentence in stated], add_special_tokens=False).input_ids
        room = length - sum(map(len, sizes))
        ends = _token_ends(tokenizer, novel[start : start + 8 * length])
        if room < 1 or len(ends) < room:
            raise ValueError(f"a text of {length} tokens needs a longer novel, or more tokens: {len(ends)} are there")
        stretch = novel[start : start + ends[room - 1]]
        parts, last = [], 0
        for n, (depth, sentence) in enumerate(sorted(stated)):
            place = min(int(depth * room), room - 1)
            if n % 2:  # so that it begins shortly before an edge
                place = max(place // BLOCK * BLOCK - 6, 0)
            at = max(last, _sentence_end(stretch, ends[place]))
            parts += [stretch[last:at].rstrip(), f"{sentence} "]
            last = at
        self.text = " ".join([*parts, stretch[last:]]).strip()


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


def _holds(answer: str, value: str) -> bool:
    return re.search(rf"\b{re.escape(value.removesuffix('s'))}", answer, re.IGNORECASE) is not None


def _token_ends(tokenizer: Any, text: str) -> Sequence[int]:
    """Return where each token of a text ends, 2**16 characters at a time: a token's offsets take some kilobyte."""
    ends = array("q")
    for first in range(0, len(text), 2**16):
        part = text[first : first + 2**16]
        found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends.extend(first + end for _, end in found.offset_mapping)
    return ends


def _sentence_end(text: str, place: int) -> int:
    """Return where the first sentence that ends in or after `place` has ended."""
    found = re.compile('[a-z][.!?]["\u201d\u2019]*\\s+(?=[A-Z"\u201c\u2018])').search(text, place)
    return found.end() if found else len(text)


def _drawn(draw: random.Random, trial: int, part: str) -> tuple[list[Question], list[tuple[float, str]]]:
    """Draw a text's questions, and (depth, sentence) of all facts in it."""
    people = zip(draw.sample(facts.GIVEN, 20), draw.sample(facts.SURNAMES, 20), strict=True)
    names = iter([" ".join(each) for each in people])
    questions: list[Question] = []
    stated: list[tuple[float, str]] = []

    def state(depth: float, sentence: str) -> str:
        stated.append((min(max(depth + draw.uniform(-0.04, 0.04), 0.0), 0.999), sentence))
        return sentence

    def depth_of(number: int) -> float:
        return DEPTHS[(number + trial) % 4]

    first = next(names)
    for number, (kind, of) in enumerate(facts.KINDS.items()):
        about = first if kind in ("number", "birth") else next(names)
        statement, thing = draw.choice(facts.half(of.statements, part)), draw.choice(of.things)
        others = 3 if kind == "similar" else 1
        values = (
            draw.sample(of.values, 1 + others) if kind != "person" else [about, *(next(names) for _ in range(others))]
        )
        depth = depth_of(number)
        fact = state(depth, statement.format(name=about, thing=thing, value=values[0]))
        for value in values[1:]:  # the same thing of somebody else, or something else that somebody did
            line = statement if kind == "similar" else draw.choice(facts.half(of.statements, part))
            deed = draw.choice([each for each in of.things if each != thing]) if kind == "person" else thing
            state(draw.random(), line.format(name=next(names) if kind != "person" else "", thing=deed, value=value))
        asks = draw.choice(facts.half(of.questions, part)).format(name=about, thing=thing)
        expected, *wrong = [value.split()[-1] for value in values]
        questions.append(Question(kind, depth, asks, (fact,), expected, tuple(wrong)))
    birth = questions[-1]
    for n, (statement, asks, values_of) in enumerate(draw.sample(facts.half(facts.UNSHARED, part), _UNSHARED)):
        value, depth = draw.choice(values_of.split(",")), depth_of(n)
        questions.append(Question("unshared", depth, asks, (state(depth, statement.format(value=value)),), value))
    name, landlord = next(names), next(names)
    street, wrong_street = draw.sample(facts.STREETS, 2)
    hop = state(depth_of(9), draw.choice(facts.half(facts.FIRST_HOPS, part)).format(name=name, other=landlord))
    lives = facts.half(facts.SECOND_HOPS, part)
    end = state(draw.random(), draw.choice(lives).format(other=landlord, value=street))
    state(draw.random(), draw.choice(lives).format(other=next(names), value=wrong_street))
    asks = draw.choice(facts.half(facts.TWO_HOPS, part)).format(name=name)
    expected, wrong_one = street.split()[0], wrong_street.split()[0]
    questions.append(Question("two hops", depth_of(9), asks, (hop, end), expected, (wrong_one,)))
    questions.append(birth._replace(kind="follow-up", text=draw.choice(facts.half(facts.FOLLOW_UPS, part))))
    kinds = [kind for kind in facts.KINDS if kind != "person"]
    unsaid = draw.sample([kind for kind in kinds if kind not in ("number", "birth")], 2)  # which is said of the first
    for nothing, about, likes in (("unknown name", next(names), draw.sample(kinds, 2)), ("unsaid", first, unsaid)):
        for asked in (facts.KINDS[like] for like in likes):
            asks = draw.choice(facts.half(asked.questions, part)).format(name=about, thing=draw.choice(asked.things))
            questions.append(Question(nothing, 0.0, asks))
    questions += [Question("off-topic", 0.0, each) for each in draw.sample(facts.half(facts.OFF_TOPIC, part), 2)]
    return questions, stated
