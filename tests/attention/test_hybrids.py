"""Models that attend in some layers and carry a state in others: attention is the definition, states are states.

Eleven architectures: linear attention, Mamba, short convolutions; in layers of their own, or in one with attention.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

from hf_longtrunc import DualChunkAttention, LambdaCacheLayer, LMInfinite, TopBlocks, TopK
from hf_longtrunc.evaluation import cache_bytes
from hf_longtrunc.models import CACHE, cache_of

from .reference import Naive, NaiveTopK, Rope, install
from .test_dual_chunk_attention import ARM, NaiveChunks
from .test_lm_infinite import SETTINGS, L, S, in_chunks, logits, prompt, ring_cache
from .test_seams import padded
from .tiny_models import tiny_model

# What an unpatched model's cache loses beside no cache, relative to its largest logit.
HYBRIDS = {
    "qwen3_next": 1e-4, "qwen3_5_text": 1e-4, "granitemoehybrid": 1e-5, "falcon_h1": 1e-5, "bamba": 1e-5,
    "jamba": 2e-5, "lfm2": 1e-5, "nemotron_h": 1e-5, "kimi_linear": 1e-4, "olmo_hybrid": 1e-5, "zamba2": 1e-4,
}  # fmt: skip
GREEDY = {"do_sample": False, "suppress_tokens": [0]}


@functools.cache
def model_of(family):
    return tiny_model(family).requires_grad_(False)


def rope_of(model):
    """Rotary positions in halves, of as many dimensions as the model has frequencies for; None where it has none."""
    frequencies = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    return Rope(2 * len(frequencies[0]), frequencies=frequencies[0]) if frequencies else None


def defined(family, ids, make):
    """Logits of an unpatched model whose attention is computed pair by pair by `make(rope)`."""
    model = tiny_model(family).requires_grad_(False)
    install(model, make(rope_of(model)), "naive_hybrid")
    return logits(model, ids, use_cache=False)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_patched_hybrid_is_the_definition_in_its_attention_alone(family):
    model, ids = model_of(family), prompt(batch=2)
    before = logits(model, ids, use_cache=False)
    expected = defined(family, ids, lambda rope: Naive(S, L, L, rope))
    with SETTINGS(model):
        patched = logits(model, ids, use_cache=False)
    assert relative(patched, expected) < 1e-5
    assert relative(patched[:, :L], before[:, :L]) < 1e-5
    assert (patched - before)[:, L:].abs().max() > 1e-2
    assert torch.equal(logits(model, ids, use_cache=False), before)


@pytest.mark.parametrize("family", HYBRIDS)
def test_generating_with_its_cache_is_computing_anew(family):
    """One row of two is padded: what it says is what it says alone; beams go on from the right states."""
    model, ids = model_of(family), prompt(2 * L, batch=2)
    wide, mask = padded(ids, 7)
    wide[1], mask = prompt(len(wide[0]))[0], torch.cat([mask[:1], torch.ones_like(mask[1:])])
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    with SETTINGS(model):
        both = model.generate(wide, attention_mask=mask, **options)
        alone = model.generate(ids[:1], **options)
        anew = logits(model, both.sequences[1:], use_cache=False)[0, wide.shape[1] - 1 : -1]
        beams = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 3, **GREEDY}
        assert torch.equal(model.generate(wide, **beams), model.generate(wide, use_cache=False, **beams))
    said, scale = torch.stack(both.logits, dim=1), float(anew.abs().max())
    assert any(isinstance(layer, LambdaCacheLayer) for layer in cache_of(both).layers)
    assert (said[1] - anew).abs().max() < HYBRIDS[family] * scale
    assert (said[0] - torch.stack(alone.logits, dim=1)[0]).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family != "jamba"])
def test_any_chunks_go_on_from_ring_and_state(family):
    model, ids = model_of(family), prompt(37)
    with SETTINGS(model):
        whole = logits(model, ids, use_cache=False)
        for cache in (ring_cache(model), DynamicCache(config=model.config)):
            parts = in_chunks(model, ids, [13, 1, 1, 9, 13], cache)
            assert (parts - whole).abs().max() < HYBRIDS[family] * whole.abs().max()


@pytest.mark.parametrize("family", HYBRIDS)
def test_bytes_of_the_cache_do_not_grow(family):
    model = model_of(family)
    with SETTINGS(model):
        cache = ring_cache(model)
        logits(model, prompt(40), cache=cache)
        first = cache_bytes(cache)
        states = [state for layer in cache.layers for state in getattr(layer, "recurrent_states", {}).values()]
        assert first > sum(state.nbytes for state in states if state is not None)
        for _ in range(3):
            logits(model, prompt(1), cache=cache)
        assert cache_bytes(cache) == first


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_the_middle_can_be_read_key_by_key(family):
    model, ids = model_of(family), prompt(45)
    reading = TopK(k=2, distance=3, first_layer=0, rows=None)
    expected = defined(family, ids, lambda rope: NaiveTopK(S, L, L, rope, k=2, away=3))
    with LMInfinite(num_sink_tokens=S, window_length=L, retrieval=reading)(model):
        for cache in (None, ring_cache(model), DynamicCache(config=model.config)):
            inputs = {"use_cache": False} if cache is None else {CACHE: cache}
            assert relative(logits(model, ids[:, :33], **inputs), expected[:, :33]) < 1e-5
            if cache is not None:
                assert relative(in_chunks(model, ids[:, 33:], [1, 1, 10], cache), expected[:, 33:]) < 1e-4


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1", "lfm2"])
def test_dual_chunk_attention_serves_hybrids_with_rotary_positions(family):
    model, ids = model_of(family), prompt(40)
    before = logits(model, ids)
    expected = defined(family, ids, lambda rope: NaiveChunks(0, 1, 1, rope))
    with ARM(model):
        assert relative(logits(model, ids, use_cache=False), expected) < 1e-5
        assert relative(in_chunks(model, ids, [20, 1, 19], DynamicCache(config=model.config)), expected) < 1e-4
        wide, mask = padded(ids, 5)
        assert relative(logits(model, wide, attention_mask=mask)[:, 5:], expected) < 1e-5
        with pytest.raises(ValueError, match="pad on the left alone"):
            logits(model, ids, attention_mask=torch.ones(1, 40).index_fill(1, torch.tensor([20]), 0))
    assert torch.equal(logits(model, ids), before)


# -- what a state cannot do ------------------------------------------------------------------------------------------


def test_taking_tokens_back_is_refused_before_anything_changes():
    for family in ("falcon_h1", "olmo_hybrid"):
        changes = {} if family == "falcon_h1" else {"layer_types": ["full_attention", "linear_attention"]}
        model = tiny_model(family, **{"num_hidden_layers": 2, **changes}).requires_grad_(False)
        ids = prompt(41)
        with SETTINGS(model):
            cache = ring_cache(model)
            whole = logits(model, ids[:, :40], cache=cache)
            kept = copy.deepcopy(cache)
            with pytest.raises(ValueError, match="carry a state of all"):
                cache.crop(-3)
            after = [logits(model, ids[:, 40:], cache=each) for each in (cache, kept)]
            assert torch.equal(*after)
            assert whole.isfinite().all()
        with pytest.raises(ValueError, match="take TopK"):
            LMInfinite(retrieval=TopBlocks(first_layer=0, first_voting_layer=0)).attach(model)


def test_convolutions_alone_take_drafts_back():
    model, ids = model_of("lfm2"), prompt(8).repeat(1, 6)
    with SETTINGS(model):
        greedy = model.generate(ids, max_new_tokens=16, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=5, **GREEDY), greedy)
        cache = ring_cache(model)
        logits(model, ids, cache=cache)
        with pytest.raises((ValueError, RuntimeError), match="activate_past_recording"):
            cache.crop(-1)


def test_recurrent_layers_refuse_drafts_in_words():
    model = model_of("qwen3_next")
    with SETTINGS(model), pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(prompt(), max_new_tokens=4, prompt_lookup_num_tokens=3, **GREEDY)


def test_layers_that_forget_in_a_second_forward_are_fed_whole_prompts_or_single_tokens(monkeypatch):
    monkeypatch.setattr("hf_longtrunc.LMInfinite.prefill_chunk", 16)
    model, ids = model_of("jamba"), prompt(50)
    with SETTINGS(model):
        expected = model.generate(ids, max_new_tokens=5, use_cache=False, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=5, **GREEDY), expected)
        cache = ring_cache(model)
        whole = logits(model, ids, use_cache=False)
        parts = in_chunks(model, ids, [30] + [1] * 20, cache)
        assert relative(parts, whole) < 1e-5
        with pytest.raises(ValueError, match="forget their state in a forward of several tokens"):
            logits(model, prompt(2), cache=cache)


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_padding_stands_on_the_left_alone(family):
    model, ids = model_of(family), prompt(20)
    mask = torch.ones(1, 20, dtype=torch.long)
    with SETTINGS(model):
        for column in (19, 8):
            with pytest.raises(ValueError, match="pad on the left alone"):
                logits(model, ids, attention_mask=mask.index_fill(1, torch.tensor([column]), 0))
        cache = ring_cache(model)
        with pytest.raises(ValueError, match="this one token of a row is padding"):
            logits(model, ids[:, :1], attention_mask=torch.zeros(1, 1), cache=cache)


def test_absolute_positions_among_states_are_refused():
    """No transformers hybrid adds them; one that did would not be limited wrongly."""
    model = tiny_model("lfm2").requires_grad_(False)
    table = torch.randn(64, 32)

    def add_positions(module, args, kwargs):
        positions = kwargs.get("position_ids")
        positions = torch.arange(kwargs["input_ids"].shape[1]) if positions is None else positions
        return args, kwargs | {
            "inputs_embeds": module.embed_tokens(kwargs["input_ids"]) + table[positions],
            "input_ids": None,
        }

    model.model.register_forward_pre_hook(add_positions, with_kwargs=True)
    with pytest.raises(ValueError, match="no rotation of planes"):
        SETTINGS.attach(model)


def test_dual_chunk_attention_needs_rotary_positions_in_hybrids_too():
    with pytest.raises(ValueError, match="has rotary positions"):
        DualChunkAttention(chunk_length=5, trained_length=9).attach(model_of("jamba"))
