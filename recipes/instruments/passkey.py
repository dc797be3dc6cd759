"""Passkey retrieval: a five-digit number hidden in filler, asked for at the end (Mohtashami and Jaggi 2023).

It is a battery of `retrieval.py` with one needle; the first number of the answer is scored. A prompt is
[opening | filler | key sentence | filler | question] and has exactly the asked number of tokens. The key sentence says
the key twice, which makes it easier to find than a needle that is mentioned once: see `NeedlePrompts`.

The prompt is plain text that the model continues, for chat models too: SmolLM2-135M-Instruct finds the key in 7,000
tokens of repeated filler when it is asked so, and no longer always when the same words are put into a chat turn.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from instruments.haystack import Haystack
from instruments.heat_maps import mean_score
from instruments.retrieval import (
    RetrievalRecord,
    RetrievalTask,
    plot_retrieval,
    retrieval_table,
    retrieval_tasks,
    run_retrieval,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from hf_longtrunc.evaluation.records import Arm

_OPENING = "There is an important pass key hidden in a long text. Find it and remember it. I will ask you about it."
_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"

# One battery among others: its task, record, table and plot are theirs.
PasskeyTask, PasskeyRecord = RetrievalTask, RetrievalRecord
passkey_table, plot_passkey = retrieval_table, plot_retrieval


class PasskeyPrompts:
    """Makes passkey prompts of an exact token length for one tokenizer and one filler.

    Args:
        tokenizer: a transformers tokenizer; the special tokens that it opens a text with open the prompt.
        text: the filler; None repeats a few sentences. A text is cut into sentences, a prompt takes a part of it
            at a place drawn per task, and a text that is too short for the length starts again from its beginning.

    Raises:
        ValueError: the text holds no sentence.
    """

    battery = "passkey"
    answer_tokens = 12

    def __init__(self, tokenizer: Any, text: str | None = None):
        self.tokenizer, self._haystack = tokenizer, Haystack(tokenizer, text)
        self.filler = self._haystack.filler

    def __call__(self, task: RetrievalTask) -> tuple[list[int], list[str]]:
        """Return the prompt's token ids, exactly `task.length` of them, and the key as the only expected string.

        Raises:
            ValueError: the length leaves no room for the filler, or the depth lies outside [0, 1].
        """
        draw = task.random
        key = str(draw.randrange(10_000, 100_000))
        hidden = [(task.depth, _KEY.format(key=key))]
        return self._haystack.prompt(task.length, _OPENING, hidden, _QUESTION, draw), [key]

    def score(self, answer: str, expected: Sequence[str]) -> float:
        """Return 1.0 if the first number of the answer is the key, else 0.0."""
        found = re.search(r"\d+", answer)
        return float(found is not None and found[0] == expected[0])


def passkey_tasks(
    lengths: Sequence[int], depths: Sequence[float], *, keys_per_cell: int = 10, seed: int = 0
) -> list[RetrievalTask]:
    """Return the grid lengths x depths x keys, shortest prompts first: `retrieval_tasks` under its earlier name."""
    return retrieval_tasks(lengths, depths, prompts_per_cell=keys_per_cell, seed=seed)


def run_passkey(
    model: Any,
    prompts: PasskeyPrompts,
    tasks: Sequence[RetrievalTask],
    arms: Mapping[str, Arm],
    *,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[RetrievalRecord]:
    """Run `run_retrieval` with the passkey as its only battery."""
    return run_retrieval(model, [prompts], tasks, arms, path=path, progress=progress)


def accuracy(records: Sequence[RetrievalRecord]) -> float:
    """Return the mean score, for passkeys the share of correct answers; NaN where there are no records."""
    return mean_score(records)
