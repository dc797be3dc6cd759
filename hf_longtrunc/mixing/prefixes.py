"""Finds the cached rows that share a prefix with new rows: a KV cache addressed by content, in pure torch.

Keys and values of a column depend only on the ids and the mask up to that column. So a cached row serves any new row
with the same ids under the same mask: permuted beams, refused drafts, a second call, another batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int


class Prefix(NamedTuple):
    """The first `length` columns of the new rows equal those of cached rows `rows` [new rows]; None: of their own."""

    length: int
    rows: Tensor | None


def common_prefix(cached: Int[Tensor, "old length"], new: Int[Tensor, "new columns"]) -> Prefix:
    """Find for each new row the cached row with the longest common prefix, its own among equals; see `address`.

    Cost: new x columns comparisons when every row continues itself, new x old x columns otherwise; one host sync.
    """
    columns = min(cached.shape[1], new.shape[1])
    old, rows = cached[:, :columns], new[:, :columns]
    if old.shape == rows.shape:
        own = _shared_columns(old, rows)
        if (length := int(own.min())) == columns:
            return Prefix(length, None)
    shared = torch.stack([_shared_columns(old, row) for row in rows])  # [new, old]
    # Doubled, so that half a column decides between equals.
    best = (2 * shared + torch.eye(*shared.shape, dtype=shared.dtype, device=shared.device)).max(-1)
    return Prefix(int(best.values.min()) // 2, best.indices)


def address(input_ids: Int[Tensor, "rows columns"], mask: Int[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return one number a column: the id of a real token, -1 - id of a masked one."""
    return torch.where(mask.bool(), input_ids, -1 - input_ids)


def _shared_columns(left: Tensor, right: Tensor) -> Tensor:
    # [..., columns] twice, broadcast -> how many leading columns are equal [...]
    return (left == right).cumprod(-1).sum(-1)
