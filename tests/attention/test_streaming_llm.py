"""StreamingLLM: positions within the cache, on models and against the definition pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import DynamicCache

from hf_longtrunc import LMInfinite, StreamingLLM
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.rope import Rotation
from hf_longtrunc.models import cache_of

from .reference import Naive, Rope, install, lambda_attention
from .test_lm_infinite import FAMILIES, L, N, S, in_chunks, logits, model_of, naive_bloom_logits, prompt, ring_cache
from .test_seams import padded

ARM = StreamingLLM(num_sink_tokens=S, window_length=L)
ROPES = {
    "llama": Rope(8),
    "qwen3": Rope(8),
    "gemma3_text": Rope(8, base=1e6),
    "gpt_neox": Rope(4),
    "cohere": Rope(8, pairs=True, base=5e5),
    "gptj": Rope(4, pairs=True),
}


def naive(rope=None, sinks=S, window=L):
    """The largest distance of sink j is S + L - 1 - j: the cache holds S + L tokens, the query's own the last."""
    return Naive(sinks, window, sinks + window - 1, rope, spacing=1)


@given(
    n=st.integers(1, 40),
    sinks=st.integers(0, 6),
    window=st.integers(1, 12),
    block=st.integers(1, 16),
    path=st.sampled_from(["split", "sdpa", "eager"]),
    seed=st.integers(0, 99),
)
def test_every_path_is_the_reference(n, sinks, window, block, path, seed):
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2))
    rotation = Rotation(10000 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    i, sinks = torch.arange(n)[None], min(sinks, n)
    turned, keys = rotation.rotate(query, i), rotation.rotate(key, i)
    far = (keys[:, :, :sinks], value[:, :, :sinks]) if sinks else None
    got = lambda_attention(
        turned, keys, value, i, i, sinks=far, window=window, max_distance=sinks + window - 1, spacing=1,
        scoring=Scoring(0.4), rotation=rotation, path=path, block_size=block,
    )  # fmt: skip
    expected = naive(Rope(8), sinks, window)(query[0], key[0], value[0], 0.4)
    assert (got[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_is_the_definition_by_every_path(family):
    ids = prompt(N)
    reference = model_of(family).double()
    if family == "bloom":
        expected = naive_bloom_logits(reference, ids, naive())
    else:
        install(reference, naive(ROPES[family]), f"naive_streaming_{family}")
        expected = logits(reference, ids)
    model, close = model_of(family), 3e-5 * max(1.0, float(expected.abs().max()))
    before = logits(model, ids)
    wide, mask = padded(ids, 3)
    with ARM(model):
        for got in (
            logits(model, ids),
            in_chunks(model, ids, [9, 1, 1, N - 17, 5, 1], ring_cache(model)),
            in_chunks(model, ids, [1] * N, ring_cache(model)),
            in_chunks(model, ids, [N - 2, 1, 1], DynamicCache(config=model.config)),
            logits(model, wide, attention_mask=mask)[:, 3:],
        ):
            assert (got - expected).abs().max() < close
    assert (expected[:, : S + L] - before[:, : S + L]).abs().max() < close
    assert torch.equal(logits(model, ids), before)


def test_it_is_not_lm_infinite_past_the_window_and_the_model_itself_up_to_the_caches_length():
    model, ids = model_of("llama"), prompt(N)
    before = logits(model, ids)
    with ARM(model):
        streaming = logits(model, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        other = logits(model, ids)
    assert (streaming - other)[:, S + L :].abs().max() > 1e-2
    assert (streaming - before)[:, : S + L].abs().max() < 1e-4
    assert StreamingLLM().for_model(model).window_length == model.config.max_position_embeddings - 4


def test_a_long_generation_keeps_a_cache_of_constant_size():
    model, ids = model_of("llama"), prompt(N)
    with ARM(model):
        output = model.generate(ids, max_new_tokens=3 * L, do_sample=False, return_dict_in_generate=True)
        whole = logits(model, output.sequences)
    assert cache_of(output).layers[0].keys.shape[2] == S + L
    assert torch.equal(whole[0, N - 1 : -1].argmax(-1), output.sequences[0, N:])
