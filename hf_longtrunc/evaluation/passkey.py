"""Passkey retrieval: a five-digit number hidden in filler, asked for at the end (Mohtashami and Jaggi 2023).

A prompt is [opening | filler | key sentence | filler | question] and has exactly the asked number of tokens.

The prompt is plain text that the model goes on with, for chat models too: SmolLM2-135M-Instruct finds the key in 7,000
tokens of repeated filler when it is asked so, and no longer always when the same words are put into a chat turn.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_longtrunc.evaluation.answers import greedy_answer
from hf_longtrunc.evaluation.grids import grid_table, mean_score, plot_grids
from hf_longtrunc.evaluation.haystack import Haystack
from hf_longtrunc.evaluation.records import Journal, arm_settings, model_settings

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table

    from hf_longtrunc.evaluation.records import Arm

_OPENING = "There is an important pass key hidden in a long text. Find it and remember it. I will ask you about it."
_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"
_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class PasskeyTask:
    """One prompt of the grid: its exact length in tokens, the key's depth in [0, 1], and which draw of the cell."""

    length: int
    depth: float
    trial: int
    seed: int

    @property
    def random(self) -> random.Random:
        """The task's own generator, the same in every process: it draws the key, then the place in the text."""
        return random.Random(f"{self.seed}/{self.length}/{float(self.depth)}/{self.trial}")


@dataclass(frozen=True)
class PasskeyRecord(PasskeyTask):
    """A task, the setting that it ran in, the key that was hidden and what the model answered."""

    filler: str
    arm: str
    settings: str
    model: str
    dtype: str
    device: str
    key: str
    answer: str
    correct: bool


class PasskeyPrompts:
    """Makes passkey prompts of an exact token length for one tokenizer and one filler.

    Args:
        tokenizer: a transformers tokenizer; the special tokens that it opens a text with open the prompt.
        text: the filler; None repeats a few sentences. A text is cut into sentences, a prompt takes a stretch of it
            whose place is drawn per task, and a text that is too short for the length starts again from its beginning.

    Raises:
        ValueError: the text holds no sentence.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        self.tokenizer = tokenizer
        self._haystack = Haystack(tokenizer, text)
        self.filler = self._haystack.filler

    def __call__(self, task: PasskeyTask) -> tuple[list[int], str]:
        """Return the prompt's token ids, exactly `task.length` of them, and the key.

        Raises:
            ValueError: the length leaves no room for the filler, or the depth lies outside [0, 1].
        """
        draw = task.random
        key = str(draw.randrange(10_000, 100_000))
        hidden = [(task.depth, _KEY.format(key=key))]
        return self._haystack.prompt(task.length, _OPENING, hidden, _QUESTION, draw), key


def passkey_tasks(
    lengths: Sequence[int], depths: Sequence[float], *, keys_per_cell: int = 10, seed: int = 0
) -> list[PasskeyTask]:
    """Return the grid lengths x depths x keys, shortest prompts first."""
    cells = product(lengths, depths, range(keys_per_cell))
    return [PasskeyTask(length, float(depth), trial, seed) for length, depth, trial in cells]


def run_passkey(
    model: Any,
    prompts: PasskeyPrompts,
    tasks: Sequence[PasskeyTask],
    arms: Mapping[str, Arm],
    *,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[PasskeyRecord]:
    """Ask every task of every arm, greedily, and compare the first number of the answer with the key.

    Args:
        model: a causal LM that generates.
        prompts: makes the prompts.
        tasks: what to ask; the same prompts for every arm.
        arms: name -> callable (model) -> context manager under which the model answers.
        path: a JSON-lines file. A record is appended as soon as it is there; tasks that the file already answers, for
            the same filler, arm (name and settings), model and dtype, are read and not asked again.
        progress: show a bar per arm.

    Returns:
        One record per arm and task, in that order.

    Raises:
        ValueError: a task that no prompt can be made for; a line of `path` that is no passkey record.
    """
    journal = Journal(path, PasskeyRecord, ("key", "answer", "correct"))
    records = []
    for name, arm in arms.items():
        setting = {"filler": prompts.filler, "arm": name, "settings": arm_settings(arm), **model_settings(model)}
        with arm(model):
            for task in tqdm(tasks, desc=name, unit="key", disable=not progress):
                records.append(journal.once({**vars(task), **setting}, partial(_answered, model, prompts, task)))
    return records


def passkey_table(records: Sequence[PasskeyRecord]) -> Table:
    """Lay accuracies out as a rich table: a row per arm, filler and length, a column per depth, and the mean."""
    return grid_table(records, ("arm", "filler"), "correct", title="passkey accuracy by depth", count="keys")


def plot_passkey(records: Sequence[PasskeyRecord]) -> list[Axes]:
    """Draw one heat map per arm: accuracy over prompt length (across) and depth of the key (down)."""
    return plot_grids(records, "arm", (), "correct")


def accuracy(records: Sequence[PasskeyRecord]) -> float:
    """Return the share of correct answers, NaN where there are no records."""
    return mean_score(records, "correct")


def _answered(model: Any, prompts: PasskeyPrompts, task: PasskeyTask) -> dict[str, Any]:
    ids, key = prompts(task)
    answer = prompts.tokenizer.decode(greedy_answer(model, ids, _ANSWER_TOKENS), skip_special_tokens=True)
    found = re.search(r"\d+", answer)
    correct = found is not None and found[0] == key
    return {"key": key, "answer": answer, "correct": correct}
