"""Dual chunk attention on models: the definition, whatever the path that leads there; what is short or refused."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_longtrunc import DualChunkAttention, LMInfinite, TopBlocks, TopK, UnsupportedModelError
from hf_longtrunc.attention.dual_chunk import ChunkLaw
from hf_longtrunc.models import CACHE, cache_of

from .reference import Naive, Rope, install
from .test_lm_infinite import enable_checkpointing, in_chunks, logits, model_of, prompt
from .test_seams import padded
from .tiny_models import tiny_model

CHUNK, TRAINED = 7, 10
ARM = DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED)
ROPES = {
    "llama": Rope(8),
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
        turned = query.double()[:, :, None].expand(-1, -1, n, -1)
        if self.rope is not None:
            turned = self.rope.turn(turned, ChunkLaw(CHUNK, TRAINED).distance(i, i))
        scores = (turned * key[:, None]).sum(-1) * scaling
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(i > i[:, None], -torch.inf)
        if null_logits is not None:
            null = null_logits.detach().double()[:, None, None].expand(*scores.shape[:2], 1)
            return torch.cat([scores, null], dim=-1).softmax(-1)[..., :-1] @ value
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


DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# Layers with a sliding window between full ones: those of Gemma 3 rotate by other frequencies, Cohere 2's full ones and
# one of SmolLM 3's do not rotate at all, Gemma 2 caps its scores, gpt-oss has learned sink logits.
WINDOWED = {
    "gemma2": ({}, Rope(8)),
    "gemma3_text": ({}, Rope(8, base=1e6)),
    "gpt_oss": (DEFAULT_ROPE, Rope(8)),
    "cohere2": ({}, None),
    "ministral": ({}, Rope(8)),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_windowed_layers_stay_as_they_are(family):
    """Their window is 8 tokens, a chunk 7: rotated by positions within chunks they would differ."""
    changes, rope = WINDOWED[family]
    ids, model, defined = prompt(40), *(tiny_model(family, **changes).requires_grad_(False) for _ in range(2))
    unpatched = logits(model, ids)
    install(defined, NaiveChunks(0, 1, 1, rope), f"naive_windowed_{family}")
    expected = logits(defined, ids)
    wide, mask = padded(ids, 3)
    if rope is None:
        with pytest.raises(UnsupportedModelError, match="none of its layers has rotary positions"):
            ARM(model)
        return
    with ARM(model):
        for got in (
            logits(model, ids),
            in_chunks(model, ids, [11, 1, 1, 9, 18], DynamicCache(config=model.config)),
            logits(model, wide, attention_mask=mask)[:, 3:],
        ):
            assert (got - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
        short = logits(model, ids[:, :CHUNK])
    assert torch.equal(short, logits(model, ids[:, :CHUNK]))
    assert (expected - unpatched)[:, TRAINED:].abs().max() > 1e-3
    assert torch.equal(unpatched, logits(model, ids))


def test_some_full_layers_need_no_rotation():
    """SmolLM 3 rotates three of four layers: the fourth sees every key, as it does without the patch."""
    ids, model, defined = (
        prompt(30),
        *(tiny_model("smollm3", no_rope_layers=[1, 0]).requires_grad_(False) for _ in range(2)),
    )
    install(defined, NaiveChunks(0, 1, 1, None), "naive_smollm3", below=(1, NaiveChunks(0, 1, 1, Rope(8, base=2e6))))
    expected = logits(defined, ids)
    with ARM(model):
        got = logits(model, ids)
    assert (got - expected).abs().max() < 5e-5 * max(1.0, float(expected.abs().max()))


def test_the_models_own_chunks_are_heeded():
    """Qwen2.5-1M: chunks of chunk_size - local_size, under max_position_embeddings that it was not trained for."""
    own = {"chunk_size": TRAINED, "local_size": TRAINED - CHUNK, "original_max_position_embeddings": TRAINED}
    model = tiny_model("qwen2", dual_chunk_attention_config=own).requires_grad_(False)
    ids = prompt(40)
    with DualChunkAttention()(model) as handle:
        assert (handle.resolved.chunk_length, handle.resolved.trained_length) == (CHUNK, TRAINED)
        by_config = logits(model, ids)
    with ARM(model):
        assert torch.equal(logits(model, ids), by_config)


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


@pytest.mark.parametrize("first", [True, False])
def test_a_cache_from_autocast_goes_on_outside_and_the_other_way_round(llama, first):
    ids = prompt(40)
    with ARM(llama):
        whole, cache = logits(llama, ids), DynamicCache(config=llama.config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            logits(llama, ids[:, :20], **{CACHE: cache})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            rest = in_chunks(llama, ids[:, 20:], [1, 1, 10, 8], cache)
    assert (rest - whole[:, 20:]).abs().max() / whole.abs().max() < 0.1


def test_it_trains_under_autocast_with_the_error_of_the_unmodified_model():
    ids, errors = prompt(40), []
    for arm in (nullcontext, ARM):
        gradients = []
        for enabled in (False, True):
            model = tiny_model("llama")
            with arm(model), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                model(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        errors.append((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert errors[1] < 1.5 * errors[0]


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
        ("bloom", {}, "has rotary positions"),
        ("gpt2", {}, "absolute positions"),
        ("llama4_text", {}, "has rotary positions"),
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
    assert DualChunkAttention()(llama).resolved.chunk_length == 3 * llama.config.max_position_embeddings // 4


# -- with blocks that a question points at ---------------------------------------------------------------------------

ENDING = (5, 6)
BLOCKS = TopBlocks(
    blocks=2, block_size=4, first_layer=0, first_voting_layer=1, voting_rows=3, rows=6, ending_ids=ENDING,
    contrast_rows=5, least_contrast=0.3, margin=1, emphasis=9.0,
)  # fmt: skip
READER = DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED, retrieval=BLOCKS)
FIRST = 16  # tokens that no block holds


def question(n, batch=1):
    """A prompt that ends as questions do."""
    ids = prompt(n, batch)
    ids[:, -2:] = torch.tensor(ENDING)
    return ids


def attentions(family, ids):
    """The definition's weights [layers][heads, n, n]."""
    seen = []

    class Keeps(NaiveChunks):
        def __call__(self, query, key, value, scaling, softcap=None, null_logits=None):
            marks = torch.eye(value.shape[1], dtype=torch.float64)[None].expand(value.shape[0], -1, -1)
            seen.append(super().__call__(query, key, marks, scaling))
            return super().__call__(query, key, value, scaling)

    model = model_of(family).double()
    install(model, Keeps(0, 1, 1, ROPES[family]), "naive_weights")
    logits(model, ids)
    return seen


def chosen_by_definition(family, ids, in_contrast):
    """Blocks and their emphasis, out of every attention weight."""
    n = ids.shape[1]
    voting, before = range(n - 5, n - 2), range(n - 10, n - 5)
    heads = torch.cat(attentions(family, ids)[1:])  # of all layers that vote
    starts = range(FIRST, n - BLOCKS.rows - BLOCKS.margin - BLOCKS.block_size + 1, BLOCKS.block_size)
    vote = [heads[:, voting, start : start + 4].sum((1, 2)) / 3 for start in starts]
    if not in_contrast:
        return dict.fromkeys(sorted(range(len(vote)), key=lambda block: -vote[block].sum())[:2], 9.0)
    anyway = [heads[:, before, start : start + 4].sum((1, 2)) / 5 for start in starts]
    usual = sum(anyway) / len(anyway)
    worth = [float((v / (b + usual + usual.mean())).square().mean().sqrt()) for v, b in zip(vote, anyway, strict=True)]
    best = sorted(range(len(worth)), key=lambda block: -worth[block])[:2]
    first = worth[best[0]]
    most = min(9.0, max(1.0, first**2))
    return {b: max(1.0, most * (worth[b] / first) ** 2) for b in best if worth[b] >= BLOCKS.least_contrast}


def emphasised_logits(family, ids, chosen):
    """The definition, where the last rows count each key of a chosen block, and one on either side, for several."""
    n = ids.shape[1]
    extra = torch.zeros(n, n, dtype=torch.float64)
    for block, count in sorted(chosen.items(), key=lambda item: item[1]):
        start = FIRST + 4 * block - 1
        extra[n - BLOCKS.rows :, start : start + 6] = math.log(max(count, 1.0))

    class Emphasised(NaiveChunks):
        def __call__(self, query, key, value, scaling, softcap=None, null_logits=None):
            marks = torch.eye(value.shape[1], dtype=torch.float64)[None].expand(value.shape[0], -1, -1)
            weights = super().__call__(query, key, marks, scaling) * extra.exp()
            value = value.double().repeat_interleave(query.shape[0] // value.shape[0], dim=0)
            return weights / weights.sum(-1, keepdim=True) @ value

    model = model_of(family).double()
    install(model, Emphasised(0, 1, 1, ROPES[family]), "naive_emphasis")
    return logits(model, ids)


@pytest.mark.parametrize("in_contrast", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj"])
def test_chosen_blocks_count_for_several_as_defined(family, in_contrast):
    ids, model = question(45), model_of(family)
    cache = DynamicCache(config=model.config)
    blocks = replace(BLOCKS, contrast_rows=5 if in_contrast else 0)
    with replace(READER, retrieval=blocks)(model):
        got = logits(model, ids, cache=cache, use_cache=True)
    chosen = chosen_by_definition(family, ids, in_contrast)
    found, emphasis = (part[0].tolist() for part in cache.layers[0].selection)
    assert [block for block in found if block >= 0] == sorted(chosen, key=lambda block: -chosen[block])
    if in_contrast:
        assert emphasis[: len(chosen)] == pytest.approx(list(chosen.values()), rel=1e-3)
    expected = emphasised_logits(family, ids, chosen)
    assert (got - expected).abs().max() < 5e-5 * max(1.0, float(expected.abs().max()))


def reader(**options):
    return replace(READER, retrieval=replace(BLOCKS, contrast_rows=0, **options))


def answer(model, ids, new=6, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options)


def test_what_is_chosen_is_read_on_in_chunks_and_with_padding(llama):
    """A cache that was read before, one padded row, several tokens an answer: each row as if it stood alone."""
    ids, mask = question(48, 2), torch.ones(2, 48, dtype=torch.long)
    mask[1, :7] = 0
    with reader()(llama):
        together = answer(llama, ids, attention_mask=mask)
        for row in (0, 1):
            alone = ids[row : row + 1, 7 * row :]
            expected = answer(llama, alone, attention_mask=torch.ones_like(alone))
            assert torch.equal(together.sequences[row, 48:], expected.sequences[0, alone.shape[1] :])
            theirs, ours = (cache_of(output).layers[1].selection for output in (expected, together))
            assert torch.equal(theirs.indices[0], ours.indices[row])
    with DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED)(llama):
        read = DynamicCache(config=llama.config)
        logits(llama, ids[:1, :30], cache=read, use_cache=True)
    with reader()(llama):
        begun = answer(llama, ids[:1], attention_mask=torch.ones_like(ids[:1]), **{CACHE: read})
    assert torch.equal(begun.sequences[0], together.sequences[0])


def test_beams_a_second_turn_and_a_copy_keep_what_was_chosen(llama):
    ids = question(48, 2)
    ones = torch.ones_like(ids)
    with reader()(llama):
        beams = answer(llama, ids, attention_mask=ones, num_beams=3)
        for row in (0, 1):
            alone = answer(llama, ids[row : row + 1], attention_mask=ones[:1], num_beams=3)
            assert torch.equal(beams.sequences[row], alone.sequences[0])
        first = answer(llama, ids[:1], attention_mask=ones[:1])
        kept = cache_of(first).layers[0].selection.indices.clone()
        said = torch.cat([first.sequences, question(20)], dim=1)
        seen = torch.ones_like(said)
        second = answer(llama, said, attention_mask=seen, **{CACHE: copy.deepcopy(cache_of(first))})
        again = answer(llama, said, attention_mask=seen, **{CACHE: copy.deepcopy(cache_of(first))})
        assert torch.equal(second.sequences, again.sequences)
        forgotten = copy.deepcopy(cache_of(first))
        for layer in forgotten.layers:
            layer.selection = None
        again = answer(llama, said, attention_mask=seen, **{CACHE: forgotten})
        assert torch.equal(second.sequences, again.sequences)  # who votes has not read the last choice
        theirs, ours = (cache_of(output).layers[0].selection for output in (again, second))
        assert torch.equal(theirs.indices, ours.indices)
        assert not torch.equal(cache_of(second).layers[0].selection.indices, kept)  # it asks anew
        assert torch.equal(cache_of(first).layers[0].selection.indices, kept)
        before = cache_of(first).layers[0]
        before.batch_repeat_interleave(2)
        assert before.selection.indices.shape[0] == 2
        before.batch_select_indices(torch.tensor([1]))
        assert before.selection.indices.shape[0] == before.keys.shape[0] == 1
        before.reset()
        assert before.selection is None


def test_a_forward_that_does_not_end_as_a_question_does_asks_nothing(llama):
    ids = question(48)
    ends, other = reader(), reader(ending_ids=(6, 5))
    plain = replace(READER, retrieval=None)
    with plain(llama):
        expected = logits(llama, ids)
    for settings, chooses in ((ends, True), (other, False)):
        cache = DynamicCache(config=llama.config)
        with settings(llama):
            got = logits(llama, ids, cache=cache, use_cache=True)
        assert (getattr(cache.layers[0], "selection", None) is not None) is chooses
        assert torch.allclose(got, expected, atol=1e-5) is not chooses
    mixed = ids.repeat(2, 1)
    mixed[1, -1] = 7
    seen = torch.ones_like(mixed)
    with ends(llama):
        both = answer(llama, mixed, attention_mask=seen).sequences
        assert torch.equal(both[:1], answer(llama, mixed[:1], attention_mask=seen[:1]).sequences)
    with plain(llama):
        assert torch.equal(both[1:], answer(llama, mixed[1:], attention_mask=seen[1:]).sequences)
    with pytest.raises(TypeError, match="ending_ids must be token ids, got 5"):
        reader(ending_ids=5)


def test_what_blocks_cannot_go_with_is_refused(llama):
    with pytest.raises(TypeError, match=r"retrieval must be TopBlocks\(...\) or None"):
        DualChunkAttention(retrieval=TopK())
    for option in ({"distance": 3}, {"store": "cpu"}):
        with pytest.raises(ValueError, match="say nothing here: leave them out"):
            reader(**option)
    with reader()(llama):
        with pytest.raises(ValueError, match="got none"):
            logits(llama, question(48))
        static = StaticCache(config=llama.config, max_cache_len=64)
        with pytest.raises(ValueError, match="StaticLayer"):
            logits(llama, question(48), cache=static, use_cache=True)
    with pytest.raises(ValueError, match="multi-head latent attention"):
        reader()(tiny_model("deepseek_v3"))
