"""Positions counted from each row's first real token, for any padding mask, and the checks that this count needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowShift(NamedTuple):
    """How a row's cached tokens move when masked columns lie between them and its new tokens."""

    truncated: Tensor  # each row's last tokens that the mask has since turned to padding [batch]
    shift: Tensor  # columns by which the remaining tokens move right, to end where the new tokens begin [batch]
    leading: Tensor  # each row's new columns that old tokens then fill [batch]
    order: Tensor | None  # the new columns of each row, masked ones first [batch, n]; None if they come in that order


class PaddingState(NamedTuple):
    """How the columns that a cache has seen map to positions.

    A row's tokens are kept as its last columns, so column c holds position c - padding; below 0 it holds no token.
    """

    padding: Tensor | None = None  # masked columns of each row [batch]; None: no row has any
    max_padding: int = 0  # the largest of them
    gaps: Tensor | None = None  # those of them after the row's first token [batch]
    trailing: Tensor | None = None  # those after the row's last token [batch] when `ended` columns were seen
    ended: int = 0  # columns seen when masked ones last came; all since hold tokens
    floor: int = 0  # a cache cannot be cropped below so many columns: shifts before it cannot be undone

    def map(self, change: Any) -> PaddingState:
        """Return the state with `change` (repeat, select, reorder) applied to its rows."""
        tensors = (None if rows is None else change(rows) for rows in (self.padding, self.gaps, self.trailing))
        padding, gaps, trailing = tensors
        return self._replace(padding=padding, gaps=gaps, trailing=trailing)

    def append(self, real: Tensor | None, past: int, new: int) -> tuple[PaddingState, RowShift | None]:
        """Return the state after `new` more columns, and the shift that they require; None where nothing moves.

        `real` [batch, past + new] says where there are tokens; None where all new columns hold one.

        Raises:
            ValueError: the mask of past columns changed in another way than that rows now end earlier.
        """
        if real is None or self._all_real(real, past):
            return self, None
        before, now = real[:, :past], real[:, past:]
        zero = torch.zeros(len(real), dtype=torch.long, device=real.device)
        padding, gaps, trailing = (
            zero if rows is None else rows.to(real.device) for rows in (self.padding, self.gaps, self.trailing)
        )
        masked, since = left_padding(before.flip(-1)), past - self.ended
        truncated = torch.where(masked < since, masked, masked - trailing)
        truncated = torch.where(before.any(-1), truncated, past - padding)
        is_as_it_was = (truncated >= 0) & (before.sum(-1) == past - padding - truncated)
        is_as_it_was &= (left_padding(before) == padding - gaps) | ~before.any(-1)
        if not bool(is_as_it_was.all()):
            raise ValueError(
                "attention_mask was changed for tokens that were seen already: only columns at the end of a row, "
                "after its answer, may turn to 0 between turns. Start anew with the whole text"
            )
        missing, leading = new - now.sum(-1), left_padding(now)
        behind = torch.where(now.any(-1), left_padding(now.flip(-1)), masked + new)
        is_sorted = bool((missing == leading).all())
        shift = truncated + missing
        has_begun = padding + truncated < past
        after = padding + shift
        gaps = torch.where(has_begun, gaps + shift, torch.where(now.any(-1), missing - leading, 0))
        result = PaddingState(
            after if bool(after.any()) else None,
            int(after.max()),
            gaps if bool(gaps.any()) else None,
            behind if bool((behind * (after < past + new)).any()) else None,
            past + new,
            self.floor,
        )
        shift = torch.where(has_begun, shift, 0)
        if is_sorted and not bool(shift.any()):
            return result, None  # padding on the left alone
        order = None if is_sorted else now.int().argsort(dim=-1, stable=True)
        floor = past + min(new, int(missing.max()) + 1) if is_sorted else past + new
        return result._replace(floor=floor), RowShift(truncated, shift, missing, order)

    def _all_real(self, real: Tensor, past: int) -> bool:
        """Return whether all new columns hold a token and the old ones are unchanged, where that is cheap to know."""
        if torch.compiler.is_compiling() and past:  # a graph cannot look
            return True
        if self.padding is not None and real.shape[1] - past > 1:
            return False
        expected = real.shape[1] - (0 if self.padding is None else self.padding.to(real.device))
        return bool((real.sum(-1) == expected).all())


def positions_of(columns: Tensor, padding: Tensor | None) -> Tensor:
    """Return columns [n] less each row's padding [batch], as positions [batch, n]; [1, n] without padding."""
    return columns[None] if padding is None else columns - padding.to(columns.device)[:, None]


def check_mask(mask: Any, length: int) -> Tensor | None:
    """Return `attention_mask` as booleans if it is a mask [batch, length], None if it is None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must be a tensor [batch, tokens] of ones and zeros on a patched model, which makes its own "
            f"mask; got {got}"
        )
    if mask.shape[1] != length:
        raise ValueError(
            f"attention_mask must cover the {length} tokens seen so far and now, got {mask.shape[1]} columns"
        )
    return mask.bool()


def left_padding(real: Tensor) -> Tensor:
    """Return the columns before each row's first real token [batch], of real [batch, m]; m where there is none."""
    return (real.cumsum(-1) == 0).sum(-1)


def text_order(real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the padding of each row [batch] of a whole text, and the order of its columns, those of no token first.

    The padding is None where there is none, the order where all padding is on the left.
    """
    if real is None:
        return None, None
    if torch.compiler.is_compiling():  # a graph cannot look
        return left_padding(real), None
    if bool(real.all()):
        return None, None
    padding = real.shape[1] - real.sum(-1)
    is_sorted = bool((left_padding(real) == padding).all())
    return padding, None if is_sorted else real.int().argsort(dim=-1, stable=True)


def check_padding(mask: Any) -> None:
    """Refuse a mask [batch, tokens] that ends in padding where a text is about to be continued."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask ends in zeros, and generate() continues after them: pad on the left, "
            "tokenizer.padding_side = 'left'"
        )


def check_positions(position_ids: Any, real: Tensor | None, past: int, new: int) -> None:
    """Refuse position_ids [..., new] that do not count up by one over real tokens, or do not go on from `past` columns.

    In three or four rows [rows, batch, new], as multimodal models count in time, height and width, they must agree.
    Position 0 is a row's first column or its first real token.
    """
    if position_ids is None or (torch.compiler.is_compiling() and new == 1):  # a graph cannot look
        return
    is_step = (position_ids[..., 1:] - position_ids[..., :-1]) == 1
    if position_ids.ndim == 3:
        is_step = is_step & (position_ids == position_ids[:1])[..., 1:]
    if real is not None:
        now = real[:, -new:]
        is_step = is_step | ~(now[:, 1:] & now[:, :-1])
    does_continue = torch.ones((), dtype=torch.bool)
    if past:
        first = position_ids[..., 0]
        counted = past if real is None else real[:, :past].sum(-1).to(first.device)
        does_continue = (first == past) | (first == counted)
        if real is not None:
            does_continue = does_continue | ~real[:, past].to(first.device)
    if bool(is_step.all()) and bool(does_continue.all()):
        return
    if past and new > 1 and bool((position_ids[..., 0] == 0).all()):
        raise ValueError(
            f"this forward brings the text from its first token on, and the cache holds {past} tokens of it already: "
            "transformers' assisted decoding so feeds a cache that it is given a second time. Leave the cache out, or "
            "generate without drafts (prompt_lookup_num_tokens, assistant_model)"
        )
    raise ValueError(
        "position_ids must count up by one within a row, and go on from the tokens that the cache holds, on a patched "
        "model, which counts distances in tokens: packed rows, position_ids that jump (CREAM), and an image's or a "
        "video's that count in time, height and width (M-RoPE) cannot be combined with it. Leave position_ids out, or "
        "detach first"
    )


def first_real(states: Tensor, positions: Tensor, count: int, is_padded: bool) -> Tensor:
    """Return states [batch, heads, m, dim] at each row's positions 0..count-1, or at as many as there are."""
    count = min(count, states.shape[2])
    if not is_padded:
        return states[:, :, :count]
    columns = torch.arange(count, device=states.device) - positions[:, :1]
    return gather_columns(states, columns.clamp_max(states.shape[2] - 1))


def gather_columns(states: Tensor, columns: Tensor) -> Tensor:
    """Return states [batch, heads, m, dim] at columns [batch, n], as [batch, heads, n, dim]."""
    index = columns.to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
