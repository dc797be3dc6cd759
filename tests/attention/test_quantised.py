"""Models that a library has quantised: attached, held to the definition on the same weights, and given back.

Each case is skipped where its library is not installed; `scripts/quantised` installs all of them. The definition runs
on the same quantised model, so that what is compared is attention alone.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_longtrunc import DualChunkAttention, LMInfinite, StreamingLLM

from .reference import Naive, Rope, install
from .test_dual_chunk_attention import CHUNK, TRAINED, NaiveChunks
from .tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

S, L = 2, 8
ROPE = Rope(16)
TECHNIQUES = {
    "lm-infinite": (LMInfinite(num_sink_tokens=S, window_length=L), Naive(S, L, L, ROPE)),
    "streaming": (StreamingLLM(num_sink_tokens=S, window_length=L), Naive(S, L, S + L - 1, ROPE, spacing=1)),
    "chunks": (DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED), NaiveChunks(0, 1, 1, ROPE)),
}


def load(folder: Path, config: Any = None) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def torchao(folder: Path, name: str) -> Any:
    config = getattr(importlib.import_module("torchao.quantization"), name)()
    return load(folder, TorchAoConfig(config))


def hqq(folder: Path) -> Any:
    """By the library itself: transformers 5.24 raises NotImplementedError for `HqqConfig`."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = load(folder)
    config = BaseQuantizeConfig(nbits=8, group_size=16)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


# By case: the library, its model, and how far rounded activations may move logits, relative to the largest.
CASES: dict[str, tuple[str, Callable[[Path], Any], float]] = {
    "torchao int8 weights": ("torchao", lambda folder: torchao(folder, "Int8WeightOnlyConfig"), 1e-4),
    "torchao W8A8": ("torchao", lambda folder: torchao(folder, "Int8DynamicActivationInt8WeightConfig"), 0.1),
    "bitsandbytes int8": ("bitsandbytes", lambda folder: load(folder, BitsAndBytesConfig(load_in_8bit=True)), 1e-4),
    "HQQ 8 bits": ("hqq", hqq, 1e-4),
    "quanto int8 weights": ("optimum.quanto", lambda folder: load(folder, QuantoConfig(weights="int8")), 1e-4),
}


def is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of which every linear layer is wide enough for all libraries."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("default")  # of these libraries
@pytest.mark.parametrize("name", TECHNIQUES)
@pytest.mark.parametrize("case", CASES)
def test_a_quantised_model_is_the_definition(folder, case, name):
    library, quantised, tolerance = CASES[case]
    if not is_installed(library):
        pytest.skip(f"{library} is not installed: pip install {library.replace('.', '-')}")
    model, defined = quantised(folder), quantised(folder)
    technique, naive = TECHNIQUES[name]
    ids = torch.randint(3, 90, (1, 30))
    with torch.inference_mode():
        before = model(ids).logits
        assert not torch.equal(before, load(folder)(ids).logits)  # it is quantised
        install(defined, naive, f"naive_quantised_{name}")
        expected = defined(ids, use_cache=False).logits.float()
        with technique(model):
            whole = model(ids).logits.float()
            answer = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model(ids).logits, before)
    scale = max(1.0, float(expected.abs().max()))
    difference = float((whole - expected).abs().max()) / scale
    assert difference < tolerance
    assert float((before.float() - expected)[:, -8:].abs().max()) > 0.2 * scale
    assert answer.shape[1] == 34
