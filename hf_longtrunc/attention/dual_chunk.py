r"""Dual chunk attention: every key is seen, and no distance is larger than what the model was trained on.

A model was trained on c positions. The text is cut into chunks of s < c tokens. With positions counted from a row's
first real token, key j stands at j mod s for good, and a query i meets it from

    i mod s                          in its own chunk: the true distance
    min(i mod s + s, c - 1)          in the chunk before: the true one as long as the trained positions last
    c - 1                            in all earlier chunks

in one softmax over all keys j <= i. So keys are cached as they are, whatever comes later, and a text of at most s
tokens is read as the model was trained to read it.

Each block of queries takes at most four kernel calls, whose outputs are joined: earlier chunks, the chunk before, its
own chunk before the block, and the block itself. No n x n tensor exists.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463, section 3;
the authors take s = 3c/4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_longtrunc.attention.joined import Part, joined_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Float, Int

    from hf_longtrunc.attention.joined import Sees

    Rotate = Callable[[Tensor, Tensor], Tensor]


def seen_from(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], chunk: int, trained: int
) -> Int[Tensor, "... n m"]:
    """Return the distance at which a query meets each key j <= i; the definition, n x m, for tests and pictures."""
    i, j = query_positions[..., :, None], key_positions[..., None, :]
    apart = i // chunk - j // chunk
    before = (i % chunk + chunk).clamp_max(trained - 1)
    query = torch.where(apart == 0, i % chunk, torch.where(apart == 1, before, trained - 1))
    return query - j % chunk


def dual_chunk_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    padding: Int[Tensor, " batch"] | None,
    *,
    chunk: int,
    trained: int,
    scaling: float,
    rotate: Rotate,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend from the last n of m tokens.

    Args:
        query: rotated at i mod s.
        key: rotated at j mod s, in the order of the text; the last n are the queries' own.
        value: of the keys.
        padding: columns before each row's first real token; None where there are none.
        chunk: s.
        trained: c, more than s.
        scaling: factor of the dot products.
        rotate: `rotate(x, steps)` turns x [batch, heads, n, dim] on by steps [rows, n] positions.

    Returns:
        [batch, heads, n, value_dim] in the dtype of `query`; zeros for padding. Rows of one padding go together: each
        other padding in the batch costs a pass of its own.
    """
    first = None if padding is None else padding.tolist()
    if first is None or len(set(first)) == 1:
        return _same_padding(query, key, value, first[0] if first else 0, chunk, trained, scaling, rotate)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for columns in sorted(set(first)):
        rows = torch.tensor([row for row, count in enumerate(first) if count == columns], device=query.device)
        q, k, v = (x.index_select(0, rows) for x in (query, key, value))
        output = output.index_copy(0, rows, _same_padding(q, k, v, columns, chunk, trained, scaling, rotate))
    return output


def _same_padding(
    query: Tensor, key: Tensor, value: Tensor, padding: int, chunk: int, trained: int, scaling: float, rotate: Rotate
) -> Tensor:
    """`dual_chunk_attention` of rows that all begin at column `padding`."""
    n, length = query.shape[2], key.shape[2] - padding
    blank = min(n, max(0, n - length))  # leading queries that are padding
    query, key, value = query[:, :, blank:], key[:, :, padding:], value[:, :, padding:]
    outputs = [query.new_zeros(*query.shape[:2], blank, value.shape[-1])] if blank else []
    begin = length - (n - blank)
    for start, stop in _blocks(begin, length, chunk):
        block = query[:, :, start - begin : stop - begin]
        parts = list(_parts(block, key, value, start, stop, chunk, trained, rotate))
        outputs.append(joined_attention(parts, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _blocks(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut positions start..stop where chunks begin."""
    while start < stop:
        end = min(stop, (start // chunk + 1) * chunk)
        yield start, end
        start = end


def _parts(
    query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, chunk: int, trained: int, rotate: Rotate
) -> Iterator[Part]:
    """Yield the kernel calls of queries start..stop, which lie in one chunk."""
    own = start - start % chunk
    before = max(0, own - chunk)
    inside = torch.arange(start - own, stop - own, device=query.device)[None]

    def part(first: int, last: int, turned: Tensor, sees: Sees = "all") -> Part:
        return Part(turned, key[:, :, first:last], value[:, :, first:last], sees)

    if before:
        yield part(0, before, rotate(query, trained - 1 - inside))
    if own:
        yield part(before, own, rotate(query, (inside + chunk).clamp_max(trained - 1) - inside))
    if own < start:
        yield part(own, start, query)
    yield part(start, stop, query, "up_to")
