"""SCROLLS: seven tasks over long texts (Shaham et al. 2022, arXiv 2201.03533): rows, prompts, predictions, scores.

A row is {id, pid, input, output}. The input is the question, if the task has one, a blank line, and the document. An
encoder-decoder reads the input unchanged. A causal model reads the document, and then the task in a sentence.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation.display import new_axes, new_table
from hf_longtrunc.evaluation.records import ArmRecord, Journal, arm_fields
from hf_longtrunc.evaluation.scrolls_metrics import METRICS as METRICS, benchmark as benchmark, evaluate as evaluate
from hf_longtrunc.evaluation.streaming import greedy_answer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

    from matplotlib.axes import Axes
    from rich.table import Table

    from hf_longtrunc.evaluation.records import Arm

_SUMMARY = "What follows is a summary of the {} above.\n\nSummary:"
_QUESTION = "Question: {query}\n\nAnswer:"


@dataclass(frozen=True)
class _Task:
    """How a causal model is asked, and how much it may answer."""

    ask: str  # put behind the document; {query} is the row's question
    max_new_tokens: int


TASKS = {
    "gov_report": _Task(_SUMMARY.format("report"), 512),
    "summ_screen_fd": _Task(_SUMMARY.format("episode"), 256),
    "qmsum": _Task(_QUESTION, 256),
    "narrative_qa": _Task(_QUESTION, 32),
    "qasper": _Task(_QUESTION, 64),
    "quality": _Task(_QUESTION, 64),
    "contract_nli": _Task(
        "Statement: {query}\n\nAccording to the contract, is it Entailment, Contradiction or Not mentioned?\n\nAnswer:",
        8,
    ),
}


@dataclass(frozen=True)
class ScrollsRecord(ArmRecord):
    """The prediction for one row under one arm, with the prompt's length and the number of tokens cut from it."""

    task: str
    id: str
    max_tokens: int | None
    max_new_tokens: int
    prompt_tokens: int
    cut_tokens: int
    prediction: str


class Rows:
    """The rows of a task's split, read from the file on each iteration, as a split may be larger than memory.

    Args:
        task: one of `TASKS`.
        data: a JSON-lines file, a zip or a folder; a zip or folder holds TASK/SPLIT.jsonl or SPLIT.jsonl, a folder may
            hold TASK.zip. None fetches TASK.zip of the data set `tau/scrolls` from the hub, once.
        split: its name.
        limit: the first so many examples, each with all its rows; None takes all.

    Raises:
        ValueError: an unknown task; a limit below 1; when read: a line that is no row of SCROLLS.
        FileNotFoundError: no such file, or nothing of the split in it.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "validation.jsonl")
        >>> _ = path.write_text(json.dumps({"id": "1", "input": "A report.", "output": "Short."}))
        >>> [row["output"] for row in Rows("gov_report", path)]
        ['Short.']
    """

    def __init__(
        self,
        task: str,
        data: str | os.PathLike[str] | None = None,
        *,
        split: str = "validation",
        limit: int | None = None,
    ):
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        self.task, self.split = task, split
        self.limit = None if limit is None else check_int("limit", limit, minimum=1)
        self.file, self.member = _found(_hub_zip(task) if data is None else Path(data), task, split)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        with self._open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = _row(line, f"{self.file}{f':{self.member}' if self.member else ''}, line {number}")
                if self.limit is not None and len(seen) == self.limit and row["id"] not in seen:
                    continue
                seen.add(row["id"])
                yield row

    @contextmanager
    def _open(self) -> Iterator[IO[str]]:
        if self.member is None:
            with open(self.file, encoding="utf-8") as lines:
                yield lines
        else:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as member:
                yield io.TextIOWrapper(member, encoding="utf-8")


def prompt(task: str, row: Mapping[str, Any]) -> tuple[str, str]:
    r"""Return the two parts of a causal model's prompt: the document, and the request after it.

    Raises:
        ValueError: no blank line separates question and document.

    Examples:
        >>> prompt("qasper", {"id": "1", "input": "Why?\n\nBecause."})
        ('Because.', '\n\nQuestion: Why?\n\nAnswer:')
    """
    ask = TASKS[task].ask
    if "{query}" not in ask:
        return row["input"].strip(), "\n\n" + ask
    # QuALITY's question has a blank line of its own before its four options.
    options = re.search(r"\(D\)", row["input"]) if task == "quality" else None
    query, blank, document = row["input"][(start := options.end() if options else 0) :].partition("\n\n")
    if not blank:
        raise ValueError(f"row {row['id']!r} of {task} has no blank line between its question and its document")
    return document.strip(), "\n\n" + ask.format(query=(row["input"][:start] + query).strip())


def run(
    model: Any,
    tokenizer: Any,
    task: str,
    rows: Iterable[Mapping[str, Any]],
    arms: Mapping[str, Arm],
    *,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[ScrollsRecord]:
    """Predict every example of `rows`, greedily, once per arm.

    Args:
        model: a transformers causal or encoder-decoder model that generates.
        tokenizer: its tokenizer.
        task: one of `TASKS`.
        rows: of the task; of several rows with one id the first is used.
        arms: name -> callable (model) -> context manager under which the model predicts.
        max_tokens: cuts the end of the document of a longer prompt, never the question; None passes the whole text.
        max_new_tokens: of a prediction; None takes the task's.
        path: a JSON-lines file for the records; a later run does not predict them again.
        progress: show a bar per arm.

    Returns:
        One record per arm and example, in that order: `predictions(records)` is what `evaluate` takes.

    Raises:
        ValueError: an unknown task, a question that alone is longer than max_tokens, a text longer than a model with
            learned positions can read.

    Examples:
        >>> from contextlib import nullcontext
        >>> language_model, tokenizer = load_pretrained(folder, device="cpu")
        >>> rows = [{"id": "1", "input": "a b c.", "output": "a"}]  # or Rows("gov_report")
        >>> (record,) = run(language_model, tokenizer, "gov_report", rows, {"plain": nullcontext}, max_new_tokens=2)
        >>> record.id, record.arm, record.cut_tokens
        ('1', 'plain', 0)
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    journal = Journal(path, ScrollsRecord, ("prompt_tokens", "cut_tokens", "prediction"))
    max_tokens = None if max_tokens is None else check_int("max_tokens", max_tokens, minimum=1)
    new_tokens = (
        TASKS[task].max_new_tokens if max_new_tokens is None else check_int("max_new_tokens", max_new_tokens, minimum=1)
    )
    records = []
    for name, arm in arms.items():
        cell: dict[str, Any] = {"task": task, "max_tokens": max_tokens, "max_new_tokens": new_tokens}
        cell |= arm_fields(name, arm, model)
        with arm(model):
            for row in tqdm(_once(rows), desc=name, unit="example", disable=not progress):
                predict = partial(_predict, model, tokenizer, row, cell)
                records.append(journal.once({"id": row["id"], **cell}, predict))
    return records


def predictions(records: Iterable[ScrollsRecord], arm: str | None = None) -> dict[str, str]:
    """Return id -> prediction, the official shape, of one arm; None takes the only one there is.

    Raises:
        ValueError: several arms and none named; no records.

    Examples:
        >>> predictions([], "plain")
        Traceback (most recent call last):
        ValueError: arm must be one of (no records), got 'plain'
    """
    by_arm: dict[str, dict[str, str]] = {}
    for record in records:
        by_arm.setdefault(record.arm, {})[record.id] = record.prediction
    if arm is None and len(by_arm) == 1:
        return next(iter(by_arm.values()))
    if arm not in by_arm:
        raise ValueError(f"arm must be one of {', '.join(by_arm) or '(no records)'}, got {arm!r}")
    return by_arm[arm]


def scrolls_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a rich table of arm -> the dictionary of `evaluate`: a row per arm, a column per displayed metric.

    Examples:
        >>> scores = evaluate("qasper", {"a": "yes"}, [{"id": "a", "output": "yes"}])
        >>> [column.header for column in scrolls_table({"plain": scores}).columns]
        ['arm', 'f1', 'score', 'examples', 'characters']
    """
    table = new_table("arm", title="SCROLLS")
    shown = next(iter(results.values()))["display_keys"]
    for heading in [*shown, "score", "examples", "characters"]:
        table.add_column(heading.removeprefix("rouge/"), justify="right")
    for arm, result in results.items():
        numbers = [*result["display"], result["scrolls_score"]]
        length = f"{result['mean_prediction_length_characters']:.0f}"
        table.add_row(arm, *(f"{number:.2f}" for number in numbers), str(result["num_predicted"]), length)
    return table


def plot_scrolls(results: Mapping[str, Mapping[str, Any]], axes: Axes | None = None) -> Axes:
    """Plot arm -> the dictionary of `evaluate` as groups of bars: a group per displayed metric, a bar per arm.

    Examples:
        >>> scores = evaluate("qasper", {"a": "yes"}, [{"id": "a", "output": "yes"}])
        >>> plot_scrolls({"plain": scores}).get_ylabel()
        'percent'
    """
    axes = axes or new_axes(6, 3.5)
    shown = next(iter(results.values()))["display_keys"]
    width = 0.8 / len(results)
    for index, (arm, result) in enumerate(results.items()):
        places = [place + (index - (len(results) - 1) / 2) * width for place in range(len(shown))]
        axes.bar_label(axes.bar(places, result["display"], width, label=arm), fmt="%.1f", padding=2, fontsize=8)
    axes.set_xticks(range(len(shown)), [key.removeprefix("rouge/") for key in shown])
    axes.set(ylabel="percent", ylim=(0, 1.15 * max(1, *(n for result in results.values() for n in result["display"]))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def _hub_zip(task: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download("tau/scrolls", f"{task}.zip", repo_type="dataset"))


def _found(data: Path, task: str, split: str) -> tuple[Path, str | None]:
    """Return the file that holds the split and, if it is a zip, the name in it."""
    names = [f"{task}/{split}.jsonl", f"{split}.jsonl"]
    if data.is_dir():
        names.append(f"{task}.zip")
        for name in names:
            if (data / name).exists():
                return _found(data / name, task, split)
    elif data.exists():
        if not zipfile.is_zipfile(data):
            return data, None
        with zipfile.ZipFile(data) as archive:
            for name in names:
                if name in archive.namelist():
                    return data, name
    else:
        raise FileNotFoundError(f"data: there is no {data}; name a folder, a zip or a JSON-lines file of SCROLLS")
    raise FileNotFoundError(f"data: {data} holds none of {', '.join(names)}; check --split and --data")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("input"), str):
        raise ValueError(f"{where}: expected a JSON object with the texts id and input, got {line[:80]!r}")
    return row


def _once(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    seen = set()
    for row in rows:
        if row["id"] not in seen:
            seen.add(row["id"])
            yield row


def _predict(model: Any, tokenizer: Any, row: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    ids, cut = _prompt_ids(model, tokenizer, row, cell["task"], cell["max_tokens"])
    try:
        answer = greedy_answer(model, ids, cell["max_new_tokens"])
    except IndexError as error:
        raise ValueError(
            f"row {row['id']!r} has {len(ids)} tokens, more than this model has learned positions for: pass max_tokens "
            "(--max-tokens), or an arm that reads longer texts"
        ) from error
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return {"prompt_tokens": len(ids), "cut_tokens": cut, "prediction": text}


def _prompt_ids(
    model: Any, tokenizer: Any, row: Mapping[str, Any], task: str, max_tokens: int | None
) -> tuple[list[int], int]:
    """Return the prompt's tokens, at most max_tokens of them, and how many were cut from the document's end."""
    if model.config.is_encoder_decoder:
        ids: list[int] = tokenizer(row["input"], verbose=False).input_ids
        if max_tokens is None or len(ids) <= max_tokens:
            return ids, 0
        # Special tokens at the end stay: the tokenizer cuts before them.
        return tokenizer(row["input"], truncation=True, max_length=max_tokens).input_ids, len(ids) - max_tokens
    document, ask = prompt(task, row)
    ids, asked = tokenizer(document, verbose=False).input_ids, tokenizer(ask, add_special_tokens=False).input_ids
    room = len(ids) if max_tokens is None else max_tokens - len(asked)
    if room < 1:
        raise ValueError(f"max_tokens must leave room behind the {len(asked)} tokens of the question, got {max_tokens}")
    return [*ids[:room], *asked], max(0, len(ids) - room)


__all__ = [
    "METRICS",
    "TASKS",
    "Rows",
    "ScrollsRecord",
    "benchmark",
    "evaluate",
    "plot_scrolls",
    "predictions",
    "prompt",
    "run",
    "scrolls_table",
]
