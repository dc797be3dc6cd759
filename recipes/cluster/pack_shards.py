"""Tokenize, pack and write in many processes with one common plan; the rows equal those of one process.

    python recipes/cluster/pack_shards.py --synthetic 1000000 --check
    python recipes/cluster/pack_shards.py --files texts/*.txt --workers 4 --tasks 16 --out rows
    python recipes/cluster/pack_shards.py --arithmetic

    tokenize   task i reads its share of the sources and writes their tokens, where each piece of a document begins,
               pieces ordered by decreasing length, and how many pieces of every length there are
    write      task j adds the histograms up and plans all rows by them, in some hundredths of a second and with no
               word from another task; it gathers rows j, j + tasks, ... from the mapped tokens, some million tokens
               at a time, and writes them

A plan places pieces by their length alone, so that the histograms are all that the tasks need to know of each other:
the n-th piece of length s is in the task where the counts of s, added up, reach n. `--check` packs everything again in
one process, and compares all rows.

Both stages are functions of a rank and the number of tasks. datatrove runs them where it is installed (its
SlurmPipelineExecutor takes the same functions, with skip_completed=False), else a pool of processes. A file gets its
name when it is complete, and a task with all its files is not run again. `manifest.json` records sources, settings and
versions: a task with others stops. docs/results/packing.md has the arithmetic for
ten thousand million documents.

Cost: `--synthetic 10000000 --check` some three CPU minutes, 10 GB of disk, and about 1 GB of memory a process, mapped
files included; a tenth of the documents, a tenth of time and disk.
"""

from __future__ import annotations

import argparse
import json
import mmap
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import hf_longtrunc
from hf_longtrunc import pack
from hf_longtrunc.data.packing import RowPlan, plan_rows
from hf_longtrunc.saving import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

Integers = NDArray[np.int64]
EOS = 0
PART = 100_000  # synthetic documents of a source
SCHEMA = pa.schema({name: pa.list_(pa.int32()) for name in ("input_ids", "position_ids", "seq_lengths")})


class Job(NamedTuple):
    """What all tasks know."""

    files: tuple[Path, ...]
    synthetic: int
    seq_length: int
    out: Path
    block: int  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="texts, one document a paragraph")
    parser.add_argument("--synthetic", type=int, default=0, help="documents of random tokens, median 55")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--block", type=int, default=2**24, help="tokens that a task gathers and writes at a time")
    parser.add_argument("--out", type=Path, help="folder of the shards; one that is thrown away if left out")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--arithmetic", action="store_true", help="print what plans of many documents cost, no more")
    arguments = parser.parse_args()
    if arguments.arithmetic:
        Console(width=100).print(arithmetic())
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        out = arguments.out or Path(thrown_away)
        job = Job(tuple(arguments.files), arguments.synthetic, arguments.seq_length, out, arguments.block)
        pack_shards(job, arguments)


def pack_shards(job: Job, arguments: argparse.Namespace) -> None:
    since = time.perf_counter()
    for stage in (tokenize, write):
        run(partial(stage, job), arguments.tasks, arguments.workers, job.out / "logs" / stage.__name__)
        seconds = time.perf_counter() - since
        print(f"{stage.__name__}: {arguments.tasks} tasks, {seconds:.1f} s since the start; {cost()}")
    agree(job, arguments.tasks)
    tables = [shard(job, task).data for task in range(arguments.tasks)]
    rows = sum(map(len, tables))
    tokens = sum(len(chunk.values) for table in tables for chunk in table["input_ids"].chunks)
    del tables
    print(f"{rows:,} rows of {job.seq_length} in {arguments.tasks} shards, {tokens / rows / job.seq_length:.3%} full")
    written = sum(file.stat().st_size for file in job.out.rglob("*") if file.is_file())
    print(f"{written / 1e9:.2f} GB on disk, of them the tokens twice: as read, and in rows")
    if arguments.check:
        check(job, arguments.tasks)
        print(f"packed again in one process, and compared: {cost()}")


def cost() -> str:
    """Return the processor time of this process and of the children that it waited for."""
    own, tasks = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(used.ru_utime + used.ru_stime for used in (own, tasks))
    return f"{seconds:.0f} CPU s, at most {tasks.ru_maxrss / 1e6:.1f} GB in a task, {own.ru_maxrss / 1e6:.1f} GB here"


def run(stage: Any, tasks: int, workers: int, logs: Path) -> None:
    """Run a stage's tasks, so many at a time; those that are done are not run again."""
    if find_spec("datatrove") is not None:
        from datatrove.executor import LocalPipelineExecutor

        # Files say what is done: of one that was deleted, datatrove's own marks know nothing.
        LocalPipelineExecutor([stage], tasks=tasks, workers=workers, logging_dir=str(logs), skip_completed=False).run()
        return
    with ProcessPoolExecutor(workers) as pool:
        for done in [pool.submit(stage, None, rank, tasks) for rank in range(tasks)]:
            done.result()


def agree(job: Job, tasks: int) -> None:
    """Write the sources, settings and versions of the files in the folder, or compare with those written before.

    Raises:
        ValueError: the files have other sources, settings or versions.
    """
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in job.files]
    manifest: dict[str, Any] = {
        "files": [list(state) for state in states], "synthetic": job.synthetic, "seq_length": job.seq_length,
        "tasks": tasks, "versions": {"hf_longtrunc": hf_longtrunc.__version__, "numpy": np.__version__},
    }  # fmt: skip
    job.out.mkdir(parents=True, exist_ok=True)
    at = job.out / "manifest.json"
    if not at.exists():
        with replacing(at) as beside:
            beside.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    found = json.loads(at.read_text(encoding="utf-8"))
    for name, value in manifest.items():
        if value != found.get(name):
            raise ValueError(
                f"{job.out} holds rows of other {name}: {found.get(name)}, got {value}; give --out another folder, or "
                "delete this one"
            )


def arithmetic() -> Table:
    """Plan for up to 1e10 documents with lengths like a web corpus; 1e7 are drawn, and counted more than once."""
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(6.2, 1.1, 10_000_000)).astype(np.int64)
    title = "documents of median 490 tokens, mean 900, in one plan"
    table = Table(title=title, title_justify="left")
    for heading in ("documents", "row", "pieces", "rows", "over ideal", "CPU s", "moves"):
        table.add_column(heading, justify="right")
    for seq_length in (2048, 8192):
        for drawn, times in ((10**5, 1), (10**6, 1), (10**7, 1), (10**7, 10), (10**7, 1000)):
            counts = times * np.bincount(pieces(lengths[:drawn], seq_length)[1], minlength=seq_length + 1)
            since = time.process_time()
            plan = plan_rows(counts, seq_length)
            seconds, tokens = time.process_time() - since, int(counts @ np.arange(seq_length + 1))
            table.add_row(
                f"{drawn * times:,}", f"{seq_length:,}", f"{counts.sum():,}", f"{plan.num_rows:,}",
                f"{plan.num_rows / -(-tokens // seq_length) - 1:+.4%}", f"{seconds:.3f}", f"{len(plan.first):,}",
            )  # fmt: skip
    return table


# -- the two stages ----------------------------------------------------------------------------------------------------


def tokenize(job: Job, data: Any, rank: int = 0, tasks: int = 1) -> None:
    """Write the tokens of a task's sources, and its pieces."""
    agree(job, tasks)
    tokens_at, pieces_at, at = (
        job.out / f"{name}-{rank:05d}.{kind}"
        for name, kind in (("tokens", "bin"), ("pieces", "npy"), ("histogram", "npy"))
    )
    if tokens_at.exists() and pieces_at.exists() and at.exists():
        return
    lengths = [np.empty(0, np.int64)]
    with replacing(tokens_at) as beside, beside.open("wb") as file:
        for tokens, sizes in sources(job, rank, tasks):
            file.write(tokens.tobytes())
            lengths.append(sizes)
    starts, sizes = pieces(np.concatenate(lengths), job.seq_length)
    save(pieces_at, starts[np.argsort(-sizes, kind="stable")])
    save(at, np.bincount(sizes, minlength=job.seq_length + 1))  # last: the other files are there


def write(job: Job, data: Any, rank: int = 0, tasks: int = 1) -> None:
    """Write every `tasks`-th row of the plan for all."""
    agree(job, tasks)
    at = job.out / f"rows-{rank:05d}.arrow"
    if at.exists():
        return
    counts = np.stack([np.load(job.out / f"histogram-{task:05d}.npy") for task in range(tasks)])
    ranks, ends = rows_of(plan_rows(counts.sum(0), job.seq_length), rank, tasks)
    step = -(-job.block // job.seq_length)
    with replacing(at) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as out:
        for first in range(0, len(ends) - 1, step):
            bounds = ends[first : first + step + 1]
            tokens, lengths = gathered(job, counts, ranks[bounds[0] : bounds[-1]])
            bounds = bounds - bounds[0]
            starts = np.append(0, np.cumsum(lengths))[bounds]
            positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            columns = ((starts, tokens), (starts, positions), (bounds, lengths))
            lists = [pa.ListArray.from_arrays(*(part.astype(np.int32) for part in column)) for column in columns]
            out.write_batch(pa.RecordBatch.from_arrays(lists, schema=SCHEMA))


def shard(job: Job, task: int) -> datasets.Dataset:
    """Return a task's rows, mapped from their file."""
    return datasets.Dataset.from_file(str(job.out / f"rows-{task:05d}.arrow"))


def pieces(lengths: Integers, seq_length: int) -> tuple[Integers, Integers]:
    """Cut documents that lie one after another: where every piece begins, and how long it is."""
    counts = -(-lengths // seq_length)
    in_document = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + in_document * seq_length
    return starts, np.minimum(np.repeat(lengths, counts) - in_document * seq_length, seq_length)


def rows_of(plan: RowPlan, first: int, step: int) -> tuple[Integers, Integers]:
    """Return the pieces in every `step`-th row of a plan, from row `first` on.

    A piece is its rank in the order of decreasing length, of all tasks. Returns the ranks, row by row, and where every
    row begins in them, [rows + 1]. Memory goes with these rows alone.
    """
    taken = np.cumsum(plan.rows * plan.pieces) - plan.rows * plan.pieces  # ranks before a move
    of_row, places, ranks = [], [], []
    for begin, rows, each, held, before in zip(*plan[:4], taken, strict=True):
        mine = np.arange((first - begin) % step, rows, step)
        piece = np.arange(each)
        of_row.append(np.repeat((begin + mine - first) // step, each))
        places.append(np.tile(held + piece, len(mine)))
        ranks.append((before + mine[:, None] * each + piece).ravel())
    rows, found = np.concatenate(of_row), np.concatenate(ranks)
    number = len(range(first, plan.num_rows, step))
    ends = np.append(0, np.cumsum(np.bincount(rows, minlength=number)))
    items = np.empty_like(found)
    items[ends[rows] + np.concatenate(places)] = found
    return items, ends


def gathered(job: Job, counts: Integers, ranks: Integers) -> tuple[NDArray[np.uint16], Integers]:
    """Return the tokens of pieces, one after another, and their lengths; `counts` [tasks, length] of all pieces."""
    decreasing = counts[:, ::-1]
    ends = np.cumsum(decreasing.sum(0))  # ranks up to each length
    column = np.searchsorted(ends, ranks, side="right")
    lengths = job.seq_length - column
    in_length = ranks - (ends - decreasing.sum(0))[column]
    out_ends = np.append(0, np.cumsum(lengths))
    out = np.empty(out_ends[-1], np.uint16)
    before = np.zeros(decreasing.shape[1], np.int64)
    for task in range(len(counts)):
        is_here = (in_length >= before[column]) & (in_length < (before + decreasing[task])[column])
        if is_here.any():
            columns = column[is_here]
            in_task = (np.cumsum(decreasing[task]) - decreasing[task])[columns] + in_length[is_here] - before[columns]
            starts = np.load(job.out / f"pieces-{task:05d}.npy", mmap_mode="r")[in_task]
            tokens = np.memmap(job.out / f"tokens-{task:05d}.bin", np.uint16, "r")
            copy(tokens, starts, lengths[is_here], out, out_ends[:-1][is_here])
        before += decreasing[task]
    return out, lengths


def copy(source: Any, starts: Integers, lengths: Integers, out: NDArray[np.uint16], places: Integers) -> None:
    """Copy pieces, a million tokens at a time."""
    bounds = np.flatnonzero(np.diff(np.cumsum(lengths) >> 20, prepend=-1))
    for first, last in zip(bounds, np.append(bounds[1:], len(lengths)), strict=True):
        sizes = lengths[first:last]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        out[np.repeat(places[first:last], sizes) + within] = source[np.repeat(starts[first:last], sizes) + within]


def save(path: Path, array: NDArray[Any]) -> None:
    with replacing(path) as beside:
        np.save(beside, array)


# -- documents ---------------------------------------------------------------------------------------------------------


def sources(job: Job, rank: int, tasks: int) -> Iterator[tuple[NDArray[np.uint16], Integers]]:
    """Yield the tokens and lengths of every `tasks`-th source: files, and parts of the synthetic documents."""
    parts = range(0, job.synthetic, PART)
    for index in range(rank, len(job.files) + len(parts), tasks):
        if index < len(job.files):
            yield read(job.files[index])
        else:
            begin = parts[index - len(job.files)]
            yield synthetic(min(PART, job.synthetic - begin), seed=begin)


def read(file: Path) -> tuple[NDArray[np.uint16], Integers]:
    """Return a text's paragraphs as bytes, 1 to 256, each with an EOS. Replace this by your tokenizer."""
    paragraphs = [part.encode() for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    documents = [np.append(np.frombuffer(part, np.uint8).astype(np.uint16) + 1, np.uint16(EOS)) for part in paragraphs]
    return np.concatenate(documents), np.array([len(document) for document in documents])


def synthetic(number: int, seed: int) -> tuple[NDArray[np.uint16], Integers]:
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(4, 1.1, number)).astype(np.int64)
    return rng.integers(1, 50_000, int(lengths.sum()), dtype=np.uint16), lengths


# -- the same in one process -------------------------------------------------------------------------------------------


def check(job: Job, tasks: int) -> None:
    """Pack everything in one process, from one mapped file of all tokens, and compare every row.

    The plan is in memory; tokens are read block by block, and released.
    """
    at, lengths = job.out / "one-process.bin", [np.empty(0, np.int64)]
    with at.open("wb") as file:
        for rank in range(tasks):
            for tokens, sizes in sources(job, rank, tasks):
                file.write(tokens.astype(np.int32).tobytes())
                lengths.append(sizes)
    ends = np.append(0, np.cumsum(np.concatenate(lengths)))
    with at.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    flat = pa.Array.from_buffers(pa.int32(), int(ends[-1]), [None, pa.py_buffer(mapped)])
    table = datasets.table.InMemoryTable(pa.table({"input_ids": pa.LargeListArray.from_arrays(ends, flat)}))
    # Without a fingerprint datasets would hash all tokens, and copy them for that.
    packed = pack(datasets.Dataset(table, fingerprint="one process"), job.seq_length, min_piece=1, seed=None)
    for rank in range(tasks):
        wanted, written = packed.shard(rank, tasks), shard(job, rank)
        assert len(wanted) == len(written), f"shard {rank} has {len(written)} rows, expected {len(wanted)}"
        for first, last in wanted.blocks(0, len(wanted), 2**20):
            rows, found = wanted.gather(first, last, with_labels=False), written.data.slice(first, last - first)
            firsts = np.cumsum(rows.piece_lengths) - rows.piece_lengths
            positions = np.arange(len(rows.input_ids)) - np.repeat(firsts, rows.piece_lengths)
            columns = {"input_ids": rows.input_ids, "position_ids": positions, "seq_lengths": rows.piece_lengths}
            for name, values in columns.items():
                column = found[name].combine_chunks().flatten()
                assert np.array_equal(column, values), f"shard {rank} differs in {name}, rows {first} to {last}"
            mapped.madvise(mmap.MADV_DONTNEED)
    at.unlink()
    print(f"equal to one process: all {len(packed):,} rows, {len(ends) - 1:,} documents, {ends[-1]:,} tokens")


if __name__ == "__main__":
    main()
