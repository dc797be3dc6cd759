"""Passkey retrieval: a five-digit number hidden in filler, asked for at the end (Mohtashami and Jaggi 2023).

A prompt is [opening | filler | key sentence | filler | question] and has exactly the asked number of tokens. It is put
together from the tokens of whole sentences, each tokenised alone, so its length is a sum; the filler's first sentence
loses tokens from its start to make it exact.

The prompt is plain text that the model goes on with, for chat models too: SmolLM2-135M-Instruct finds the key in 7,000
tokens of repeated filler when it is asked so, and no longer always when the same words are put into a chat turn.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_longtrunc.evaluation.records import Journal, arm_settings, model_settings

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table

    from hf_longtrunc.evaluation.records import Arm

REPEATED_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

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
        text: the filler; None repeats `REPEATED_FILLER`. A text is cut into sentences, a prompt takes a stretch of it
            whose place is drawn per task, and a text that is too short for the length starts again from its beginning.

    Raises:
        ValueError: the text holds no sentence.
    """

    def __init__(self, tokenizer: Any, text: str | None = None):
        self.tokenizer = tokenizer
        self.filler = "repeated" if text is None else "text"
        sentences = _sentences(REPEATED_FILLER if text is None else text)
        if not sentences:
            raise ValueError(
                "text holds no sentence to make filler of; give another text, or None for a repeated filler"
            )
        self._sentences = self._tokens_of(sentences)
        self._opening: list[int] = tokenizer(_OPENING).input_ids
        (self._question,) = self._tokens_of([_QUESTION])

    def __call__(self, task: PasskeyTask) -> tuple[list[int], str]:
        """Return the prompt's token ids, exactly `task.length` of them, and the key.

        Raises:
            ValueError: the length leaves no room for the filler, or the depth lies outside [0, 1].
        """
        if not 0 <= task.depth <= 1:
            raise ValueError(f"depth must lie in [0, 1], from the prompt's start to its end, got {task.depth}")
        draw = task.random
        key = str(draw.randrange(10_000, 100_000))
        (hidden,) = self._tokens_of([_KEY.format(key=key)])
        room = task.length - len(self._opening) - len(hidden) - len(self._question)
        if room < 1:
            raise ValueError(
                f"length must be at least {task.length - room + 1} tokens for this prompt, got {task.length}"
            )
        sentences = self._stretch(room, draw.randrange(len(self._sentences)))
        cut = _nearest_boundary(sentences, task.depth * room)
        before, after = _joined(sentences[:cut]), _joined(sentences[cut:])
        return [*self._opening, *before, *hidden, *after, *self._question], key

    def _stretch(self, room: int, last: int) -> list[list[int]]:
        """Return sentences of `room` tokens together, ending with sentence `last`; the first loses its start to fit."""
        backwards: list[list[int]] = []
        while room > 0:
            sentence = self._sentences[(last - len(backwards)) % len(self._sentences)]
            backwards.append(sentence[-room:])
            room -= len(sentence)
        return backwards[::-1]

    def _tokens_of(self, sentences: Sequence[str]) -> list[list[int]]:
        spaced = [" " + sentence for sentence in sentences]
        tokens: list[list[int]] = self.tokenizer(spaced, add_special_tokens=False, verbose=False).input_ids
        return tokens


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
                record = journal.get(**vars(task), **setting)
                if record is None:
                    record = _ask(model, prompts, task, setting)
                    journal.add(record)
                records.append(record)
    return records


def passkey_table(records: Sequence[PasskeyRecord]) -> Table:
    """Lay accuracies out as a rich table: a row per arm, filler and length, a column per depth, and the mean."""
    try:
        from rich.table import Table
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("passkey_table() needs rich: pip install 'hf_longtrunc[eval]'") from error
    depths = sorted({record.depth for record in records})
    table = Table("arm", "filler", "tokens", title="passkey accuracy by depth")
    for column in [*(f"{depth:.0%}" for depth in depths), "mean", "keys"]:
        table.add_column(column, justify="right")
    for row in dict.fromkeys((record.arm, record.filler, record.length) for record in records):
        inside = [record for record in records if (record.arm, record.filler, record.length) == row]
        by_depth = [[record for record in inside if record.depth == depth] for depth in depths]
        accuracies = [f"{accuracy(cell):.2f}" if cell else "" for cell in [*by_depth, inside]]
        table.add_row(row[0], row[1], f"{row[2]:,}", *accuracies, str(len(inside)))
    return table


def plot_passkey(records: Sequence[PasskeyRecord]) -> list[Axes]:
    """Draw one heat map per arm: accuracy over prompt length (across) and depth of the key (down)."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_passkey() needs matplotlib: pip install 'hf_longtrunc[eval]'") from error
    arms = list(dict.fromkeys(record.arm for record in records))
    lengths = sorted({record.length for record in records})
    depths = sorted({record.depth for record in records})
    size = (1.5 + len(arms) * (1 + 0.6 * len(lengths)), 1.5 + 0.4 * len(depths))
    _, grid = plt.subplots(1, len(arms), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axes, arm in zip(grid[0], arms, strict=True):
        cells = [
            [accuracy([r for r in records if (r.arm, r.length, r.depth) == (arm, n, depth)]) for n in lengths]
            for depth in depths
        ]
        axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set(title=arm, xlabel="prompt (tokens)", xticks=range(len(lengths)), yticks=range(len(depths)))
        axes.set_xticklabels([f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticklabels([f"{depth:.0%}" for depth in depths])
    grid[0][0].set_ylabel("depth of the key")
    return list(grid[0])


def accuracy(records: Sequence[PasskeyRecord]) -> float:
    """Return the share of correct answers, NaN where there are no records."""
    return sum(record.correct for record in records) / len(records) if records else float("nan")


def _ask(model: Any, prompts: PasskeyPrompts, task: PasskeyTask, setting: dict[str, Any]) -> PasskeyRecord:
    ids, key = prompts(task)
    prompt = torch.tensor([ids], device=model.device)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_ANSWER_TOKENS, **greedy)
    answer = prompts.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    found = re.search(r"\d+", answer)
    correct = found is not None and found[0] == key
    return PasskeyRecord(**vars(task), **setting, key=key, answer=answer, correct=correct)


def _sentences(text: str) -> list[str]:
    sentences = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    return [sentence for sentence in sentences if sentence]


def _nearest_boundary(sentences: Sequence[Sequence[int]], position: float) -> int:
    """Return after how many sentences the token count is nearest to `position`."""
    ends = list(accumulate(map(len, sentences), initial=0))
    return min(range(len(ends)), key=lambda index: abs(ends[index] - position))


def _joined(sentences: Sequence[Sequence[int]]) -> list[int]:
    return [token for sentence in sentences for token in sentence]
