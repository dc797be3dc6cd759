"""Files written so that a process killed at any moment leaves the old content or the new, whole.

A writer fills a file in a hidden folder next to its destination, syncs it to the disk and renames it. It holds a lock
on the hidden folder, which ends with the process, so that the next writer removes hidden folders of killed ones.
Windows and network disks have no such locks: hidden folders of killed processes stay there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

FORMAT = 2
_KEY = "hf_longtrunc"
_NEW = 10.0  # seconds: its writer may not hold it yet


def save_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write tensors and settings (plain json values) as `<folder>/<kind>.safetensors`, in place of those saved before.

    The file's metadata hold kind, format, settings and a SHA-256 over settings and tensors.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    saved = {"kind": kind, "format": FORMAT, "settings": dict(settings), "sha256": _checksum(plain, settings)}
    with replacing(Path(folder, f"{kind}.safetensors")) as written:
        save_file(plain, written, {_KEY: json.dumps(saved)})


def load_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, str], settings: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and settings that `save_folder` wrote, the first on the CPU and mapped from the file.

    Args:
        folder: its path.
        kind: the kind it must have.
        tensors: name -> dimensions of each required tensor, such as "vocab rank". Others may be there.
        settings: names of the required settings.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, of another kind or format, or something in it is missing, of another number of
            dimensions, or not finite.
    """
    path = Path(folder, f"{kind}.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no saved {kind}: {path.name} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()[_KEY])
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        named, version, found, checksum = (saved[name] for name in ("kind", "format", "settings", "sha256"))
        is_whole = checksum == _checksum(loaded, found)
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or hf_longtrunc did not write it ({error!r}); save it again") from error
    if named != kind or version != FORMAT:
        raise ValueError(f"{path} has kind {named!r} and format {version!r}, expected {kind!r} and {FORMAT}")
    if not is_whole:
        raise ValueError(f"{path} is damaged: it does not have the checksum that was saved with it; save it again")
    if missing := sorted({*tensors, *settings} - {*loaded, *found}):
        raise ValueError(f"{folder} holds a {kind} without {', '.join(missing)}; save it again")
    for name, tensor in loaded.items():
        if name in tensors and tensor.ndim != len(tensors[name].split()):
            raise ValueError(f"{path}: {name} must have the dimensions [{tensors[name]}], got {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} must be finite, got NaN or infinite entries")
    return loaded, found


def _checksum(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- files -------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden path, with the suffix of `path`, for a file that replaces `path` unless there is an exception."""
    with _partial(path) as written:
        yield written
        _place(written, path)


@contextmanager
def placing(first: Path, second: Path) -> Iterator[tuple[Path, Path]]:
    """Give hidden paths for two new files, which get their names in this order; nothing is overwritten.

    Raises:
        FileExistsError: one of the files exists, before or after the writing.
    """
    for path in (first, second):
        if path.exists():
            raise FileExistsError(f"{path} exists: write to another path, or delete it first")
    with _partial(first) as one, _partial(second) as two:
        yield one, two
        try:
            first.touch(exist_ok=False)  # succeeds for one of several writers
        except FileExistsError:
            raise FileExistsError(f"{first} exists: another process wrote it; write to another path") from None
        _place(one, first)
        _place(two, second)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder, so that `abandoned` does not name it."""
    handle = _locked(path, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def abandoned(folder: Path, pattern: str) -> set[Path]:
    """Return the files and folders whose writers have ended; none where there are no locks."""
    found = set()
    for path in folder.glob(pattern):
        if (handle := _locked(path, wait=False)) is not None:
            if time.time() - os.fstat(handle).st_mtime > _NEW:
                found.add(path)
            os.close(handle)
    return found


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    for left in abandoned(path.parent, ".partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    hidden = path.parent / f".partial-{secrets.token_hex(4)}"
    hidden.mkdir(parents=True)
    try:
        with held(hidden):
            yield hidden / path.name
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _place(written: Path, path: Path) -> None:
    with written.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(written, path)


def _locked(path: Path, *, wait: bool) -> int | None:
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ModuleNotFoundError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another holds it, or the disk has no locks
        os.close(handle)
        return None
    return handle
