from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_longtrunc import LMInfinite
from hf_longtrunc.evaluation import cache_bytes, read_ahead, start_stream, token_losses
from hf_longtrunc.evaluation.streaming import greedy_answer
from hf_longtrunc.models import CACHE


def test_a_stream_starts_with_the_cache_and_logits_of_a_forward(tiny_model):
    ids = torch.randint(97, (2, 9))
    cache, logits = start_stream(tiny_model, ids)
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(logits[:, 0], tiny_model(ids).logits[:, -1])


@pytest.mark.parametrize("chunk", [1, 40, 90, 100])
def test_a_text_that_was_read_ahead_is_asked_about_as_if_it_were_read_with_the_question(tiny_model, chunk):
    ids = torch.randint(97, (1, 90))
    question = [5, 17, 4]
    with LMInfinite(num_sink_tokens=2, window_length=16)(tiny_model):
        expected = greedy_answer(tiny_model, [*ids[0].tolist(), *question], 6)
        cache = read_ahead(tiny_model, ids, chunk=chunk)
        assert cache.get_seq_length() == 90
        prompt = torch.cat([ids, torch.tensor([question])], dim=1)
        answer = tiny_model.generate(
            prompt, attention_mask=torch.ones_like(prompt), **{CACHE: cache}, max_new_tokens=6, do_sample=False
        )[0, 93:]
    assert answer.tolist() == expected.tolist()


def test_a_text_is_read_on_from_a_cache(tiny_model):
    ids = torch.randint(97, (1, 50))
    whole = read_ahead(tiny_model, ids, chunk=50)
    parts = read_ahead(tiny_model, ids[:, 20:], chunk=7, cache=read_ahead(tiny_model, ids[:, :20], chunk=9))
    for ours, expected in zip(parts.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours.keys, expected.keys)


def test_bytes_of_a_cache_are_those_of_its_tensors():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 4), layer)
    assert cache_bytes(cache) == 3 * (2 * 5 * 8 + 2 * 5 * 4) * 4


def test_an_unmodified_cache_grows_and_a_patched_one_does_not(tiny_model):
    short, long = torch.randint(97, (1, 100)), torch.randint(97, (1, 200))
    assert cache_bytes(start_stream(tiny_model, long)[0]) == 2 * cache_bytes(start_stream(tiny_model, short)[0])
    with LMInfinite(num_sink_tokens=2, window_length=8)(tiny_model):
        caches = [start_stream(tiny_model, ids)[0] for ids in (short, long)]
    patched = [cache_bytes(cache) for cache in caches]
    (layer, *_), kept = caches[0].layers, caches[0].layers[0].ROLLBACK
    heads, dim = layer.keys.shape[1], layer.keys.shape[3]
    assert patched[0] == len(caches[0].layers) * (2 * (2 + 8 + kept) + 2) * heads * dim * 4  # and the sinks unrotated
    assert patched[0] == patched[1] < cache_bytes(start_stream(tiny_model, short)[0])


def test_bytes_of_a_ring_are_those_of_all_that_it_keeps(tiny_model):
    with LMInfinite(num_sink_tokens=2, window_length=8)(tiny_model):
        cache, _ = start_stream(tiny_model, torch.randint(97, (1, 100)))
    heads, dim = cache.layers[0].keys.shape[1::2]
    kept = 2 * (2 + 8 + cache.layers[0].ROLLBACK) + 2  # slots and rollback buffer; unrotated sinks
    assert cache_bytes(cache) == len(cache.layers) * heads * dim * kept * 4


@pytest.mark.parametrize("chunk", [1, 5, 32, 300])
def test_losses_under_lm_infinite_do_not_depend_on_the_chunks(tiny_model, chunk):
    ids = torch.randint(97, (2, 150))
    plain = token_losses(tiny_model, ids)
    with LMInfinite(num_sink_tokens=3, window_length=20)(tiny_model):
        logits = tiny_model(ids, use_cache=False).logits
        losses = token_losses(tiny_model, ids, chunk=chunk)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, atol=3e-5, rtol=0)
    torch.testing.assert_close(losses[:, :20], plain[:, :20], atol=3e-5, rtol=0)
    assert (losses[:, 20:] - plain[:, 20:]).abs().max() > 0.1
