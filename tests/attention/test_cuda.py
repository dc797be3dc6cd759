"""LM-Infinite on a GPU: every path against the definition, and decoding as a CUDA graph. Skipped without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.rope import Rotation

from .reference import Naive, Rope, lambda_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
N, DIM, S, L = 1100, 64, 4, 96  # long enough for "auto" to take FlexAttention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("path", ["auto", "sdpa", "eager", "flex"])
def test_every_path_is_the_reference(path, padding, dtype, tolerance):
    torch.manual_seed(0)
    rotation = Rotation(10000 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
    query, key, value = (torch.randn(1, heads, N, DIM).to(dtype).cuda() for heads in (4, 2, 2))
    i = torch.arange(N, device="cuda")[None] - padding
    turned, keys = rotation.rotate(query, i), rotation.rotate(key, i)
    first = slice(padding, padding + S)
    got = lambda_attention(
        *(turned, keys, value, i, i),
        sinks=(keys[:, :, first], value[:, :, first]),
        window=L,
        max_distance=L,
        scoring=Scoring(DIM**-0.5),
        rotation=rotation,
        path=path,
        is_padded=padding > 0,
    )
    naive = Naive(S, L, L, Rope(DIM))
    expected = naive(*(x[0, :, padding:].double().cpu() for x in (query, key, value)), DIM**-0.5)
    assert (got[0, :, padding:].double().cpu() - expected).abs().max() < tolerance


def test_decoding_as_a_cuda_graph_is_decoding():
    program = """
import torch
from hf_longtrunc import LMInfinite
from tests.attention.tiny_models import tiny_model
model = tiny_model("llama").requires_grad_(False).cuda()
prompts = [torch.randint(3, 90, (2, n), device="cuda") for n in (15, 40)]
with LMInfinite(num_sink_tokens=3, window_length=10)(model) as handle:
    plain = [model.generate(ids, max_new_tokens=60, do_sample=False) for ids in prompts]
    handle.compile(mode="reduce-overhead")
    for _ in range(2):
        for ids, answer in zip(prompts, plain):
            assert torch.equal(model.generate(ids, max_new_tokens=60, do_sample=False), answer)
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
