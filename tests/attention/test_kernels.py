"""The kernels for CUDA that are off until a GPU has measured them, against the definition, here on a CPU.

PyTorch's is stood in for by what its documentation says, Triton's runs in Triton's interpreter:

    pip install triton && TRITON_INTERPRET=1 pytest -n 0 tests/attention/test_kernels.py
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from hf_longtrunc.attention import lambda_attention as paths
from hf_longtrunc.attention.lambda_attention import Scoring, lambda_attention
from hf_longtrunc.attention.rotary import Rotation

from .reference import Naive, Rope

varlen = pytest.importorskip("hf_longtrunc.attention.varlen", exc_type=ImportError)  # of a newer torch
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton, and TRITON_INTERPRET=1")
KERNELS = ["varlen", pytest.param("triton", marks=NEEDS_TRITON)]


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, window_size, enable_gqa):
    """`varlen_attn` as torch documents it, but for the shape of the log-sum-exp, which is its kernel's, in fp64."""
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    assert return_aux.lse
    assert query.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    output, sums = torch.zeros_like(query), torch.zeros(query.shape[1], len(query))
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    for a, b, c, d in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        assert 0 <= b - a <= max_q
        assert 0 <= d - c <= max_k
        scores = torch.einsum("qhd,khd->hqk", query[a:b].double(), key[c:d]) * scale
        away = (torch.arange(b - a) + (d - c) - (b - a))[:, None] - torch.arange(d - c)
        scores = scores.masked_fill((away > window_size[0]) | (-away > window_size[1]), -torch.inf)
        output[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[c:d]).to(query.dtype)
        sums[:, a:b] = scores.logsumexp(-1)
    return output, sums


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Let the paths be taken without a device, and in single precision, which is exact enough to see every fault."""
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    monkeypatch.setattr(paths, "choose_path", lambda path, *_: path)


def attended(path, lengths, n, *, heads, dim, width, sinks, window, ceiling, rotation):
    """The last n queries of left-padded rows of so many tokens, and what each row's definition says."""
    m = max(lengths)
    query, key, value = (torch.randn(len(lengths), h, m, d) for h, d in zip(heads, (dim, dim, width), strict=True))
    padding = torch.tensor([m - length for length in lengths])[:, None]
    i = torch.arange(m)[None] - (padding if padding.any() else 0)
    turned = (query, key) if rotation is None else (rotation.rotate(query, i), rotation.rotate(key, i))
    columns = (torch.arange(sinks) + padding).clamp_max(m - 1)[:, None, :, None]
    far = [x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (turned[1], value)]
    got = lambda_attention(
        turned[0][:, :, m - n :], turned[1], value, i[:, m - n :], i, sinks=tuple(far) if sinks else None,
        window=window, max_distance=ceiling, scoring=Scoring(0.4), rotation=rotation, path=path,
        is_padded=bool(padding.any()),
    )  # fmt: skip
    assert got.shape == (len(lengths), heads[0], n, width)
    assert got.isfinite().all()
    rope = None
    if rotation is not None:
        rope = Rope(2 * len(rotation.frequencies), rotation.layout == "pairs", frequencies=rotation.frequencies)
    for row, length in enumerate(lengths):
        real = [x[row, :, m - length :] for x in (query, key, value)]
        expected = Naive(min(sinks, length), window, ceiling, rope)(*real, 0.4)
        shown = min(n, length)
        yield got[row, :, n - shown :].double(), expected[:, length - shown :]


ROTATION = Rotation(10000 ** -(torch.arange(0, 12, 2, dtype=torch.float64) / 12))
PAIRS = Rotation(ROTATION.frequencies[:4], "pairs")


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("rotation", [ROTATION, PAIRS, None])
@pytest.mark.parametrize(
    ("lengths", "n", "sinks", "window", "ceiling"),
    [
        ([70], 70, 3, 20, 20),
        ([70, 41, 9], 70, 3, 20, 26),  # left padding, and sinks that are near
        ([70, 30], 12, 3, 20, 20),  # a past
        ([5], 5, 5, 40, 40),
        ([50], 50, 0, 7, 7),
        ([60], 60, 20, 1, 3),  # more sinks than are scored together
    ],
)
def test_a_kernel_is_the_definition(path, lengths, n, sinks, window, ceiling, rotation):
    options = {"heads": (6, 2, 2), "dim": 12, "width": 12, "rotation": rotation}
    for got, expected in attended(path, lengths, n, sinks=sinks, window=window, ceiling=ceiling, **options):
        assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("path", KERNELS)
def test_widths_that_differ_and_odd_groups(path):
    options = {"sinks": 2, "window": 9, "ceiling": 9, "rotation": ROTATION}
    for dim, width in ((12, 5), (12, 20)):
        for got, expected in attended(path, [40, 21], 40, heads=(9, 3, 3), dim=dim, width=width, **options):
            assert (got - expected).abs().max() < 1e-5


@NEEDS_TRITON
def test_blocks_that_every_query_sees_take_no_mask():
    """Long enough that all three kinds of blocks of the kernel occur."""
    for got, expected in attended(
        "triton", [400, 150], 400, heads=(2, 1, 1), dim=12, width=12, sinks=4, window=170, ceiling=170,
        rotation=ROTATION,
    ):  # fmt: skip
        assert (got - expected).abs().max() < 1e-5


@NEEDS_TRITON
def test_half_precision():
    """Not bfloat16, which Triton's interpreter multiplies wrongly."""
    from hf_longtrunc.attention.fused import fused_lambda_attention

    query, key, value = (torch.randn(1, heads, 90, 16).half() for heads in (4, 2, 2))
    settings = (torch.arange(90)[None], (key[:, :, :3], value[:, :, :3]), 20, 20, 0.4, None)
    got, wide = fused_lambda_attention(query, key, value, *settings), (x.double() for x in (query, key, value))
    expected = Naive(3, 20, 20)(*(x[0] for x in wide), 0.4)
    assert got.dtype == torch.float16
    assert (got[0].double() - expected).abs().max() < 4 * torch.finfo(torch.float16).eps
