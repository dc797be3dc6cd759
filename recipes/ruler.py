"""Six of RULER's tasks, made up by lm-evaluation-harness without a network, past the trained window: seven arms.

    python recipes/ruler.py --out ruler                      # 126 cells of 20 prompts: one GPU
    python recipes/ruler.py --arms ask --out ruler           # short prompts only: two CPU cores
    python recipes/ruler.py --model NAME --out ruler         # a row for another model

YaRN and dynamic NTK are transformers' own, untrained. `ask` takes a prompt's last line for the question and the lines
before it for the text. It reads one passage a question: a count over the whole text (cwe, fwe) and a chain (vt) are
beyond it. A run that was cut off goes on at the cell where it stopped: records are appended to OUT/ruler.jsonl, and
OUT/ruler.png shows them.

Cost: a cell of 20 prompts of 4,096 tokens takes SmolLM2-135M-Instruct some ten minutes of one CPU core.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import lm_eval
import torch
import typer
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers import AutoConfig

from hf_longtrunc import (
    BM25,
    DualChunkAttention,
    LMInfinite,
    StreamingLLM,
    TextIndex,
    ask,
    load_pretrained,
    trained_length,
)
from hf_longtrunc.asking.answers import default_finder
from hf_longtrunc.evaluation import wilson_interval
from hf_longtrunc.evaluation.display import new_table
from hf_longtrunc.evaluation.harness import PatchedLM
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings
from hf_longtrunc.extras import import_pyplot
from hf_longtrunc.pretrained import default_model_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ARMS = ("unmodified", "yarn", "dynamic ntk", "streaming", "lm-infinite", "dual chunk", "ask")
_MAKERS = {"niah_utils": "generate_samples", "vt_utils": "sys_vartrack_w_noise_random"}
_MAKERS |= {"cwe_utils": "sys_word_pair_random", "fwe_utils": "sys_kwext"}


@dataclass(frozen=True, kw_only=True)
class RulerRecord(ModelRecord):
    """One cell: the mean score of `samples` prompts."""

    arm: str
    task: str
    length: int
    limit: int
    samples: int
    score: float


class AskLM(LM):  # type: ignore[misc]
    """Answers each prompt by `ask`: the last line is the question, what is before it is the text."""

    def __init__(self, model: Any, tokenizer: Any, finder: Any):
        super().__init__()
        self._ask, self._finder = partial(ask, model, tokenizer), finder

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer a request."""
        answers = []
        for prompt, settings in (request.args for request in requests):
            text, _, question = prompt.rstrip().rpartition("\n")
            (answer,) = self._ask(TextIndex(text, self._finder), question, max_new_tokens=settings["max_gen_toks"])
            answers.append(answer.text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Not asked for by these tasks."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    arms: Annotated[str, typer.Option(help=", ".join(ARMS))] = ",".join(ARMS),
    tasks: Annotated[str, typer.Option(help="Names of lm-evaluation-harness.")] = ",".join(TASKS),
    lengths: Annotated[str, typer.Option(help="Powers of two from 4096 on.")] = "4096,8192,16384",
    limit: Annotated[int, typer.Option(min=1, help="Prompts a cell.")] = 20,
    finder: Annotated[str, typer.Option(help="Of `ask`: default or bm25.")] = "default",
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; all-MiniLM-L6-v2 if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of ruler.jsonl.")] = Path("ruler"),
) -> None:
    source = model or str(default_model_folder())
    sizes = [int(length) for length in lengths.split(",")]
    if unknown := set(arms.split(",")) - set(ARMS):
        raise typer.BadParameter(f"--arms takes {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
    journal, records = Journal(out / "ruler.jsonl", RulerRecord, ("samples", "score")), []
    for arm in arms.split(","):
        patched, tokenizer, patch = loaded(source, arm, max(sizes))
        settings = {**model_settings(patched), "model": patched.config.name_or_path}
        with ExitStack() as stack:
            if arm == "ask":
                by_words = BM25()
                lm: Any = AskLM(patched, tokenizer, by_words if finder == "bm25" else default_finder(encoder))
            else:
                lm = stack.enter_context(
                    PatchedLM(patched, tokenizer=tokenizer, arm=patch, max_length=2**30, batch_size=1)
                )
            for length in sizes:
                for task in tasks.split(","):
                    cell = {**settings, "arm": arm, "task": task, "length": length, "limit": limit}
                    records.append(journal.once(cell, partial(measured, lm, task, length, limit, source)))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(ruler_table(records))
    draw(records).figure.canvas.print_figure(out / "ruler.png", dpi=130)


def loaded(source: str, arm: str, longest: int) -> tuple[Any, Any, Any]:
    """Return the model, its tokenizer and the technique of an arm."""
    config = AutoConfig.from_pretrained(source)
    trained = trained_length(config)
    if arm in ("yarn", "dynamic ntk"):
        scaling = {"rope_type": arm.split()[0], "factor": max(longest / trained, 1.0)}
        config.rope_parameters = {**config.rope_parameters, **scaling, "original_max_position_embeddings": trained}
    model, tokenizer = load_pretrained(source, config=config)
    window = max(1, trained // 4)
    patches = {
        "streaming": StreamingLLM(window_length=window),
        "lm-infinite": LMInfinite(window_length=window),
        "dual chunk": DualChunkAttention(),
    }
    return model, tokenizer, patches.get(arm)


def measured(lm: Any, task: str, length: int, limit: int, source: str) -> dict[str, Any]:
    """Return the number of prompts and their mean score."""
    with ExitStack() as stack:  # the harness makes 500 prompts whatever `limit` says; the first ones are the same
        for module, name in _MAKERS.items():
            of = import_module(f"lm_eval.tasks.ruler.{module}")
            stack.enter_context(mock.patch.object(of, name, fewer(getattr(of, name), limit)))
        folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"  # an index of all tasks takes seconds
        manager = TaskManager(
            metadata={"tokenizer": source, "max_seq_lengths": [length]},
            include_path=str(folder),
            include_defaults=False,
        )
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    score = float(found["results"][task][f"{length},none"])
    return {"samples": found["n-samples"][task]["effective"], "score": score}


def fewer(make: Any, limit: int) -> Any:
    """Return a maker of prompts that makes no more than `limit`."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "num_samples": min(limit, kwargs.get("num_samples", limit))})

    return limited


def ruler_table(records: Sequence[RulerRecord]) -> Table:
    """Lay the scores out: a row a task and length, a column an arm: mean, 95 % interval, number of prompts."""
    arms = list(dict.fromkeys(record.arm for record in records))
    table = new_table("task", "tokens", title="RULER: mean score, 95 % interval, prompts")
    for arm in arms:
        table.add_column(arm, justify="right")
    cells = {(r.task, r.length, r.arm): r for r in records}
    for task, length in dict.fromkeys((r.task, r.length) for r in records):
        row = [cells.get((task, length, arm)) for arm in arms]
        table.add_row(task, f"{length:,}", *("" if each is None else shown(each) for each in row))
    return table


def shown(record: RulerRecord) -> str:
    low, high = wilson_interval(record.score, record.samples)
    return f"{record.score:.2f} ({low:.2f}-{high:.2f}, {record.samples})"


def draw(records: Sequence[RulerRecord]) -> Any:
    """Draw the mean over the tasks of each arm, by length."""
    axes = import_pyplot("a picture").subplots(layout="constrained")[1]
    for arm in dict.fromkeys(record.arm for record in records):
        own = [record for record in records if record.arm == arm]
        lengths = sorted({record.length for record in own})
        scores = [[record.score for record in own if record.length == length] for length in lengths]
        axes.plot(lengths, [sum(each) / len(each) for each in scores], marker="o", label=arm)
    axes.set(xlabel="prompt (tokens)", ylabel="mean score of the tasks", ylim=(0, 1))
    axes.legend()
    return axes


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
