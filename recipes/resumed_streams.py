"""Random streams, stopped at every row and resumed: the rows that follow are those of the run that was not stopped.

    python recipes/resumed_streams.py --streams 1000
    python recipes/resumed_streams.py --streams 60 --loaders       # with torchdata's StatefulDataLoader, real workers

A stream is drawn at random: documents, row length, pool, rounds, what becomes of long documents, and a source that can
be read again or a `datasets.IterableDataset`, shuffled by the epoch or not. It is read for two epochs by 1 or 2 ranks
with 0, 2 or 4 workers each. After every row of both epochs, and between them before and after `set_epoch`, a new stream
takes the state: it must give the rest of its epoch, and then the whole next one.

Cost: some 10 CPU minutes for 1,000 streams. Without `--loaders`, workers are told apart as torch tells them, in one
process.
Expect: "all equal" in every line.
"""

from __future__ import annotations

import argparse
import pickle
import time
from functools import cache
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from rich.console import Console
from rich.table import Table
from torch.utils.data._utils import worker as torchs_worker

from hf_longtrunc import PackedStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

EPOCHS = 2


class Examples:
    """A source that can be read again, and knows no epochs; a rank has every n-th document."""

    def __init__(self, documents: list[dict[str, Any]], rank: int, ranks: int) -> None:
        self.documents = documents[rank::ranks]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loaders", action="store_true", help="torchdata's loader, with processes as workers")
    arguments = parser.parse_args()
    ways = [(workers, ranks) for workers in (0, 2, 4) for ranks in (1, 2)]
    table = Table(title="resumed after every row, and between epochs", title_justify="left")
    for heading in ("workers", "ranks", "streams", "resumed", "rows compared", "", "seconds"):
        table.add_column(heading, justify="right")
    for way, (workers, ranks) in enumerate(ways):
        since, counts = time.perf_counter(), np.zeros(2, np.int64)
        numbers = range(way, arguments.streams, len(ways))
        for number in numbers:
            for rank in range(ranks):
                if arguments.loaders:
                    counts += loaded((arguments.seed, number), workers, rank, ranks)
                    continue
                for worker in range(max(workers, 1)):
                    counts += resumed((arguments.seed, number), (worker, workers), rank, ranks)
        seconds = time.perf_counter() - since
        table.add_row(
            *(str(value) for value in (workers, ranks, len(numbers))),
            *(f"{count:,}" for count in counts),
            "all equal",
            f"{seconds:.0f}",
        )
    Console(width=100).print(table)


@cache
def documents_of(seed: tuple[int, int]) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, int(rng.integers(3, 60)), int(rng.integers(4, 40)))
    documents = [rng.integers(1, 999, length).tolist() for length in lengths]
    # Each worker of each rank has one to pack.
    return datasets.Dataset.from_dict({"input_ids": [*documents, *[[1, 2, 3, 4]] * 8]})


def stream_of(seed: tuple[int, int], rank: int, ranks: int) -> PackedStream:
    """Return the stream of a seed, for a rank."""
    rng, documents = np.random.default_rng((*seed, 1)), documents_of(seed)
    source: Any
    seq_length = int(rng.integers(4, 40))
    if rng.random() < 0.5:
        whole = documents.to_iterable_dataset(num_shards=8)
        if rng.random() < 0.7:
            whole = whole.shuffle(seed=int(rng.integers(99)), buffer_size=int(rng.integers(1, 50)))
        source, sharding = split_dataset_by_node(whole, rank, ranks), "source"
    else:
        source, sharding = Examples(documents.to_list(), rank, ranks), "documents"
    options: dict[str, Any] = {
        "sharding": sharding,
        "long": str(rng.choice(["split", "split", "truncate", "drop"])),
        "min_piece": int(rng.integers(1, 3)),
        "seed": None if rng.random() < 0.2 else int(rng.integers(9)),
        "pool_size": int(rng.integers(1, 60)),
        "max_rounds": int(rng.integers(1, 8)),
        "eos_token_id": None if rng.random() < 0.5 else 0,
    }
    return PackedStream(source, seq_length, **options)


def resumed(seed: tuple[int, int], worker: tuple[int, int], rank: int, ranks: int) -> NDArray[np.int64]:
    """Resume one worker's share everywhere; return how often, and how many rows were compared."""
    number, workers = worker
    said: Any = {"id": number, "num_workers": workers, "seed": 0, "dataset": None}
    info = torchs_worker.WorkerInfo(**said) if workers else None
    torchs_worker._worker_info = info
    try:
        stream = stream_of(seed, rank, ranks)
        states: list[tuple[int, int, bytes]] = []
        epochs: list[list[list[int]]] = []
        for epoch in range(EPOCHS):
            stream.set_epoch(epoch)
            states.append((epoch, 0, pickle.dumps(stream.state_dict())))
            rows = []
            for row in stream:
                rows.append(row["input_ids"].tolist())
                states.append((epoch, len(rows), pickle.dumps(stream.state_dict())))
            epochs.append(rows)
        compared = 0
        for epoch, taken, state in states:
            stream = stream_of(seed, rank, ranks)
            stream.load_state_dict(pickle.loads(state))
            wanted = [epochs[epoch][taken:], *epochs[epoch + 1 :]]
            for ahead, rows in enumerate(wanted):
                stream.set_epoch(epoch + ahead)
                found = [row["input_ids"].tolist() for row in stream]
                assert found == rows, f"stream {seed}, rank {rank} of {ranks}, worker {worker}: epoch {epoch}, {taken}"
                compared += len(rows)
        return np.array([len(states), compared])
    finally:
        torchs_worker._worker_info = None


def loaded(seed: tuple[int, int], workers: int, rank: int, ranks: int) -> NDArray[np.int64]:
    """Resume a StatefulDataLoader at four places of an epoch, at its end, and before the next one."""
    loaders = import_module("torchdata.stateful_dataloader")

    def loader() -> tuple[PackedStream, Any]:
        stream = stream_of(seed, rank, ranks)
        return stream, loaders.StatefulDataLoader(stream, 2, collate_fn=collate, num_workers=workers)

    stream, whole = loader()
    epochs = []
    for epoch in range(EPOCHS):
        stream.set_epoch(epoch)
        epochs.append(list(whole))
    places = sorted({0, 1, len(epochs[0]) // 2, len(epochs[0])})
    for taken in places:
        stream, interrupted = loader()
        batches = iter(interrupted)
        head = list(islice(batches, taken))
        is_over = taken == len(epochs[0]) and next(batches, None) is None
        state = pickle.loads(pickle.dumps(interrupted.state_dict()))
        stream, again = loader()
        again.load_state_dict(state)
        if not is_over:  # torchdata begins the next epoch where one was over
            assert head + list(again) == epochs[0], f"stream {seed}, rank {rank}, {workers} workers, after {taken}"
        stream.set_epoch(1)
        assert list(again) == epochs[1], f"stream {seed}, rank {rank}, {workers} workers: the epoch after {taken}"
    return np.array([len(places), len(places) * sum(map(len, epochs))])


def collate(rows: list[dict[str, Any]]) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


if __name__ == "__main__":
    main()
