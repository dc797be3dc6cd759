"""Kept sets recorded in a real vLLM, compared with the processors'; and log-probabilities taken from them.

    engine/bin/python recipes/vllm_masks.py        # where vLLM, its torch and hf_longtrunc are installed

A random Llama of 49,152 tokens is served by vLLM's own engine, 64 requests at a time; each names samplers and a mask. A
subclass notes, row by row, the kept sets of hf_longtrunc's processors for transformers on the same logits. Afterwards
`read_mask` is compared with these, and the drawn tokens with the masks.

Cost: five minutes on two CPU cores, half of it the engine's start.
Expect: 0 rows that differ, 0 tokens outside of their mask.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hf_longtrunc import sampler_by_name
from instruments.vllm_masks import FOLDER, RecordingLogitsProcessor, read_mask

ASKED: list[dict[str, float]] = [
    {"eta": 2e-3},
    {"eta": 0.02},
    {"epsilon": 9e-4},
    {"top_n_sigma": 1.0},
    {"p_less": 1},
    {"p_less_norm": 1},
    {"top_h": 0.4},
    {"min_k": 3.0},
    {"eta": 1e-3, "top_n_sigma": 2.0},
]


class Checker(RecordingLogitsProcessor):
    """Notes what this package's processors for transformers keep of each recorded row."""

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Return what the processor returns."""
        for row in range(len(logits)):
            asked, _, outputs = self._requests.get(row, ({}, [], []))
            if "sampling_mask" in asked:
                scores = logits[row : row + 1].clone()
                path = asked["sampling_mask"]
                for name in [each for each in asked if each != "sampling_mask"]:
                    scores = sampler_by_name(name, None if name.startswith("p_less") else asked[name])(None, scores)
                kept = (scores[0] > -torch.inf).nonzero()[:, 0].numpy().astype(np.int32)
                np.save(path.parent / "expected" / f"{path.name}-{len(outputs)}.npy", kept)
        return super().apply(logits, context)


def main(
    requests: Annotated[int, typer.Option(help="Each with a sampler and a mask of its own.")] = 160,
    new_tokens: Annotated[int, typer.Option(min=8, help="Of each request, less up to seven.")] = 68,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        masks, model = Path(scratch, "masks"), Path(scratch, "model")
        (masks / "expected").mkdir(parents=True)
        export(model)
        os.environ |= {FOLDER: str(masks), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        check(masks, generate(model, requests, new_tokens))


def export(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.35,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def generate(model: Path, requests: int, new_tokens: int) -> dict[str, list[int]]:
    """Return the tokens of each request by the name of its mask."""
    from vllm import LLM, SamplingParams, __version__

    engine = LLM(
        str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=192, max_num_seqs=64,
        max_num_batched_tokens=256, logits_processors=[Checker],
    )  # fmt: skip
    names = [f"rollout-{n}" for n in range(requests)]
    prompts: list[Any] = [{"prompt_token_ids": [1, *range(10, 10 + n % 40)]} for n in range(requests)]
    params = [
        SamplingParams(
            temperature=1.0, top_k=-1, max_tokens=new_tokens - n % 8, detokenize=False,
            extra_args={**ASKED[n % len(ASKED)], "sampling_mask": name},
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    outputs = engine.generate(prompts, params, use_tqdm=False)
    print(f"vLLM {__version__}: {requests} requests, 64 at a time")
    return {name: list(output.outputs[0].token_ids) for name, output in zip(names, outputs, strict=True)}


def check(folder: Path, drawn: dict[str, list[int]]) -> None:
    rows = others = outside = memory = 0
    sizes = []
    for name, tokens in drawn.items():
        mask = read_mask(folder / name, len(tokens))
        memory += len(mask.data)
        for number, (kept, token) in enumerate(zip(mask.kept(), tokens, strict=True)):
            expected = torch.from_numpy(np.load(folder / "expected" / f"{name}-{number}.npy")).long()
            rows += 1
            others += not torch.equal(kept.nonzero()[:, 0], expected)
            outside += not kept[token]
            sizes.append(len(expected))
    print(f"masks other than the processors' kept sets: {others} of {rows:,} rows")
    print(f"tokens drawn outside of their mask: {outside} of {rows:,}")
    print(f"tokens kept: {min(sizes):,} to {max(sizes):,} of 49,152; {memory / rows:.0f} bytes a token")


if __name__ == "__main__":
    typer.run(main)
