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

Some keys may count for several (`Emphasis`): a key that counts for e is there once in these calls, and e - 1 times in
calls of their own, in the same softmax.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463, section 3;
the authors take s = 3c/4.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.joined import SCORED_AT_ONCE, Part, joined_attention, scored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int

    Rotate = Callable[[Tensor, Tensor], Tensor]


class Emphasis(NamedTuple):
    """Keys that count for several.

    Attributes:
        positions: of them [batch, k], each once, counted from a row's first real token; -1 for none.
        counts: how many keys each counts for [batch, k], more than 1.
    """

    positions: Tensor
    counts: Tensor


class Chunks(NamedTuple):
    """How a layer's positions are cut.

    Attributes:
        chunk: s.
        trained: c, more than s.
        scaling: factor of the dot products.
        rotate: `rotate(x, steps)` turns x [batch, heads, n, dim] on by steps [rows, n] positions.
    """

    chunk: int
    trained: int
    scaling: float
    rotate: Rotate


def sharpness(
    positions: Int[Tensor, "rows n"], trained: int, temperature: str, dtype: torch.dtype
) -> Float[Tensor, "rows n"]:
    """Return by how much the scores of queries past the trained positions are multiplied, 1 up to them.

    The more keys, the flatter a softmax of the same scores. "log" multiplies by log(i + 1) / log c, which keeps the
    entropy in step (Chiang and Cholak 2022, arXiv 2202.12172, section 5.3); "yarn" by (0.1 log((i + 1) / c) + 1)^2,
    what was fitted to Llamas on stretched positions (Peng et al. 2023, arXiv 2309.00071, equation 22, whose factor of
    extension is one number, here each query's own).
    """
    keys = (positions + 1).clamp_min(trained).to(dtype)
    if temperature == "log":
        return keys.log() / math.log(trained)
    return (0.1 * (keys / trained).log() + 1).square()


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
    chunks: Chunks,
    emphasis: Emphasis | None = None,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend from the last n of m tokens.

    Args:
        query: rotated at i mod s.
        key: rotated at j mod s, in the order of the text; the last n are the queries' own.
        value: of the keys.
        padding: columns before each row's first real token; None where there are none.
        chunks: lengths, scaling and rotation.
        emphasis: keys that count for several, if they stand before all queries; None: there are none.

    Returns:
        [batch, heads, n, value_dim] in the dtype of `query`; zeros for padding. Rows of one padding go together: each
        other padding in the batch costs a pass of its own.
    """
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for rows, columns in _by_padding(padding, query):
        q, k, v = (_taken(x, rows) for x in (query, key, value))
        of_rows = None if emphasis is None else Emphasis(*(_taken(x, rows) for x in emphasis))
        attended = _same_padding(q, k, v, columns, chunks, of_rows)
        output = attended if rows is None else output.index_copy(0, rows, attended)
    return output


def block_votes(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    padding: Int[Tensor, " batch"] | None,
    chunks: Chunks,
    groups: Bool[Tensor, "groups rows n"],
    num_sink_tokens: int,
    block_size: int,
    last: int,
) -> Float[Tensor, "batch heads groups blocks"]:
    """Return the attention that each head and a group's queries pay to each block of keys.

    Args:
        query: of the last n of m tokens, as for `dual_chunk_attention`.
        key: likewise.
        padding: likewise.
        chunks: likewise.
        groups: which queries belong to each group; `rows` is the batch or 1.
        num_sink_tokens: keys at the beginning of a row that belong to no block.
        block_size: keys a block; block b begins at position num_sink_tokens + b * block_size.
        last: queries at the end before which a block must end.

    Returns:
        [batch, heads, groups, blocks]; 0 for blocks that are not whole. Sums over a group's queries.
    """
    count = max(0, key.shape[2] - last - num_sink_tokens) // block_size
    wide = torch.promote_types(query.dtype, torch.float32)
    votes = query.new_zeros(*query.shape[:2], groups.shape[0], count, dtype=wide)
    belongs = groups.to(query.device, wide).transpose(0, 1).expand(query.shape[0], -1, -1)[:, None]
    for rows, columns in _by_padding(padding, query):
        q, k, member = (_taken(x, rows) for x in (query, key, belongs))
        whole = max(0, key.shape[2] - columns - last - num_sink_tokens) // block_size
        inside = slice(num_sink_tokens, num_sink_tokens + whole * block_size)
        for start, weights in _weights(q, k, columns, chunks):
            paid = weights[..., inside].reshape(*weights.shape[:3], whole, block_size).sum(-1)
            part = member[..., start : start + paid.shape[2]] @ paid
            found = torch.nn.functional.pad(part, (0, count - whole))
            votes = votes + found if rows is None else votes.index_add(0, rows, found)
    return votes


def _taken(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _by_padding(padding: Tensor | None, like: Tensor) -> Iterator[tuple[Tensor | None, int]]:
    """Yield the rows of each padding, and their columns of it; None stands for all rows."""
    first = [0] if padding is None else padding.tolist()
    for columns in sorted(set(first)):
        rows = [row for row, count in enumerate(first) if count == columns]
        yield None if len(rows) == len(first) else torch.tensor(rows, device=like.device), columns


def _same_padding(
    query: Tensor, key: Tensor, value: Tensor, padding: int, chunks: Chunks, emphasis: Emphasis | None
) -> Tensor:
    """`dual_chunk_attention` of rows that all begin at column `padding`."""
    blank, begin = _begin(query, key, padding)
    query, key, value = query[:, :, blank:], key[:, :, padding:], value[:, :, padding:]
    outputs = [query.new_zeros(*query.shape[:2], blank, value.shape[-1])] if blank else []
    chosen = None if emphasis is None else _chosen(key, value, emphasis, begin)
    for start, stop in _blocks(begin, key.shape[2], chunks.chunk):
        block = query[:, :, start - begin : stop - begin]
        parts = list(_parts(block, key, value, start, stop, chunks, chosen))
        outputs.append(joined_attention(parts, chunks.scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _weights(query: Tensor, key: Tensor, padding: int, chunks: Chunks) -> Iterator[tuple[int, Tensor]]:
    """Yield where a block of queries starts among them, and their attention weights [rows, heads, queries, m]."""
    blank, begin = _begin(query, key, padding)
    query, key = query[:, :, blank:], key[:, :, padding:]
    for start, stop in _blocks(begin, key.shape[2], chunks.chunk):
        for first in range(start, stop, SCORED_AT_ONCE):
            last = min(first + SCORED_AT_ONCE, stop)
            parts = _parts(query[:, :, first - begin : last - begin], key, key, first, last, chunks, None)
            scores = torch.cat([scored(part, 0, chunks.scaling) for part in parts], dim=-1)
            yield blank + first - begin, torch.nn.functional.pad(scores.softmax(-1), (0, key.shape[2] - last))


def _begin(query: Tensor, key: Tensor, padding: int) -> tuple[int, int]:
    """Return how many leading queries are padding, and the position of the first other one."""
    n, length = query.shape[2], key.shape[2] - padding
    blank = min(n, max(0, n - length))
    return blank, length - (n - blank)


def _blocks(start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut positions start..stop where chunks begin."""
    while start < stop:
        end = min(stop, (start // chunk + 1) * chunk)
        yield start, end
        start = end


def _parts(
    query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, chunks: Chunks, chosen: _Chosen | None
) -> Iterator[Part]:
    """Yield the kernel calls of queries start..stop, which lie in one chunk, in the order of their keys."""
    chunk, trained, rotate = chunks.chunk, chunks.trained, chunks.rotate
    own = start - start % chunk
    before = max(0, own - chunk)
    inside = torch.arange(start - own, stop - own, device=query.device)[None]

    def parts(first: int, last: int, turned: Tensor) -> Iterator[Part]:
        yield Part(turned, key[:, :, first:last], value[:, :, first:last])
        yield from _again(turned, chosen, first, last)

    if own:
        steps = (inside + chunk).clamp_max(trained - 1) - inside
        if before:  # both turns at once: a token has little else to do
            turned = rotate(torch.cat([query, query], dim=2), torch.cat([trained - 1 - inside, steps], dim=1))
            earlier, near = turned.chunk(2, dim=2)
            yield from parts(0, before, earlier)
        else:
            near = rotate(query, steps)
        yield from parts(before, own, near)
    if stop - start == 1:  # which sees all of its chunk so far
        yield from parts(own, stop, query)
        return
    if own < start:
        yield from parts(own, start, query)
    yield Part(query, key[:, :, start:stop], value[:, :, start:stop], "up_to")


class _Chosen(NamedTuple):
    """Keys that count for several, of rows of one padding: [rows, kv_heads, k, ..], positions and counts [rows, k]."""

    key: Tensor
    value: Tensor
    positions: Tensor
    counts: Tensor


def _chosen(key: Tensor, value: Tensor, emphasis: Emphasis, begin: int) -> _Chosen:
    """Take the keys that count for several, where they stand before position `begin`."""
    positions = emphasis.positions.to(key.device)
    columns = positions.clamp(0, key.shape[2] - 1)[:, None, :, None]
    k, v = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    counts = emphasis.counts.to(key.device, torch.promote_types(key.dtype, torch.float32))
    return _Chosen(k, v, positions.masked_fill(positions >= begin, -1), counts)


def _again(query: Tensor, chosen: _Chosen | None, first: int, last: int) -> Iterator[Part]:
    """Yield the chosen keys first..last as often as they count beyond once; nothing where there are none."""
    if chosen is None:
        return
    is_here = (first <= chosen.positions) & (chosen.positions < last) & (chosen.counts > 1)
    if bool(is_here.any()):
        bias = torch.where(is_here, (chosen.counts - 1).clamp_min(0).log(), -torch.inf)
        yield Part(query, chosen.key, chosen.value, bias=bias.clamp_min(torch.finfo(bias.dtype).min / 2))
