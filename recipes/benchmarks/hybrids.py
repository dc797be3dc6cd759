"""The cost of resetting the states of a hybrid: a training step on packed rows, leaking, reset, and padded.

    python recipes/benchmarks/hybrids.py                   # one CPU core: transformers' own PyTorch code
    python recipes/benchmarks/hybrids.py --device cuda     # with causal-conv1d, mamba-ssm and flash-linear-attention

The same documents (lognormal lengths, median 90 tokens) as rows of 512: packed as they are, which leaks between
documents; packed inside `reset_states`; and one document a row, padded to the longest. Seconds (of the CPU, on a CPU)
are the fastest of the turns, forward and backward. On a GPU the flat layout is timed too, with kernels that read
`seq_idx`, and with the verdict of `check_packed`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from hf_longtrunc import BestFitPackingCollator, check_packed, pack, reset_states

SEQ_LENGTH = 512
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
                         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 1.0, arguments.documents), 4, SEQ_LENGTH).astype(int)
    documents = [{"input_ids": rng.integers(3, 512, length)} for length in lengths]
    table = Table(title=f"a training step on {lengths.sum():,} tokens, seconds", title_justify="left")
    for heading in ("", "packed, leaking", "packed, reset", "padded", "reset / leaking", "padded / reset", "flat"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, model in models().items():
        model.to(arguments.device).train()
        leaking, reset, padded = seconds(model, documents, arguments.turns)
        ratios = f"{reset / leaking:.2f}x", f"{padded / reset:.2f}x"
        table.add_row(name, *(f"{each:.3f}" for each in (leaking, reset, padded)), *ratios, flat(model, documents))
    Console(width=110).print(table)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    lfm2 = Lfm2Config(**SMALL, layer_types=["conv", "full_attention"] * 2)
    linear = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    heads: dict[str, Any] = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
             "linear_value_head_dim": 32}  # fmt: skip
    qwen = Qwen3NextConfig(
        **SMALL, **heads, head_dim=32, layer_types=linear, num_experts=0, mlp_only_layers=[0, 1, 2, 3]
    )
    bamba = BambaConfig(**SMALL, attn_layer_indices=[3], mamba_n_heads=4, mamba_d_head=64, mamba_d_state=32)
    return {
        "LFM2, convolutions": Lfm2ForCausalLM(lfm2),
        "Qwen3-Next, linear attention": Qwen3NextForCausalLM(qwen),
        "Bamba, Mamba 2": BambaForCausalLM(bamba),
    }


def seconds(model: Any, documents: list[dict[str, Any]], turns: int) -> list[float]:
    """Return the fastest step of each of the three ways, taken in turns."""
    packed = BestFitPackingCollator(SEQ_LENGTH)(list(pack(documents, SEQ_LENGTH)))
    longest = max(len(document["input_ids"]) for document in documents)
    rows = [{**document, "position_ids": np.arange(len(document["input_ids"]))} for document in documents]
    padded = BestFitPackingCollator(longest)(rows)
    ways: tuple[tuple[dict[str, Any], Any], ...] = (
        (packed, nullcontext),
        (packed, lambda: reset_states(model)),
        (padded, nullcontext),
    )
    fastest = [float("inf")] * len(ways)
    for _ in range(turns):
        for index, (batch, context) in enumerate(ways):
            moved = {name: value.to(model.device) for name, value in batch.items()}
            with context():
                since = time.process_time() if model.device.type == "cpu" else time.perf_counter()
                model(**moved, use_cache=False).loss.backward()
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                until = time.process_time() if model.device.type == "cpu" else time.perf_counter()
            fastest[index] = min(fastest[index], until - since)
    return fastest


def flat(model: Any, documents: list[dict[str, Any]]) -> str:
    """Return the verdict of `check_packed` for the flat layout; nothing on a CPU."""
    if model.device.type == "cpu":
        return "needs a GPU"
    batch = BestFitPackingCollator(SEQ_LENGTH, layout="flat")(list(pack(documents, SEQ_LENGTH)))
    moved = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
    try:
        check_packed(model, {**moved, "use_cache": False})
    except ValueError as error:
        return str(error).split(".")[0][:60]
    return "apart"


if __name__ == "__main__":
    main()
