"""Write files so that a process killed at any moment leaves the old content or the new content, complete.

A writer fills a hidden file next to the destination, syncs it to the disk and renames it. A hidden file that nobody
wrote to for a day is that of a killed writer: the next writer in the folder deletes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from contextlib import contextmanager, suppress
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
_ABANDONED = 86_400.0  # seconds


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
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".partial-*"):
        with suppress(OSError):  # another writer was faster
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    written = path.parent / f".partial-{secrets.token_hex(4)}-{path.name}"
    try:
        yield written
        with written.open("r+b") as file:
            os.fsync(file.fileno())
        (os.replace if overwrite else _link)(written, path)
    finally:
        written.unlink(missing_ok=True)


def _link(written: Path, path: Path) -> None:
    """Give a file its name; FileExistsError if the name is taken."""
    try:
        os.link(written, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists: another process wrote it; write to another path") from None
    except OSError:  # a disk without hard links
        path.touch(exist_ok=False)
        os.replace(written, path)
