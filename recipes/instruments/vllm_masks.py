"""Kept sets of vLLM's requests, recorded: a logits processor of vLLM for `truncated_log_probs`.

vLLM's own `--return-sampling-mask` covers its own top-k and top-p and refuses custom logits processors; this processor
writes its kept sets itself, a file for each request.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_longtrunc import SamplingMask
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
    r"""`TruncationLogitsProcessor` that writes each step's kept set to a file if the request names one.

        HF_LONGTRUNC_MASKS=/dev/shm/masks PYTHONPATH=recipes vllm serve MODEL \
            --logits-processors instruments.vllm_masks:RecordingLogitsProcessor

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
