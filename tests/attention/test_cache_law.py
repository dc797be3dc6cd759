"""A cache knows under which law it was filled: what goes on is right, what would be wrong is refused."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_longtrunc import CacheLawError, DualChunkAttention, LMInfinite, StreamingLLM, TopBlocks
from hf_longtrunc.attention.cache_law import CacheLaw, check_law
from hf_longtrunc.models import CACHE, cache_of

from .test_lm_infinite import logits, model_of, prompt, ring_cache
from .tiny_models import tiny_model

S, L = 2, 8
CHAT = TopBlocks(blocks=1, block_size=2, voting_rows=2, rows=2, first_layer=0, first_voting_layer=0)
ARMS = {
    "unpatched": lambda model: nullcontext(),
    "lm-infinite": LMInfinite(num_sink_tokens=S, window_length=L),
    "streaming": StreamingLLM(num_sink_tokens=S, window_length=L),
    "chunks": DualChunkAttention(chunk_length=8, trained_length=12),
    "other chunks": DualChunkAttention(chunk_length=9, trained_length=12),
    "chunks with blocks": DualChunkAttention(chunk_length=8, trained_length=12, retrieval=CHAT),
}
SHORT, LONG, NEW = 6, 21, 7


def by_ids(model, tokens, cache):
    return model(tokens, **{CACHE: cache}).logits


def by_decoder(model, tokens, cache):
    return model.lm_head(model.model(tokens, None, None, cache)[0])


DOORS = [by_ids, by_decoder]  # test_pairwise.py has more


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("second", ARMS)
@pytest.mark.parametrize("first", ARMS)
def test_a_cache_goes_on_right_or_is_refused(llama, first, second, door):
    ids = prompt(LONG + NEW)
    with ARMS[second.removesuffix(" with blocks")](llama):
        whole = logits(llama, ids)
    for length in (SHORT, LONG):
        with ARMS[first](llama):
            cache = DynamicCache(config=llama.config)
            logits(llama, ids[:, :length], cache=cache)
        go_on = length == SHORT or first == second or {first, second} == {"chunks", "chunks with blocks"}
        if go_on and "blocks" in first + second:
            continue  # what they select depends on the forwards: tests/attention/test_dual_chunk_attention.py
        with ARMS[second](llama):
            if go_on:
                parts = [door(llama, ids[:, n : n + 1], cache) for n in range(length, LONG)]
                got = torch.cat([*parts, door(llama, ids[:, max(length, LONG) :], cache)], dim=1)
                assert (got - whole[:, length:]).abs().max() < 3e-5 * float(whole.abs().max())
            else:
                with pytest.raises(CacheLawError, match="start anew with a new cache"):
                    door(llama, ids[:, length:], cache)


EIGHT, TWENTY = CacheLaw("one", 8), CacheLaw("another", 20)


@pytest.mark.parametrize(
    ("held", "law", "longest"),  # the longest text that may go on
    [
        (EIGHT, TWENTY, 8),
        (TWENTY, EIGHT, 8),
        (None, TWENTY, 20),
        (TWENTY, None, 20),
        (EIGHT, CacheLaw("one", 8), 99),
        (EIGHT, CacheLaw("one", 9), 8),
        (CacheLaw("one", 0, frequencies=1), CacheLaw("one", 0, frequencies=2), 0),  # one technique on two models
    ],
)
def test_a_cache_goes_on_while_both_laws_read_its_text_alike(held, law, longest):
    for length in (0, 1, 8, 9, 20, 21, 99):
        layer = SimpleNamespace(law=held, get_seq_length=lambda length=length: length)
        if length <= longest:
            check_law(layer, law)
            assert layer.law is law
        else:
            with pytest.raises(CacheLawError, match=f"holds {length} tokens"):
                check_law(layer, law)


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "unpatched"])
def test_after_detach_it_is_refused_and_says_what_to_do(llama, arm):
    ids = prompt(LONG + 1)
    with ARMS[arm](llama):
        made, ring = DynamicCache(config=llama.config), None
        logits(llama, ids[:, :LONG], cache=made)
        if arm in ("lm-infinite", "streaming"):
            ring = ring_cache(llama)
            logits(llama, ids[:, :LONG], cache=ring)
    for cache in filter(None, (made, ring, copy.deepcopy(made), pickle.loads(pickle.dumps(made)))):
        with pytest.raises(CacheLawError, match=type(ARMS[arm]).__name__):
            logits(llama, ids[:, LONG:], cache=cache)


def test_the_sentence_names_both_laws_and_the_way_out(llama):
    cache = DynamicCache(config=llama.config)
    with ARMS["chunks"](llama):
        logits(llama, prompt(LONG), cache=cache)
    words = (
        r"holds 21 tokens that were read by DualChunkAttention\(chunk_length=8, trained_length=12\), and the "
        r"unpatched model reads texts of more than 8 tokens differently: start anew with a new cache, or patch the "
        r"model with DualChunkAttention"
    )
    with pytest.raises(CacheLawError, match=words):
        logits(llama, prompt(1), cache=cache)
    cache.reset()
    assert logits(llama, prompt(LONG), cache=cache).isfinite().all()


def test_a_window_after_a_text_within_it_is_the_window_alone(llama):
    """What a user does who patches late: the first tokens were read without the patch, all that follows with it."""
    ids = prompt(LONG)
    cache = cache_of(llama(ids[:, :L], use_cache=True))
    with ARMS["lm-infinite"](llama):
        got = logits(llama, ids[:, L:], cache=cache)
        assert (got - logits(llama, ids)[:, L:]).abs().max() < 1e-4


def test_caches_of_fixed_shape_are_refused_at_the_start(llama):
    ids = prompt(5)
    for arm in ("lm-infinite", "streaming", "chunks"):
        with ARMS[arm](llama):
            with pytest.raises(ValueError, match="cache_implementation='static' cannot be used"):
                llama.generate(ids, max_new_tokens=2, cache_implementation="static")
            with pytest.raises(ValueError, match="StaticCache"):
                logits(llama, ids, cache=StaticCache(config=llama.config, max_cache_len=64))


def test_positions_of_one_token_that_jump_are_refused(llama):
    ids = prompt(LONG)
    for arm in ("lm-infinite", "streaming", "chunks"):
        with ARMS[arm](llama):
            cache = cache_of(llama(ids[:, :-1], use_cache=True))
            with pytest.raises(ValueError, match="go on from the tokens that the cache holds"):
                logits(llama, ids[:, -1:], cache=cache, position_ids=torch.tensor([[LONG + 5]]))
            logits(llama, ids[:, -1:], cache=cache, position_ids=torch.tensor([[LONG - 1]]))


def test_a_cache_under_two_names_is_refused(llama):
    with ARMS["lm-infinite"](llama), pytest.raises(TypeError, match="pass it once"):
        llama.model(prompt(3), past_key_values=DynamicCache(), cache=DynamicCache())


def test_frequencies_are_part_of_the_law():
    """longrope: the unpatched model caches short texts by its short factors, the patched one by its long ones."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32).requires_grad_(False)
    ids = prompt(12)
    cache = cache_of(model(ids[:, :6], use_cache=True))
    beyond, within = (LMInfinite(num_sink_tokens=S, window_length=length) for length in (64, 16))
    with beyond(model), pytest.raises(CacheLawError, match="the unpatched model"):
        logits(model, ids[:, 6:], cache=cache)
    with within(model):
        assert logits(model, ids[:, 6:], cache=cache).isfinite().all()
