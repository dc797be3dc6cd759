"""The parts of `hf-longtrunc demo`: each shows one technique on a real model, as a table and a picture.

Each prints to `console` and returns its figures as plain values, which `--json` prints.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    BestFitPackingCollator,
    EtaLogitsProcessor,
    PackedDataset,
    SoftmaxBasis,
    TruncationRecord,
    TruncationTrace,
    check_packed,
    pack,
    packing_table,
    plot_packing,
)
from hf_longtrunc.cli import common

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# One meaning a colour and a shape, as on the pages: a cross was refused, a diamond was rescued.
MARKS: dict[str, dict[str, Any]] = {
    "refused": {"color": "#b23a00", "marker": "x", "linestyle": "", "markersize": 5},
    "rescued": {"color": "#006b4d", "marker": "D", "linestyle": "", "markersize": 4},
}
PROMPT = "The lighthouse keeper had not spoken to anyone for eleven days when"


@dataclass(frozen=True)
class SampledText:
    """One sampler's continuation and its trace."""

    name: str
    text: str
    trace: TruncationTrace
    seconds: float

    @cached_property
    def records(self) -> list[TruncationRecord]:
        """The trace's records, put in order once."""
        return self.trace.records


def sampling_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = 80,
    epsilon: float = 2e-3,
    top_p: float = 0.9,
    seed: int = 0,
    steps_shown: int = 12,
    console: Console,
) -> list[dict[str, object]]:
    """Continue `prompt` by plain sampling, top-p and eta, and show the tokens that each of them cut at every step."""
    samplers: dict[str, dict[str, Any]] = {
        "plain": {},
        f"top-p {top_p:g}": {"top_p": top_p},
        f"eta {epsilon:g}": {"logits_processor": [EtaLogitsProcessor(epsilon)]},
    }
    heading(console, "Truncation sampling: what each sampler cuts")
    console.print(f"[dim]prompt[/dim]  {escape(prompt)}")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    runs = []
    for name, settings in samplers.items():
        with common.notes().status(f"generating {max_new_tokens} tokens by {name} sampling"):
            runs.append(_sample(model, tokenizer, inputs, name, seed, max_new_tokens, settings))
        console.print(f"\n[bold]{name}[/bold]  {escape(runs[-1].text)}")
    console.print(_steps_table(runs, tokenizer, steps_shown))
    console.print(_summary_table(runs, epsilon))
    _picture(runs, epsilon, folder / "sampling.png")
    _page(runs, tokenizer, epsilon, prompt, folder / "sampling.html")
    return [_summary(run, epsilon) for run in runs]


def bat_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    prompt: str = PROMPT,
    max_new_tokens: int = 60,
    epsilon: float = 0.01,
    rank: int = 20,
    seed: int = 0,
    steps_shown: int = 12,
    console: Console,
) -> dict[str, object]:
    """Continue `prompt` by basis-aware truncation and show the tokens that it kept below eta's threshold."""
    heading(console, "Basis-aware truncation: tokens kept because it is proved that they belong")
    with common.notes().status(f"softmax basis of rank {rank}"):
        basis = SoftmaxBasis.from_model(model, rank)
    processor = BasisAwareLogitsProcessor(basis, epsilon, mode="mask")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    settings = {"logits_processor": [processor]}
    with common.notes().status(f"generating {max_new_tokens} tokens by basis-aware truncation"):
        run = _sample(model, tokenizer, inputs, f"BAT {epsilon:g}", seed, max_new_tokens, settings)
    console.print(f"[bold]{run.name}[/bold]  {escape(run.text)}")
    console.print(_rescue_table(run, tokenizer, steps_shown))
    checker = processor.checker
    console.print(f"{checker.checked:,} tokens decided by proof, {checker.undecided} undecided")
    _picture([run], epsilon, folder / "bat.png")
    _page([run], tokenizer, epsilon, prompt, folder / "bat.html")
    decided = {"decided by proof": checker.checked, "undecided": checker.undecided}
    return {**_summary(run, epsilon), "rescued": sum(record.kept_below or 0 for record in run.records), **decided}


def _rescue_table(run: SampledText, tokenizer: Any, steps: int) -> Table:
    title = f"The first {steps} steps: kept by eta's threshold, and rescued below it by a proof"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("drawn", "p", "threshold", "kept", "rescued"):
        table.add_column(heading, justify="left" if heading == "drawn" else "right")
    for record in run.records[:steps]:
        token = escape(repr(tokenizer.decode([record.token]))[1:-1])
        figures = f"{record.probability:.1e}", f"{record.threshold:.1e}"
        table.add_row(token, *figures, f"{record.kept:,}", f"{record.kept_below:,}")
    return table


def _sample(
    model: Any, tokenizer: Any, inputs: Any, name: str, seed: int, max_new_tokens: int, settings: dict[str, Any]
) -> SampledText:
    trace = TruncationTrace()
    torch.manual_seed(seed)
    start = time.perf_counter()
    with trace.observe(model):
        # top_k=0 switches off the cut to 50 tokens that generate() makes on its own.
        sequences = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=max_new_tokens, **settings)
    seconds = time.perf_counter() - start
    text = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return SampledText(name, text.strip(), trace.finish(sequences), seconds)


def _steps_table(runs: list[SampledText], tokenizer: Any, steps: int) -> Table:
    title = f"The first {steps} steps: token drawn, tokens kept, probability cut"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for run in runs:
        table.add_column(run.name, no_wrap=True, width=10)
        table.add_column("kept", justify="right", no_wrap=True, min_width=6)
        table.add_column("cut", justify="right", no_wrap=True, min_width=5)
    for step in range(steps):
        table.add_row(*(cell for run in runs for cell in _step_cells(run, tokenizer, step)))
    return table


def _step_cells(run: SampledText, tokenizer: Any, step: int) -> tuple[str, str, str]:
    if step >= len(run.records):
        return "", "", ""
    record = run.records[step]
    token = escape(repr(tokenizer.decode([record.token]))[1:-1])
    return token, f"{record.kept:,}", f"{1 - record.kept_mass:.1%}"


def _summary_table(runs: list[SampledText], epsilon: float) -> Table:
    table = Table(title="Over the whole text", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("sampler", "tokens", "kept (median)", "cut (mean)", f"refused by eta {epsilon:g}", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for run in runs:
        name, _, tokens, kept, cut, refused, speed = _summary(run, epsilon).values()
        table.add_row(str(name), str(tokens), f"{kept:,.0f}", f"{cut:.1%}", str(refused), f"{speed:.1f}")
    return table


def _summary(run: SampledText, epsilon: float) -> dict[str, object]:
    """Return a run's figures over the whole text."""
    records = run.records
    return {
        "sampler": run.name,
        "text": run.text,
        "tokens": len(records),
        "kept (median)": median(record.kept for record in records),
        "cut (mean)": fmean(1 - record.kept_mass for record in records),
        f"refused by eta {epsilon:g}": sum(record.is_refused_by_eta(epsilon) for record in records),
        "tokens/s": len(records) / run.seconds,
    }


def _picture(runs: list[SampledText], epsilon: float, path: Path) -> None:
    """Draw one column a sampler, three panels each, on common scales."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        3, len(runs), sharex=True, sharey="row", figsize=(4 * len(runs), 6), layout="constrained", squeeze=False
    )
    marks: dict[str, Callable[[TruncationRecord], bool]] = {
        "rescued": lambda record: record.is_rescued,
        "refused": lambda record: record.is_refused_by_eta(epsilon) and not record.is_rescued,
    }
    for column, run in enumerate(runs):
        run.trace.plot(axes=list(panels[:, column]))
        # What eta would have asked of this text: the dots under the dashed line are the tokens that it refuses.
        steps = range(1, len(run.records) + 1)
        panels[1, column].plot(steps, [record.eta_threshold(epsilon) for record in run.records], "k--", linewidth=0.8)
        for mark, is_marked in marks.items():
            marked = [(n, r.probability) for n, r in zip(steps, run.records, strict=True) if is_marked(r)]
            panels[1, column].plot(*zip(*marked, strict=True) if marked else ([], []), **MARKS[mark])
        panels[0, column].set_title(run.name, loc="left")
        panels[2, column].set_xlabel("generated token")
    told = {"rescued": "rescued by a proof (diamonds)", "refused": f"refused by eta {epsilon:g} (x)"}
    seen = [words for mark, words in told.items() if any(marks[mark](record) for run in runs for record in run.records)]
    names = ("entropy (nats)", "\n".join(["drawn (dots), cut (line)", *seen]), "kept mass")
    for panel, name in zip(panels[:, 0], names, strict=True):
        panel.set_ylabel(name)
    lowest = min(record.kept_mass for run in runs for record in run.records)
    panels[2, 0].set_ylim(min(0.6, lowest), 1.02)
    common.save_picture(figure, path)


def _page(runs: list[SampledText], tokenizer: Any, epsilon: float, prompt: str, path: Path) -> None:
    """Write the page that shows every token's step."""
    first, *others = runs
    beside = {run.name: run.trace for run in others}
    first.trace.to_html(tokenizer, path, name=first.name, beside=beside, epsilon=epsilon, prompt=prompt)
    common.notes().print(f"page: [bold]{escape(str(path))}[/bold] shows every token's step: open it in a browser")


def packing_part(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, seq_length: int = 512, console: Console
) -> dict[str, object]:
    """Pack the docstrings of Python's standard library, and show that a packed document is the document alone."""
    seq_length = min(seq_length, model.config.max_position_embeddings)
    heading(console, "Best-fit packing: no unnecessary cut, no document sees another")
    with common.notes().status("tokenizing the standard library's docstrings"):
        documents = [{"input_ids": tokenizer(text)["input_ids"]} for text in _docstrings()]
    packed: PackedDataset = pack(documents, seq_length, tokenizer)
    console.print(packing_table(packed.packing))
    batch = BestFitPackingCollator(seq_length, tokenizer, model=model)([packed[0]])
    batch = {name: tensor.to(model.device) if torch.is_tensor(tensor) else tensor for name, tensor in batch.items()}
    check_packed(model, {**batch, "use_cache": False})
    pieces = int((batch["position_ids"] == 0).sum())
    right = _distance_from_alone(model, batch)
    leaky = _distance_from_alone(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])})
    console.print(
        f"one row, {pieces} pieces: logits differ from each piece's alone by at most [bold]{right:.1e}[/bold]; "
        f"with a 2-D attention_mask, which lets them see each other, by {leaky:.1f}"
    )
    common.save_picture(plot_packing(packed.packing)[0], folder / "packing.png")
    return {**packed.packing.stats(), "difference from alone": right, "difference where pieces leak": leaky}


@torch.no_grad()
def _distance_from_alone(model: Any, batch: dict[str, Any]) -> float:
    """Largest difference between the logits of a row's pieces packed and run alone."""
    logits = model(**{name: batch[name] for name in batch if name != "labels"}, use_cache=False).logits[0]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    distance = 0.0
    for start, end in zip(starts, [*starts[1:], len(logits)], strict=True):
        alone = model(batch["input_ids"][:, start:end], use_cache=False).logits[0]
        distance = max(distance, float((logits[start:end] - alone).abs().max()))
    return distance


def _docstrings() -> list[str]:
    """Return the distinct docstrings of some well-known modules and of all that they define."""
    names = "argparse asyncio collections datetime decimal email.message json logging pathlib random re statistics"
    owners: list[object] = [import_module(name) for name in names.split()]
    owners += [item for module in owners for item in vars(module).values() if inspect.isclass(item)]
    texts = (inspect.getdoc(item) for owner in owners for item in (owner, *vars(owner).values()))
    return list(dict.fromkeys(text for text in texts if text))


def last_screen(shown: dict[str, Any], folder: Path, console: Console) -> None:
    """Sum up the parts by their own figures, and name the next commands."""
    heading(console, "What you saw")
    if sampled := shown.get("sampling"):
        refused = next(iter(run for key, run in sampled[0].items() if key.startswith("refused")))
        console.print(
            f"- Plain sampling drew {refused} of {sampled[0]['tokens']} tokens that eta refuses; eta kept "
            f"{sampled[-1]['kept (median)']:,.0f} tokens a step (median). {folder / 'sampling.html'} shows each step."
        )
    if rescued := shown.get("bat"):
        console.print(
            f"- Basis-aware truncation kept {rescued['rescued']:,} tokens below the threshold, each by a proof."
        )
    if packed := shown.get("packing"):
        console.print(
            f"- Packing cut {packed['truncated_documents']} of {packed['documents']:,} documents, concatenation "
            f"{packed['truncated_by_concatenation']}; packed logits differ by {packed['difference from alone']:.0e}."
        )
    if read := shown.get("past-window"):
        plain, ours = read["unmodified"], read["LM-Infinite"]
        share = ours["cache bytes"] / plain["cache bytes"]
        console.print(
            f"- After {read['tokens']:,} tokens, of {read['trained window']:,} trained, the unmodified model answered "
            f"'{escape(plain['answer'])}', and under LM-Infinite, with {share:.0%} of the cache, "
            f"'{escape(ours['answer'])}'. {folder / 'perplexity.png'} shows where the unmodified model goes wrong."
        )
    console.print("\n[bold]Next[/bold]: a model of your own with --model (a hub id or a folder), and")
    console.print("  hf-longtrunc chat                       a conversation without end, at constant memory")
    console.print('  hf-longtrunc ask a_text.txt "Who ...?"  a question about a text of any length')
    console.print("  hf-longtrunc --help                     all commands")


def heading(console: Console, title: str) -> None:
    """Print a part's title."""
    console.print(f"\n[bold]{title}[/bold]\n")
