"""The cost of resuming a packed stream against datasets' own resume, and the memory of its pool.

    python recipes/benchmarks/streams.py [--documents 24363]

A `datasets.IterableDataset` of 8 shards of texts, tokenized by `map`, is read to some document, and resumed in turns,
CPU seconds: by datasets alone to its next document; by datasets to as many documents as the first row here needs, for a
pool; here; and here from a source without a state of its own, which is read again. Memory is the peak that tracemalloc
sees over a stream of documents of 20,000 tokens, divided by 16 bytes times `pool_tokens`.

Expect: here at most 1.5 times datasets with the same documents, memory at most 1.2.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from hf_longtrunc import PackedStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEQ_LENGTH, WORDS = 2048, 20_000


class Plain:
    """A stream without a state of its own."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=24_363, help="read before the stream is resumed")
    parser.add_argument("--pool", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(width=100)
    console.print(resumes(corpus(arguments.documents + 3 * arguments.pool), arguments))
    for budget in (2**20, 2**22, 2**24):
        peak = peak_of(budget)
        console.print(
            f"pool_tokens = {budget:,}: {peak / 2**20:,.0f} MiB at most, {peak / 16 / budget:.3f} of 16 bytes each"
        )


def corpus(documents: int) -> Dataset:
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(WORDS)])
    lengths = np.maximum(2, rng.lognormal(5.2, 1.0, documents)).astype(np.int64)
    return Dataset.from_dict({"text": [" ".join(words[rng.integers(0, WORDS, length)]) for length in lengths]})


def tokenized(texts: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    return {"input_ids": [encoding.ids for encoding in tokenizer().encode_batch_fast(texts["text"])]}


@cache
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = WhitespaceSplit()
    return made


def resumes(documents: Dataset, arguments: argparse.Namespace) -> Table:
    def source() -> Any:
        texts = documents.to_iterable_dataset(num_shards=8)
        return texts.map(tokenized, batched=True, batch_size=100, remove_columns="text")

    states = {}
    for name, wrapped in (("here", source()), ("here, read again", Plain(source()))):
        stream = PackedStream(wrapped, SEQ_LENGTH, pool_size=arguments.pool)
        for _ in stream:
            if stream.state_dict()["read"] >= arguments.documents:
                break
        states[name] = stream.state_dict()
    read = states["here"]["read"]
    waiting = len(states["here"]["source"]["sizes"]) // 8
    own = source()
    next(islice(own, read - 1, None))
    own_state = own.state_dict()

    def by_datasets(count: int) -> None:
        resumed = source()
        resumed.load_state_dict(own_state)
        for _ in islice(resumed, count):
            pass

    def here(wrapped: Any, state: Any) -> None:
        stream = PackedStream(wrapped, SEQ_LENGTH, pool_size=arguments.pool)
        stream.load_state_dict(state)
        next(iter(stream))

    pool = arguments.pool - waiting
    ways: dict[str, Callable[[], None]] = {
        "datasets, to the next document": lambda: by_datasets(1),
        f"datasets, to the {pool:,} documents of a pool": lambda: by_datasets(pool),
        "here, to the next row": lambda: here(source(), states["here"]),
        "here, source read again": lambda: here(Plain(source()), states["here, read again"]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.turns):
        for name, way in ways.items():
            since = time.process_time()
            way()
            seconds[name].append(time.process_time() - since)
    size = len(states["here"]["source"]["tokens"]) + len(states["here"]["waiting"])
    title = f"resumed after {read:,} documents; {waiting:,} pieces wait, the state has {size / 1024:,.0f} KiB"
    shown = Table(title=title, title_justify="left")
    for heading in ("", "CPU s, median", "least", "to datasets with a pool"):
        shown.add_column(heading, justify="right" if heading else "left")
    base = np.median(list(seconds.values())[1])
    for name, spent in seconds.items():
        shown.add_row(name, f"{np.median(spent):.2f}", f"{min(spent):.2f}", f"{np.median(spent) / base:.2f}x")
    return shown


def peak_of(budget: int) -> int:
    """Return the greatest number of bytes that a stream holds, of documents of 20,000 tokens in rows of 32,768."""
    rng = np.random.default_rng(0)
    source = ({"input_ids": rng.integers(1, 50_000, 20_000)} for _ in range(3 * budget // 20_000))
    stream = PackedStream(source, 32_768, pool_tokens=budget)
    tracemalloc.start()
    for _ in stream:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
