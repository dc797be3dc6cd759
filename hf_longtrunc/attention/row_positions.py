"""Positions counted from each row's first real token, and the checks that make such a count possible."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """How the columns of a batch that were seen so far become positions.

    Attributes:
        padding: columns of each row that hold no token [batch]; None where no row has any. A row's tokens are kept as
            its last columns, so column c holds position c - padding, and a negative position holds nothing.
        max_padding: the largest of them.
        holes: how many of them lie behind the row's first token [batch]; None where none do.
        trailing: how many of them lay behind the row's last token [batch] when `ended` columns were seen; None: none.
        ended: the columns seen when masked ones last came; all since hold tokens.
        floor: the tokens that a cache must keep: what was moved up to there cannot be moved back.
    """

    padding: Tensor | None = None
    max_padding: int = 0
    holes: Tensor | None = None
    trailing: Tensor | None = None
    ended: int = 0
    floor: int = 0

    def map(self, change: Any) -> Rows:
        """Repeat, choose or reorder the rows."""
        tensors = (None if rows is None else change(rows) for rows in (self.padding, self.holes, self.trailing))
        padding, holes, trailing = tensors
        return self._replace(padding=padding, holes=holes, trailing=trailing)


class Moves(NamedTuple):
    """How new columns join the old ones, where masked columns stand between tokens.

    Attributes:
        taken_back: how many of each row's last tokens the mask has since declared to be none [batch].
        shift: by how many columns what remains moves to the right, to end where the row's new tokens begin [batch].
        leading: how many of each row's new columns are then filled by old tokens [batch].
        order: the new columns of each row, those without a token first [batch, n]; None if they are so already.
    """

    taken_back: Tensor
    shift: Tensor
    leading: Tensor
    order: Tensor | None


def from_first_token(columns: Tensor, padding: Tensor | None) -> Tensor:
    """Return columns [n] less each row's padding [batch], as positions [batch, n]; [1, n] without padding."""
    return columns[None] if padding is None else columns - padding.to(columns.device)[:, None]


def checked_mask(mask: Any, length: int) -> Tensor | None:
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


def joined(rows: Rows, real: Tensor | None, past: int, new: int) -> tuple[Rows, Moves | None]:
    """Return the rows after `new` columns more, and what must move for them; None where nothing must.

    Args:
        rows: of the `past` columns that were seen.
        real: where there are tokens [batch, past + new]; None where all new columns hold one.
        past: columns seen.
        new: columns to come.

    Raises:
        ValueError: the mask of the past is not what it was, other than that rows now end earlier.
    """
    if real is None or _goes_on(rows, real, past):
        return rows, None
    before, now = real[:, :past], real[:, past:]
    zero = torch.zeros(len(real), dtype=torch.long, device=real.device)
    padding = zero if rows.padding is None else rows.padding.to(real.device)
    holes = zero if rows.holes is None else rows.holes.to(real.device)
    trailing = zero if rows.trailing is None else rows.trailing.to(real.device)
    masked, since = left_padding(before.flip(-1)), past - rows.ended
    taken_back = torch.where(masked < since, masked, masked - trailing)
    taken_back = torch.where(before.any(-1), taken_back, past - padding)
    is_as_it_was = (taken_back >= 0) & (before.sum(-1) == past - padding - taken_back)
    is_as_it_was &= (left_padding(before) == padding - holes) | ~before.any(-1)
    if not bool(is_as_it_was.all()):
        raise ValueError(
            "attention_mask was changed for tokens that were seen already: only columns at the end of a row, behind "
            "its answer, may turn to 0 between turns. Start anew with the whole text"
        )
    missing, leading = new - now.sum(-1), left_padding(now)
    behind = torch.where(now.any(-1), left_padding(now.flip(-1)), masked + new)
    is_sorted = bool((missing == leading).all())
    shift = taken_back + missing
    has_begun = padding + taken_back < past
    after = padding + shift
    holes = torch.where(has_begun, holes + shift, torch.where(now.any(-1), missing - leading, 0))
    result = Rows(
        after if bool(after.any()) else None,
        int(after.max()),
        holes if bool(holes.any()) else None,
        behind if bool((behind * (after < past + new)).any()) else None,
        past + new,
        rows.floor,
    )
    shift = torch.where(has_begun, shift, 0)
    if is_sorted and not bool(shift.any()):
        return result, None  # padding on the left alone
    order = None if is_sorted else now.int().argsort(dim=-1, stable=True)
    floor = past + min(new, int(missing.max()) + 1) if is_sorted else past + new
    return result._replace(floor=floor), Moves(taken_back, shift, missing, order)


def _goes_on(rows: Rows, real: Tensor, past: int) -> bool:
    """Return whether all new columns hold a token and the old ones are as they were, where that is cheap to know."""
    if torch.compiler.is_compiling() and past:  # a graph cannot look
        return True
    if rows.padding is not None and real.shape[1] - past > 1:
        return False
    expected = real.shape[1] - (0 if rows.padding is None else rows.padding.to(real.device))
    return bool((real.sum(-1) == expected).all())


def text_order(real: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the padding of each row [batch] of a whole text, and the order of its columns, those of no token first.

    The padding is None where there is none, the order where all of it stands on the left.
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


def check_end(mask: Any) -> None:
    """Refuse a mask [batch, tokens] that ends in padding where a text is about to be continued."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask ends in zeros, and generate() goes on behind them: pad on the left, "
            "tokenizer.padding_side = 'left'"
        )


def check_positions(position_ids: Any, real: Tensor | None, new: int) -> None:
    """Refuse position_ids [..., new] that do not count up by one over real tokens.

    In three or four rows [rows, batch, new], as multimodal models count in time, height and width, they must agree.
    """
    if position_ids is None or new == 1:
        return
    is_step = (position_ids[..., 1:] - position_ids[..., :-1]) == 1
    if position_ids.ndim == 3:
        is_step = is_step & (position_ids == position_ids[:1])[..., 1:]
    if real is not None:
        now = real[:, -new:]
        is_step = is_step | ~(now[:, 1:] & now[:, :-1])
    if not bool(is_step.all()):
        raise ValueError(
            "position_ids must count up by one within a row on a patched model, which counts distances in "
            "tokens: packed rows, position_ids that jump (CREAM), and an image's or a video's that count in time, "
            "height and width (M-RoPE) cannot be combined with it"
        )


def first_real(states: Tensor, positions: Tensor, count: int, is_padded: bool) -> Tensor:
    """Return states [batch, heads, m, dim] at each row's positions 0..count-1, or at as many as there are."""
    count = min(count, states.shape[2])
    if not is_padded:
        return states[:, :, :count]
    columns = torch.arange(count, device=states.device) - positions[:, :1]
    return taken(states, columns.clamp_max(states.shape[2] - 1))


def taken(states: Tensor, columns: Tensor) -> Tensor:
    """Return states [batch, heads, m, dim] at columns [batch, n], as [batch, heads, n, dim]."""
    index = columns.to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
