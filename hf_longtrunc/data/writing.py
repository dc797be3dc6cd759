"""Packed rows written out as Arrow files, straight from the documents' tokens, at about the speed of copying them.

Rows are gathered some million tokens at a time into flat arrays, Arrow's own layout of lists: no row becomes a Python
list. `datasets.load_from_disk` reads the folder. New data files have new names; `state.json`, which names the files
that count, is replaced last. A process killed at any moment leaves the old rows or the new ones, and the next writing
removes the files that it began. Of several that write at once, the rows of one stay.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.data.documents import BOUNDARIES
from hf_longtrunc.extras import missing
from hf_longtrunc.saving import abandoned, held, replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets
    from numpy.typing import NDArray

    from hf_longtrunc.data.dataset import FlatRows, PackedDataset

WRITTEN = ("input_ids", "position_ids", "labels", "seq_lengths")
_TOKENS = 2**21  # gathered at once
_Job = tuple["PackedDataset", int, int, Path, tuple[str, ...], str]  # rows, first, last, path, columns, dtype


def write_rows(
    rows: PackedDataset, folder: str | os.PathLike[str], columns: tuple[str, ...], dtype: str, num_proc: int
) -> datasets.Dataset:
    """Write rows into a folder, one data file a process, and return them read from there."""
    library, folder = import_datasets("writing rows"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left = abandoned(folder, f"data-????????-{'?' * 5}-of-{'?' * 5}.arrow")
    _remove(left - _files_that_count(folder))  # asked last: a process that has ended changes it no more
    bounds, token = np.linspace(0, len(rows), num_proc + 1).astype(int).tolist(), secrets.token_hex(4)
    paths = [folder / f"data-{token}-{index:05d}-of-{num_proc:05d}.arrow" for index in range(num_proc)]
    jobs = [(rows, *bound, path, columns, dtype) for *bound, path in zip(bounds[:-1], bounds[1:], paths, strict=True)]
    with ExitStack() as stack:
        for path in paths:
            path.touch(exist_ok=False)
            stack.enter_context(held(path))
        try:
            _run(jobs, library)
            old = _files_that_count(folder)
            _commit(folder, paths, library)
            _remove(old)
        except BaseException:
            _remove(set(paths) - _files_that_count(folder))
            raise
    written = _read(folder, library)
    if _files_that_count(folder) != set(paths):
        raise FileExistsError(f"another process wrote its rows into {folder} meanwhile: give each its own folder")
    return written


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


def refuse_own_folder(documents: object, folder: Path, library: Any) -> None:
    """Raise ValueError if rows would take the place of the documents that they are made of, or hide splits."""
    if (folder / "dataset_dict.json").exists():
        raise ValueError(
            f"folder {str(folder)!r} holds splits, which the rows would hide: write them to another folder"
        )
    source: Any = documents
    while source is not None and not isinstance(source, library.Dataset):  # torch's Subset has one too
        source = getattr(source, "dataset", None)
    files = () if source is None else source.cache_files
    if any(Path(file["filename"]).resolve().parent == folder.resolve() for file in files):
        raise ValueError(
            f"folder must not be that of the documents, which the rows would replace, got {str(folder)!r}: write the "
            "rows to another folder"
        )


def import_datasets(what: str) -> Any:
    """Return the module `datasets`, or say what to install."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing(what, "datasets", "train") from error
    return datasets


def _run(jobs: list[_Job], library: Any) -> None:
    with library.utils.tqdm(total=sum(job[2] - job[1] for job in jobs), unit="row", desc="writing rows") as progress:
        if len(jobs) == 1:
            _write(*jobs[0], progress.update)
            return
        with ProcessPoolExecutor(len(jobs), initializer=_receive, initargs=(jobs,)) as pool:
            for done in as_completed([pool.submit(_write_job, index) for index in range(len(jobs))]):
                progress.update(done.result())


_received: list[_Job] = []  # in a process of the pool: a forked one inherits the rows, nothing is sent


def _receive(jobs: list[_Job]) -> None:
    _received[:] = jobs


def _write_job(index: int) -> int:
    _, first, last, *_ = job = _received[index]
    _write(*job, lambda _: None)
    return last - first


def _write(
    rows: PackedDataset, first: int, last: int, path: Path, columns: tuple[str, ...], dtype: str, progress: Any
) -> None:
    import pyarrow as pa

    library = import_datasets("writing rows")
    buffers: dict[str, NDArray[Any]] = {}

    def reused(name: str, size: int, kind: str) -> NDArray[Any]:
        """Return an array that the next block overwrites: new memory costs more than filling it."""
        if len(buffers.get(name, ())) < size:
            buffers[name] = np.empty(size, kind)
        return buffers[name][:size]

    kinds = {name: "int32" if name in BOUNDARIES else dtype for name in columns}
    schema = library.Features({name: library.List(library.Value(kind)) for name, kind in kinds.items()}).arrow_schema
    steps = np.arange(rows.packing.seq_length, dtype=np.int32)
    with path.open("r+b") as file:
        with pa.ipc.new_stream(file, schema) as out:
            for start, stop in rows.blocks(first, last, _TOKENS):
                flat = rows.gather(start, stop, with_labels="labels" in columns, dtype=dtype, empty=reused)
                values: dict[str, Any] = {"input_ids": flat.input_ids, "labels": flat.labels}
                values["seq_lengths"] = flat.piece_lengths.astype(np.int32)
                values["position_ids"] = positions = reused("position_ids", len(flat.input_ids), "int32")
                np.concatenate([steps[:0], *(steps[:n] for n in flat.piece_lengths.tolist())], out=positions)
                counts = {name: flat.pieces if name == "seq_lengths" else flat.tokens for name in columns}
                arrays = [
                    pa.ListArray.from_arrays(np.append(0, np.cumsum(counts[name])).astype(np.int32), values[name])
                    for name in columns
                ]
                out.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
                progress(stop - start)
        os.fsync(file.fileno())


def _commit(folder: Path, paths: list[Path], library: Any) -> None:
    """Make the new data files those that count. Their columns are described in themselves."""
    state: dict[str, Any] = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    state |= {"_fingerprint": secrets.token_hex(8), "_format_kwargs": {}, "_output_all_columns": False}
    state["_data_files"] = [{"filename": path.name} for path in paths]
    for name, content in (("dataset_info.json", asdict(library.DatasetInfo())), ("state.json", state)):
        with replacing(folder / name) as written:
            written.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _files_that_count(folder: Path) -> set[Path]:
    """Return the data files that `state.json` names; none where there is none, or no such file."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {folder / Path(file["filename"]).name for file in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _read(folder: Path, library: Any) -> datasets.Dataset:
    written: datasets.Dataset = library.load_from_disk(str(folder))
    return written


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
