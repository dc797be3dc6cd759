"""Dual chunk attention on models: the definition, whatever the path that leads there; what is short or refused."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_longtrunc import DualChunkAttention, LMInfinite
from hf_longtrunc.attention.dual_chunk import seen_from

from .reference import Naive, Rope, install
from .test_lm_infinite import enable_checkpointing, in_chunks, logits, model_of, prompt
from .tiny_models import tiny_model

CHUNK, TRAINED = 7, 10
ARM = DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED)
ROPES = {
    "llama": Rope(8),
    "mistral": Rope(8),
    "qwen3": Rope(8),
    "gpt_neox": Rope(4),
    "cohere": Rope(8, pairs=True, base=5e5),
    "gptj": Rope(4, pairs=True),
}


@dataclass
class NaiveChunks(Naive):
    """Every pair on its own, at the distance of the definition."""

    def __call__(self, query, key, value, scaling, softcap=None, null_logits=None):
        group, n = query.shape[0] // key.shape[0], query.shape[1]
        key, value = (x.double().repeat_interleave(group, dim=0) for x in (key, value))
        i = torch.arange(n)
        turned = self.rope.turn(query.double()[:, :, None].expand(-1, -1, n, -1), seen_from(i, i, CHUNK, TRAINED))
        scores = ((turned * key[:, None]).sum(-1) * scaling).masked_fill(i > i[:, None], -torch.inf)
        return scores.softmax(-1) @ value


def naive_logits(family, ids):
    model = model_of(family).double()
    install(model, NaiveChunks(0, 1, 1, ROPES[family]), "naive_chunks")
    return logits(model, ids)


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.mark.parametrize("family", ROPES)
def test_a_patched_model_is_the_definition(family):
    ids = prompt(40)
    expected, model = naive_logits(family, ids), model_of(family)
    unpatched = logits(model, ids)
    with ARM(model):
        patched = logits(model, ids)
        shorter = logits(model, ids[:, :CHUNK])
    assert (patched - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert (patched - unpatched)[:, TRAINED:].abs().max() > 1e-2
    assert torch.equal(shorter, logits(model, ids[:, :CHUNK]))
    assert torch.equal(unpatched, logits(model, ids))


@pytest.mark.parametrize("family", ["deepseek_v3", "falcon", "phi3", "glm"])
def test_other_layouts_go_on_from_their_cache(family):
    """Latent attention, a forward of our own, fused projections, partial rotation."""
    model, ids = tiny_model(family).requires_grad_(False), prompt(33)
    with ARM(model):
        whole = logits(model, ids)
        parts = in_chunks(model, ids, [5, 9, 1, 1, 17], DynamicCache(config=model.config))
    assert (whole - parts).abs().max() < 2e-5 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_short_text_is_the_unmodified_model_to_the_bit(llama, attention):
    llama.set_attn_implementation(attention)
    ids = torch.cat([prompt(2), prompt(3)], dim=1).repeat(2, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    before = logits(llama, ids, attention_mask=mask, position_ids=positions)
    with ARM(llama):
        assert torch.equal(logits(llama, ids, attention_mask=mask, position_ids=positions), before)


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_are_each_row_alone(llama, seed):
    """Chunks, single tokens, crops, rows repeated and reordered, left padding of one row too, a patch anew."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows = draw.randint(1, 3)
    padding = [draw.choice([0, 0, draw.randint(1, 12)]) for _ in range(rows)]
    ids, cache, handle = torch.randint(3, 90, (rows, 70)), DynamicCache(), ARM(llama)
    pad = torch.tensor(padding)[:, None]
    seen = 0
    while seen < 45:
        new = draw.choice([1, 1, draw.randint(2, 19)])
        new = min(new, ids.shape[1] - seen)
        mask = (torch.arange(seen + new)[None] >= pad).long()
        got = logits(llama, ids[:, seen : seen + new], cache=cache, attention_mask=mask, use_cache=True)
        seen += new
        event = draw.choice(["", "", "crop", "reorder", "again"])
        for row in range(len(ids)):
            first = int(pad[row])
            if seen <= first:
                continue
            alone = logits(llama, ids[row : row + 1, first:seen])[0]
            kept = alone[-new:] if seen - first >= new else alone
            assert (got[row, new - len(kept) :] - kept).abs().max() < 3e-5
        if event == "crop" and seen > 14:
            cache.crop(-draw.randint(1, 12))
            seen = cache.get_seq_length()
        elif event == "reorder":
            order = torch.tensor([draw.randrange(len(ids)) for _ in range(len(ids))])
            cache.reorder_cache(order)
            ids, pad = ids[order], pad[order]
        elif event == "again":
            handle.detach()
            handle = ARM(llama)
    handle.detach()


def test_a_batched_chat_with_answers_of_different_lengths(llama):
    """The shorter answer ends in masked columns; the next turn of each row is as if it stood there alone."""
    first, second = prompt(20, 2), prompt(9, 2)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 15:20] = 0
    with ARM(llama):
        cache = DynamicCache()
        logits(llama, first, cache=cache, attention_mask=mask[:, :20], use_cache=True)
        got = logits(llama, second, cache=cache, attention_mask=mask, use_cache=True)
        alone = logits(llama, torch.cat([first[1:, :15], second[1:]], dim=1))
    assert (got[1] - alone[0, -9:]).abs().max() < 3e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_definitions(checkpointing):
    ids = prompt(25)
    gradients = []
    for arm in ("naive", "ours"):
        model = tiny_model("llama").double()
        if arm == "naive":
            install(model, NaiveChunks(0, 1, 1, ROPES["llama"]), "naive_chunks")
        else:
            ARM(model)
            if checkpointing:
                enable_checkpointing(model)
                model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():  # the model's own cosines are fp32
        assert (gradients[1][name] - gradient).abs().max() < 2e-6 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 4},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "offloaded"},
    ],
)
def test_generate(llama, options):
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        options = {"cache_implementation": "dynamic"}
    ids = prompt(31, 2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    row = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
    with ARM(llama):
        got = llama.generate(ids[row], attention_mask=mask[row], **settings, **options)
        alone = [
            llama.generate(ids[i : i + 1, 6 * (i == 0) :], **settings, num_beams=options.get("num_beams", 1))
            for i in range(len(got))
        ]
    for text, other in zip(got, alone, strict=True):
        assert torch.equal(text[-9:], other[0, -9:])


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together")
def test_assisted_decoding(llama):
    ids = prompt(31)
    with ARM(llama):
        plain = llama.generate(ids, max_new_tokens=12, do_sample=False)
        assisted = llama.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=copy.copy(model_of("llama")))
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("bloom", {}, "no rotary positions"),
        ("gpt2", {}, "absolute positions"),
        ("gemma2", {}, "window of their own|soft-caps"),
        ("gemma3_text", {}, "window of their own"),
        ("llama4_text", {}, "window of their own"),
        ("gpt_oss", {}, "window of their own|learned sink"),
    ],
)
def test_what_it_cannot_serve_is_refused_in_words(family, changes, words):
    model = tiny_model(family, **changes)
    with pytest.raises(ValueError, match=words):
        ARM(model)
    logits(model, prompt(5))


def test_bad_arguments_say_what_is_expected(llama):
    with pytest.raises(TypeError, match="chunk_length must be a whole number of at least 1, got True"):
        DualChunkAttention(chunk_length=True)
    with pytest.raises(ValueError, match="chunk_length must be a whole number of at most 9, got 10"):
        DualChunkAttention(chunk_length=10, trained_length=10)
    with pytest.raises(
        ValueError, match=r"chunk_length must be less than the \d+ tokens that the model was trained on"
    ):
        DualChunkAttention(chunk_length=10**6)(llama)
    assert DualChunkAttention(chunk_length=np.int64(6), trained_length=np.int32(8)).chunk_length == 6
    with pytest.raises(TypeError):
        DualChunkAttention(6)
    with ARM(llama), pytest.raises(ValueError, match="patched by DualChunkAttention already"):
        LMInfinite()(llama)
    with ARM(llama):
        cache = StaticCache(config=llama.config, max_cache_len=64)
        with pytest.raises(ValueError, match="needs a cache that grows"):
            logits(llama, prompt(20), use_cache=True, cache=cache)
        llama.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="set_attn_implementation was called"):
            logits(llama, prompt(5))
    assert DualChunkAttention()(llama).chunk == 3 * llama.config.max_position_embeddings // 4
