"""One way to keep what was computed: a folder with a safetensors file, and a json file that says what it is.

`<kind>.json` holds the kind, the number of the format, the settings, and a SHA-256 over settings and tensors, so that
a flipped bit in either file is found when they are read.

Two files cannot be replaced at once. The json file decides: new tensors lie whole under a hidden name made of their
checksum before it is replaced, and get their own name after it. Who is killed in between leaves them under the hidden
name, where they are found.

What is not whole yet has a name that says which process of which machine writes it. The next writing to the same place
removes what a process of this machine left that runs no more; another machine's is left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

FORMAT = 1
# Bytes of a file that are read at a time for its checksum.
_PART = 2**24
# Of the checksum, in a hidden name.
_DIGITS = 16


def save_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write tensors and settings (plain json values) into a folder, which is made where it is missing.

    What was saved there before stays until the new is whole, and is then replaced at once.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    data_at, described_at = Path(folder, f"{kind}.safetensors"), Path(folder, f"{kind}.json")
    with _beside(data_at) as beside, ExitStack() as stack:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
        checksum = _checksum(beside, settings)
        described = {"kind": kind, "format": FORMAT, "settings": dict(settings), "sha256": checksum}
        stack.enter_context(alone(Path(folder)))
        with replacing(described_at) as new:
            new.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, _hidden(data_at, checksum))
        os.replace(_hidden(data_at, checksum), data_at)
        for left in Path(folder).glob(_hidden(data_at, "?" * _DIGITS).name):  # by one who was killed
            left.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden path to write a file to, which takes the place of `path` at once and when it is whole.

    An exception leaves the old. The hidden path has the suffix of `path`.
    """
    with _beside(path) as beside:
        yield beside
        os.replace(beside, path)


@contextmanager
def placing(first: Path, second: Path) -> Iterator[tuple[Path, Path]]:
    """Give hidden paths to write a pair of new files to, which get their names, in this order, when both are whole.

    Nothing is overwritten, and of two processes that write one pair at once one is refused.

    Raises:
        FileExistsError: one of the files is there, or is there when the pair is written.
    """
    for path in (first, second):
        if path.exists():
            raise FileExistsError(f"{path} exists: write to another path, or delete it first")
    with _beside(first) as first_beside, _beside(second) as second_beside:
        yield first_beside, second_beside
        try:
            first.touch(exist_ok=False)  # only one of several can
        except FileExistsError:
            raise FileExistsError(
                f"{first} exists: another process has written it meanwhile; write to another path, or delete it first"
            ) from None
        os.replace(first_beside, first)
        os.replace(second_beside, second)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    for name in left_by_killed(path.parent, ".", f".{escape(path.name)}"):
        with suppress(OSError):  # another user's
            (path.parent / name).unlink()
    beside = path.with_name(f".{writing_name()}.{path.name}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)


def writing_name() -> str:
    """Return a part of a file's name by which others see that it is being written, see `left_by_killed`."""
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"


def left_by_killed(folder: Path, before: str, after: str) -> set[str]:
    """Return names in a folder, made of `before`, `writing_name()` and the pattern `after`, by processes that ended.

    What a running process writes is not among them, nor what another machine or container has begun.
    """
    begin = f"{before}{_machine()}-"
    names = {path.name for path in folder.glob(f"{escape(begin)}*-*{after}")}
    processes = {name: name.removeprefix(begin).split("-")[0] for name in names}
    return {name for name, process in processes.items() if process.isdecimal() and not _runs(int(process))}


@cache
def _machine() -> str:
    """Return a name for the machine, or container, in which numbers of processes mean what they mean here."""
    processes = Path("/proc/self/ns/pid")
    names = f"{socket.gethostname()} {os.readlink(processes) if processes.is_symlink() else ''}"
    return hashlib.sha256(names.encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    if os.name != "posix":
        return True  # asking would end it
    with suppress(PermissionError, OverflowError):  # another user's, or no number of a process
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one at a time do what is inside, where folders can be locked: not on Windows or on every network's disk."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def load_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, str], settings: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_folder` wrote.

    Args:
        folder: where it lies.
        kind: what it must be.
        tensors: name -> shape in words, of every tensor that must be there, such as "vocab rank". There may be others;
            floats must be finite in all of them.
        settings: names that must be there.

    Returns:
        The tensors, on the CPU and mapped from the file, so that they may be larger than the memory, and the settings.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, of another kind or of a newer format, or something in it is missing, of another
            number of dimensions, or not finite.
    """
    described_at, data_at = Path(folder, f"{kind}.json"), Path(folder, f"{kind}.safetensors")
    _check_there(described_at, kind)
    described = _described(described_at, kind)
    found = described["settings"]
    if (hidden := _hidden(data_at, str(described["sha256"]))).is_file():
        data_at = hidden
    _check_there(data_at, kind)
    if _checksum(data_at, found) != described["sha256"]:
        raise ValueError(
            f"{folder} is damaged: settings and tensors of the saved {kind} do not have the checksum that was written "
            "with them; save it again"
        )
    try:
        with safe_open(data_at, framework="pt") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{data_at} is no safetensors file: {error}") from error
    if missing := sorted({*tensors, *settings} - {*loaded, *found}):
        raise ValueError(f"{folder} holds a {kind} without {', '.join(missing)}; save it again")
    for name, tensor in loaded.items():
        _check_tensor(f"{data_at}: {name}", tensor, tensors.get(name))
    return loaded, found


def _check_there(path: Path, kind: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no saved {kind}: {path.name} is missing")


def _described(path: Path, kind: str) -> dict[str, Any]:
    try:
        described: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no json ({error})") from error
    is_ours = isinstance(described, dict) and {"kind", "format", "settings", "sha256"} <= described.keys()
    if not is_ours or not isinstance(described["settings"], dict):
        raise ValueError(f"{path} is damaged: kind, format, settings and sha256 are expected in it")
    if described["kind"] != kind:
        raise ValueError(f"{path} describes a {described['kind']!r}, expected a {kind!r}")
    if described["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {described['format']!r}, this version reads {FORMAT}: upgrade hf_longtrunc, or save "
            "it again"
        )
    return dict(described)


def _check_tensor(name: str, tensor: Tensor, shape: str | None) -> None:
    if shape is not None and tensor.ndim != len(shape.split()):
        raise ValueError(f"{name} must have the dimensions [{shape}], got {list(tensor.shape)}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")


def _checksum(data_at: Path, settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    with data_at.open("rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def _hidden(data_at: Path, checksum: str) -> Path:
    return data_at.with_name(f".{checksum[:_DIGITS]}.{data_at.name}")
