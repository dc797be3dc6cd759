r"""Dual chunk attention: every key is seen, at no larger distance than in training.

A model was trained on c positions. The text is cut into chunks of s < c tokens. With positions counted from a row's
first real token, key j is rotated at j mod s once and for all, and a query i sees it from

    i mod s                          in its own chunk: the true distance
    min(i mod s + s, c - 1)          in the chunk before: the true one as long as the trained positions last
    c - 1                            in all earlier chunks

in one softmax over all keys j <= i. `ChunkLaw` is the one place where this is written. So a cached key never changes,
and a text of at most s tokens is read as the model was trained to read it.

Each block of queries takes at most four kernel calls, merged into one softmax: earlier chunks, the chunk before, its
own chunk before the block, and the block itself. No n x n tensor exists.

Some keys may count for several (`Selection`): a key of emphasis e is in these calls once, and in further calls e - 1
times, in the same softmax.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463, section 3;
the authors take s = 3c/4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_longtrunc.attention.block_scores import Selection
from hf_longtrunc.attention.softmax_merge import ROWS_SCORED, AttentionPart, merge_attention, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float, Int

    from hf_longtrunc.attention.kernels import Scoring
    from hf_longtrunc.attention.rope import Rotation

    # Keys and values [rows, kv_heads, k, ..], and how often each counts.
    RepeatedKeys = tuple[Tensor, Tensor, Selection]


@dataclass(frozen=True)
class ChunkLaw:
    """At which distance a query sees each key j <= i.

    Examples:
        >>> ChunkLaw(chunk_length=2, trained_length=3).distance(torch.tensor([4]), torch.arange(5)).tolist()
        [[2, 1, 2, 1, 0]]

    """

    chunk_length: int  # s
    trained_length: int  # c, more than s

    @property
    def exact_length(self) -> int:
        """The longest text that is read as the unmodified model reads it."""
        return self.chunk_length

    def key_position(self, positions: Tensor) -> Tensor:
        """Return the position at which keys are rotated and cached."""
        return positions % self.chunk_length

    def query_position(self, inside: Tensor, apart: int) -> Tensor:
        """Return the position from which queries at i mod s see keys that are 0, 1, or 2 and more chunks before."""
        if apart == 0:
            return inside
        if apart == 1:
            return (inside + self.chunk_length).clamp_max(self.trained_length - 1)
        return torch.full_like(inside, self.trained_length - 1)

    def visible(
        self, query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"]
    ) -> Bool[Tensor, "... n m"]:
        """Return whether a query sees a key: all up to its own; padding is never seen."""
        i, j = query_positions[..., :, None], key_positions[..., None, :]
        return (j >= 0) & (j <= i)

    def distance(
        self, query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"]
    ) -> Int[Tensor, "... n m"]:
        """Return the distance of every pair; n x m, for tests, checks and pictures."""
        i, j = query_positions[..., :, None], key_positions[..., None, :]
        apart = i // self.chunk_length - j // self.chunk_length
        inside = (i % self.chunk_length).expand(apart.shape)
        own, near, far = (self.query_position(inside, chunks) for chunks in (0, 1, 2))
        return torch.where(apart == 0, own, torch.where(apart == 1, near, far)) - self.key_position(j)


def dual_chunk_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    padding: Int[Tensor, " batch"] | None,
    law: ChunkLaw,
    scoring: Scoring,
    selection: Selection | None = None,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend from the last n of m tokens; the output has the dtype of `query`, and is zero for padding.

    Args:
        query: rotated at i mod s.
        key: rotated at j mod s, in the order of the text; the last n are the queries' own.
        value: of the keys.
        padding: columns before each row's first real token. Each different one costs a pass of its own.
        law: of distances.
        scoring: of the layer, without slopes and dropout.
        selection: keys that count for several, if they come before all queries.
    """
    if padding is None:
        return _attend_rows(query, key, value, 0, law, scoring, selection)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for rows, columns in _padding_groups(padding, query):
        q, k, v = (_select_rows(x, rows) for x in (query, key, value))
        of_rows = None if selection is None else Selection(*(_select_rows(x, rows) for x in selection))
        attended = _attend_rows(q, k, v, columns, law, scoring, of_rows)
        output = attended if rows is None else output.index_copy(0, rows, attended)
    return output


def chunk_block_scores(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    padding: Int[Tensor, " batch"] | None,
    law: ChunkLaw,
    scoring: Scoring,
    groups: Bool[Tensor, "groups rows n"],
    num_sink_tokens: int,
    block_size: int,
    last: int,
) -> Float[Tensor, "batch heads groups blocks"]:
    """Return the attention weight that a head and a group's queries give to each block; 0 for incomplete blocks.

    Block b has `block_size` keys from position `num_sink_tokens` + b * block_size on, and must end before the `last`
    queries. `groups` says which queries belong to each group; its `rows` is the batch or 1. The other arguments are
    those of `dual_chunk_attention`.
    """
    count = max(0, key.shape[2] - last - num_sink_tokens) // block_size
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.new_zeros(*query.shape[:2], groups.shape[0], count, dtype=wide)
    belongs = groups.to(query.device, wide).transpose(0, 1).expand(query.shape[0], -1, -1)[:, None]
    for rows, columns in _padding_groups(padding, query):
        q, k, member = (_select_rows(x, rows) for x in (query, key, belongs))
        complete = max(0, key.shape[2] - columns - last - num_sink_tokens) // block_size
        inside = slice(num_sink_tokens, num_sink_tokens + complete * block_size)
        for start, weights in _weights(q, k, columns, law, scoring):
            by_block = weights[..., inside].reshape(*weights.shape[:3], complete, block_size).sum(-1)
            part = member[..., start : start + by_block.shape[2]] @ by_block
            part = torch.nn.functional.pad(part, (0, count - complete))
            scores = scores + part if rows is None else scores.index_add(0, rows, part)
    return scores


def _select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _padding_groups(padding: Tensor | None, like: Tensor) -> Iterator[tuple[Tensor | None, int]]:
    """Yield the rows of each padding, and their columns of it; None stands for all rows."""
    first = [0] if padding is None else padding.tolist()
    for columns in sorted(set(first)):
        rows = [row for row, count in enumerate(first) if count == columns]
        yield None if len(rows) == len(first) else torch.tensor(rows, device=like.device), columns


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: int,
    law: ChunkLaw,
    scoring: Scoring,
    selection: Selection | None,
) -> Tensor:
    """`dual_chunk_attention` of rows that all begin at column `padding`."""
    blank, begin = _first_query(query, key, padding)
    query, key, value = query[:, :, blank:], key[:, :, padding:], value[:, :, padding:]
    outputs = [query.new_zeros(*query.shape[:2], blank, value.shape[-1])] if blank else []
    repeated = None if selection is None else _repeat_keys(key, value, selection, begin)
    for start, stop in _blocks(begin, key.shape[2], law.chunk_length):
        block = query[:, :, start - begin : stop - begin]
        parts = list(_parts(block, key, value, start, stop, law, scoring, repeated))
        outputs.append(merge_attention(parts, scoring))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _weights(query: Tensor, key: Tensor, padding: int, law: ChunkLaw, scoring: Scoring) -> Iterator[tuple[int, Tensor]]:
    """Yield where a block of queries starts among them, and their attention weights [rows, heads, queries, m]."""
    blank, begin = _first_query(query, key, padding)
    query, key = query[:, :, blank:], key[:, :, padding:]
    for start, stop in _blocks(begin, key.shape[2], law.chunk_length):
        for first in range(start, stop, ROWS_SCORED):
            last = min(first + ROWS_SCORED, stop)
            parts = list(_parts(query[:, :, first - begin : last - begin], key, key, first, last, law, scoring, None))
            weights = weights_of(parts, 0, scoring)
            yield blank + first - begin, torch.nn.functional.pad(weights, (0, key.shape[2] - last))


def _first_query(query: Tensor, key: Tensor, padding: int) -> tuple[int, int]:
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    stop: int,
    law: ChunkLaw,
    scoring: Scoring,
    repeated: RepeatedKeys | None,
) -> Iterator[AttentionPart]:
    """Yield the kernel calls of queries start..stop, which lie in one chunk, in the order of their keys."""
    own = start - start % law.chunk_length
    before = max(0, own - law.chunk_length)

    def parts(first: int, last: int, rotated: Tensor) -> Iterator[AttentionPart]:
        yield AttentionPart(rotated, key[:, :, first:last], value[:, :, first:last])
        yield from _repeat_parts(rotated, repeated, first, last)

    if own:
        far_query, near_query = _rotate_query(query, start, stop, law, scoring.rotation)
        if before:
            yield from parts(0, before, far_query)
        yield from parts(before, own, near_query)
    if stop - start == 1:  # which sees all of its chunk so far
        yield from parts(own, stop, query)
        return
    if own < start:
        yield from parts(own, start, query)
    yield AttentionPart(query, key[:, :, start:stop], value[:, :, start:stop], "causal")


def _rotate_query(
    query: Tensor, start: int, stop: int, law: ChunkLaw, rotation: Rotation | None
) -> tuple[Tensor, Tensor]:
    """Return queries start..stop rotated for keys of all earlier chunks but the last, and for those of the last."""
    if rotation is None:
        return query, query
    is_one = stop - start == 1 and not torch.compiler.is_compiling()
    offsets = _offsets_of_token if is_one else _offsets
    cos, sin = offsets(start, stop, law, rotation, query.dtype, query.device, torch.is_inference_mode_enabled())
    far, near = rotation.apply(torch.cat([query, query], dim=2), cos, sin).chunk(2, dim=2)
    return far, near


def _offsets(
    start: int, stop: int, law: ChunkLaw, rotation: Rotation, dtype: torch.dtype, device: torch.device, _: bool
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of `_rotate_query` [1, 1, 2n, 2f]: of the far rotations, then of the near."""
    inside = torch.arange(start, stop, device=device)[None] % law.chunk_length
    far, near = law.query_position(inside, 2) - inside, law.query_position(inside, 1) - inside
    return rotation.cos_sin(torch.cat([far, near], dim=1), dtype)


# Those of the token that is decoded, which are the same in all layers that share a rotation.
_offsets_of_token = lru_cache(maxsize=8)(_offsets)


def _repeat_keys(key: Tensor, value: Tensor, selection: Selection, begin: int) -> RepeatedKeys:
    """Take the keys that count for several, where they stand before position `begin`."""
    positions = selection.indices.to(key.device)
    columns = positions.clamp(0, key.shape[2] - 1)[:, None, :, None]
    k, v = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    counts = selection.emphasis.to(key.device, torch.promote_types(key.dtype, torch.float32))
    return k, v, Selection(positions.masked_fill(positions >= begin, -1), counts)


def _repeat_parts(query: Tensor, repeated: RepeatedKeys | None, first: int, last: int) -> Iterator[AttentionPart]:
    """Yield the repeated keys first..last as often as they count beyond once; nothing where there are none."""
    if repeated is None:
        return
    key, value, (positions, counts) = repeated
    is_here = (first <= positions) & (positions < last) & (counts > 1)
    if bool(is_here.any()):
        bias = torch.where(is_here, (counts - 1).clamp_min(0).log(), -torch.inf)
        bias = bias.clamp_min(torch.finfo(bias.dtype).min / 2)
        yield AttentionPart(query, key, value, bias=bias)
