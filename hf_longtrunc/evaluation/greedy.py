"""Greedy decoding of one prompt."""

from __future__ import annotations

from typing import Any

import torch


def greedy_answer(model: Any, ids: list[int], max_new_tokens: int) -> torch.Tensor:
    """Return the token ids [n] that `model` generates greedily after a prompt, whatever its generation config samples.

    Of an encoder-decoder that is all that its decoder says, its start token included.
    """
    prompt = torch.tensor([ids], device=model.device)
    greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, **greedy)
    answer: torch.Tensor = output[0] if model.config.is_encoder_decoder else output[0, len(ids) :]
    return answer
