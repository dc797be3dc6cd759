"""The cost of a truncation step: our samplers against those of transformers, and the lower bound of a copy.

    python recipes/benchmarks/processors.py [--device cpu|cuda] [--threads 1 2]
    python recipes/benchmarks/processors.py --samplers ranks     # top-H, min-k, XTC and DRY

Expected (tables: docs/results/sampling.md): eager eta <= 0.6x transformers' on a CPU at V = 128256, batch 32;
<= 0.3x on an H100, and under 0.2 ms compiled.

Samplers by rank are compared with transformers' top-h, and where transformers has none, with the methods of local
engines: a sort of the row for min-k and XTC, a loop over the text (2,048 tokens) for DRY; and with a softmax, which all
need. transformers' top-h looks at the 100 most probable tokens and renormalises them, so it keeps another set wherever
the others hold some probability: how often is printed, and "all tokens" is the same code without that limit.

All run in one process on the same scores; a figure is the median of the turns, a ratio that of the turns' ratios. Min-p
and top-k do less arithmetic than eta and are faster. The floor is the time that a copy of the scores takes: one read
and one write of every score, which no processor can go under. One thread is timed by the processor's clock, which
leaves neighbours out, more threads by the wall's: run those on an idle machine, a busy neighbour on one of two cores
stretches every parallel region.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_longtrunc import (
    DRYLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    PLessLogitsProcessor,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    XTCLogitsProcessor,
)

if TYPE_CHECKING:
    from collections.abc import Callable

EPSILON = 2e-3
TOP_P = 0.9
TEXT = 2048
PAIRS = {
    "thresholds": {
        "eta / transformers' eta": ("eta", "transformers' eta"),
        "epsilon / transformers' epsilon": ("epsilon", "transformers' epsilon"),
        "eta / transformers' top-p": ("eta", "transformers' top-p"),
        "eta / transformers' min-p": ("eta", "transformers' min-p"),
        "eta / transformers' top-k": ("eta", "transformers' top-k"),
    },
    "ranks": {
        "top-h / transformers' top-h": ("top-h", "transformers' top-h"),
        "top-h / theirs, all tokens": ("top-h", "transformers' top-h, all tokens"),
        "min-k / min-k by a sort": ("min-k", "min-k by a sort"),
        "XTC / XTC by a sort": ("XTC", "XTC by a sort"),
        "DRY / DRY by a loop": ("DRY", "DRY by a loop"),
        "top-h / softmax": ("top-h", "softmax"),
        "min-k / softmax": ("min-k", "softmax"),
        "XTC / softmax": ("XTC", "softmax"),
        "DRY / softmax": ("DRY", "softmax"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256, 262144])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--samplers", choices=PAIRS, default="thresholds")
    parser.add_argument("--peaked", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    arguments = parser.parse_args()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        _print_table(arguments)


def _print_table(arguments: argparse.Namespace) -> None:
    console = Console(width=132)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"{name} ({platform.machine()}), torch {torch.__version__}, transformers {transformers.__version__}; "
        f"milliseconds a call, median of up to {arguments.turns} turns; the columns are vocabulary x batch"
    )
    table = Table("sampler", *(f"{vocab:,} x {batch}" for vocab in arguments.vocab for batch in arguments.batch))
    cells = [(vocab, batch) for vocab in arguments.vocab for batch in arguments.batch]
    columns: list[list[str]] = []
    names = [*_contestants(arguments, "cpu"), "floor", *PAIRS[arguments.samplers]]
    try:
        for vocab, batch in track(cells, description="timing", console=Console(stderr=True)):
            columns.append(_column(arguments, vocab, batch))
    finally:  # what was measured is shown, whatever stopped the rest
        for name, *figures in zip(names, *columns, strict=True):
            table.add_row(name, *figures)
        console.print(table)
    if arguments.samplers == "ranks":
        for limit, said in ((100, "the 100 most probable tokens, as transformers has it"), (sys.maxsize, "all tokens")):
            _print_agreement(arguments, limit, said, console)


def _print_agreement(arguments: argparse.Namespace, limit: int, said: str, console: Console) -> None:
    ours, theirs = TopHLogitsProcessor(0.4), transformers.TopHLogitsWarper(0.4)
    theirs.top_n = limit
    processors: list[Any] = [ours, theirs]
    scores = _scores(64, arguments.vocab[0], "cpu", arguments.peaked)
    one, other = (each(None, scores) > -torch.inf for each in processors)
    same = (one == other).all(-1).sum()
    console.print(f"top-h beside transformers' over {said}: the same kept set in {int(same)} of {len(scores)} rows")


def _column(arguments: argparse.Namespace, vocab: int, batch: int) -> list[str]:
    torch.compiler.reset()  # every shape compiles anew, and a process has a limit of recompilations
    scores = _scores(batch, vocab, arguments.device, arguments.peaked)
    contestants: dict[str, Callable[[torch.Tensor], object]] = _contestants(arguments, arguments.device)
    contestants["floor"] = torch.clone
    times = _goes_ms(contestants, scores, arguments.turns)
    ratios = [
        statistics.median(ours / theirs for ours, theirs in zip(times[one], times[other], strict=True))
        for one, other in PAIRS[arguments.samplers].values()
    ]
    return [*(f"{statistics.median(goes):.3f}" for goes in times.values()), *(f"{ratio:.2f}x" for ratio in ratios)]


def _contestants(arguments: argparse.Namespace, device: str) -> dict[str, Callable[[torch.Tensor], object]]:
    if arguments.samplers == "ranks":
        return _by_rank(device)
    processors: dict[str, Any] = {
        "eta": EtaLogitsProcessor(EPSILON),
        "transformers' eta": transformers.EtaLogitsWarper(EPSILON, device=device),
        "epsilon": EpsilonLogitsProcessor(EPSILON),
        "transformers' epsilon": transformers.EpsilonLogitsWarper(EPSILON),
        "top-n-sigma": TopNSigmaLogitsProcessor(),
        "p-less": PLessLogitsProcessor(),
        "p-less, normalised": PLessLogitsProcessor(normalized=True),
        "transformers' top-p": transformers.TopPLogitsWarper(TOP_P),
        "transformers' top-k": transformers.TopKLogitsWarper(50),
        "transformers' min-p": transformers.MinPLogitsWarper(0.05),
        "transformers' typical": transformers.TypicalLogitsWarper(TOP_P),
        "transformers' top-h": transformers.TopHLogitsWarper(0.4),
        "transformers' temperature": transformers.TemperatureLogitsWarper(0.7),
    }
    calls = {name: _call(processor) for name, processor in processors.items()}
    if not arguments.no_compile:
        calls["eta compiled"] = torch.compile(_call(EtaLogitsProcessor(EPSILON)), fullgraph=True, dynamic=False)
    return calls


def _by_rank(device: str) -> dict[str, Callable[[torch.Tensor], object]]:
    # Some passages come again, as in a text that begins to repeat itself.
    ids = torch.randint(400, (64,), generator=torch.Generator().manual_seed(0)).repeat(TEXT // 64).to(device)
    dry = DRYLogitsProcessor(0.8)
    whole_row = transformers.TopHLogitsWarper(0.4)
    whole_row.top_n = sys.maxsize  # it looks at 100 tokens otherwise
    return {
        "softmax": lambda scores: scores.softmax(-1),
        "top-h": _call(TopHLogitsProcessor(0.4)),
        "transformers' top-h": _call(transformers.TopHLogitsWarper(0.4)),
        "transformers' top-h, all tokens": _call(whole_row),
        "min-k": _call(MinKLogitsProcessor(3.0)),
        "min-k by a sort": _min_k_by_a_sort,
        "XTC": _call(XTCLogitsProcessor(0.05, 1.0)),
        "XTC by a sort": _xtc_by_a_sort,
        "DRY": lambda scores: dry(ids.expand(len(scores), -1), scores),
        "DRY by a loop": lambda scores: torch.stack([_dry_by_a_loop(ids.tolist(), row.clone()) for row in scores]),
    }


def _min_k_by_a_sort(scores: torch.Tensor) -> torch.Tensor:
    ordered = scores.sort(-1, descending=True).values
    extent = ordered[:, :1] - ordered[:, -1:]
    places = torch.arange(1, scores.shape[-1], device=scores.device)
    cliff = (-ordered.diff(dim=-1) / extent / places).argmax(-1, keepdim=True)
    last = torch.maximum(cliff, (3.0 / extent).floor().long() - 1)
    return scores.masked_fill(scores < ordered.gather(-1, last), -torch.inf)


def _xtc_by_a_sort(scores: torch.Tensor) -> torch.Tensor:
    ordered, places = scores.sort(-1, descending=True)
    above = torch.nn.functional.pad(ordered.softmax(-1)[:, 1:] >= 0.05, (0, 1))
    return scores.masked_fill(torch.zeros_like(above).scatter(-1, places, above), -torch.inf)


def _dry_by_a_loop(ids: list[int], row: torch.Tensor) -> torch.Tensor:
    longest: dict[int, int] = {}
    for place in range(len(ids) - 1):
        length = 0
        while length < min(50, place + 1) and ids[place - length] == ids[-1 - length]:
            length += 1
        if length >= 2:
            longest[ids[place + 1]] = max(longest.get(ids[place + 1], 0), length)
    for token, length in longest.items():
        row[token] -= 0.8 * 1.75 ** (length - 2)
    return row


def _call(processor: Any) -> Callable[[torch.Tensor], object]:
    return lambda scores: processor(None, scores)


def _scores(batch: int, vocab: int, device: str, peaked: bool) -> torch.Tensor:
    """Logits with a language model's spread, of some 7 nats; `peaked` ones, of some 3 nats, fall with their rank."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, vocab, generator=generator) * (0.3 if peaked else 2.6)
    if peaked:
        ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
        scores -= 1.5 * (ranks + 1.0).log()
    return (scores - 5).to(device)


def _goes_ms(
    contestants: dict[str, Callable[[torch.Tensor], object]], scores: torch.Tensor, turns: int
) -> dict[str, list[float]]:
    """Milliseconds a call, of every turn. In a turn every contestant has its go, so that a slow moment hits them all.

    A go at small scores is many calls; no turn begins once 10 seconds are spent.
    """
    repeats = max(1, round(4e6 / scores.numel()))
    for call in contestants.values():
        _seconds(call, scores, 2)  # warm up
    goes: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    while not goes["floor"] or (len(goes["floor"]) < turns and time.perf_counter() - begin < 10):
        for name, call in contestants.items():
            goes[name].append(_seconds(call, scores, repeats))
    return {name: [seconds * 1e3 for seconds in measured] for name, measured in goes.items()}


def _seconds(call: Callable[[torch.Tensor], object], scores: torch.Tensor, repeats: int) -> float:
    clock = time.perf_counter if scores.is_cuda or torch.get_num_threads() > 1 else time.process_time
    _synchronize(scores)
    start = clock()
    for _ in range(repeats):
        call(scores)
    _synchronize(scores)
    return (clock() - start) / repeats


def _synchronize(scores: torch.Tensor) -> None:
    if scores.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
