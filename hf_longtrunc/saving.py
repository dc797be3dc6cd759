"""Write files so that a process killed at any moment leaves the old content or the new content, complete.

A writer fills a file in a hidden folder next to the destination, syncs it to the disk and renames it. It locks the
hidden folder. The lock ends with the process, so the next writer can delete the hidden folders of killed writers.
Windows and network disks have no such locks: there, hidden folders of killed writers stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import ExitStack, contextmanager
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
_NEW = 10.0  # seconds: the writer of a younger folder may not have locked it yet


def save_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write tensors and settings (plain JSON values) to `<folder>/<kind>.safetensors`, replacing an earlier file.

    The metadata hold kind, format, settings and a SHA-256 of settings and tensors.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    saved = {"kind": kind, "format": FORMAT, "settings": dict(settings), "sha256": _checksum(plain, settings)}
    with replacing(Path(folder, f"{kind}.safetensors")) as written:
        save_file(plain, written, {_KEY: json.dumps(saved)})


def load_folder(
    folder: str | os.PathLike[str], kind: str, tensors: Mapping[str, str], settings: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors (on the CPU, mapped from the file) and settings that `save_folder` wrote.

    Args:
        folder: where `save_folder` wrote.
        kind: the expected kind.
        tensors: name -> dimensions of each required tensor, such as "vocab rank".
        settings: names of the required settings.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or of another kind or format; a tensor or setting is missing; a tensor has
            another number of dimensions or is not finite.
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


@contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a path for a new file, which gets the name `path` at the end of the block, unless the block raises.

    Raises:
        FileExistsError: `overwrite` is False, and the file exists before or after the block.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "notes.txt")
        >>> with replacing(path) as written:
        ...     _ = written.write_text("new")
        >>> path.read_text()
        'new'
    """
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists: write to another path, or delete it first")
    with hidden_folder(path.parent) as hidden:
        yield hidden / path.name
        move_synced(hidden / path.name, path, overwrite=overwrite)


@contextmanager
def hidden_folder(parent: Path) -> Iterator[Path]:
    """Make a hidden folder for unfinished files, deleted at the end of the block or by the next writer in `parent`."""
    for left in parent.glob(".partial-*"):
        with locked(left, wait=False) as handle:
            if handle is not None and time.time() - os.fstat(handle).st_mtime > _NEW:
                shutil.rmtree(left, ignore_errors=True)
    hidden = parent / f".partial-{secrets.token_hex(4)}"
    hidden.mkdir(parents=True)
    try:
        with locked(hidden):
            yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def move_synced(written: Path, path: Path, *, overwrite: bool = True) -> None:
    """Give a file its name after its content is on the disk; FileExistsError if the name is taken."""
    with written.open("r+b") as file:
        os.fsync(file.fileno())
    if overwrite:
        os.replace(written, path)
        return
    try:
        os.link(written, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: another process wrote it; write to another path") from None
    except OSError:  # a disk without hard links
        path.touch(exist_ok=False)
        os.replace(written, path)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Lock a file or folder and give its handle; None if it is gone, held by another process, or there are no locks."""
    handle = None
    with ExitStack() as stack:
        try:
            import fcntl

            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (ModuleNotFoundError, OSError):
            handle = None
        yield handle
