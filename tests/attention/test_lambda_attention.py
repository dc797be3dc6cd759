"""The pure core against its definition, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from hf_longtrunc.attention import softmax_merge
from hf_longtrunc.attention.kernels import Scoring, eager_attention, sdpa_attention
from hf_longtrunc.attention.lambda_attention import SinkWindowLaw, resolve_path
from hf_longtrunc.attention.rope import Rotation

from .reference import Naive, Rope, is_visible, lambda_attention

DIM = 8
FREQUENCIES = 10000 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
ROTATION, ROPE = Rotation(FREQUENCIES), Rope(DIM)


def states(n, heads=4, kv_heads=2, dtype=torch.float64, value_dim=DIM, batch=1):
    query = torch.randn(batch, heads, n, DIM, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, n, DIM, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, n, value_dim, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (query, key, value))


def ours(query, key, value, sinks, window, max_distance, scoring, rotation=ROTATION, offset=0, **options):
    """Rotate as a model would, from position `offset` on, and attend."""
    i = torch.arange(query.shape[2])[None]
    if rotation is not None:
        query, key = rotation.rotate(query, i), rotation.rotate(key, i)
    far = (key[:, :, :sinks], value[:, :, :sinks]) if sinks else None
    return lambda_attention(
        query,
        key,
        value,
        i,
        i,
        sinks=far,
        window=window,
        max_distance=max_distance,
        scoring=scoring,
        rotation=rotation,
        **options,
    )


def test_mask_and_distance_are_their_definitions():
    i = torch.arange(23)
    for sinks, window, ceiling in [(0, 1, 1), (3, 5, 5), (3, 5, 9), (7, 2, 2), (30, 4, 8)]:
        for spacing, most in ((0, ceiling), (1, sinks + window - 1)):
            law, naive = SinkWindowLaw(sinks, window, most, spacing), Naive(sinks, window, most, spacing=spacing)
            seen, away = law.visible(i, i), law.distance(i, i)
            for a in range(23):
                for b in range(a + 1):
                    assert bool(seen[a, b]) == is_visible(a, b, sinks, window)
                    assert int(away[a, b]) == naive.distance(a, b)


def test_a_row_attends_to_as_many_keys_as_the_definition_says():
    i = torch.arange(50)
    counts = SinkWindowLaw(3, 10, 10).visible(i, i).sum(-1).tolist()
    assert counts == [min(n + 1, 10) + min(3, max(0, n - 10 + 1)) for n in range(50)]


@given(
    n=st.integers(1, 40),
    sinks=st.integers(0, 6),
    window=st.integers(1, 12),
    extra=st.integers(0, 5),
    block=st.integers(1, 16),
    path=st.sampled_from(["split", "sdpa", "eager"]),
    value_dim=st.sampled_from([4, 8, 12]),
    seed=st.integers(0, 99),
)
def test_every_path_is_the_reference(n, sinks, window, extra, block, path, value_dim, seed):
    torch.manual_seed(seed)
    query, key, value = states(n, value_dim=value_dim)
    sinks = min(sinks, n)
    got = ours(query, key, value, sinks, window, window + extra, Scoring(0.4), path=path, block_size=block)
    expected = Naive(sinks, window, window + extra, ROPE)(query[0], key[0], value[0], 0.4)
    assert (got[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("block", [1, 4, 7, 18, 19])
@pytest.mark.parametrize(("sinks", "ceiling"), [(0, 20), (3, 20), (3, 33), (25, 20)])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_blocks_without_masks_see_what_the_definition_says(has_kernel, block, sinks, ceiling, monkeypatch):
    """Also where torch's kernel is not used: before 2.13 it is wrong for some shapes."""
    monkeypatch.setattr(softmax_merge, "_KERNEL_IS_TRIED", has_kernel)
    query, key, value = states(61)
    settings = (sinks, 20, ceiling, Scoring(0.3))
    whole = ours(query, key, value, *settings, path="eager")
    assert (ours(query, key, value, *settings, path="split", block_size=block) - whole).abs().max() < 1e-12
    i, turn = torch.arange(61)[None], ROTATION.rotate
    query, key = turn(query, i), turn(key, i)
    far = (key[:, :, :sinks], value[:, :, :sinks]) if sinks else None
    later = lambda_attention(  # the last 30, over the keys that a cache hands out
        query[:, :, 31:],
        key[:, :, 12:],
        value[:, :, 12:],
        i[:, 31:],
        i[:, 12:],
        sinks=far,
        window=20,
        max_distance=ceiling,
        scoring=settings[-1],
        rotation=ROTATION,
        path="split",
        block_size=block,
    )
    assert (later - whole[:, :, 31:]).abs().max() < 1e-12


@pytest.mark.parametrize("path", ["split", "sdpa", "eager"])
def test_single_precision(path):
    query, key, value = states(60, dtype=torch.float32)
    got = ours(query, key, value, 3, 7, 9, Scoring(0.4), path=path, block_size=16)
    expected = Naive(3, 7, 9, ROPE)(query[0], key[0], value[0], 0.4)
    assert (got[0] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("path", ["split", "sdpa", "eager"])
def test_half_precision_errs_no_more_than_twice_what_plain_attention_does(path):
    query, key, value = states(200, heads=8, dtype=torch.bfloat16)
    got = ours(query, key, value, 4, 16, 16, Scoring(0.4), path=path, block_size=32)
    expected = Naive(4, 16, 16, ROPE)(query[0], key[0], value[0], 0.4)
    i = torch.arange(200)
    turned = ROTATION.rotate(query, i[None]), ROTATION.rotate(key, i[None])
    mask = SinkWindowLaw(4, 16, 16).visible(i, i)
    plain = torch.nn.functional.scaled_dot_product_attention(*turned, value, attn_mask=mask, scale=0.4, enable_gqa=True)
    exact = Naive(4, 16, 10**6, ROPE)(query[0], key[0], value[0], 0.4)
    allowed = 2 * (plain[0].double() - exact).square().mean().sqrt()
    assert (got[0].double() - expected).square().mean().sqrt() < allowed


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 0.7},
        {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.01], dtype=torch.float64)},
        {"null_logits": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    ],
)
def test_soft_capping_slopes_and_null_logits(changes):
    query, key, value = states(40)
    rotation, rope = (None, None) if "slopes" in changes else (ROTATION, ROPE)
    got = ours(query, key, value, 3, 6, 8, Scoring(0.4, **changes), rotation, block_size=8)
    slopes = changes.pop("slopes", None)
    expected = Naive(3, 6, 8, rope, slopes)(query[0], key[0], value[0], 0.4, **changes)
    assert (got[0] - expected).abs().max() < 1e-12


def test_a_left_padded_row_is_the_row_alone():
    query, key, value = states(30, batch=2)
    padding = torch.tensor([0, 11])
    i = torch.arange(30)[None] - padding[:, None]
    columns = (torch.arange(3)[None] + padding[:, None])[:, None, :, None].expand(2, 2, 3, DIM)
    turned = ROTATION.rotate(query, i), ROTATION.rotate(key, i)
    far = turned[1].gather(2, columns), value.gather(2, columns)
    for path in ("split", "sdpa", "eager"):
        got = lambda_attention(
            *turned, value, i, i, sinks=far, window=5, max_distance=7, scoring=Scoring(0.4), rotation=ROTATION,
            path=path, block_size=8,
        )  # fmt: skip
        alone = Naive(3, 5, 7, ROPE)(query[1, :, 11:], key[1, :, 11:], value[1, :, 11:], 0.4)
        assert (got[1, :, 11:] - alone).abs().max() < 1e-12
        assert got.isfinite().all()


def test_one_query_over_keys_in_any_order():
    query, key, value = states(20)
    order = torch.randperm(20)
    j = torch.arange(20)[order]
    last = query[:, :, -1:]
    away = (19 - j).clamp_max(9)
    turned = ROTATION.rotate(key[:, :, order], -away[None])
    seen = SinkWindowLaw(3, 6, 6).visible(torch.tensor([19]), j)[None]
    expected = Naive(3, 6, 9, ROPE)(query[0], key[0], value[0], 0.4)[:, -1:]
    for got in (
        sdpa_attention(last, turned, value[:, :, order], seen, Scoring(0.4), None),
        eager_attention(last, turned, value[:, :, order], seen, Scoring(0.4), None, None, None),
    ):
        assert (got[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("path", ["split", "sdpa", "eager"])
def test_gradients_are_the_references(path):
    query, key, value = (x.requires_grad_() for x in states(30))
    weight = torch.randn(4, 30, DIM, dtype=torch.float64)
    got = ours(query, key, value, 3, 6, 8, Scoring(0.4), path=path, block_size=8)
    expected = Naive(3, 6, 8, ROPE)(query[0], key[0], value[0], 0.4)
    inputs = (query, key, value)
    for mine, theirs in zip(
        torch.autograd.grad((got[0] * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert (mine - theirs).abs().max() < 1e-12


def test_no_score_outside_the_window_is_ever_computed(monkeypatch):
    """Linear time: the key blocks that the kernel is handed add up to n (S + L) and a block's width."""
    widths = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counting(query, key, *args, **kwargs):
        widths.append((query.shape[2], key.shape[2]))
        return kernel(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    query, key, value = states(400, dtype=torch.float32)
    ours(query, key, value, 4, 20, 20, Scoring(0.4), path="sdpa", block_size=10)
    assert sum(rows for rows, _ in widths) == 400
    assert max(columns for _, columns in widths) == 4 + 20 - 1 + 10


@pytest.mark.parametrize(
    ("n", "sinks", "window"), [(5, 3, 40), (400, 0, 40), (400, 3, 270), (300, 130, 20), (200, 3, 1)]
)
def test_flex_attention_is_the_blockwise_path(n, sinks, window):
    query, key, value = states(n, dtype=torch.float32)
    sinks = min(sinks, n)
    settings = (sinks, window, window + 5, Scoring(0.4))
    flex = ours(query, key, value, *settings, path="flex")
    assert (flex - ours(query, key, value, *settings, path="sdpa")).abs().max() < 2e-5


def test_flex_attention_with_padding_and_a_past():
    query, key, value = states(300, batch=2, dtype=torch.float32)
    i = torch.arange(300)[None] - torch.tensor([0, 150])[:, None]
    turned = ROTATION.rotate(query, i)[:, :, 100:], ROTATION.rotate(key, i)
    far = torch.randn(2, 2, 4, DIM), torch.randn(2, 2, 4, DIM)
    settings = {"sinks": far, "window": 30, "max_distance": 30, "scoring": Scoring(0.4), "rotation": ROTATION}
    flex, sdpa = (lambda_attention(*turned, value, i[:, 100:], i, path=path, **settings) for path in ("flex", "sdpa"))
    real = (i[:, 100:] >= 0)[:, None, :, None]
    assert ((flex - sdpa) * real).abs().max() < 2e-5
    assert flex.isfinite().all()


def test_paths_are_named():
    assert resolve_path("auto", Scoring(1.0)) == "sdpa"
    assert resolve_path("auto", Scoring(1.0, softcap=2.0)) == "eager"
    with pytest.raises(ValueError, match="path must be one of"):
        resolve_path("flash", Scoring(1.0))
    with pytest.raises(ValueError, match="use 'eager'"):
        resolve_path("sdpa", Scoring(1.0, softcap=2.0))
    with pytest.raises(ValueError, match="has no attention dropout"):
        resolve_path("flex", Scoring(1.0, dropout=0.1))


def test_rotation_is_exact_at_any_position():
    x = torch.randn(1, 1, 1, DIM, dtype=torch.float64)
    for layout in ("halves", "pairs"):
        rotation = Rotation(FREQUENCIES, layout)
        there = rotation.rotate(x, torch.tensor([[10_000_000]]))
        back = rotation.rotate(there, torch.tensor([[-10_000_000 + 5]]))
        assert (back - rotation.rotate(x, torch.tensor([[5]]))).abs().max() < 1e-8
        assert math.isclose(there.norm(), x.norm(), rel_tol=1e-12)
