"""Write packed rows as Arrow files, which `datasets.load_from_disk` reads, at about the speed of copying the tokens.

Rows are gathered some million tokens at a time into flat arrays, Arrow's own layout of lists: no row becomes a Python
list. `state.json`, which names the data files of the data set, is replaced last: a process killed at any moment leaves
the old rows or the new ones. If two processes write into one folder, the rows of the second stay.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_longtrunc.arguments import check_choice
from hf_longtrunc.data.documents import BOUNDARIES
from hf_longtrunc.extras import import_extra
from hf_longtrunc.saving import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import datasets
    from numpy.typing import NDArray

    from hf_longtrunc.data.dataset import PackedDataset
    from hf_longtrunc.data.documents import FlatRows

WRITTEN = ("input_ids", "position_ids", "labels", "seq_lengths")
_TOKENS = 2**21  # gathered at once
_Job = tuple["PackedDataset", int, int, Path, tuple[str, ...], str]  # rows, first, last, path, columns, dtype


def write_rows(
    rows: PackedDataset, folder: str | os.PathLike[str], columns: tuple[str, ...], dtype: str, num_proc: int
) -> datasets.Dataset:
    """Write rows into a folder, one data file a process, and return them as read from there."""
    library, folder = import_extra("datasets", "writing rows", "train"), Path(folder)
    bounds, token = np.linspace(0, len(rows), num_proc + 1).astype(int).tolist(), secrets.token_hex(4)
    names = [f"data-{token}-{index:05d}-of-{num_proc:05d}.arrow" for index in range(num_proc)]
    with ExitStack() as unnamed:
        paths = [unnamed.enter_context(replacing(folder / name)) for name in names]
        _run([(rows, *job, columns, dtype) for job in zip(bounds[:-1], bounds[1:], paths, strict=True)], library)
        with _locked(folder):
            old = _named_files(folder)
            try:
                unnamed.close()
                _name(folder, names)
            finally:  # data files of before, or of a writer that was killed or failed
                for path in {*old, *folder.glob(f"data-????????-{'?' * 5}-of-{'?' * 5}.arrow")} - _named_files(folder):
                    path.unlink(missing_ok=True)
            written: datasets.Dataset = library.load_from_disk(str(folder))
            if _named_files(folder) != {folder / name for name in names}:  # on a disk without locks
                raise FileExistsError(
                    f"another process wrote its rows into {folder} meanwhile: give each its own folder"
                )
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


def checked_columns(columns: Sequence[str], teaching: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to write, boundaries included; ValueError without tokens, or without labels that are needed.

    `teaching` names the columns of the documents that decide which tokens are learned.
    """
    given = (columns,) if isinstance(columns, str) else columns
    wanted = {check_choice("columns", name, WRITTEN) for name in given}
    if "input_ids" not in wanted:
        raise ValueError(f"columns must have input_ids, got {', '.join(sorted(wanted)) or 'none'}")
    if teaching and "labels" not in wanted:
        raise ValueError(
            f"columns must have labels: the documents have {', '.join(teaching)}, and without labels every token would "
            "be learned"
        )
    return tuple(name for name in WRITTEN if name in wanted or name in BOUNDARIES)


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


def _run(jobs: list[_Job], library: Any) -> None:
    with library.utils.tqdm(total=sum(job[2] - job[1] for job in jobs), unit="row", desc="writing rows") as progress:
        if len(jobs) == 1:
            _write(jobs[0], progress.update)
            return
        with ProcessPoolExecutor(len(jobs), initializer=_receive, initargs=(jobs,)) as pool:
            for done in as_completed([pool.submit(_write_received, index) for index in range(len(jobs))]):
                progress.update(done.result())


_received: list[_Job] = []  # in a process of the pool: a forked one inherits the rows, nothing is sent


def _receive(jobs: list[_Job]) -> None:
    _received[:] = jobs


def _write_received(index: int) -> int:
    return _write(_received[index], lambda _: None)


def _write(job: _Job, progress: Any) -> int:
    """Write the rows of a job, and return their number."""
    rows, first, last, path, columns, dtype = job
    import datasets as library
    import pyarrow as pa

    buffers: dict[str, NDArray[Any]] = {}

    def reused(name: str, size: int, kind: str) -> NDArray[Any]:
        """Return an array that the next block overwrites: new memory costs more than filling it."""
        if len(buffers.get(name, ())) < size:
            buffers[name] = np.empty(size, kind)
        return buffers[name][:size]

    kinds = {name: "int32" if name in BOUNDARIES else dtype for name in columns}
    schema = library.Features({name: library.List(library.Value(kind)) for name, kind in kinds.items()}).arrow_schema
    steps = np.arange(rows.packing.seq_length, dtype=np.int32)
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as out:
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
    return last - first


def _name(folder: Path, names: list[str]) -> None:
    """Write the two files that `load_from_disk` reads; `state.json`, the last, names the data files."""
    state: dict[str, Any] = dict.fromkeys(("_format_columns", "_format_type", "_split"))
    state |= {"_fingerprint": secrets.token_hex(8), "_format_kwargs": {}, "_output_all_columns": False}
    state["_data_files"] = [{"filename": name} for name in names]
    for name, content in (("dataset_info.json", {}), ("state.json", state)):
        with replacing(folder / name) as written:
            written.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _named_files(folder: Path) -> set[Path]:
    """Return the data files that `state.json` names; none if there is no such file."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return {folder / Path(file["filename"]).name for file in state["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for other processes that give rows their names in this folder, where the system and the disk have locks."""
    with ExitStack() as stack:
        with suppress(ModuleNotFoundError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
