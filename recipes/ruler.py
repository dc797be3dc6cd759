"""Six of RULER's tasks, made up by lm-evaluation-harness without a network, up to twice the trained window.

    python recipes/ruler.py --out ruler                      # 144 cells of 20 prompts: one GPU
    python recipes/ruler.py --arms ask,bm25 --out ruler      # short prompts only: two CPU cores
    python recipes/ruler.py --model FOLDER --out larger      # another model

YaRN and dynamic NTK are transformers' own, untrained. `ask` takes a prompt's last line for the question and the lines
before it for the text; `bm25` is `ask` with the best passage by words alone. They read one passage a question: a count
over the whole text (cwe, fwe) and a chain (vt) are beyond them. Records of single prompts are appended to
OUT/ruler.jsonl: a run that was cut off goes on where it stopped, and `--limit` may grow. OUT/ruler.png shows them.

Cost: a prompt of 4,096 tokens takes SmolLM2-135M-Instruct some 40 seconds of one CPU core.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from rich.console import Console
from tqdm import tqdm
from transformers import AutoConfig
from transformers.generation.streamers import BaseStreamer

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
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings, read_records
from hf_longtrunc.extras import import_pyplot
from hf_longtrunc.pretrained import default_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ARMS = ("unmodified", "yarn", "dynamic ntk", "streaming", "lm-infinite", "dual chunk", "ask", "bm25")
_MAKERS = {"niah_utils": "generate_samples", "vt_utils": "sys_vartrack_w_noise_random"}
_MAKERS |= {"cwe_utils": "sys_word_pair_random", "fwe_utils": "sys_kwext"}


@dataclass(frozen=True, kw_only=True)
class RulerRecord(ModelRecord):
    """The score of one prompt: the share of the expected strings that its answer holds."""

    arm: str
    task: str
    length: int
    number: int
    score: float


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    arms: Annotated[str, typer.Option(help=", ".join(ARMS))] = ",".join(ARMS),
    tasks: Annotated[str, typer.Option(help="Names of lm-evaluation-harness.")] = ",".join(TASKS),
    lengths: Annotated[str | None, typer.Option(help="Tokens; half, once and twice the trained window.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts a cell.")] = 20,
    encoder: Annotated[str | None, typer.Option(help="Hub id or folder; all-MiniLM-L6-v2 if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of ruler.jsonl.")] = Path("ruler"),
) -> None:
    source = model or str(default_model_folder())
    trained = trained_length(AutoConfig.from_pretrained(source))
    sizes = [int(length) for length in lengths.split(",")] if lengths else [trained // 2, trained, 2 * trained]
    if unknown := set(arms.split(",")) - set(ARMS):
        raise typer.BadParameter(f"--arms takes {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
    journal = Journal(out / "ruler.jsonl", RulerRecord, ("score",))
    cells = [(length, task) for length in sizes for task in tasks.split(",")]
    for arm in arms.split(","):
        answer, tokenizer, settings = answers_of(arm, source, max(sizes), encoder)
        for length, task in tqdm(cells, desc=arm):
            plans = [{**settings, "arm": arm, "task": task, "length": length, "number": n} for n in range(limit)]
            if all(journal.get(**plan) for plan in plans):
                continue
            for plan, (prompt, new_tokens, score) in zip(plans, prompts(task, length, limit, source), strict=True):
                journal.once(plan, partial(answered, answer, prompt, new_tokens, Watched(tokenizer, score)))
    records = read_records(out / "ruler.jsonl", RulerRecord)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(ruler_table(records))
    draw(records).savefig(out / "ruler.png", dpi=130)


class Watched(BaseStreamer):
    """Keeps an answer, and ends it by `StopIteration` once it holds everything: no further token lowers its score."""

    def __init__(self, tokenizer: Any, score: Callable[[str], float]):
        self._tokenizer, self._score = tokenizer, score
        self._tokens: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token after token."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        if self.score == 1:
            raise StopIteration

    def end(self) -> None:
        """Nothing is kept back."""

    @property
    def score(self) -> float:
        """Of the answer so far."""
        return self._score(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


def answered(answer: Callable[..., object], prompt: str, new_tokens: int, watched: Watched) -> dict[str, float]:
    """Answer a prompt and return its score."""
    with suppress(StopIteration):
        answer(prompt, max_new_tokens=new_tokens, streamer=watched)
    return {"score": watched.score}


def answers_of(
    arm: str, source: str, longest: int, encoder: str | None
) -> tuple[Callable[..., object], Any, dict[str, Any]]:
    """Return what answers a prompt, the tokenizer, and the fields of a `ModelRecord`."""
    config = AutoConfig.from_pretrained(source)
    trained = trained_length(config)
    if arm in ("yarn", "dynamic ntk"):
        scaling = {"rope_type": arm.split()[0], "factor": max(longest / trained, 1.0)}
        config.rope_parameters = {**config.rope_parameters, **scaling, "original_max_position_embeddings": trained}
    loaded: tuple[Any, Any] = load_pretrained(source, config=config)
    model, tokenizer = loaded
    settings = {**model_settings(model), "model": Path(source).name if Path(source).exists() else source}
    if arm in ("ask", "bm25"):
        finder = BM25(threshold=0) if arm == "bm25" else default_finder(encoder)

        def by_asking(prompt: str, **given: Any) -> object:
            text, _, question = prompt.rstrip().rpartition("\n")
            return ask(model, tokenizer, TextIndex(text, finder), question, **given)

        return by_asking, tokenizer, settings
    window = max(1, trained // 4)
    patches = {
        "streaming": StreamingLLM(window_length=window),
        "lm-infinite": LMInfinite(window_length=window),
        "dual chunk": DualChunkAttention(),
    }
    if arm in patches:
        patches[arm].attach(model)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def by_reading(prompt: str, **given: Any) -> object:
        inputs = tokenizer(prompt, return_tensors="pt", verbose=False).to(model.device)
        return model.generate(**inputs, **given, **greedy, pad_token_id=tokenizer.eos_token_id)

    return by_reading, tokenizer, settings


@cache
def prompts(task: str, length: int, limit: int, source: str) -> list[tuple[str, int, Callable[[str], float]]]:
    """Return prompts, the same whatever `limit` is, each with its tokens to generate and what scores an answer."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with ExitStack() as stack:
        for name, maker in _MAKERS.items():
            module: Any = import_module(f"lm_eval.tasks.ruler.{name}")
            module.__mtime__ = Path(module.__file__).stat().st_mtime_ns  # or the harness loads it once more
            # The harness makes 500 prompts, whatever its `limit` is.
            stack.enter_context(mock.patch.object(module, maker, fewer(getattr(module, maker), limit)))
            if name == "cwe_utils":
                stack.enter_context(mock.patch.object(module, "RNG", random.Random(42)))
        random.seed(0)
        np.random.seed(1234)
        manager = TaskManager(
            metadata={"tokenizer": source, "max_seq_lengths": [length]},
            include_path=str(Path(lm_eval.__file__).parent / "tasks" / "ruler"),
            include_defaults=False,  # an index of all tasks takes seconds
        )
        made = manager.load([task])["tasks"][task]
        made.build_all_requests(limit=limit)

    def scored_by(request: Any) -> Callable[[str], float]:
        return lambda answer: float(made.process_results(request.doc, [answer])[str(length)])

    return [(request.args[0], request.args[1]["max_gen_toks"], scored_by(request)) for request in made.instances]


def fewer(make: Any, limit: int) -> Any:
    """Return a maker of prompts that makes no more than `limit`."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "num_samples": min(limit, kwargs.get("num_samples", limit))})

    return limited


def means(records: Sequence[RulerRecord]) -> dict[tuple[str, int, str], tuple[float, int]]:
    """Return the mean score and the number of prompts of each task, length and arm."""
    cells: dict[tuple[str, int, str], list[float]] = {}
    for record in records:
        cells.setdefault((record.task, record.length, record.arm), []).append(record.score)
    return {cell: (sum(scores) / len(scores), len(scores)) for cell, scores in cells.items()}


def ruler_table(records: Sequence[RulerRecord]) -> Table:
    """Lay the scores out: a row a task and length, a column an arm: mean, 95 % interval, number of prompts."""
    cells = means(records)
    arms = [arm for arm in ARMS if any(arm == record.arm for record in records)]
    table = new_table("task", "tokens", title="RULER: mean score, 95 % interval, prompts")
    for arm in arms:
        table.add_column(arm, justify="right")
    for task, length in sorted({cell[:2] for cell in cells}, key=lambda cell: (TASKS.index(cell[0]), cell[1])):
        table.add_row(task, f"{length:,}", *(shown(*cells.get((task, length, arm), (0.0, 0))) for arm in arms))
    return table


def shown(mean: float, count: int) -> str:
    if not count:
        return ""
    low, high = wilson_interval(mean, count)
    return f"{mean:.2f} ({low:.2f}-{high:.2f}, {count})"


def draw(records: Sequence[RulerRecord]) -> Any:
    """Draw each arm's mean score by length, a panel a task, with 95 % intervals, and return the figure."""
    cells = means(records)
    tasks = [task for task in TASKS if any(task == cell[0] for cell in cells)]
    options = {"figsize": (10, 3 * -(-len(tasks) // 3)), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, panels = import_pyplot("a picture").subplots(-(-len(tasks) // 3), min(3, len(tasks)), **options)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    for panel, task in zip(panels.flat, tasks, strict=False):
        for place, arm in enumerate(ARMS):
            lengths = sorted(length for name, length, of in cells if (name, of) == (task, arm))
            if not lengths:
                continue
            found = [cells[task, length, arm] for length in lengths]
            bars = [(mean - low, high - mean) for mean, n in found for low, high in [wilson_interval(mean, n)]]
            at = [length * 1.03**place for length in lengths]  # side by side
            panel.errorbar(
                at, [mean for mean, _ in found], list(zip(*bars, strict=True)), label=arm, marker="o", capsize=2
            )
        ticks = sorted({length for name, length, _ in cells if name == task})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.set(title=task, ylim=(-0.05, 1.05))
    figure.supxlabel("prompt (tokens)")
    figure.supylabel("mean score")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return figure


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
