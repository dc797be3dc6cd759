"""Kept sets of vLLM's requests, recorded: a logits processor for `truncated_log_probs`, and its check in a real vLLM.

    HF_LONGTRUNC_MASKS=/dev/shm/masks PYTHONPATH=recipes vllm serve MODEL \
        --logits-processors vllm_masks:RecordingLogitsProcessor          # in a checkout
    engine/bin/python recipes/vllm_masks.py        # the check, where vLLM, its torch and hf_longtrunc are installed

vLLM's own `--return-sampling-mask` covers its own top-k and top-p and refuses custom logits processors; this processor
writes its kept sets itself, a file for each request.

The check serves a random Llama of 49,152 tokens by vLLM's own engine, 64 requests at a time; each names samplers and a
mask. A subclass notes, row by row, the kept sets of hf_longtrunc's processors for transformers on the same logits.
Afterwards `read_mask` is compared with these, and the drawn tokens with the masks.

Cost: five minutes on two CPU cores, half of it the engine's start.
Expect: 0 rows that differ, 0 tokens outside of their mask.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hf_longtrunc import SamplingMask, sampler_by_name
from hf_longtrunc.arguments import check_int
from hf_longtrunc.serving.rows import parse_request
from hf_longtrunc.serving.vllm import TruncationLogitsProcessor

FOLDER = "HF_LONGTRUNC_MASKS"
_KEY = "sampling_mask"
_NAME = re.compile(r"\w[\w.-]{0,127}")  # a file in the folder, and nowhere else
_HEAD = struct.Struct("<iii")  # new token's number, vocabulary, bytes that follow
# What vLLM applies behind custom processors, each with the values at which it does nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
}


class RecordingLogitsProcessor(TruncationLogitsProcessor):
    """`TruncationLogitsProcessor` that writes each step's kept set to a file if the request names one.

    A request says `"vllm_xargs": {"eta": 2e-3, "sampling_mask": "rollout-17"}`; then
    `read_mask("/dev/shm/masks/rollout-17", len(token_ids))` is the mask of its tokens. The name is a plain file name,
    new for each request. vLLM's own top-p, top-k, min-p and penalties run later and are refused with a mask.

    Cost: that of `SamplingMask.from_kept`, V / 8 bytes to the host and one append to a file, a row and step.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        super().__init__(vllm_config, device, is_pin_memory)
        self._prompt_lengths: Any = getattr(device, "prompt_len", None)  # by slot (V2, whose second argument has them)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError where a request's arguments are wrong, before it enters the batch."""
        super().validate_params(sampling_params)
        name = _name(sampling_params)
        if name is None:
            return
        folder = os.environ.get(FOLDER)
        if not folder or not Path(folder).is_dir():
            raise ValueError(f"{_KEY} needs a folder: start the server with {FOLDER} set to one that exists")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{_KEY} must be a file name of letters, digits, '_', '-' and '.', got {name!r}")
        if Path(folder, name).exists():
            raise ValueError(f"{_KEY} {name!r} is taken: give each request a name of its own")
        asked = parse_request(sampling_params.extra_args)
        if not asked or "dry" in asked:
            raise ValueError(
                f"{_KEY} records eta, epsilon and the other samplers that cut: name one, and leave DRY off"
            )
        for other, values in _NEUTRAL.items():
            if (value := getattr(sampling_params, other, None)) is not None and value not in values:
                raise ValueError(
                    f"{_KEY} cannot see {other}={value}, which vLLM applies later: leave it at {values[0]}"
                )

    def _wanted(self, params: Any) -> dict[str, Any]:
        asked, name = super()._wanted(params), _name(params)
        return {**asked, _KEY: Path(os.environ[FOLDER], str(name))} if asked and name is not None else asked

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Return `logits` [rows, V], cut in each row by what its request asks, and write down what was left."""
        result = super().apply(logits, context)
        slots = range(len(logits)) if context is None else context.expanded_idx_mapping.tolist()
        requests = [self._requests.get(slot, ({}, [], [])) for slot in slots]
        rows = [row for row, (asked, *_) in enumerate(requests) if _KEY in asked]
        if rows:
            mask = SamplingMask.from_kept(result[rows] > -torch.inf)
            for place, row in enumerate(rows):
                asked, _, output = requests[row]
                # Which new token the row is for; below 0 in the middle of a prompt, whose draw the engine drops.
                number = len(output)
                if context is not None:
                    number = int(context.pos[row]) + 1 - int(self._prompt_lengths.np[slots[row]])
                _append(asked[_KEY], number, mask[place : place + 1])
        return result


def read_mask(path: str | os.PathLike[str], num_tokens: int) -> SamplingMask:
    """Return the mask of a request's `num_tokens` tokens from the file that it named.

    Where the engine ran a step again or one too many (chunked prompts, preemption, asynchronous scheduling), the last
    record of each token counts.

    Raises:
        OSError: no such file.
        ValueError: a token was not recorded, or the file is damaged.
    """
    num_tokens = check_int("num_tokens", num_tokens, minimum=1)
    data, steps, sizes, place = Path(path).read_bytes(), {}, set(), 0
    while place < len(data):
        if len(data) < place + _HEAD.size or len(data) < place + _HEAD.size + _HEAD.unpack_from(data, place)[2]:
            raise ValueError(f"{path} ends in the middle of a record: it is damaged, or was read while it was written")
        number, vocab_size, size = _HEAD.unpack_from(data, place)
        place += _HEAD.size + size
        steps[number] = data[place - size : place]
        sizes.add(vocab_size)
    if missing := sorted(set(range(num_tokens)) - set(steps)):
        raise ValueError(
            f"{path} has no record of new token {missing[0]} of {num_tokens}: read it once the text is back"
        )
    chosen = [steps[number] for number in range(num_tokens)]
    offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
    return SamplingMask(sizes.pop(), offsets, np.frombuffer(b"".join(chosen), np.uint8))


def _append(path: Path, number: int, step: SamplingMask) -> None:
    with open(path, "ab") as file:
        file.write(_HEAD.pack(number, step.vocab_size, step.data.size) + step.data.tobytes())


def _name(params: Any) -> object:
    """Return the name that a request asks its mask to be recorded under."""
    return (getattr(params, "extra_args", None) or {}).get(_KEY)


# -- the check ---------------------------------------------------------------------------------------------------------

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
