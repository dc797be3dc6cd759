"""TRL's packing against ours: rows, fill, lost tokens, and seconds to the first batch.

    pip install "trl>=1.16" && python recipes/benchmarks/trl_packing.py

Both begin with the same tokenized dataset, in one process, and end with the first batch of 8 rows from a collator of
their own. TRL's cached results are thrown away. Seconds are CPU time, the median of the turns, which the ways take one
after another. A lost token is in no row; `pack()` leaves out single tokens unless `min_piece=1`, which is
given here. "written" is `materialize()` into Arrow, as int32 without labels and positions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import compute
from rich.console import Console
from rich.table import Table

from hf_longtrunc import BestFitPackingCollator, pack

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 8


class Packed(NamedTuple):
    """Rows that can be run through, and the collator that makes batches of them."""

    rows: Any
    collate: Callable[[list[Any]], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    documents, seq_length = corpus(arguments.documents), arguments.seq_length
    ways = {f"TRL {strategy}": theirs(strategy) for strategy in ("bfd", "bfd_split", "wrapped")}
    ways["Dataset.map, as run_clm.py"] = mapped
    if find_spec("lightbinpack") is not None:
        ways["lightbinpack obfd, joined by numpy"] = binned
    ways |= {"here, a view": viewed, "here, written": written, "here, a stream": streamed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    lengths: dict[str, list[int]] = {}
    for _ in range(arguments.turns):
        for name, way in ways.items():
            since = time.process_time()
            packed = way(documents, seq_length)
            rows = iter(packed.rows)
            packed.collate([next(rows) for _ in range(BATCH)])
            seconds[name].append(time.process_time() - since)
            if name not in lengths:
                lengths[name] = lengths_of(packed.rows)
    Console(width=110).print(table(sum(lengths_of(documents)), seq_length, lengths, seconds))


def lengths_of(rows: Any) -> list[int]:
    if isinstance(rows, datasets.Dataset):
        return list(compute.list_value_length(rows.data["input_ids"]).to_pylist())
    return [len(row["input_ids"]) for row in rows]


def table(tokens: int, seq_length: int, lengths: dict[str, list[int]], seconds: dict[str, list[float]]) -> Table:
    title = f"TRL {version('trl')}, {tokens:,} tokens, rows of {seq_length:,}; CPU seconds to the first batch"
    shown = Table(title=title, title_justify="left")
    for heading in ("", "rows", "full", "tokens lost", "", "seconds", "to written"):
        shown.add_column(heading, justify="right" if heading else "left")
    base = np.median(seconds["here, written"])
    for name, rows in lengths.items():
        lost, spent = tokens - sum(rows), float(np.median(seconds[name]))
        shown.add_row(name, f"{len(rows):,}", f"{sum(rows) / len(rows) / seq_length:.2%}", f"{lost:,}",
                      f"{lost / tokens:.1%}", f"{spent:.3f}", f"{spent / base:.2f}x")  # fmt: skip
    return shown


def corpus(documents: int) -> datasets.Dataset:
    """Documents like a web corpus: median 490 tokens, mean 900, one in ten over 2048."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(6.2, 1.1, documents)).astype(np.int64)
    ends = np.append(0, np.cumsum(lengths))
    ids = pa.LargeListArray.from_arrays(ends, pa.array(rng.integers(3, 50_000, ends[-1])))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": ids})))


def theirs(strategy: str) -> Callable[[Any, int], Packed]:
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    def way(documents: Any, seq_length: int) -> Packed:
        options = {"load_from_cache_file": False, "keep_in_memory": True}
        rows = pack_dataset(documents, seq_length, strategy, map_kwargs=options)
        return Packed(rows, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True))

    return way


def mapped(documents: Any, seq_length: int) -> Packed:
    def sliced(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [token for document in batch["input_ids"] for token in document]
        rows = [tokens[start : start + seq_length] for start in range(0, len(tokens), seq_length)]
        return {"input_ids": rows, "seq_lengths": [[len(row)] for row in rows]}

    rows = documents.map(sliced, batched=True, load_from_cache_file=False, keep_in_memory=True)
    return Packed(rows, BestFitPackingCollator(seq_length))


def binned(documents: Any, seq_length: int) -> Packed:
    import lightbinpack

    column = documents.data["input_ids"].combine_chunks()
    values, ends = column.values.to_numpy(), column.offsets.to_numpy()
    pieces = [
        values[start : min(start + seq_length, end)]
        for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        for start in range(begin, end, seq_length)
    ]
    plan = lightbinpack.obfd([len(piece) for piece in pieces], seq_length)
    tokens = np.concatenate([pieces[number] for row in plan for number in row])
    sizes = [sum(len(pieces[number]) for number in row) for row in plan]
    rows = {"input_ids": pa.ListArray.from_arrays(np.append(0, np.cumsum(sizes)).astype(np.int32), tokens)}
    rows["seq_lengths"] = pa.array([[len(pieces[number]) for number in row] for row in plan])
    return Packed(datasets.Dataset(datasets.table.InMemoryTable(pa.table(rows))), BestFitPackingCollator(seq_length))


def viewed(documents: Any, seq_length: int) -> Packed:
    packed: Any = pack(documents, seq_length, min_piece=1)
    return Packed(packed, BestFitPackingCollator(seq_length))


def written(documents: Any, seq_length: int) -> Packed:
    with tempfile.TemporaryDirectory() as folder:
        columns = ["input_ids"]
        rows = pack(documents, seq_length, min_piece=1).materialize(folder, dtype="int32", columns=columns)
    return Packed(rows, BestFitPackingCollator(seq_length))


def streamed(documents: Any, seq_length: int) -> Packed:
    numpy = documents.with_format("numpy").to_iterable_dataset()
    return Packed(pack(numpy, seq_length, min_piece=1), BestFitPackingCollator(seq_length))


if __name__ == "__main__":
    main()
