"""Positions counted from each row's first real token, and the checks that make such a count possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def from_first_token(columns: Tensor, padding: Tensor | None) -> Tensor:
    """Return columns [n] less each row's left padding [batch], as positions [batch, n]; [1, n] without padding."""
    return columns[None] if padding is None else columns - padding.to(columns.device)[:, None]


def checked_mask(mask: Any, length: int) -> Tensor | None:
    """Return `attention_mask` if it is a mask [batch, length], None if it is None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must be a tensor [batch, tokens] of ones and zeros on a model patched by LMInfinite, which "
            f"makes its own mask; got {got}"
        )
    if mask.shape[1] != length:
        raise ValueError(
            f"attention_mask must cover the {length} tokens seen so far and now, got {mask.shape[1]} columns"
        )
    return mask


def left_padding(mask: Tensor | None, new: int) -> Tensor | None:
    """Return the columns before each row's first real token [batch]; None where it is cheap to know there are none.

    A row that has no real token yet counts as all padding.

    Raises:
        ValueError: there are zeros between real tokens; looked for when `new`, the number of tokens, is more than one.
    """
    if mask is None:
        return None
    real = mask.bool()
    if new > 1:
        starts = real[:, 0].int() + (real[:, 1:] & ~real[:, :-1]).sum(-1)
        if bool((starts > 1).any()):
            raise ValueError(
                "attention_mask has zeros between real tokens: LMInfinite counts distances in columns from a row's "
                "first token, so pad on the left alone and drop what was padded in between"
            )
        if bool(real[:, 0].all()):
            return None
    return torch.where(real.any(-1), real.int().argmax(-1), mask.shape[1])


def check_end(mask: Any) -> None:
    """Refuse a mask [batch, tokens] that ends in padding where a text is about to be continued."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask ends in zeros, and generate() goes on behind them: pad on the left, "
            "tokenizer.padding_side = 'left'"
        )


def check_positions(position_ids: Any, mask: Tensor | None, new: int) -> None:
    """Refuse position_ids [..., new] that do not count up by one over real tokens."""
    if position_ids is None or new == 1:
        return
    is_step = (position_ids[..., 1:] - position_ids[..., :-1]) == 1
    if mask is not None:
        real = mask[:, -new:].bool()
        is_step = is_step | ~(real[:, 1:] & real[:, :-1])
    if not bool(is_step.all()):
        raise ValueError(
            "position_ids must count up by one within a row on a model patched by LMInfinite, which counts distances "
            "in tokens: packed rows and position_ids that jump (CREAM) cannot be combined with it"
        )


def first_real(states: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return states [batch, heads, m, dim] at each row's positions 0..count-1, or at as many as there are."""
    count = min(count, states.shape[2])
    if positions.shape[0] == 1:
        return states[:, :, :count]
    columns = torch.arange(count, device=states.device) - positions[:, :1]
    index = columns.clamp_max(states.shape[2] - 1)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
