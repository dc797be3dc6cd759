"""Dual chunk attention against one softmax over every pair, and the join of kernel calls that it stands on."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_longtrunc.attention import softmax_merge
from hf_longtrunc.attention.block_scores import Selection
from hf_longtrunc.attention.dual_chunk import (
    ChunkLaw,
    chunk_block_scores,
    dual_chunk_attention,
)
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.rope import Rotation
from hf_longtrunc.attention.softmax_merge import AttentionPart, merge_attention


def rotation(dim):
    return Rotation(10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)))


def naive(query, key, value, padding, chunk, trained, scaling, counts=None, weights=None):
    """Per pair: un-rotated query and key, turned apart by the distance of the definition.

    `counts[row]` says for how many keys one at a position before all queries counts; `weights` takes each attention.
    """
    turn, group = rotation(query.shape[-1]), query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    n, m = query.shape[2], key.shape[2]
    output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for row in range(query.shape[0]):
        for q in range(n):
            i = q + m - n - padding[row]
            if i < 0:
                continue
            j = torch.arange(i + 1)
            apart = ChunkLaw(chunk, trained).distance(torch.tensor([i]), j)  # [1, i + 1]
            turned = turn.rotate(query[row : row + 1, :, q : q + 1].expand(-1, -1, i + 1, -1), apart)[0]
            columns = j + padding[row]
            scores = (turned * key[row][:, columns]).sum(-1) * scaling
            for position, count in ({} if counts is None else counts[row]).items():
                if position < max(0, m - n - padding[row]):
                    scores[:, position] += math.log(count)
            output[row, :, q] = (scores.softmax(-1)[..., None] * value[row][:, columns]).sum(1)
            if weights is not None:
                weights[row, :, q, : i + 1] = scores.softmax(-1)
    return output


def case(seed):
    draw = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    chunk = pick(1, 9)
    trained = chunk + pick(1, 6)
    m = pick(1, 45)
    n = m if pick(0, 1) else pick(1, m)
    batch, groups, group, dim = pick(1, 3), pick(1, 2), pick(1, 3), 2 * pick(1, 3)
    value_dim = dim if pick(0, 2) else dim + 3
    padding = [pick(0, m - 1) for _ in range(batch)] if pick(0, 1) else [0] * batch
    sizes = ((groups * group, n, dim), (groups, m, dim), (groups, m, value_dim))
    tensors = [torch.randn(batch, *size, dtype=torch.float64, generator=draw) for size in sizes]
    return tensors, padding, chunk, trained


def placed_as_cached(tensors, padding, chunk, trained):
    query, key, value = tensors
    turn, n, m = rotation(query.shape[-1]), query.shape[2], key.shape[2]
    positions = torch.arange(m)[None] - torch.tensor(padding)[:, None]
    placed = positions.clamp_min(0) % chunk
    turned = turn.rotate(query, placed[:, m - n :]), turn.rotate(key, placed)
    layer = ChunkLaw(chunk, trained), Scoring(0.4, rotation=turn)
    return *turned, value, torch.tensor(padding) if any(padding) else None, *layer


def run(tensors, padding, chunk, trained, emphasis=None):
    return dual_chunk_attention(*placed_as_cached(tensors, padding, chunk, trained), emphasis)


@pytest.mark.parametrize("seed", range(80))
def test_every_query_meets_every_key_at_its_distance(seed):
    tensors, padding, chunk, trained = case(seed)
    expected = naive(*tensors, padding, chunk, trained, 0.4)
    assert torch.allclose(run(tensors, padding, chunk, trained), expected, rtol=0, atol=1e-12)


def drawn_emphasis(tensors, seed):
    """Return a few positions a row with counts, -1 among them, and the same as dicts."""
    draw = random.Random(seed)
    batch, m, k = tensors[0].shape[0], tensors[1].shape[2], draw.randint(1, 7)
    positions = [[p if draw.random() < 0.8 else -1 for p in draw.sample(range(m + 9), k)] for _ in range(batch)]
    counts = [[draw.choice([1.0, 1.5, 4.0, 16.0]) for _ in range(k)] for _ in range(batch)]
    as_dicts = [{p: c for p, c in zip(*row, strict=True) if p >= 0} for row in zip(positions, counts, strict=True)]
    return Selection(torch.tensor(positions), torch.tensor(counts, dtype=torch.float64)), as_dicts


@pytest.mark.parametrize("seed", range(1000, 1060))
def test_keys_that_count_for_several_join_the_one_softmax(seed):
    tensors, padding, chunk, trained = case(seed)
    emphasis, counts = drawn_emphasis(tensors, seed)
    expected = naive(*tensors, padding, chunk, trained, 0.4, counts)
    assert torch.allclose(run(tensors, padding, chunk, trained, emphasis), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2000, 2030))
def test_blocks_get_the_attention_that_the_definition_pays_them(seed):
    tensors, padding, chunk, trained = case(seed)
    draw = random.Random(seed)
    sinks, size, last = draw.randint(0, 4), draw.randint(1, 6), draw.randint(0, 5)
    batch, n, m = tensors[0].shape[0], tensors[0].shape[2], tensors[1].shape[2]
    groups = torch.rand(2, draw.choice([1, batch]), n, generator=torch.Generator().manual_seed(seed)) < 0.6
    heads = tensors[0].shape[1]
    weights = torch.zeros(batch, heads, n, m, dtype=torch.float64)
    naive(*tensors, padding, chunk, trained, 0.4, weights=weights)
    expected = torch.zeros(batch, heads, 2, max(0, m - last - sinks) // size, dtype=torch.float64)
    for row in range(batch):
        for block in range(max(0, m - padding[row] - last - sinks) // size):
            paid = weights[row, :, :, sinks + block * size :][..., :size].sum(-1)
            for group in range(2):
                expected[row, :, group, block] = paid[:, groups[group].expand(batch, -1)[row]].sum(-1)
    query, key, _, pad, law, scoring = placed_as_cached(tensors, padding, chunk, trained)
    got = chunk_block_scores(query, key, pad, law, scoring, groups, sinks, size, last)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_gradients_are_those_of_the_definition(seed, monkeypatch):
    monkeypatch.setattr(softmax_merge, "ROWS_SCORED", 3)  # queries that are scored together
    tensors, padding, chunk, trained = case(seed)
    emphasis, counts = drawn_emphasis(tensors, seed)
    gradients = []
    for attend in (
        lambda *x: run(x, padding, chunk, trained, emphasis),
        lambda *x: naive(*x, padding, chunk, trained, 0.4, counts),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        weights = torch.randn(leaves[0].shape[:3], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (attend(*leaves).sum(-1) * weights).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


def test_distances_are_true_inside_a_chunk_and_never_beyond_what_was_trained():
    chunk, trained = 6, 8
    i = torch.arange(50)
    seen = ChunkLaw(chunk, trained).distance(i, i)
    causal = i[:, None] >= i
    same = (i[:, None] // chunk == i // chunk) & causal
    assert torch.equal(seen[same], (i[:, None] - i)[same])
    assert seen[causal].max() == trained - 1
    assert seen[causal].min() == 0
    # Across a chunk's edge too, as long as the trained positions last.
    near = causal & (i[:, None] - i < trained - chunk) & (i[:, None] % chunk < trained - chunk)
    assert torch.equal(seen[near], (i[:, None] - i)[near])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_tensor_may_learn_where_the_others_stand_still(which, seed):
    tensors, padding, chunk, trained = case(seed)
    gradients = []
    for attend in (run, lambda *a: naive(*a[0], *a[1:], 0.4)):
        mine = [tensor.clone().requires_grad_(place == which) for place, tensor in enumerate(tensors)]
        attend(mine, padding, chunk, trained).square().sum().backward()
        gradients.append(mine[which].grad)
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_with_null_logits_and_a_soft_cap(softcap, monkeypatch):
    monkeypatch.setattr(softmax_merge, "ROWS_SCORED", 3)

    def merged(q, k, v, null):
        parts = AttentionPart(q, k[:, :, :5], v[:, :, :5]), AttentionPart(q, k[:, :, 5:], v[:, :, 5:], "causal")
        return merge_attention(parts, Scoring(0.4, softcap, null_logits=null))

    def in_one(q, k, v, null):
        scores = 0.4 * q @ k.repeat_interleave(2, 1).mT
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(torch.ones(7, 12, dtype=torch.bool).triu(6), -torch.inf)
        scores = torch.cat([scores, null[:, None, None].expand(2, -1, 7, 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)

    sizes = (2, 4, 7, 6), (2, 2, 12, 6), (2, 2, 12, 6), (4,)
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in sizes]
    outputs = [attend(*leaves) for attend in (merged, in_one)]
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(merged(*leaves), outputs[1], rtol=0, atol=1e-12)
    for ours, expected in zip(*(torch.autograd.grad(each.square().sum(), leaves) for each in outputs), strict=True):
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_errs_like_one_call(dtype):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 90, 8, generator=draw).to(dtype) for heads in (4, 2, 2))
    parts = [
        AttentionPart(query, key[:, :, :40], value[:, :, :40]),
        AttentionPart(query, key[:, :, 40:], value[:, :, 40:]),
    ]
    together = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3, enable_gqa=True
    )
    one = merge_attention([AttentionPart(query, key, value)], Scoring(0.3)).double()
    error, bound = (merge_attention(parts, Scoring(0.3)).double() - together).abs().max(), (one - together).abs().max()
    assert error <= 2 * bound + torch.finfo(dtype).eps * together.abs().max()
