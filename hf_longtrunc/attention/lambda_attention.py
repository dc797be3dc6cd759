r"""The Λ-shaped mask of LM-Infinite and StreamingLLM, as attention over tensors.

A query at position i and a key at position j <= i, both counted from the row's first real token, with S sinks, a window
of L and the largest distance D:

    visible(i, j)  = i - j < L  or  j < S
    distance(i, j) = i - j, but at most D (LM-Infinite) or D - j (StreamingLLM) for a sink j < S

and one softmax over all visible keys. `SinkWindowLaw` is the one place where this is written; every path takes it from
there. Keys nearer than L are the *local* set. A sink outside the window belongs to the *far* set: R(D - i) rotates a
rotated query to distance D from the first sink, and R(-j) or R(0) the sinks, so the far set costs n S dot products.

Invariants:
- O(n (S + L)) time. A block of queries sees the S sinks and the L - 1 + block keys before its end. No n x n tensor
  exists. Under autograd every block is recomputed in the backward pass.
- a position below zero is padding: as a key it is invisible; as a query its output is finite and has no meaning.
- only differences of positions are used, so a row may start anywhere.

Sources: Han et al. 2024, "LM-Infinite", arXiv 2308.16137, section 3.2 (D = L there; any D >= L here). Xiao et al. 2023,
"Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2: positions within the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_longtrunc.arguments import check_choice
from hf_longtrunc.attention.kernels import (
    ExtraKeys,
    Scoring,
    alibi_bias,
    eager_attention,
    grouped_scores,
    sdpa_attention,
)
from hf_longtrunc.attention.softmax_merge import AttentionPart, MaskKind, merge_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Bool, Float, Int

PATHS = ("auto", "split", "sdpa", "eager", "flex")
LONG_PROMPTS = "flex"  # the default for them on CUDA; recipes/gpu.py compares it with the other paths
_SPLIT_BLOCK = 256  # queries that share kernel calls without masks
_RETRIEVAL_BLOCK = 64  # queries that read distant keys together: their scores of every key exist at once


@dataclass(frozen=True)
class SinkWindowLaw:
    """Which keys a query sees, and at which distance.

    Examples:
        >>> law = SinkWindowLaw(num_sink_tokens=1, window_length=2, max_distance=2)
        >>> law.visible(torch.arange(4), torch.arange(4)).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
        >>> law.distance(torch.tensor([3]), torch.arange(4)).tolist()
        [[2, 2, 1, 0]]
    """

    num_sink_tokens: int  # S
    window_length: int  # L
    max_distance: int  # D, the largest distance of the first sink
    sink_spacing: int = 0  # 0: the largest distance of every sink is D. 1: that of sink j is D - j, in their order

    def key_position(self, positions: Tensor) -> Tensor:
        """Return the position at which keys are rotated and cached: their own."""
        return positions

    def visible(
        self, query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"]
    ) -> Bool[Tensor, "... n m"]:
        """Return whether a query sees a key; padding is never seen."""
        i, j = query_positions[..., :, None], key_positions[..., None, :]
        return (j >= 0) & (j <= i) & ((i - j < self.window_length) | (j < self.num_sink_tokens))

    def distance(
        self, query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"]
    ) -> Int[Tensor, "... n m"]:
        """Return the distance at which a query sees a key."""
        i, j = query_positions[..., :, None], key_positions[..., None, :]
        limited = torch.minimum(i - j, self.max_distance - self.sink_spacing * j)
        return torch.where(j < self.num_sink_tokens, limited, i - j)

    @property
    def exact_length(self) -> int:
        """The longest text that is read as the unmodified model reads it."""
        if not self.num_sink_tokens:
            return self.window_length
        return min(self.num_sink_tokens + self.window_length, self.max_distance + 1)

    @property
    def far_from(self) -> int:
        """The first query position that sees every sink at its largest distance."""
        return self.max_distance + (1 - self.sink_spacing) * (self.num_sink_tokens - 1)

    def far_query_offsets(self, query_positions: Tensor) -> Tensor:
        """Return the offsets that rotate queries to the largest distance from the first sink."""
        return self.max_distance - query_positions

    def far_key_offsets(self, sink_positions: Tensor) -> Tensor:
        """Return the offsets that rotate sinks, so that such a query sees each at its largest distance."""
        return (self.sink_spacing - 1) * sink_positions


@dataclass(frozen=True, eq=False)
class LambdaAttention:
    """Attention over a window of keys and the row's first keys, in one forward of a layer."""

    query: Float[Tensor, "batch heads n dim"]  # rotated at its own positions
    key: Float[Tensor, "batch kv_heads m dim"]  # rotated too, in the order of the text; the last n are the queries' own
    value: Float[Tensor, "batch kv_heads m value_dim"]  # value_dim may differ from dim
    query_positions: Int[Tensor, "rows n"]  # counted from each row's first real token; `rows` is the batch or 1
    key_positions: Int[Tensor, "rows m"]  # one step apart; negative is padding
    # Keys [batch, kv_heads, S, dim] and values of positions 0 to S - 1; None: all are in every query's window.
    sinks: tuple[Tensor, Tensor] | None
    law: SinkWindowLaw
    scoring: Scoring
    # read(query, query_positions, logits of sinks and window [batch, heads, n, S + m]) finds extra keys.
    read: Callable[[Tensor, Tensor, Tensor], ExtraKeys | None] | None = None
    query_rows: int = 0  # the last queries, which have extra keys and take the "eager" path
    is_padded: bool = False  # whether positions below zero may occur; without any, fewer masks are needed

    def attend(self, path: str = "auto", block_size: int = 512) -> Tensor:
        """Return the output [batch, heads, n, value_dim] in the dtype of `query`.

        Args:
            path: "split" (CPU; kernel calls without masks for each block of up to 256 queries), "sdpa" (any device;
                one call with a mask, the fallback of "split" for gradients, padded rows, dropout, another value_dim and
                the few queries that are near some of the sinks), "eager" (any device and scoring; the only one for
                soft-capping, slopes and null logits), "flex" (CUDA; FlexAttention) or "auto".
            block_size: queries that the blockwise paths take together.
        """
        path = resolve_path(path, self.scoring, self.query)
        if self.read is not None:
            return self._with_extra_keys(path, block_size)
        if path == "flex":
            return self._flex()
        remember = torch.is_grad_enabled() and self.query.requires_grad and self.query.shape[2] > block_size
        blocks = []
        for start, stop, is_split in self._blocks(path, block_size):
            if is_split:
                blocks.append(self._split_block(start, stop))
            elif remember:
                blocks.append(checkpoint(self._block, start, stop, path, use_reentrant=False))
            else:
                blocks.append(self._block(start, stop, path))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)

    def _flex(self) -> Tensor:
        from hf_longtrunc.attention.flex import flex_attend

        far = None
        if self.sinks is not None:
            far = self._far_scores(self.query, self.query_positions), self.sinks[1]
        return flex_attend(self, far)

    def _with_extra_keys(self, path: str, block_size: int) -> Tensor:
        """Attend with the last `query_rows` queries by "eager", with the others by `path`."""
        n, m = self.query.shape[2], self.key.shape[2]
        first = max(0, n - self.query_rows)
        spans = [(start, min(start + _RETRIEVAL_BLOCK, n)) for start in range(first, n, _RETRIEVAL_BLOCK)]
        parts = [self._block(start, stop, "eager") for start, stop in spans]
        if first:
            keys = m - (n - first)
            before = replace(
                self,
                query=self.query[:, :, :first],
                key=self.key[:, :, :keys],
                value=self.value[:, :, :keys],
                query_positions=self.query_positions[:, :first],
                key_positions=self.key_positions[:, :keys],
                read=None,
            )
            parts.insert(0, before.attend(path, block_size))
        return torch.cat(parts, dim=2)

    def _blocks(self, path: str, block_size: int) -> Iterator[tuple[int, int, bool]]:
        """Yield blocks of queries start..stop, and whether kernel calls without masks serve one."""
        n, window, ahead = self.query.shape[2], self.law.window_length, self.key.shape[2] - self.query.shape[2]
        if path != "split" or not self._is_split():
            yield from ((start, min(start + block_size, n), False) for start in range(0, n, block_size))
            return
        first = int(self.query_positions[0, 0])
        # All sinks are near before the first of these, and at their largest distance from the second on.
        edges = (n, n) if self.sinks is None else (window, self.law.far_from)
        mixed = [min(n, max(0, edge - first)) for edge in edges]
        for begin, end, is_split in ((0, mixed[0], True), (mixed[0], mixed[1], False), (mixed[1], n, True)):
            start = begin
            while start < end:
                stop = min(end, start + (min(_SPLIT_BLOCK, block_size, window - 1) if is_split else block_size))
                # Windows begin to lose keys at the query in column `window`: a block ends there.
                stop = window - ahead if start < window - ahead < stop else stop
                yield start, stop, is_split
                start = stop

    def _is_split(self) -> bool:
        """Whether no row is padded, all share their positions, no gradient is asked, and the scores are plain."""
        query, key, value = self.query, self.key, self.value
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return False
        is_plain = self.scoring.is_plain and not self.scoring.dropout and query.device.type == "cpu"
        is_square = query.shape[-1] == value.shape[-1] and query.shape[2] > 1 and self.law.window_length > 1
        is_square &= query.dtype == key.dtype == value.dtype  # under autocast they differ
        one_row = len(self.query_positions) == len(self.key_positions) == 1
        return is_plain and is_square and one_row and int(self.key_positions[0, 0]) >= 0

    def _split_block(self, start: int, stop: int) -> Tensor:
        """Attend from queries start..stop, fewer than the window, in kernel calls without masks.

        Every query sees its block's keys up to itself, all keys between the block and the last query's window, and of
        the keys that windows of this block lose one after another those that its own still has.
        """
        law, ahead = self.law, self.key.shape[2] - self.query.shape[2]
        first, last = ahead + start, ahead + stop  # columns of the block's own keys
        reach = max(0, last - law.window_length + 1)  # from here on every query sees the keys before the block
        query = self.query[:, :, start:stop]

        def part(first: int, last: int, mask: MaskKind) -> AttentionPart:
            return AttentionPart(query, self.key[:, :, first:last], self.value[:, :, first:last], mask)

        parts = [part(first, last, "causal")]
        left = max(0, first - law.window_length + 1)  # the first key that the first query sees
        if left < reach:
            parts.append(part(left, reach, "anticausal"))
        if reach < first:
            parts.append(part(reach, first, "full"))
        if self.sinks is not None and int(self.query_positions[0, start]) >= law.window_length:
            key, value = self.sinks
            i, j = self.query_positions[:, start:stop], torch.arange(key.shape[2], device=key.device)[None]
            query = self.scoring.rotate(query, law.far_query_offsets(i))
            parts.append(AttentionPart(query, self.scoring.rotate(key, law.far_key_offsets(j)), value))
        return merge_attention(parts, self.scoring)

    def _block(self, start: int, stop: int, path: str) -> Tensor:
        """Attend from queries start..stop to the keys that their windows span, and to the sinks."""
        law, ahead = self.law, self.key.shape[2] - self.query.shape[2]
        keys = slice(max(0, ahead + start - law.window_length + 1), ahead + stop)
        query, i = self.query[:, :, start:stop], self.query_positions[:, start:stop]
        key, value, j = self.key[:, :, keys], self.value[:, :, keys], self.key_positions[:, keys]
        seen, slopes, far = replace(law, num_sink_tokens=0).visible(i, j), self.scoring.slopes, None
        bias = None if slopes is None else alibi_bias(slopes, law.distance(i, j), query)
        if self.sinks is not None:
            far = self._far_scores(query, i)
            sink_positions = torch.arange(far.shape[-1], device=key.device)[None]
            seen = torch.cat([i[:, :, None] - sink_positions[:, None] >= law.window_length, seen], dim=-1)
            value = torch.cat([self.sinks[1], value], dim=2)
        read = None if self.read is None else partial(self.read, query, i)
        if path == "eager":
            return eager_attention(query, key, value, seen, self.scoring, far, bias, read)
        # A padding query sees everything rather than nothing: its output is finite, and nobody reads it.
        return sdpa_attention(query, key, value, seen | ~seen.any(-1, keepdim=True), self.scoring, far)

    def _far_scores(self, query: Tensor, i: Tensor) -> Tensor:
        """Logits [batch, heads, n, S] of queries at i [rows, n] with the sinks, at their distances by the law."""
        assert self.sinks is not None
        law, scoring, key = self.law, self.scoring, self.sinks[0]
        j = torch.arange(key.shape[2], device=key.device)[None]
        far_query = scoring.rotate(query, law.far_query_offsets(i))
        scores = grouped_scores(far_query, scoring.rotate(key, law.far_key_offsets(j)))
        if scoring.rotation is not None and law.max_distance > law.window_length:
            # Some sinks that left the window are not at their largest distance yet.
            is_near = (law.distance(i, j) == i[..., :, None] - j[..., None, :])[:, None]
            scores = torch.where(is_near, grouped_scores(query, key), scores)
        scores = scoring.scores(scores)
        if scoring.slopes is not None:
            scores = scores + alibi_bias(scoring.slopes, law.distance(i, j), query)
        return scores


def resolve_path(path: str, scoring: Scoring, query: Tensor | None = None) -> str:
    """Return the path that `path` names, "auto" resolved.

    Raises:
        ValueError: the path does not exist, or cannot serve this scoring or device.
    """
    check_choice("path", path, PATHS)
    if path == "auto":
        # FlexAttention takes sinks' logits as a constant of its kernel: a good one for inference on long prompts.
        long_prompt = query is not None and query.is_cuda and query.shape[2] >= 1024 and not query.requires_grad
        if scoring.is_plain and long_prompt and not scoring.dropout:
            return LONG_PROMPTS
        on_cpu = query is not None and query.device.type == "cpu"
        return "eager" if not scoring.is_plain else "split" if on_cpu else "sdpa"
    if path != "eager" and not scoring.is_plain:
        raise ValueError(f"path {path!r} has no soft-capping, ALiBi slopes or null logits: use 'eager' or 'auto'")
    if path == "split" and query is not None and query.device.type != "cpu":
        raise ValueError(f"path 'split' is for the CPU, got queries on {query.device}: use 'sdpa' or 'auto'")
    if path == "flex" and scoring.dropout:
        raise ValueError("path 'flex' has no attention dropout: use 'sdpa', 'eager' or 'auto'")
    return path
