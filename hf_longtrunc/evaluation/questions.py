"""Several kinds of questions about one long text, which is read once for all of them.

A prompt of its own for every question costs a reading each. Here a stretch of prose holds four facts of each kind, each
stated once; it is read into the cache, and every question is asked on a copy of that, in the model's chat template.
"""

from __future__ import annotations

import copy
import math
import random
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_longtrunc.arguments import whole
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.greedy import greedy_answer
from hf_longtrunc.evaluation.heat_maps import mean_score, wilson_interval
from hf_longtrunc.evaluation.records import Journal, arm_fields
from hf_longtrunc.evaluation.retrieval import RetrievalRecord
from hf_longtrunc.evaluation.streaming import read_ahead
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from rich.table import Table
    from transformers import Cache

    from hf_longtrunc.evaluation.haystack import Haystack
    from hf_longtrunc.evaluation.records import Arm

_OPENING = "Here is a text. A question about it follows at its end.\n\n"
_SHIP = "Which number does the ship {} carry on her bow?"
_NAMES = [
    ("brave-anchor", "Aurora", "Lady Ashby"),
    ("calm-badger", "Calypso", "Doctor Lund"),
    ("icy-candle", "Fearless", "Captain Roe"),
    ("pale-dragon", "Hesperus", "Mrs. Tarrant"),
]
_OWN_WORDS = [
    ("The new code for the north gate is {}.", "I stand before the north gate. Which code do I need?"),
    ("Whoever calls the harbour desk must dial {}.", "What must I dial to reach the harbour desk?"),
    ("The cellar safe was set to {} last night.", "What was the cellar safe set to last night?"),
    ("Ask the chapel library for the book with the mark {}.", "Which mark has the book in the chapel library?"),
]
CONTINUATION = "continuation"
_ANSWER_TOKENS = 28
_CONTINUED = 256
_AT_ONCE = 7  # tokens a forward of what is continued: fewer than a strategy takes for a question
_WITH_QUESTION = 96  # of the text's tokens are read with each question, so that it stands against what is before it


class Question(NamedTuple):
    """A fact and what is asked about it.

    Attributes:
        battery: which kind.
        depth: where in the text it stands, the middle of a quarter; 1 right before the question.
        fact: the sentence that is hidden.
        text: the question.
        expected: the numbers that a right answer holds.
    """

    battery: str
    depth: float
    fact: str
    text: str
    expected: list[str]


class LongText:
    """A stretch of prose with sixteen facts in it, and questions about them.

    Args:
        haystack: the filler; its tokenizer needs a chat template.
        length: tokens before a question.
        trial: which draw.
        seed: of the draws.

    Four kinds, each once in every quarter of the text: "magic number" and "two values" in RULER's words, "ship", one of
    four that differ in their names alone, and "own words", which the question repeats in part. "recent magic number"
    and "recent own words" are stated right before their question: what reads far away must not lose them.

    Attributes:
        ids: the tokens before a question.
        more: what the text goes on with.
        questions: all of them.

    Raises:
        ValueError: there is no chat template, or the length leaves no room.
    """

    def __init__(self, haystack: Haystack, length: int, trial: int, seed: int):
        draw = random.Random(f"{seed}/{length}/{trial}")
        self._haystack = haystack
        self.questions = _questions(draw)
        opened, _ = haystack.conversation(_OPENING, "?")
        inside = [question for question in self.questions if question.depth < 1]
        needles = [(question.depth + (i % 4 - 1.5) / 16, question.fact) for i, question in enumerate(inside)]
        text = haystack.text(length + _CONTINUED, needles, draw, beside=len(opened), behind=_CONTINUED)
        self.ids, self.more = opened + text[:-_CONTINUED], text[-_CONTINUED:]

    def ending(self, question: Question) -> list[int]:
        """Return the tokens from the end of the text to where the answer begins."""
        said = f"{question.fact} {question.text}" if question.depth == 1 else question.text
        return self._haystack.conversation(_OPENING, f"\n\n{said}")[1]


def run_questions(
    model: Any,
    haystack: Haystack,
    lengths: Sequence[int],
    arms: Mapping[str, Arm],
    *,
    texts: int = 1,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[RetrievalRecord]:
    """Read each text once under every arm, ask all its questions on copies of the cache, and go on with the text.

    The records of "continuation" hold, as their score, the mean loss in nats a token of the next 256 tokens, where
    nothing is asked; they are read seven at a time, which no strategy takes for a question.

    Args:
        model: a causal LM that generates.
        haystack: the filler; its tokenizer needs a chat template.
        lengths: tokens before the question.
        arms: name -> callable (model) -> context manager under which the model answers.
        texts: how many a length.
        seed: of the draws.
        path: a JSON-lines file; what it holds is not asked again.
        progress: show a bar an arm.

    Returns:
        One record an arm, text and question. A score is the share of the expected numbers that stand in the answer.

    Raises:
        ValueError: there is no chat template, or a length leaves no room; a line of `path` that is no such record.
    """
    journal = Journal(path, RetrievalRecord, ("tokens", "expected", "answer", "score"))
    draws = range(whole("texts", texts, least=1))
    cells = [(whole("lengths", length, least=1), trial) for length in lengths for trial in draws]
    records = []
    for name, arm in arms.items():
        setting = arm_fields(name, arm, model)
        with arm(model):
            for length, trial in tqdm(cells, desc=name, unit="text", disable=not progress):
                cell = {"length": length, "trial": trial, "seed": seed, "filler": haystack.filler, **setting}
                asked = Asked(model, haystack, LongText(haystack, length, trial, seed))
                for question in asked.text.questions:
                    planned = {**cell, "battery": question.battery, "depth": question.depth}
                    records.append(journal.once(planned, partial(asked.answer, question)))
                records.append(journal.once({**cell, "battery": CONTINUATION, "depth": 1.0}, asked.go_on))
    return records


class Asked:
    """A text that is read once, when it is first asked about.

    Args:
        model: that reads it.
        haystack: whose tokenizer decodes the answers.
        text: to read.
    """

    def __init__(self, model: Any, haystack: Haystack, text: LongText):
        self.model, self.tokenizer, self.text = model, haystack.tokenizer, text

    @cached_property
    def _read(self) -> Cache:
        ids = torch.tensor([self.text.ids[:-_WITH_QUESTION]], device=self.model.device)
        return read_ahead(self.model, ids)

    def answer(self, question: Question) -> dict[str, Any]:
        """Return the results of a record: the greedy answer to a question, and its score."""
        ids = self.text.ids + self.text.ending(question)
        said = greedy_answer(self.model, ids, _ANSWER_TOKENS, cache=copy.deepcopy(self._read))
        answer = self.tokenizer.decode(said, skip_special_tokens=True)
        score = sum(number in answer for number in question.expected) / len(question.expected)
        return {"tokens": len(ids), "expected": question.expected, "answer": answer, "score": score}

    @torch.no_grad()
    def go_on(self) -> dict[str, Any]:
        """Return the results of a record: the mean loss of what the text goes on with, nothing being asked."""
        cache = copy.deepcopy(self._read)
        rest = torch.tensor([self.text.ids[-_WITH_QUESTION:] + self.text.more], device=self.model.device)
        seen = [self.model(input_ids=rest[:, :_WITH_QUESTION], use_cache=True, **{CACHE: cache}).logits[:, -1:]]
        for start in range(_WITH_QUESTION, rest.shape[1] - 1, _AT_ONCE):
            part = rest[:, start : min(start + _AT_ONCE, rest.shape[1] - 1)]
            seen.append(self.model(input_ids=part, use_cache=True, **{CACHE: cache}).logits)
        loss = torch.nn.functional.cross_entropy(torch.cat(seen, dim=1)[0].float(), rest[0, _WITH_QUESTION:])
        return {"tokens": len(self.text.ids) + _CONTINUED, "expected": [], "answer": "", "score": float(loss)}


def questions_table(records: Sequence[RetrievalRecord]) -> Table:
    """Lay the scores out: a row per arm and length, a column per kind with its 95 % interval and number of questions.

    The last column is the perplexity of what the texts go on with, over all of their tokens.
    """
    kinds = list(dict.fromkeys(record.battery for record in records if record.battery != CONTINUATION))
    table = new_table("arm", "tokens", title="share of the asked numbers found, 95 % interval, questions")
    for column in [*kinds, "perplexity, going on"]:
        table.add_column(column, justify="right", no_wrap=True)
    for arm, length in dict.fromkeys((record.arm, record.length) for record in records):
        inside = [record for record in records if (record.arm, record.length) == (arm, length)]
        cells = [_cell([record for record in inside if record.battery == kind]) for kind in kinds]
        losses = [record for record in inside if record.battery == CONTINUATION]
        table.add_row(arm, f"{length:,}", *cells, f"{math.exp(mean_score(losses)):.2f} ({len(losses)})")
    return table


def _cell(records: Sequence[RetrievalRecord]) -> str:
    if not records:
        return ""
    low, high = wilson_interval(mean_score(records), len(records))
    return f"{mean_score(records):.2f} ({low:.2f}-{high:.2f}, {len(records)})"


def _questions(draw: random.Random) -> list[Question]:
    """Draw the facts' numbers: four kinds in each quarter, and two that stand right before their question."""
    numbers = iter(draw.sample(range(1_000_000, 10_000_000), 22))
    found = []
    for quarter, (word, ship, door) in enumerate(draw.sample(_NAMES, 4)):
        one, two, three, four, five = (str(next(numbers)) for _ in range(5))
        sentence, asks = _OWN_WORDS[quarter]
        magic = f"One of the special magic numbers for {word} is: {one}."
        pair = f"The lockers of {door} are number {two} and number {three}."
        facts: list[tuple[str, str, str, list[str]]] = [
            ("magic number", magic, f"What is the special magic number for {word} mentioned in the text?", [one]),
            ("two values", pair, f"Which two lockers belong to {door}?", [two, three]),
            ("ship", f"The ship {ship} carries the number {four} on her bow.", _SHIP.format(ship), [four]),
            ("own words", sentence.format(five), asks, [five]),
        ]
        found += [Question(kind, (quarter + 0.5) / 4, fact, text, right) for kind, fact, text, right in facts]
    one, two = str(next(numbers)), str(next(numbers))
    magic = "One of the special magic numbers for merry-kettle is: {}."
    asks = "What is the special magic number for merry-kettle mentioned in the text?"
    door, asks_door = "The new code for the garden door is {}.", "I stand before the garden door. Which code do I need?"
    found.append(Question("recent magic number", 1.0, magic.format(one), asks, [one]))
    found.append(Question("recent own words", 1.0, door.format(two), asks_door, [two]))
    return found
