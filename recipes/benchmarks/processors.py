"""What a truncation step costs: our samplers beside every one that transformers ships, and the floor in bytes.

    python recipes/benchmarks/processors.py [--device cpu|cuda] [--threads 1 2]

Expected (docs/eta.md has the measured tables): eager eta <= 0.6x transformers' on a CPU at V = 128256, batch 32;
<= 0.3x on an H100, and under 0.2 ms compiled.

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
import time
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_longtrunc import EpsilonLogitsProcessor, EtaLogitsProcessor, PLessLogitsProcessor, TopNSigmaLogitsProcessor

if TYPE_CHECKING:
    from collections.abc import Callable

EPSILON = 2e-3
TOP_P = 0.9
LIKE_PAIRS = {
    "eta / transformers' eta": ("eta", "transformers' eta"),
    "epsilon / transformers' epsilon": ("epsilon", "transformers' epsilon"),
    "eta / transformers' top-p": ("eta", "transformers' top-p"),
    "eta / transformers' min-p": ("eta", "transformers' min-p"),
    "eta / transformers' top-k": ("eta", "transformers' top-k"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256, 262144])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--turns", type=int, default=15)
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
    names = [*_contestants(arguments, "cpu"), "floor", *LIKE_PAIRS]
    try:
        for vocab, batch in track(cells, description="timing", console=Console(stderr=True)):
            columns.append(_column(arguments, vocab, batch))
    finally:  # what was measured is shown, whatever stopped the rest
        for name, *figures in zip(names, *columns, strict=True):
            table.add_row(name, *figures)
        console.print(table)


def _column(arguments: argparse.Namespace, vocab: int, batch: int) -> list[str]:
    torch.compiler.reset()  # every shape compiles anew, and a process has a limit of recompilations
    scores = _scores(batch, vocab, arguments.device)
    contestants: dict[str, Callable[[torch.Tensor], object]] = _contestants(arguments, arguments.device)
    contestants["floor"] = torch.clone
    times = _goes_ms(contestants, scores, arguments.turns)
    ratios = [
        statistics.median(ours / theirs for ours, theirs in zip(times[one], times[other], strict=True))
        for one, other in LIKE_PAIRS.values()
    ]
    return [*(f"{statistics.median(goes):.3f}" for goes in times.values()), *(f"{ratio:.2f}x" for ratio in ratios)]


def _contestants(arguments: argparse.Namespace, device: str) -> dict[str, Callable[[torch.Tensor], object]]:
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


def _call(processor: Any) -> Callable[[torch.Tensor], object]:
    return lambda scores: processor(None, scores)


def _scores(batch: int, vocab: int, device: str) -> torch.Tensor:
    """Logits with a language model's spread: some tens of tokens share most of the mass, entropy near 3 nats."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, vocab, generator=generator) * 2.6 - 5).to(device)


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
