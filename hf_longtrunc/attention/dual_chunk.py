r"""Dual chunk attention: every key is seen, and no distance is larger than what the model was trained on.

A model was trained on c positions. The text is cut into chunks of s < c tokens. With positions counted from a row's
first real token, key j stands at j mod s for good, and a query i meets it from

    i mod s                          in its own chunk: the true distance
    min(i mod s + s, c - 1)          in the chunk before: the true one as long as the trained positions last
    c - 1                            in all earlier chunks

in one softmax over all keys j <= i. `ChunkLaw` is the one place where this is written. So a cached key never changes,
and a text of at most s tokens is read as the model was trained to read it.

Each block of queries takes at most four kernel calls, whose outputs are merged: earlier chunks, the chunk before, its
own chunk before the block, and the block itself. No n x n tensor exists.

Some keys may count for several (`KeyMultiplicity`): a key of multiplicity e is in these calls once, and in further
calls e - 1 times, in the same softmax.

Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463, section 3;
the authors take s = 3c/4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.softmax_merge import ROWS_SCORED, AttentionPart, merge_attention, scores_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int

    Rotate = Callable[[Tensor, Tensor], Tensor]


class KeyMultiplicity(NamedTuple):
    """Keys that count for several.

    Attributes:
        positions: of them [batch, k], each once, counted from a row's first real token; -1 for none.
        counts: how many keys each counts for [batch, k], more than 1.
    """

    positions: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ChunkLaw:
    """At which distance a query sees each key j <= i.

    >>> ChunkLaw(chunk_length=2, trained_length=3).distance(torch.tensor([4]), torch.arange(5)).tolist()
    [[2, 1, 2, 1, 0]]

    Attributes:
        chunk_length: s.
        trained_length: c, more than s.
    """

    chunk_length: int
    trained_length: int

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


class Chunks(NamedTuple):
    """How a layer computes dual chunk attention.

    Attributes:
        law: of distances.
        scaling: factor of the dot products.
        rotate: `rotate(x, offsets)` rotates x [batch, heads, n, dim] by offsets [rows, n] positions.
        softcap: c in c * tanh(score / c), or None.
        null_logits: a learned logit of each query head [heads] that joins the softmax and carries no value, or None.
    """

    law: ChunkLaw
    scaling: float
    rotate: Rotate
    softcap: float | None = None
    null_logits: Tensor | None = None


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


def dual_chunk_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    padding: Int[Tensor, " batch"] | None,
    chunks: Chunks,
    multiplicity: KeyMultiplicity | None = None,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend from the last n of m tokens.

    Args:
        query: rotated at i mod s.
        key: rotated at j mod s, in the order of the text; the last n are the queries' own.
        value: of the keys.
        padding: columns before each row's first real token; None where there are none.
        chunks: lengths, scaling and rotation.
        multiplicity: keys that count for several, if they stand before all queries; None: there are none.

    Returns:
        [batch, heads, n, value_dim] in the dtype of `query`; zeros for padding. Rows of one padding go together: each
        other padding in the batch costs a pass of its own.
    """
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for rows, columns in _by_padding(padding, query):
        q, k, v = (_select_rows(x, rows) for x in (query, key, value))
        of_rows = None if multiplicity is None else KeyMultiplicity(*(_select_rows(x, rows) for x in multiplicity))
        attended = _same_padding(q, k, v, columns, chunks, of_rows)
        output = attended if rows is None else output.index_copy(0, rows, attended)
    return output


def chunk_block_scores(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    padding: Int[Tensor, " batch"] | None,
    chunks: Chunks,
    groups: Bool[Tensor, "groups rows n"],
    num_sink_tokens: int,
    block_size: int,
    last: int,
) -> Float[Tensor, "batch heads groups blocks"]:
    """Return the attention weight that each head and a group's queries give to each block of keys.

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
        [batch, heads, groups, blocks]: sums over a group's queries; 0 for blocks that are not complete.
    """
    count = max(0, key.shape[2] - last - num_sink_tokens) // block_size
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.new_zeros(*query.shape[:2], groups.shape[0], count, dtype=wide)
    belongs = groups.to(query.device, wide).transpose(0, 1).expand(query.shape[0], -1, -1)[:, None]
    for rows, columns in _by_padding(padding, query):
        q, k, member = (_select_rows(x, rows) for x in (query, key, belongs))
        complete = max(0, key.shape[2] - columns - last - num_sink_tokens) // block_size
        inside = slice(num_sink_tokens, num_sink_tokens + complete * block_size)
        for start, weights in _weights(q, k, columns, chunks):
            by_block = weights[..., inside].reshape(*weights.shape[:3], complete, block_size).sum(-1)
            part = member[..., start : start + by_block.shape[2]] @ by_block
            part = torch.nn.functional.pad(part, (0, count - complete))
            scores = scores + part if rows is None else scores.index_add(0, rows, part)
    return scores


def _select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _by_padding(padding: Tensor | None, like: Tensor) -> Iterator[tuple[Tensor | None, int]]:
    """Yield the rows of each padding, and their columns of it; None stands for all rows."""
    first = [0] if padding is None else padding.tolist()
    for columns in sorted(set(first)):
        rows = [row for row, count in enumerate(first) if count == columns]
        yield None if len(rows) == len(first) else torch.tensor(rows, device=like.device), columns


def _same_padding(
    query: Tensor, key: Tensor, value: Tensor, padding: int, chunks: Chunks, multiplicity: KeyMultiplicity | None
) -> Tensor:
    """`dual_chunk_attention` of rows that all begin at column `padding`."""
    blank, begin = _begin(query, key, padding)
    query, key, value = query[:, :, blank:], key[:, :, padding:], value[:, :, padding:]
    outputs = [query.new_zeros(*query.shape[:2], blank, value.shape[-1])] if blank else []
    repeated = None if multiplicity is None else _repeated_keys(key, value, multiplicity, begin)
    for start, stop in _blocks(begin, key.shape[2], chunks.law.chunk_length):
        block = query[:, :, start - begin : stop - begin]
        parts = list(_parts(block, key, value, start, stop, chunks, repeated))
        outputs.append(merge_attention(parts, chunks.scaling, chunks.null_logits))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _weights(query: Tensor, key: Tensor, padding: int, chunks: Chunks) -> Iterator[tuple[int, Tensor]]:
    """Yield where a block of queries starts among them, and their attention weights [rows, heads, queries, m]."""
    blank, begin = _begin(query, key, padding)
    query, key = query[:, :, blank:], key[:, :, padding:]
    for start, stop in _blocks(begin, key.shape[2], chunks.law.chunk_length):
        for first in range(start, stop, ROWS_SCORED):
            last = min(first + ROWS_SCORED, stop)
            parts = _parts(query[:, :, first - begin : last - begin], key, key, first, last, chunks, None)
            scores = torch.cat([scores_of(part, 0, chunks.scaling) for part in parts], dim=-1)
            if chunks.null_logits is not None:
                null = chunks.null_logits.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, null], dim=-1)
            yield (
                blank + first - begin,
                torch.nn.functional.pad(scores.softmax(-1)[..., :last], (0, key.shape[2] - last)),
            )


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
    query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, chunks: Chunks, repeated: _RepeatedKeys | None
) -> Iterator[AttentionPart]:
    """Yield the kernel calls of queries start..stop, which lie in one chunk, in the order of their keys."""
    law, rotate, softcap = chunks.law, chunks.rotate, chunks.softcap
    own = start - start % law.chunk_length
    before = max(0, own - law.chunk_length)
    inside = torch.arange(start - own, stop - own, device=query.device)[None]

    def parts(first: int, last: int, rotated: Tensor) -> Iterator[AttentionPart]:
        yield AttentionPart(rotated, key[:, :, first:last], value[:, :, first:last], softcap=softcap)
        yield from _repetitions(rotated, repeated, first, last, softcap)

    if own:
        near, far = law.query_position(inside, 1) - inside, law.query_position(inside, 2) - inside
        if before:  # both rotations at once: a token has little else to do
            both = rotate(torch.cat([query, query], dim=2), torch.cat([far, near], dim=1))
            yield from parts(0, before, both[:, :, : query.shape[2]])
            near_query = both[:, :, query.shape[2] :]
        else:
            near_query = rotate(query, near)
        yield from parts(before, own, near_query)
    if stop - start == 1:  # which sees all of its chunk so far
        yield from parts(own, stop, query)
        return
    if own < start:
        yield from parts(own, start, query)
    yield AttentionPart(query, key[:, :, start:stop], value[:, :, start:stop], "causal", softcap=softcap)


class _RepeatedKeys(NamedTuple):
    """Keys that count for several, of rows of one padding: [rows, kv_heads, k, ..], positions and counts [rows, k]."""

    key: Tensor
    value: Tensor
    positions: Tensor
    counts: Tensor


def _repeated_keys(key: Tensor, value: Tensor, multiplicity: KeyMultiplicity, begin: int) -> _RepeatedKeys:
    """Take the keys that count for several, where they stand before position `begin`."""
    positions = multiplicity.positions.to(key.device)
    columns = positions.clamp(0, key.shape[2] - 1)[:, None, :, None]
    k, v = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    counts = multiplicity.counts.to(key.device, torch.promote_types(key.dtype, torch.float32))
    return _RepeatedKeys(k, v, positions.masked_fill(positions >= begin, -1), counts)


def _repetitions(
    query: Tensor, repeated: _RepeatedKeys | None, first: int, last: int, softcap: float | None
) -> Iterator[AttentionPart]:
    """Yield the repeated keys first..last as often as they count beyond once; nothing where there are none."""
    if repeated is None:
        return
    is_here = (first <= repeated.positions) & (repeated.positions < last) & (repeated.counts > 1)
    if bool(is_here.any()):
        bias = torch.where(is_here, (repeated.counts - 1).clamp_min(0).log(), -torch.inf)
        bias = bias.clamp_min(torch.finfo(bias.dtype).min / 2)
        yield AttentionPart(query, repeated.key, repeated.value, bias=bias, softcap=softcap)
