"""Several kinds of questions about one long text, which is read once for all of them.

A prompt of its own for every question costs a reading each. Here a stretch of prose holds one fact of each kind, stated
once; it is read into the cache, and every question is asked on a copy of that, in the model's chat template. More facts
of this kind in one text confuse a small model, which then finds none.
"""

from __future__ import annotations

import copy
import math
import random
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from hf_longtrunc.arguments import whole
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.greedy import greedy_answer
from hf_longtrunc.evaluation.heat_maps import mean_score, plot_scores, wilson_interval
from hf_longtrunc.evaluation.records import Journal, arm_fields
from hf_longtrunc.evaluation.retrieval import RetrievalRecord
from hf_longtrunc.evaluation.streaming import read_ahead
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table
    from transformers import Cache

    from hf_longtrunc.evaluation.haystack import Haystack
    from hf_longtrunc.evaluation.records import Arm

_MAGIC = "The special magic number for {} is: {}."
_ASKS_MAGIC = "What is the special magic number for {} mentioned in the text?"
_VALUE = "One of the special magic numbers for {} is: {}."
_ASKS_VALUES = "What are the two special magic numbers for {} mentioned in the text?"
_WORDS = ["brave-anchor", "calm-badger", "icy-candle", "pale-dragon", "keen-feather", "hollow-jacket"]
_SHIP = "The ship {} carries the number {} on her bow."
_ASKS_SHIP = "Which number does the ship {} carry on her bow?"
_SHIPS = ["Aurora", "Calypso", "Fearless", "Hesperus"]
_OWN_WORDS = [
    ("The new code for the north gate is {}.", "I stand before the north gate. Which code do I need?"),
    ("Whoever calls the harbour desk must dial {}.", "What must I dial to reach the harbour desk?"),
    ("The cellar safe was set to {} last night.", "What was the cellar safe set to last night?"),
    ("Ask the chapel library for the book with the mark {}.", "Which mark has the book in the chapel library?"),
]
_RECENT = (
    "merry-kettle",
    "The new code for the garden door is {}.",
    "I stand before the garden door. Which code do I need?",
)
SECOND_TURN = "second turn"
CONTINUATION = "continuation"
_KINDS = [
    *("magic number", "own words", "two values", "ship", "recent magic number", "recent own words"),
    *(SECOND_TURN, CONTINUATION),
]
_ANSWER_TOKENS = 12
_NUMBER_TOKENS = 16
_CONTINUED = 256
_AT_ONCE = 7  # tokens a forward of what is continued: fewer than a strategy takes for a question
_WITH_QUESTION = 96  # of the text's tokens are read with each question, so that it stands against what is before it


class Question(NamedTuple):
    """What is asked, and the facts that answer it.

    Attributes:
        battery: which kind.
        facts: (where in the text from 0 to 1, sentence) of each; 1 stands right before the question.
        text: the question.
        expected: the numbers that a right answer holds.
    """

    battery: str
    facts: list[tuple[float, str]]
    text: str
    expected: list[str]

    @property
    def depth(self) -> float:
        """Where the first fact stands."""
        return self.facts[0][0]


class LongText:
    """A stretch of prose with eight facts in it, each stated once, and questions about them.

    Args:
        haystack: the filler; its tokenizer needs a chat template.
        lengths: tokens before a question, ascending. The facts stand before the first of these places, so that every
            question can be asked at each of them while the text is read on.
        trial: which draw.
        seed: of the draws.

    Four kinds: "magic number" and "two values" (of one word, in two places) in RULER's words, "ship", one of four that
    differ in their names alone, and "own words", which the question repeats in part. "recent magic number" and "recent
    own words" are stated right before their question: what reads far away must not lose them. "second turn" asks for
    the magic number when the question about own words has been answered, in the same conversation.

    Attributes:
        ids: the tokens, 256 more than the last length.
        questions: all of them; the last is that of the second turn.

    Raises:
        ValueError: there is no chat template, or the first length leaves no room.
    """

    def __init__(self, haystack: Haystack, lengths: Sequence[int], trial: int, seed: int):
        draw = random.Random(f"{seed}/{list(lengths)}/{trial}")
        self._haystack = haystack
        self.questions, facts = _questions(draw)
        opened, _ = haystack.conversation("", "?")
        behind = lengths[-1] + _CONTINUED - lengths[0]
        text = haystack.text(lengths[0] + behind, facts, draw, beside=len(opened), behind=behind)
        self.ids = opened + text

    def ending(self, question: Question) -> list[int]:
        """Return the tokens from the end of the text to where the answer begins."""
        said = f"{question.facts[0][1]} {question.text}" if question.depth == 1 else question.text
        return self._haystack.conversation("", f"\n\n{said}")[1]

    def turn(self, question: Question) -> list[int]:
        """Return the tokens from the end of an answer to where that to another question begins."""
        return self._haystack.turn(question.text)


def run_questions(
    model: Any,
    haystack: Haystack,
    lengths: Sequence[int],
    arms: Mapping[str, Arm],
    *,
    texts: int = 1,
    seed: int = 0,
    batteries: Collection[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[RetrievalRecord]:
    """Read each text once under every arm, and at each length ask all its questions on copies of the cache.

    The records of "continuation" hold, as their score, the mean loss in nats a token of the next 256 tokens, where
    nothing is asked; they are read seven at a time, which no strategy takes for a question.

    Args:
        model: a causal LM that generates.
        haystack: the filler; its tokenizer needs a chat template.
        lengths: tokens before a question. The facts stand before the shortest: longer ones ask about the same text,
            farther on.
        arms: name -> callable (model) -> context manager under which the model answers.
        texts: how many.
        seed: of the draws.
        batteries: only these kinds of questions, and "continuation"; None asks all.
        path: a JSON-lines file; what it holds is not asked again.
        progress: show a bar an arm.

    Returns:
        One record an arm, text, length and question. A score is the share of the expected numbers that stand in the
        answer.

    Raises:
        ValueError: there is no chat template, or the shortest length leaves no room; an unknown battery; a line of
            `path` that is no such record.
    """
    journal = Journal(path, RetrievalRecord, ("tokens", "expected", "answer", "score"))
    places = sorted({whole("lengths", length, least=_WITH_QUESTION + 1) for length in lengths})
    drawn = [LongText(haystack, places, trial, seed) for trial in range(whole("texts", texts, least=1))]
    if unknown := set(batteries or ()) - set(_KINDS):
        raise ValueError(f"batteries are {', '.join(_KINDS)}; got {', '.join(sorted(unknown))}")
    records = []
    for name, arm in arms.items():
        setting = {"seed": seed, "filler": haystack.filler, **arm_fields(name, arm, model)}
        with arm(model):
            for trial, text in enumerate(tqdm(drawn, desc=name, unit="text", disable=not progress)):
                asked = Asked(model, haystack, text)
                for length in places:
                    for battery, depth, measure in asked.at(length):
                        cell = {"length": length, "trial": trial, "battery": battery, "depth": depth, **setting}
                        if batteries is None or battery in batteries:
                            records.append(journal.once(cell, measure))
    return records


class Asked:
    """A text that is read as far as it is asked about.

    Args:
        model: that reads it.
        haystack: whose tokenizer decodes the answers.
        text: to read.
    """

    def __init__(self, model: Any, haystack: Haystack, text: LongText):
        self.model, self.tokenizer, self.text = model, haystack.tokenizer, text
        self._cache: Cache | None = None

    def at(self, length: int) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
        """Yield battery, depth and what measures it, for everything that is asked behind the first `length` tokens."""
        for question in self.text.questions:
            ask = self.answer_next if question.battery == SECOND_TURN else self.answer
            yield question.battery, question.depth, partial(ask, length, question)
        yield CONTINUATION, 1.0, partial(self.go_on, length)

    def _read(self, length: int) -> Cache:
        """Return a copy of the cache that has seen all but the last tokens before `length`; lengths ascend."""
        seen = 0 if self._cache is None else self._cache.get_seq_length()
        if ahead := self.text.ids[seen : length - _WITH_QUESTION]:
            self._cache = read_ahead(self.model, torch.tensor([ahead], device=self.model.device), cache=self._cache)
        assert self._cache is not None
        return copy.deepcopy(self._cache)

    def answer(self, length: int, question: Question) -> dict[str, Any]:
        """Return the results of a record: the greedy answer to a question, and its score."""
        ids = self.text.ids[:length] + self.text.ending(question)
        return self._result(question, ids, self._said(question, ids, self._read(length)))

    def answer_next(self, length: int, question: Question) -> dict[str, Any]:
        """Return the same for a question of a second turn, asked when that about own words has been answered."""
        cache = self._read(length)
        first = next(each for each in self.text.questions if each.battery == "own words")
        ids = self.text.ids[:length] + self.text.ending(first)
        ids = ids + self._said(first, ids, cache) + self.text.turn(question)
        return self._result(question, ids, self._said(question, ids, cache))

    def _said(self, question: Question, ids: list[int], cache: Cache) -> list[int]:
        """Return what the model answers, without the token that ends it."""
        room = _ANSWER_TOKENS + _NUMBER_TOKENS * len(question.expected)
        said: list[int] = greedy_answer(self.model, ids, room, cache=cache).tolist()
        return said[:-1] if said[-1] == self.tokenizer.eos_token_id else said

    def _result(self, question: Question, ids: list[int], said: list[int]) -> dict[str, Any]:
        answer = self.tokenizer.decode(said, skip_special_tokens=True)
        score = sum(number in answer for number in question.expected) / len(question.expected)
        return {"tokens": len(ids), "expected": question.expected, "answer": answer, "score": score}

    @torch.no_grad()
    def go_on(self, length: int) -> dict[str, Any]:
        """Return the results of a record: the mean loss of what the text goes on with, nothing being asked."""
        cache = self._read(length)
        rest = torch.tensor([self.text.ids[length - _WITH_QUESTION : length + _CONTINUED]], device=self.model.device)
        seen = [self.model(input_ids=rest[:, :_WITH_QUESTION], use_cache=True, **{CACHE: cache}).logits[:, -1:]]
        for start in range(_WITH_QUESTION, rest.shape[1] - 1, _AT_ONCE):
            part = rest[:, start : min(start + _AT_ONCE, rest.shape[1] - 1)]
            seen.append(self.model(input_ids=part, use_cache=True, **{CACHE: cache}).logits)
        loss = torch.nn.functional.cross_entropy(torch.cat(seen, dim=1)[0].float(), rest[0, _WITH_QUESTION:])
        return {"tokens": length + _CONTINUED, "expected": [], "answer": "", "score": float(loss)}


def questions_table(records: Sequence[RetrievalRecord]) -> Table:
    """Lay the scores out: a row per kind and length, a column per arm with its 95 % interval and number of questions.

    The rows of "continuation" are the perplexity of what the texts go on with, over all of their tokens, and how many
    texts there are.
    """
    arms = list(dict.fromkeys(record.arm for record in records))
    table = new_table("asked", "tokens", title="share of the asked numbers found, 95 % interval, questions")
    for column in table.columns:  # where there is little room the cells fold and not what they are of
        column.no_wrap = True
    for arm in arms:
        table.add_column(arm, justify="right")
    for kind in sorted({record.battery for record in records}, key=_KINDS.index):
        for length in sorted({record.length for record in records if record.battery == kind}):
            inside = [record for record in records if (record.battery, record.length) == (kind, length)]
            cells = [_cell(kind, [record for record in inside if record.arm == arm]) for arm in arms]
            table.add_row(kind, f"{length:,}", *cells)
    return table


def plot_questions(records: Sequence[RetrievalRecord]) -> list[Axes]:
    """Draw a heat map per arm, of the scores by kind of question and length; a cell says of how many questions."""
    asked = [record for record in records if record.battery != CONTINUATION]
    return plot_scores(sorted(asked, key=lambda record: _KINDS.index(record.battery)), "arm", [], inside="battery")


def _cell(kind: str, records: Sequence[RetrievalRecord]) -> str:
    if not records:
        return ""
    if kind == CONTINUATION:
        return f"{math.exp(mean_score(records)):.2f} ({len(records)})"
    low, high = wilson_interval(mean_score(records), len(records))
    return f"{mean_score(records):.2f} ({low:.2f}-{high:.2f}, {len(records)})"


def _questions(draw: random.Random) -> tuple[list[Question], list[tuple[float, str]]]:
    """Draw a text's questions, and all facts that stand in it."""
    one, two, three, four, *carried = (str(number) for number in draw.sample(range(1_000_000, 10_000_000), 10))
    (word, other), (sentence, asks) = draw.sample(_WORDS, 2), draw.choice(_OWN_WORDS)
    ships = [(draw.random(), _SHIP.format(*each)) for each in zip(_SHIPS, carried[:4], strict=True)]
    asked = draw.randrange(len(_SHIPS))
    magic = Question("magic number", [(draw.random(), _MAGIC.format(word, one))], _ASKS_MAGIC.format(word), [one])
    values = [(draw.random(), _VALUE.format(other, number)) for number in (two, three)]
    found = [
        magic,
        Question("own words", [(draw.random(), sentence.format(four))], asks, [four]),
        Question("two values", values, _ASKS_VALUES.format(other), [two, three]),
        Question("ship", [ships[asked]], _ASKS_SHIP.format(_SHIPS[asked]), [carried[asked]]),
    ]
    inside = [fact for question in found[:3] for fact in question.facts] + ships
    word, sentence, asks = _RECENT
    one, two = carried[4:]
    recent = [
        Question("recent magic number", [(1.0, _MAGIC.format(word, one))], _ASKS_MAGIC.format(word), [one]),
        Question("recent own words", [(1.0, sentence.format(two))], asks, [two]),
    ]
    return [*found, *recent, magic._replace(battery=SECOND_TURN)], inside
