"""Packed rows written out as Arrow files, straight from the documents' tokens, at about the speed of copying them.

Rows are gathered some million tokens at a time into flat arrays, which are Arrow's own layout of lists, so that no row
is ever a Python list. `datasets.load_from_disk` reads the folder. Its data files have new names, and `state.json`,
which names the files that count, takes the place of an older one last and at once: whoever is interrupted, at
whatever moment, leaves the old rows or the new ones, and of several who write at once, the rows of one are there.
"""

from __future__ import annotations

import json
import secrets
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_longtrunc.extras import missing
from hf_longtrunc.saving import alone, left_by_killed, replacing, writing_name

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import datasets

    from hf_longtrunc.data.dataset import FlatRows, PackedDataset

WRITTEN = ("input_ids", "position_ids", "labels", "seq_lengths")
_TOKENS = 2**21  # gathered at once


class _Job(NamedTuple):
    rows: PackedDataset
    first: int
    last: int
    path: str
    columns: tuple[str, ...]
    dtype: str


def write_rows(
    rows: PackedDataset, folder: str | os.PathLike[str], columns: tuple[str, ...], dtype: str, num_proc: int
) -> datasets.Dataset:
    """Write rows into a folder, one data file a process, and return them read from there."""
    library, folder = import_datasets("writing rows"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left = left_by_killed(folder, "data-", "-*.arrow")
    _remove(folder, left - _files_that_count(folder))  # asked last: who has ended makes nothing count any more
    writing, bounds = writing_name(), np.linspace(0, len(rows), num_proc + 1).astype(int)
    names = [f"data-{writing}-{index:05d}-of-{num_proc:05d}.arrow" for index in range(num_proc)]
    jobs = [
        _Job(rows, int(first), int(last), str(folder / name), columns, dtype)
        for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True)
    ]
    try:
        _run(jobs, library)
        with alone(folder):
            old = _files_that_count(folder)
            _commit(folder, names, library)
            _remove(folder, old)
    except BaseException:
        _remove(folder, set(names) - _files_that_count(folder))
        raise
    return _read(folder, names, library)


def token_blocks(rows: PackedDataset, whose: str) -> Iterator[FlatRows]:
    """Gather all rows, some million tokens at a time, for a format that holds nothing but tokens.

    Raises:
        TypeError: the rows are no `PackedDataset`.
        ValueError: the documents have labels or masks.
    """
    if not hasattr(rows, "teaching"):
        raise TypeError(
            f"rows must be what pack() makes of a dataset with a length, a PackedDataset, got {type(rows).__name__}"
        )
    if rows.teaching:
        raise ValueError(
            f"{whose} holds tokens only, and the documents have {', '.join(rows.teaching)}: every token would be "
            "learned"
        )
    return (rows.gather(*bounds, with_labels=False) for bounds in rows.blocks(0, len(rows), _TOKENS))


def import_datasets(what: str) -> Any:
    """Return the module `datasets`, or say what to install."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing(what, "datasets", "train") from error
    return datasets


def _run(jobs: list[_Job], library: Any) -> None:
    progress = library.utils.tqdm(total=sum(job.last - job.first for job in jobs), unit="row", desc="writing rows")
    with progress:
        if len(jobs) == 1:
            _write(jobs[0], progress.update)
            return
        with ProcessPoolExecutor(len(jobs), initializer=_receive, initargs=(jobs,)) as pool:
            for done in as_completed([pool.submit(_write_job, index) for index in range(len(jobs))]):
                progress.update(done.result())


_received: list[_Job] = []  # in a process of the pool: a forked one inherits the rows, nothing is sent


def _receive(jobs: list[_Job]) -> None:
    _received[:] = jobs


def _write_job(index: int) -> int:
    job = _received[index]
    _write(job, lambda _: None)
    return job.last - job.first


def _write(job: _Job, progress: Any) -> None:
    import pyarrow as pa

    schema = _features(job.columns, job.dtype).arrow_schema
    with pa.OSFile(job.path, "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for first, last in job.rows.blocks(job.first, job.last, _TOKENS):
            flat = job.rows.gather(first, last, with_labels="labels" in job.columns)
            if flat.input_ids.max(initial=0) > np.iinfo(job.dtype).max:
                raise ValueError(f'token {flat.input_ids.max()} is more than {job.dtype} holds; pass dtype="int64"')
            arrays = [
                pa.ListArray.from_arrays(
                    np.append(0, np.cumsum(lengths)).astype(np.int32), pa.array(values.astype(job.dtype, copy=False))
                )
                for values, lengths in (_column(flat, name) for name in job.columns)
            ]
            out.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            progress(last - first)


def _column(flat: Any, name: str) -> tuple[Any, Any]:
    """Return a column's values and the number of them in every row."""
    if name == "seq_lengths":
        return flat.piece_lengths, flat.pieces
    if name == "position_ids":
        ends = np.cumsum(flat.piece_lengths)
        return np.arange(len(flat.input_ids)) - np.repeat(ends - flat.piece_lengths, flat.piece_lengths), flat.tokens
    return getattr(flat, name), flat.tokens


def _features(columns: tuple[str, ...], dtype: str) -> Any:
    library = import_datasets("writing rows")
    return library.Features({name: library.List(library.Value(dtype)) for name in columns})


def _commit(folder: Path, names: list[str], library: Any) -> None:
    """Make the new data files those that count; what their columns are stands in themselves, not in a file beside."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": secrets.token_hex(8),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("dataset_info.json", asdict(library.DatasetInfo())), ("state.json", state)):
        with replacing(folder / name) as beside:
            beside.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _files_that_count(folder: Path) -> set[str]:
    """Return the names of the data files that `state.json` names; none where there is none, or no such file."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {Path(file["filename"]).name for file in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _remove(folder: Path, names: set[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _read(folder: Path, names: list[str], library: Any) -> datasets.Dataset:
    """Return the rows that lie in a folder, if they are those of the data files.

    Raises:
        FileExistsError: another process has written others meanwhile.
    """
    try:
        written: datasets.Dataset | None = library.load_from_disk(str(folder))
    except FileNotFoundError:
        written = None
    if written is None or _files_that_count(folder) != set(names):
        raise FileExistsError(
            f"another process has written rows into {folder} at the same time, and those are there: give each its own "
            "folder"
        )
    return written
