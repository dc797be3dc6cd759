"""Retrieval from long prompts: needles, key-value pairs, and chains of variables.

Prompts are plain text that the model continues. A score is RULER's (Hsieh et al. 2024, arXiv 2404.06654): the share
of the expected strings that stand in the answer. The words are ours: compare arms with one another, not with RULER.
"""

from __future__ import annotations

import random
import string
import uuid
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_fraction, check_int
from hf_longtrunc.evaluation.records import ArmRecord, Journal, arm_fields
from hf_longtrunc.evaluation.streaming import greedy_answer
from instruments.haystack import Haystack
from instruments.heat_maps import plot_scores, score_table

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table

    from hf_longtrunc.evaluation.records import Arm

_ADJECTIVES = [
    "amber",
    "brave",
    "calm",
    "daring",
    "early",
    "faint",
    "gentle",
    "hollow",
    "icy",
    "jolly",
    "keen",
    "lonely",
    "mellow",
    "narrow",
    "old",
    "pale",
]
_NOUNS = [
    "anchor",
    "badger",
    "candle",
    "dragon",
    "engine",
    "feather",
    "garden",
    "harbor",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "meadow",
    "needle",
    "orchard",
]


@dataclass(frozen=True)
class RetrievalTask:
    """A prompt of the grid: its exact length in tokens, the depth in [0, 1] of the answer, the number of the draw."""

    length: int
    depth: float
    trial: int
    seed: int

    @property
    def random(self) -> random.Random:
        """The task's generator, the same in each process: it draws the hidden strings, then the place in the text."""
        return random.Random(f"{self.seed}/{self.length}/{float(self.depth)}/{self.trial}")


def retrieval_tasks(
    lengths: Sequence[int], depths: Sequence[float], *, prompts_per_cell: int = 10, seed: int = 0
) -> list[RetrievalTask]:
    """Return the grid lengths x depths x draws, shortest prompts first.

    Raises:
        TypeError, ValueError: a length or count that is no whole number of at least 1, a depth outside [0, 1].
    """
    sizes = [check_int("lengths", length, minimum=1) for length in lengths]
    places = [check_fraction("depths", depth) for depth in depths]
    draws = range(check_int("prompts_per_cell", prompts_per_cell, minimum=1))
    return [RetrievalTask(*cell, check_int("seed", seed)) for cell in product(sizes, places, draws)]


@dataclass(frozen=True)
class RetrievalRecord(ArmRecord, RetrievalTask):
    """A task of one battery, the arm and model that answered it, the expected strings, the answer and its score."""

    battery: str
    filler: str
    tokens: int
    expected: list[str]
    answer: str
    score: float

    @property
    def key(self) -> str:
        """The first expected string: a passkey's only one."""
        return self.expected[0]

    @property
    def correct(self) -> bool:
        """Whether the answer holds everything that was asked for."""
        return self.score == 1

    @staticmethod
    def upgraded(values: dict[str, Any]) -> dict[str, Any]:
        """Return a passkey's line of versions before 0.2, which had `key` and `correct`, with the fields of today."""
        if not {"key", "correct", "length"} <= values.keys():
            return values
        kept = {name: value for name, value in values.items() if name not in ("key", "correct")}
        results = {"expected": [values["key"]], "score": float(values["correct"])}
        return {"battery": "passkey", "tokens": values["length"], **kept, **results}


class Prompts(Protocol):
    """Makes the prompts of one battery for one tokenizer, and judges the answers."""

    battery: str
    filler: str
    tokenizer: Any
    answer_tokens: int

    def __call__(self, task: RetrievalTask) -> tuple[list[int], list[str]]:
        """Return a prompt's token ids and the strings that a right answer holds."""

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """Return how right an answer is, from 0 to 1."""


class SharePrompts:
    """A battery scored by the share of expected strings in the answer, ignoring case."""

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """Return the share of the expected strings that stand in the answer."""
        return sum(text.lower() in answer.lower() for text in expected) / len(expected)


class NeedlePrompts(SharePrompts):
    """Magic numbers hidden in filler, with questions about some of them: RULER's four needle tasks.

    Args:
        tokenizer: a transformers tokenizer.
        text: the filler, see `PasskeyPrompts`; None repeats a few sentences.
        keys: how many words have a number; more than are asked for is RULER's "multi-key".
        values: numbers that each word has; more than one is "multi-value".
        queries: how many words are asked for; more than one is "multi-query".
        chat: put the prompt into the tokenizer's chat template, up to where the assistant is to speak. Without it the
            prompt ends with the beginning of the answer.
        question_first: the question comes before the filler instead of after it.
        second_turn: another word, the last one, was asked for before, and its right answer stands in the prompt. The
            whole conversation is read as one prompt: it is no second call of `generate` on a filled cache.

    A needle is mentioned once. The first needle that is asked for stands at the task's depth, the others anywhere. At
    depth 1 it stands right before the question: the control that a patch which reads far away must not lose. Prompts
    have exactly the task's length.

    Raises:
        ValueError: a count below 1, more queries than keys, a second turn without a word that is not asked for, or a
            chat (when a prompt is made) without a chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | None = None,
        *,
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
        chat: bool = False,
        question_first: bool = False,
        second_turn: bool = False,
    ):
        self.keys = check_int("keys", keys, minimum=1, maximum=len(_ADJECTIVES) * len(_NOUNS))
        self.values = check_int("values", values, minimum=1)
        self.queries = check_int("queries, the keys that are asked for,", queries, minimum=1, maximum=self.keys)
        if second_turn and (question_first or self.keys <= self.queries):
            raise ValueError(
                "second_turn asks for another word first, so it needs more keys than queries and no question_first, "
                f"got keys={keys}, queries={queries}, question_first={question_first}"
            )
        self.chat, self.question_first, self.second_turn = chat, question_first, second_turn
        self.tokenizer, self._haystack = tokenizer, Haystack(tokenizer, text)
        variants = {"chat": chat, "question first": question_first, "second turn": second_turn}
        self.battery = f"needle {keys}x{values}, {queries} asked"
        self.battery += "".join(f", {name}" for name, is_on in variants.items() if is_on)
        self.filler = self._haystack.filler
        self.answer_tokens = 12 + 12 * queries * values

    def __call__(self, task: RetrievalTask) -> tuple[list[int], list[str]]:
        """Return the prompt's token ids and the numbers that are asked for."""
        draw = task.random
        words = draw.sample([f"{adjective}-{noun}" for adjective in _ADJECTIVES for noun in _NOUNS], self.keys)
        numbers = draw.sample(range(1_000_000, 10_000_000), self.keys * self.values)
        pairs = [(word, str(numbers.pop())) for word in words for _ in range(self.values)]
        depths = [task.depth, *(draw.random() for _ in pairs[1:])]
        needles = [
            (depth, f"One of the magic numbers for {word} is {number}.")
            for depth, (word, number) in zip(depths, pairs, strict=True)
        ]
        opening = "Some magic numbers are hidden in a long text. Find and remember them. I will ask you about them."
        question, start = _asked(words[: self.queries], self.values)
        spoken = [question]
        if self.second_turn:
            other_question, other_start = _asked(words[-1:], self.values)
            known = " and ".join(number for word, number in pairs if word == words[-1])
            spoken = [other_question, f"{other_start} {known}.", question]
        if self.question_first:
            opening, spoken = f"{opening} {question}", [""]
        if self.chat:
            first, *turns = spoken
        else:
            first, turns = " ".join([*spoken, start]).strip(), None
        ids = self._haystack.prompt(task.length, opening, needles, first, draw, turns=turns)
        return ids, [number for word, number in pairs if word in words[: self.queries]]


class VariablePrompts(SharePrompts):
    """Chains of variables, each set to the one before, hidden in filler: RULER's variable tracking.

    Args:
        tokenizer: a transformers tokenizer.
        text: the filler, see `PasskeyPrompts`; None repeats a few sentences.
        chains: number of chains; the question is about one of them.
        hops: assignments of a variable to a variable in each chain.

    The asked chain starts at the task's depth, its later links follow in order; the other chains are anywhere.

    Raises:
        ValueError: a count below 1.
    """

    battery: str

    def __init__(self, tokenizer: Any, text: str | None = None, *, chains: int = 1, hops: int = 4):
        self.chains, self.hops = check_int("chains", chains, minimum=1), check_int("hops", hops, minimum=1)
        self.tokenizer, self._haystack = tokenizer, Haystack(tokenizer, text)
        self.battery = f"variables {chains}x{hops} hops"
        self.filler = self._haystack.filler
        self.answer_tokens = 12 + 8 * (hops + 1)

    def __call__(self, task: RetrievalTask) -> tuple[list[int], list[str]]:
        """Return the prompt's token ids and the names of the variables that hold the asked value."""
        draw = task.random
        names = _names(draw, self.chains * (self.hops + 1))
        values = draw.sample(range(10_000, 100_000), self.chains)
        needles, asked = [], names[: self.hops + 1]
        for chain, value in enumerate(values):
            links = names[chain * (self.hops + 1) :][: self.hops + 1]
            start = draw.random() if chain else task.depth
            depths = [start, *sorted(start + (1 - start) * draw.random() for _ in links[1:])]
            for depth, name, before in zip(depths, links, [str(value), *links], strict=False):
                needles.append((depth, f"VAR {name} = {before if before.isdigit() else f'VAR {before}'}."))
        question = f"Which variables hold the value {values[0]}? The {len(asked)} variables that hold {values[0]} are"
        opening = "Assignments of variables are hidden in a long text. Follow them. I will ask you about their values."
        return self._haystack.prompt(task.length, opening, needles, question, draw), asked


class KeyValuePrompts(SharePrompts):
    """Pairs of uuids, a line each, with a question for the value of one key (Liu et al. 2023, arXiv 2307.03172).

    Args:
        tokenizer: a transformers tokenizer.

    As many pairs as fit into the task's length: a prompt is up to one pair shorter. The asked pair stands at the task's
    depth among them.
    """

    battery, filler = "key-value", "pairs"
    _opening = "Each line below is a key and its value. I will ask you for the value of one key.\n\n"

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.answer_tokens = 64

    def __call__(self, task: RetrievalTask) -> tuple[list[int], list[str]]:
        """Return the prompt's token ids, at most `task.length`, and the value that is asked for.

        Raises:
            ValueError: not even one pair fits, or the depth lies outside [0, 1].
        """
        check_fraction("depth", task.depth)
        draw = task.random
        key, value = _uuid(draw), _uuid(draw)
        opened: list[int] = self.tokenizer(self._opening).input_ids
        closed = self._tokens(f'\nThe value of the key "{key}" is "')
        asked = self._tokens(f'"{key}": "{value}"\n')
        room = task.length - len(opened) - len(closed) - len(asked)
        if room < 0:
            raise ValueError(f"length must be at least {task.length - room} tokens for this prompt, got {task.length}")
        pairs: list[list[int]] = []
        while (room := room - len(pair := self._tokens(f'"{_uuid(draw)}": "{_uuid(draw)}"\n'))) >= 0:
            pairs.append(pair)
        pairs.insert(round(task.depth * len(pairs)), asked)
        return [*opened, *(token for pair in pairs for token in pair), *closed], [value]

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return tokens


def run_retrieval(
    model: Any,
    batteries: Sequence[Prompts],
    tasks: Sequence[RetrievalTask],
    arms: Mapping[str, Arm],
    *,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[RetrievalRecord]:
    """Ask every task of every battery under every arm, greedily.

    Args:
        model: a causal LM that generates.
        batteries: makers of prompts: `PasskeyPrompts`, `NeedlePrompts`, `KeyValuePrompts`, `VariablePrompts`.
        tasks: the grid, from `retrieval_tasks`; the same prompts for every arm.
        arms: name -> callable (model) -> context manager under which the model answers.
        path: a JSON-lines file. A record is appended as soon as its answer is known; tasks that the file already
            answers, for the same battery, filler, arm (name and settings), model and dtype, are not asked again.
        progress: show a bar per arm.

    Returns:
        One record per arm, battery and task, in that order.

    Raises:
        ValueError: a task that no prompt can be made for; a line of `path` that is no such record.
    """
    journal = Journal(path, RetrievalRecord, ("tokens", "expected", "answer", "score"))
    cells = [(prompts, task) for prompts in batteries for task in tasks]
    records = []
    for name, arm in arms.items():
        setting = arm_fields(name, arm, model)
        with arm(model):
            for prompts, task in tqdm(cells, desc=name, unit="prompt", disable=not progress):
                cell = {**vars(task), "battery": prompts.battery, "filler": prompts.filler, **setting}
                records.append(journal.once(cell, partial(_answered, model, prompts, task)))
    return records


def retrieval_table(records: Sequence[RetrievalRecord]) -> Table:
    """Lay mean scores out as a rich table: a row per arm, battery, filler and length, a column per depth, the mean."""
    title = "expected strings found, by depth"
    return score_table(records, ("arm", "battery", "filler"), title=title)


def plot_retrieval(records: Sequence[RetrievalRecord]) -> list[Axes]:
    """Draw heat maps of mean scores over prompt length and depth: a column per arm, a row per battery and filler."""
    return plot_scores(records, "arm", ("battery", "filler"))


def _answered(model: Any, prompts: Prompts, task: RetrievalTask) -> dict[str, Any]:
    ids, expected = prompts(task)
    answer = prompts.tokenizer.decode(greedy_answer(model, ids, prompts.answer_tokens), skip_special_tokens=True)
    return {"tokens": len(ids), "expected": expected, "answer": answer, "score": prompts.score(answer, expected)}


def _asked(words: Sequence[str], values: int) -> tuple[str, str]:
    """Return the question for some words' numbers, and the beginning of its answer."""
    asked, plural = " and ".join(words), values * len(words) > 1
    question = f"What {'are all magic numbers' if plural else 'is the magic number'} for {asked}?"
    return question, f"The magic {'numbers' if plural else 'number'} for {asked} {'are' if plural else 'is'}"


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _names(draw: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choices(string.ascii_uppercase, k=5))] = None
    return list(names)
