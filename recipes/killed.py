"""kill -9 each writer at random moments and before each step in the file system: the old or the new content stays.

    python recipes/killed.py
    python recipes/killed.py --moments 100 --writers materialize

A writer that overwrites starts with old content; the others start with an empty folder. Each runs in a process of its
own, which is killed with its children: after a random part of its time, or before its n-th opening, linking, renaming
or removing of a file in the folder, for each n. Then the folder is read in the ordinary way: it must hold the old
content or the new content, complete.

Cost: a CPU minute or two, most of it drawing the picture of `hf-longtrunc pack`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hf_longtrunc import (
    Packing,
    PEMAAdapter,
    PEMAMemory,
    SoftmaxBasis,
    pack,
    read_megatron,
    write_datatrove,
    write_megatron,
)
from hf_longtrunc.evaluation import append_records, read_records, update_model_card
from hf_longtrunc.evaluation.records import ModelRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEQ_LENGTH = 64
STEPS = {"open", "os.link", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}  # Python's audit events


class Writer(NamedTuple):
    """Writes version 0 or 1 into a folder; reads the folder, None if it is empty."""

    name: str
    write: Callable[[int, Path], Any]
    read: Callable[[Path], Any]
    overwrites: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--writers", help="some of them, separated by commas")
    arguments = parser.parse_args()
    table = Table(title="what was found after kill -9", title_justify="left")
    for heading in ("writer", "at random moments", "old", "new", "before steps", "old", "new"):
        table.add_column(heading, justify="left" if heading == "writer" else "right")
    with tempfile.TemporaryDirectory() as place:
        for writer in writers(Path(place), arguments.documents):
            if arguments.writers is None or writer.name in arguments.writers.split(","):
                table.add_row(writer.name, *map(str, killed(writer, Path(place, "out"), arguments.moments)))
    Console(width=100).print(table)


def killed(writer: Writer, folder: Path, moments: int) -> list[int]:
    """Kill a writer again and again; return how often the old and the new were found, at moments and before steps."""

    def begin() -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if writer.overwrites:
            run(partial(writer.write, 0, folder))
        return writer.read(folder)

    old = begin()
    since = time.perf_counter()
    run(partial(writer.write, 1, folder))
    seconds, new = time.perf_counter() - since, writer.read(folder)
    assert new not in (old, None), f"{writer.name} wrote nothing new"
    delays = np.random.default_rng(0).uniform(0, 1.1 * seconds, moments)
    counts = [len(delays), 0, 0, 0, 0, 0]
    for delay in delays:
        begin()
        run(partial(writer.write, 1, folder), after=delay)
        counts[1 + seen(writer, folder, old, new)] += 1
    is_killed = True
    while is_killed:
        begin()
        if is_killed := run(partial(writer.write, 1, folder), folder=folder, step=counts[3]):
            counts[3] += 1
            counts[4 + seen(writer, folder, old, new)] += 1
    return counts


def seen(writer: Writer, folder: Path, old: Any, new: Any) -> bool:
    """Return whether the new is there; the old must be if it is not."""
    found = writer.read(folder)
    assert found in (old, new), f"killed, {writer.name} left neither the old nor the new"
    return bool(found == new)


def run(call: Callable[[], Any], *, after: float | None = None, folder: Path | None = None, step: int = 0) -> bool:
    """Run a call in a process of its own, and return whether it was killed: after some seconds, or before a step."""
    process = os.fork()
    if not process:
        alone(call, folder, step)
    if after is not None:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or not os.waitstatus_to_exitcode(status), "the writer failed"
    return os.WIFSIGNALED(status)


def alone(call: Callable[[], Any], folder: Path | None, step: int) -> None:
    """Be the process that is killed."""
    os.setsid()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    steps = iter(range(step))

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS and str(folder) in str(arguments) and next(steps, None) is None:
            os.killpg(0, signal.SIGKILL)

    if folder is not None:
        sys.addaudithook(kill)
    try:
        call()
        os._exit(0)
    finally:
        os._exit(1)


# -- what writes -------------------------------------------------------------------------------------------------------


def writers(place: Path, documents: int) -> Iterator[Writer]:
    """Return all of them. Version 1 of rows has other columns and another type too."""
    tokens = [documents_of(documents, seed) for seed in (0, 1)]
    tokenizer: Any = SimpleNamespace(eos_token_id=2)  # Megatron tells documents apart by it
    rows = [pack(datasets.Dataset.from_dict({"input_ids": each}), SEQ_LENGTH, tokenizer) for each in tokens]
    forms: list[dict[str, Any]] = [{}, {"dtype": "int32", "columns": ["input_ids"]}]
    yield Writer("materialize", lambda v, at: rows[v].materialize(at, **forms[v]), rows_in)
    yield Writer("materialize (2 processes)", lambda v, at: rows[v].materialize(at, num_proc=2, **forms[v]), rows_in)
    yield Writer("write_megatron", lambda v, at: write_megatron(rows[v], at / "rows"), megatron_in, overwrites=False)
    yield Writer(
        "write_datatrove",
        lambda v, at: write_datatrove(rows[v], at / "rows.ds", pad_token_id=0),
        datatrove_in,
        overwrites=False,
    )
    for kind, two in saved([packed.packing for packed in rows]).items():
        name = f"{kind.__name__}.save_pretrained"
        yield Writer(name, partial(save, two), partial(saved_in, kind))
    record = ModelRecord(model="tiny", dtype="float32", device="cpu")
    yield Writer(
        "append_records",
        lambda _, at: append_records(at / "records.jsonl", [record] * 500),
        lambda at: read_records(at / "records.jsonl", ModelRecord),
    )
    yield Writer(
        "update_model_card",
        lambda v, at: update_model_card(at, [SoftmaxBasis], records=[record] * (v + 1)),
        lambda at: (at / "README.md").read_text(encoding="utf-8"),
    )
    for version, each in enumerate(tokens):
        lines = (json.dumps({"input_ids": ids}) + "\n" for ids in each)
        Path(place, f"{version}.jsonl").write_text("".join(lines), encoding="utf-8")
    yield Writer("hf-longtrunc pack", partial(command, place), command_in)


def documents_of(number: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 90, length).tolist() for length in rng.integers(2, 80, number)]


def saved(plans: list[Packing]) -> dict[type[Any], list[Any]]:
    """Return two of each class that has `save_pretrained`."""
    parts = [torch.randn(2000, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    ids = torch.arange(2000)
    return {
        Packing: plans,
        PEMAMemory: [PEMAMemory(part, ids, 2000) for part in parts],
        PEMAAdapter: [PEMAAdapter(64, 32, 2000) for _ in parts],
        SoftmaxBasis: [SoftmaxBasis(part.double(), part[0].double(), "0" * 64) for part in parts],
    }


def save(two: list[Any], version: int, folder: Path) -> None:
    two[version].save_pretrained(folder)


def saved_in(kind: Any, folder: Path) -> Any:
    value = kind.from_pretrained(folder)
    held = value.state_dict() if isinstance(value, torch.nn.Module) else vars(value)
    return {name: part.tolist() if hasattr(part, "tolist") else part for name, part in held.items()}


def rows_in(folder: Path) -> Any:
    rows = datasets.load_from_disk(folder)
    return str(rows.features), rows.to_dict()


def megatron_in(folder: Path) -> Any:
    return read_megatron(folder / "rows").to_dict() if (folder / "rows.idx").exists() else None


def datatrove_in(folder: Path) -> Any:
    tokens = folder / "rows.ds"
    return (tokens.read_bytes(), Path(f"{tokens}.index").read_bytes()) if tokens.exists() else None


def command(place: Path, version: int, folder: Path) -> None:
    from hf_longtrunc.cli.app import app

    words = [str(place / f"{version}.jsonl"), "--seq-length", str(SEQ_LENGTH), "--output-dir", str(folder), "--force"]
    said = io.StringIO()
    datasets.config.HF_DATASETS_CACHE = place / "cache"
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        app(["pack", *words])


def command_in(folder: Path) -> Any:
    from PIL import Image

    Image.open(folder / "packing.png").load()
    return rows_in(folder / "dataset")


if __name__ == "__main__":
    main()
