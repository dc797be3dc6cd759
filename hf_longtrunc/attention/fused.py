"""Λ-attention as one Triton kernel: for prompts on CUDA.

A program takes a block of queries of one head through an online softmax: first over the sinks that their windows have
left, the queries turned to the ceiling in registers, then over the keys that their windows span. Of these, blocks of
keys that every query sees take no mask. The keys before a row's first token are never read. No gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from hf_longtrunc.attention.rotary import Rotation

_SINKS = 16  # that are scored together: the least that Triton multiplies


def fused_lambda_attention(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch kv_heads m dim"],
    value: Float[Tensor, "batch kv_heads m value_dim"],
    key_positions: Int[Tensor, "rows m"],
    sinks: tuple[Tensor, Tensor] | None,
    window: int,
    max_distance: int,
    scaling: float,
    rotation: Rotation | None,
) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend as `lambda_attention` does.

    Args:
        query: rotated at its own positions, which are those of the last n keys.
        key: likewise, in the order of the text.
        value: of the keys.
        key_positions: counted from each row's first real token.
        sinks: keys [batch, kv_heads, S, dim], rotated at 0..S-1, and values; None without sinks.
        window: L.
        max_distance: D.
        scaling: of the dot products.
        rotation: of queries and keys, None where nothing turns.
    """
    batch, heads, n, dim = query.shape
    m, width, device = key.shape[2], value.shape[-1], query.device
    near, far_value = (x[:, :, :0] for x in (key, value)) if sinks is None else sinks
    far, turn = near, (query.new_empty(1, 1, n, 0, dtype=torch.float32),) * 2
    if rotation is not None and near.shape[2]:
        far = rotation.rotate(near, -torch.arange(near.shape[2], device=device)[None])
        turn = rotation.weights(max_distance - key_positions[:, m - n :], torch.float32)  # [rows, 1, n, 2f]
    output = query.new_empty(batch, heads, n, width)
    strided = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    small = (x.contiguous() for x in (near, far, far_value, *turn, key_positions[:, 0].expand(batch).int()))
    rows, columns = (64, 32) if query.element_size() > 2 or max(dim, width) > 128 else (128, 64)
    _kernel[(triton.cdiv(n, rows), batch * heads)](
        *strided, *small, output, *(step for x in strided for step in x.stride()[:3]),
        turn[0].stride(0) if len(key_positions) > 1 else 0, n, m, window, max_distance, scaling,
        heads=heads, group=heads // key.shape[1], dim=dim, width=width, sinks=near.shape[2],
        wide=max(16, triton.next_power_of_2(dim)), wide_value=max(16, triton.next_power_of_2(width)),
        turned=turn[0].shape[-1], start=0 if rotation is None else rotation.start,
        is_halves=rotation is not None and rotation.layout == "halves", has_near=max_distance > window,
        rows=rows, columns=columns, block=_SINKS,
    )  # fmt: skip
    return output


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(
    query: Any, key: Any, value: Any, near: Any, far: Any, far_value: Any, cos: Any, sin: Any, first: Any, output: Any,
    query_row: Any, query_head: Any, query_step: Any, key_row: Any, key_head: Any, key_step: Any,
    value_row: Any, value_head: Any, value_step: Any,
    turn_row: Any, n: Any, m: Any, window: Any, max_distance: Any, scaling: Any,
    heads: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, width: tl.constexpr, sinks: tl.constexpr,
    wide: tl.constexpr, wide_value: tl.constexpr, turned: tl.constexpr, start: tl.constexpr,
    is_halves: tl.constexpr, has_near: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    kv_head = head // group
    q = tl.program_id(0) * rows + tl.arange(0, rows)
    column = m - n + q
    offset = tl.load(first + row)  # position of column 0
    d, e = tl.arange(0, wide), tl.arange(0, wide_value)
    query += row * query_row + head * query_head + q.to(tl.int64)[:, None] * query_step
    x = tl.load(query + d[None], mask=(q < n)[:, None] & (d < dim)[None], other=0.0)
    largest = tl.full([rows], -1e30, tl.float32)
    total = tl.zeros([rows], tl.float32)
    result = tl.zeros([rows, wide_value], tl.float32)
    if sinks > 0:
        farther = x
        if turned > 0:
            plane = d - start
            if is_halves:
                is_first = plane < turned // 2
                partner = tl.where(is_first, d + turned // 2, d - turned // 2)
            else:
                is_first = plane % 2 == 0
                partner = tl.where(is_first, d + 1, d - 1)
            turns = (q < n)[:, None] & ((plane >= 0) & (plane < turned))[None]
            at = row * turn_row + q.to(tl.int64)[:, None] * turned + plane[None]
            quarter = tl.load(query + partner[None], mask=turns, other=0.0) * tl.where(is_first, -1.0, 1.0)[None]
            turn = tl.load(cos + at, mask=turns, other=1.0), tl.load(sin + at, mask=turns, other=0.0)
            farther = (x * turn[0] + quarter * turn[1]).to(x.dtype)
        for begin in range(0, sinks, block):
            j = begin + tl.arange(0, block)
            sink = (row * (heads // group) + kv_head) * sinks + j
            at = sink[None] * dim + d[:, None]
            exists = (j < sinks)[None] & (d < dim)[:, None]
            scores = tl.dot(farther, tl.load(far + at, mask=exists, other=0.0), input_precision="ieee")
            away = (column + offset)[:, None] - j[None]
            if has_near:
                own = tl.dot(x, tl.load(near + at, mask=exists, other=0.0), input_precision="ieee")
                scores = tl.where(away < max_distance, own, scores)
            seen = (away >= window) & (j < sinks)[None]
            exists = (j < sinks)[:, None] & (e < width)[None]
            v = tl.load(far_value + sink[:, None] * width + e[None], mask=exists, other=0.0)
            largest, total, result = _joined(scores * scaling, seen, v, largest, total, result, True)
    key += row * key_row + kv_head * key_head
    value += row * value_row + kv_head * value_head
    begin = m - n + tl.program_id(0) * rows  # the block's first column
    end = tl.minimum(begin + rows, m)
    low = tl.maximum(tl.maximum(begin - window + 1, -offset), 0)
    # From here on to there every query sees every key.
    here = low + tl.cdiv(tl.maximum(end - window - low, 0), columns) * columns
    there = tl.maximum(here, low + tl.maximum(begin + 1 - low, 0) // columns * columns)
    key += d[:, None]
    value += e[None]
    held = largest, total, result
    held = _over_keys(
        x, key, value, key_step, value_step, column, low, tl.minimum(here, end), m, window, scaling, held,
        d, e, dim, width, columns, True,
    )  # fmt: skip
    held = _over_keys(
        x, key, value, key_step, value_step, column, here, there, m, window, scaling, held,
        d, e, dim, width, columns, False,
    )  # fmt: skip
    largest, total, result = _over_keys(
        x, key, value, key_step, value_step, column, there, end, m, window, scaling, held,
        d, e, dim, width, columns, True,
    )  # fmt: skip
    result = result / tl.where(total > 0, total, 1.0)[:, None]  # a padding query sees nothing
    places = ((row * heads + head) * n + q)[:, None] * width + e[None]
    tl.store(output + places, result.to(output.dtype.element_ty), mask=(q < n)[:, None] & (e < width)[None])


@triton.jit  # type: ignore[untyped-decorator]
def _over_keys(
    x: Any, key: Any, value: Any, key_step: Any, value_step: Any, column: Any, begin: Any, end: Any, m: Any,
    window: Any, scaling: Any, held: Any, d: Any, e: Any, dim: tl.constexpr, width: tl.constexpr,
    columns: tl.constexpr, is_edge: tl.constexpr,
) -> Any:  # fmt: skip
    """Let the keys in the columns from `begin` to `end` join, in whole blocks."""
    largest, total, result = held
    for at in range(begin, end, columns):
        j = at + tl.arange(0, columns)
        place = j.to(tl.int64)
        k = tl.load(key + place[None] * key_step, mask=(j < m)[None] & (d < dim)[:, None], other=0.0)
        v = tl.load(value + place[:, None] * value_step, mask=(j < m)[:, None] & (e < width)[None], other=0.0)
        scores = tl.dot(x, k, input_precision="ieee") * scaling
        away = column[:, None] - j[None]
        seen = (away >= 0) & (away < window)
        largest, total, result = _joined(scores, seen, v, largest, total, result, is_edge)
    return largest, total, result


@triton.jit  # type: ignore[untyped-decorator]
def _joined(
    scores: Any, seen: Any, value: Any, largest: Any, total: Any, result: Any, is_masked: tl.constexpr
) -> Any:  # fmt: skip
    """Let a block of keys join the softmax: its largest logit, its sum and the weighted values, each a query's."""
    if is_masked:
        scores = tl.where(seen, scores, -1e30)
    new = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp(scores - new[:, None])
    if is_masked:
        weights = tl.where(seen, weights, 0.0)
    kept = tl.exp(largest - new)
    added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return new, total * kept + tl.sum(weights, 1), result * kept[:, None] + added
