"""Random streams, stopped at every row and resumed: the rows that follow equal those of the run that was not stopped.

    python recipes/resumed_streams.py --streams 1000               # workers and ranks in one process
    python recipes/resumed_streams.py --streams 30 --loaders       # torchdata's StatefulDataLoader, worker processes
    python recipes/resumed_streams.py --streams 12 --loaders --gloo    # in two processes with gloo, too

A stream is drawn at random: documents, row length, pool, rounds, treatment of long documents, and a source. The source
is an iterable, a `datasets.IterableDataset` with a shuffle buffer, or one without: of one source or several, mapped in
batches, filtered, formatted, made by a generator. It is read for two epochs by 1 or 2 ranks with 0, 2 or 4 workers. A
new stream takes the state before the first row, after every row, and before and after `set_epoch` between the epochs.
It must return the rest of its epoch; from an end or a beginning on, the next epoch too.

Without `--loaders`, one process sets `torch.utils.data.get_worker_info()` for each worker; a rank is a share by
`split_dataset_by_node`. The streams run the same code in both cases. Cost: some 5 CPU minutes for 1,000 streams;
`--first` and `--streams` do a part. Expect: "all equal" in every line.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from rich.console import Console
from rich.table import Table
from torch.utils.data._utils import worker as torchs_worker

from hf_longtrunc import PackedStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

EPOCHS = 2
WAYS = [(workers, ranks) for workers in (0, 2, 4) for ranks in (1, 2)]
KINDS = ("an iterable", "a shuffle buffer", "the source's own state")


class Examples:
    """A source that can be read again, and knows no epochs; a rank has every n-th document."""

    def __init__(self, documents: list[dict[str, Any]], rank: int, ranks: int) -> None:
        self.documents = documents[rank::ranks]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loaders", action="store_true", help="torchdata's loader, with processes as workers")
    parser.add_argument("--gloo", action="store_true", help="two ranks are two processes, which gather their documents")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    numbers = range(arguments.first, arguments.first + arguments.streams)
    if arguments.gloo:
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder, "counts.npy")
            processes: Any = torch.multiprocessing
            processes.spawn(in_a_process, (str(at), numbers, arguments.seed), nprocs=2)
            counts = np.load(at)
    else:
        counts = counted(numbers, arguments.seed, range(2), by_loader=arguments.loaders)
    what = "StatefulDataLoader, worker processes" if arguments.loaders or arguments.gloo else "in one process"
    title = f"streams {numbers[0]} to {numbers[-1]}, {what}{', two gloo processes' if arguments.gloo else ''}"
    table = Table(title=title, title_justify="left")
    for heading in ("workers", "ranks", "source", "streams", "resumed", "rows compared", "", "CPU s"):
        table.add_column(heading, justify="right")
    for (workers, ranks), of_kinds in zip(WAYS, counts, strict=True):
        for kind, (streams, resumes, rows, seconds) in zip(KINDS, of_kinds, strict=True):
            if streams:
                numbers_of = (f"{streams:,.0f}", f"{resumes:,.0f}", f"{rows:,.0f}", "all equal", f"{seconds:.0f}")
                table.add_row(str(workers), str(ranks), kind, *numbers_of)
    totals = (f"{total:,.0f}" for total in counts.sum(axis=(0, 1))[:3])
    table.add_row("", "", "all", *totals, "all equal", f"{counts[..., 3].sum():.0f}")
    Console(width=100).print(table)


def counted(numbers: range, seed: int, own_ranks: range, *, by_loader: bool) -> NDArray[np.float64]:
    """Return streams, resumes, rows compared and CPU seconds [way, kind of source, 4]."""
    counts = np.zeros((len(WAYS), len(KINDS), 4))
    for number in numbers:
        (workers, ranks), since = WAYS[number % len(WAYS)], time.process_time()
        found = np.zeros(2)
        for rank in [rank for rank in own_ranks if rank < ranks]:
            if by_loader:
                found += loaded((seed, number), workers, rank, ranks)
            else:
                for worker in range(max(workers, 1)):
                    found += resumed((seed, number), (worker, workers), rank, ranks)
        documents_of.cache_clear()
        seconds = time.process_time() - since
        counts[number % len(WAYS), kind_of((seed, number))] += (1, *found, seconds)
    return counts


def in_a_process(rank: int, at: str, numbers: range, seed: int) -> None:
    """Resume the streams of one of two ranks, and check that both together read every document."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29547")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ours = [number for number in numbers if WAYS[number % len(WAYS)][1] == 2]
    counts = sum(counted(range(number, number + 1), seed, range(rank, rank + 1), by_loader=True) for number in ours)
    for number in ours:
        both: list[Any] = [None, None]
        torch.distributed.all_gather_object(both, sum(map(len, documents_read((seed, number), rank))))
        whole = sum(map(len, documents_read((seed, number), 0, ranks=1)))
        assert sum(both) == whole, f"stream {number}: two ranks read {both} tokens of {whole}"
    shared = torch.as_tensor(counts)
    shared[..., 0] /= 2
    torch.distributed.all_reduce(shared)
    if rank == 0:
        np.save(at, shared.numpy())
    torch.distributed.destroy_process_group()


def documents_read(seed: tuple[int, int], rank: int, ranks: int = 2) -> list[list[int]]:
    return [row["input_ids"] for row in stream_of(seed, rank, ranks).source]


@cache
def documents_of(seed: tuple[int, int]) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, int(rng.integers(3, 30)), int(rng.integers(3, 12)))
    documents = [rng.integers(1, 999, length).tolist() for length in lengths]
    # Each worker of each rank has one to pack.
    return datasets.Dataset.from_dict({"input_ids": [*documents, *[[1, 2, 3, 4]] * 8]})


def kind_of(seed: tuple[int, int]) -> int:
    return int(np.random.default_rng((*seed, 2)).choice(len(KINDS), p=[0.25, 0.25, 0.5]))


def stream_of(seed: tuple[int, int], rank: int, ranks: int) -> PackedStream:
    """Return the stream of a seed, for a rank."""
    rng, documents, kind = np.random.default_rng((*seed, 1)), documents_of(seed), kind_of(seed)
    source: Any
    seq_length, by = int(rng.integers(4, 40)), "source"
    if kind == 0:
        source, by = Examples(documents.to_list(), rank, ranks), "documents"
    else:
        whole = documents.to_iterable_dataset(num_shards=8)
        whole = whole.shuffle(seed=int(rng.integers(99)), buffer_size=int(rng.integers(1, 50))) if kind == 1 else whole
        source = split_dataset_by_node(chained(whole, documents, rng) if kind == 2 else whole, rank, ranks)
    options: dict[str, Any] = {
        "sharding": by,
        "long": str(rng.choice(["split", "split", "truncate", "drop"])),
        "min_piece": int(rng.integers(1, 3)),
        "seed": None if rng.random() < 0.2 else int(rng.integers(9)),
        "pool_size": int(rng.integers(1, 30)),
        "pool_tokens": int(rng.integers(16, 4000)) if rng.random() < 0.5 else None,
        "max_rounds": int(rng.integers(1, 8)),
        "eos_token_id": None if rng.random() < 0.5 else 0,
    }
    return PackedStream(source, seq_length, **options)


def chained(whole: datasets.IterableDataset, documents: datasets.Dataset, rng: np.random.Generator) -> Any:
    """Put some of datasets' operations after a source: those after which it still knows its place."""
    if rng.random() < 0.3:
        lists = documents["input_ids"][:]
        lists_of = {"lists": [lists[n::8] for n in range(8)]}
        whole = datasets.IterableDataset.from_generator(generated, gen_kwargs=lists_of)
    if rng.random() < 0.4:
        other = documents.to_iterable_dataset(num_shards=8)
        joined = [whole.map(first_half), other.map(last_half)]
        shares, stop = [0.3, 0.7] if rng.random() < 0.7 else None, "all_exhausted_without_replacement"
        whole = datasets.interleave_datasets(joined, probabilities=shares, seed=1, stopping_strategy=stop)
    if rng.random() < 0.3:
        whole = whole.skip(int(rng.integers(0, 3))).take(int(rng.integers(20, 99)))
    if rng.random() < 0.2:
        whole = whole.select_columns(["input_ids"]).repeat(2)
    if rng.random() < 0.5:
        whole = whole.map(doubled, batched=True, batch_size=int(rng.integers(1, 9)))
    if rng.random() < 0.3:
        whole = whole.filter(is_odd)
    return whole.with_format("numpy") if rng.random() < 0.3 else whole


def generated(lists: list[list[list[int]]]) -> Iterator[dict[str, Any]]:
    for some in lists:
        for tokens in some:
            yield {"input_ids": tokens}


def first_half(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": row["input_ids"][: len(row["input_ids"]) // 2 + 1]}


def last_half(row: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": row["input_ids"][len(row["input_ids"]) // 2 :]}


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": [tokens for tokens in batch["input_ids"] for _ in range(1 + len(tokens) % 2)]}


def is_odd(row: dict[str, Any]) -> bool:
    return len(row["input_ids"]) % 4 != 1


def resumed(seed: tuple[int, int], worker: tuple[int, int], rank: int, ranks: int) -> NDArray[np.int64]:
    """Resume one worker's share everywhere; return how often, and how many rows were compared."""
    number, workers = worker
    said: Any = {"id": number, "num_workers": workers, "seed": 0, "dataset": None}
    torchs_worker._worker_info = torchs_worker.WorkerInfo(**said) if workers else None
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
            goes_on = taken in (0, 1, len(epochs[epoch]))
            wanted = [epochs[epoch][taken:], *(epochs[epoch + 1 :] if goes_on else ())]
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
