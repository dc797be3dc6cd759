"""Where LM-Infinite meets everything else: padding, masks, caches, wrappers, threads, and what is left behind."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from hf_longtrunc import DualChunkAttention, LambdaCacheLayer, LMInfinite, TopBlocks, TopK
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import CACHE, cache_of
from tests.launch import two_ranks

from .test_lm_infinite import FAMILIES, L, S, enable_checkpointing, in_chunks, logits, model_of, prompt, ring_cache
from .tiny_models import tiny_model

SETTINGS = LMInfinite(num_sink_tokens=S, window_length=L)
TOP_K = LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=3, distance=4, first_layer=0, rows=None))
TOP_BLOCKS = LMInfinite(
    num_sink_tokens=S,
    window_length=L,
    retrieval=TopBlocks(blocks=2, block_size=4, distance=4, first_layer=0, voting_rows=3, rows=5),
)
GREEDY = {"do_sample": False, "suppress_tokens": [0]}


@pytest.fixture
def llama():
    return model_of("llama")


def padded(text, left):
    ids = torch.nn.functional.pad(text, (left, 0))
    return ids, (torch.arange(ids.shape[1]) >= left).long().expand(len(ids), -1)


# -- padding and masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("technique", [SETTINGS, TOP_K])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_left_padded_row_is_the_row_alone(family, technique):
    model, text = model_of(family), prompt(3 * L)
    ids, mask = padded(text, 7)
    with technique(model):
        alone = logits(model, text)
        for cache in (None, ring_cache(model), DynamicCache(config=model.config)):
            inputs = {"use_cache": False} if cache is None else {CACHE: cache}
            assert (logits(model, ids, attention_mask=mask, **inputs)[:, 7:] - alone).abs().max() < 3e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_pads_one_row(llama):
    text = prompt(3 * L)
    ids, mask = padded(text, 7)
    with LMInfinite(num_sink_tokens=S, window_length=L, path="flex")(llama):
        assert (logits(llama, ids, attention_mask=mask)[:, 7:] - logits(llama, text)).abs().max() < 3e-5


def conversation(seed, turns, width):
    """Texts of rows that differ in length at each turn, side by side with padding on either side."""
    generator = torch.Generator().manual_seed(seed)
    parts, masks, texts = [], [], [[], [], []]
    for _ in range(turns):
        n = int(torch.randint(1, width, (1,), generator=generator))
        ids = torch.randint(3, 90, (3, n), generator=generator)
        mask = torch.ones(3, n, dtype=torch.long)
        for row in range(3):
            pads = int(torch.randint(0, n, (1,), generator=generator)) if row else 0
            kind = int(torch.randint(0, 3, (1,), generator=generator))
            where = torch.randperm(n, generator=generator)[:pads] if kind == 2 else torch.arange(pads)
            mask[row, n - 1 - where if kind == 1 else where] = 0
            texts[row].append(ids[row][mask[row] == 1])
        parts.append(ids)
        masks.append(mask)
    return parts, masks, [torch.cat(row)[None] for row in texts]


@pytest.mark.parametrize("kind", ["ring", "dynamic", "none"])
@pytest.mark.parametrize("technique", [SETTINGS, TOP_K])
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "deepseek_v2"])
def test_masked_columns_anywhere_are_no_tokens(family, technique, kind):
    """In every turn: on the left, on the right or between tokens, the rows each on their own."""
    model = model_of(family)
    for seed in range(2):
        parts, masks, texts = conversation(seed, 5, 3 * L)
        mask = torch.cat(masks, dim=1)
        with technique(model):
            if kind == "none":
                got = logits(model, torch.cat(parts, dim=1), attention_mask=mask, use_cache=False)
            else:
                cache = ring_cache(model) if kind == "ring" else DynamicCache(config=model.config)
                got, seen = [], 0
                for part in parts:
                    seen += part.shape[1]
                    got.append(logits(model, part, attention_mask=mask[:, :seen], **{CACHE: cache}))
                got = torch.cat(got, dim=1)
            for row, text in enumerate(texts):
                alone = logits(model, text, use_cache=False)[0]
                assert (got[row][mask[row] == 1] - alone).abs().max() < 3e-5, (seed, row)


@pytest.mark.parametrize("technique", [SETTINGS, TOP_K])
@pytest.mark.parametrize("new_cache", [True, False])
def test_a_batched_chat_whose_answers_differ_in_length(llama, technique, new_cache):
    """generate() fills shorter answers with padding, and the next turn's mask says so."""
    first, second, lengths = prompt(25, batch=2), prompt(9, batch=2), [12, 5]
    with technique(llama):
        cache = ring_cache(llama) if new_cache else DynamicCache(config=llama.config)
        logits(llama, first, **{CACHE: cache})
        answer = prompt(12, batch=2)
        for t in range(12):  # the shorter row is fed padding, as a token like others
            logits(llama, answer[:, t : t + 1], **{CACHE: cache}, attention_mask=torch.ones(2, 26 + t))
        mask = torch.ones(2, 37 + 9, dtype=torch.long)
        mask[1, 25 + 5 : 37] = 0
        got = logits(llama, second, attention_mask=mask, **{CACHE: cache})
        after = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = logits(llama, second[:, :1], attention_mask=after, **{CACHE: cache})
        for row, n in enumerate(lengths):
            text = torch.cat([first[row], answer[row, :n], second[row], second[row, :1]])[None]
            alone = logits(llama, text, use_cache=False)[0, -10:]
            assert (torch.cat([got[row], step[row]]) - alone).abs().max() < 3e-5


def test_a_row_that_answers_nothing_to_a_turn_padded_on_the_right(llama):
    """What its mask turns to 0 lies right behind padding that was known."""
    parts = [prompt(n, batch=2) for n in (20, 6, 3, 8)]
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1, 23:26] = 0
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, parts[0], **{CACHE: cache})
        logits(llama, parts[1], attention_mask=mask[:, :26], **{CACHE: cache})
        for t in range(3):
            logits(llama, parts[2][:, t : t + 1], attention_mask=mask[:, : 27 + t], **{CACHE: cache})
        mask[1, 26:29] = 0
        got = logits(llama, parts[3], attention_mask=mask, **{CACHE: cache})
        text = torch.cat(parts, dim=1)
        for row in range(2):
            alone = logits(llama, text[row][mask[row] == 1][None], use_cache=False)[0, -8:]
            assert (got[row] - alone).abs().max() < 3e-5


def test_more_padding_than_the_cache_can_take_back_is_refused(llama):
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(100, batch=2), **{CACHE: cache})
        in_chunks(llama, prompt(70, batch=2), [1] * 70, cache)
        mask = torch.ones(2, 175)
        mask[1, 100:170] = 0
        with pytest.raises(ValueError, match="turns the last 70 tokens of a row to 0"):
            logits(llama, prompt(5, batch=2), attention_mask=mask, **{CACHE: cache})


@pytest.mark.parametrize("change", ["left", "middle"])
def test_a_mask_that_changes_what_was_seen_is_refused(llama, change):
    ids, mask = padded(prompt(30, batch=2), 4)
    mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, ids, attention_mask=mask[:, :-5], **{CACHE: cache})
        mask = mask.clone()
        mask[0, 5 if change == "left" else 12] = 0
        with pytest.raises(ValueError, match="changed for tokens that were seen"):
            logits(llama, prompt(5, batch=2), attention_mask=mask, **{CACHE: cache})


def test_holes_are_refused_where_layers_have_a_window_of_their_own():
    model = model_of("gemma3_text")
    mask = torch.ones(1, 30)
    mask[0, 10] = 0
    with SETTINGS(model), pytest.raises(ValueError, match="window of their own"):
        logits(model, prompt(30), attention_mask=mask)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["llama", "mpt", "bloom", "falcon"])
def test_two_forwards_before_their_backwards_under_checkpointing(family):
    model = tiny_model(family).double().requires_grad_(True).train()
    short, long = prompt(12), prompt(30)
    with SETTINGS(model):
        (model(short, labels=short).loss + model(long, labels=long).loss).backward()
        expected = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        enable_checkpointing(model)
        (model(short, labels=short, use_cache=False).loss + model(long, labels=long, use_cache=False).loss).backward()
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        assert (weight.grad - gradient).abs().max() < 1e-9


# -- what is lost or left behind -------------------------------------------------------------------------------------


def test_edits_of_the_config_inside_the_block_stay(llama, tmp_path):
    with SETTINGS(llama):
        llama.resize_token_embeddings(101)
        llama.config.pad_token_id = 7
        llama.config.rope_parameters["rope_theta"] = 123.0
        llama.config.note = "kept"
    assert (llama.config.vocab_size, llama.config.pad_token_id, llama.config.note) == (101, 7, "kept")
    assert llama.config.rope_parameters["rope_theta"] == 123.0
    assert llama.config._attn_implementation == "sdpa"
    llama.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 101


def test_a_model_that_is_never_detached_is_freed():
    before = set(AttentionInterface._global_mapping)
    model = model_of("llama")
    SETTINGS.attach(model)
    model.generate(prompt(30), max_new_tokens=2, **GREEDY)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert set(AttentionInterface._global_mapping) == before


def test_a_handle_says_what_it_changed(llama):
    with SETTINGS(llama) as handle:
        assert isinstance(handle, Handle)
        assert "LMInfinite(num_sink_tokens=3, window_length=10" in repr(handle)
        with pytest.raises(TypeError, match="detach first"):
            pickle.dumps(llama)
        with pytest.raises(TypeError, match="detach first"):
            copy.deepcopy(llama)
    assert "detached" in repr(handle)


# -- crashes and misleading errors -----------------------------------------------------------------------------------


def test_generate_without_a_cache_by_name(llama):
    ids = prompt(30)
    with SETTINGS(llama):
        options = {"max_new_tokens": 5, **GREEDY}
        expected = llama.generate(ids, **options)
        assert torch.equal(llama.generate(ids, use_cache=False, **{CACHE: None}, **options), expected)


@pytest.mark.parametrize("technique", [SETTINGS, TOP_K])
def test_a_cache_from_inference_mode_goes_on_outside(llama, technique):
    ids = prompt(40)
    with technique(llama):
        whole, cache = logits(llama, ids), ring_cache(llama)
        with torch.inference_mode():
            logits(llama, ids[:, :20], **{CACHE: cache})
        rest = in_chunks(llama, ids[:, 20:], [1, 1, 10, 8], cache)
    assert (rest - whole[:, 20:]).abs().max() < 3e-5


@pytest.mark.parametrize("technique", [SETTINGS, TOP_K])
@pytest.mark.parametrize("first", [True, False])
def test_a_cache_from_autocast_goes_on_outside_and_the_other_way_round(llama, technique, first):
    ids = prompt(40)
    with technique(llama):
        whole, cache = logits(llama, ids), ring_cache(llama)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            logits(llama, ids[:, :20], **{CACHE: cache})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            rest = in_chunks(llama, ids[:, 20:], [1, 1, 10, 8], cache)
    error = (rest - whole[:, 20:]).abs().max() / whole.abs().max()
    assert error < 0.1


def test_crop_takes_a_negative_number_as_in_transformers(llama):
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(20), **{CACHE: cache})
        with pytest.raises(ValueError, match="negative number"):
            cache.crop(5)
        cache.crop(0)
        assert cache.get_seq_length() == 20


def test_a_forward_that_was_interrupted_leaves_a_cache_that_is_refused(llama):
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(20), **{CACHE: cache})
        last = llama.model.layers[-1]
        hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            logits(llama, prompt(1), **{CACHE: cache})
        hook.remove()
        with pytest.raises(ValueError, match="a forward was interrupted"):
            logits(llama, prompt(1), **{CACHE: cache})


def test_drafts_that_cannot_be_taken_back_are_refused_at_the_start(llama, monkeypatch):
    assistant, ids, new = model_of("llama"), prompt(8).repeat(1, 12), 16
    monkeypatch.setattr(LambdaCacheLayer, "ROLLBACK", 8)
    with SETTINGS(llama), SETTINGS(assistant):
        greedy = llama.generate(ids, max_new_tokens=new, **GREEDY)
        calls = []
        hook = llama.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens must be at most 9"):
            llama.generate(ids, max_new_tokens=new, prompt_lookup_num_tokens=10, **GREEDY)
        with pytest.raises(ValueError, match="num_assistant_tokens must be at most 9"):
            llama.generate(ids, max_new_tokens=new, assistant_model=assistant, **GREEDY)
        assert not calls
        hook.remove()
        assert torch.equal(llama.generate(ids, max_new_tokens=new, prompt_lookup_num_tokens=9, **GREEDY), greedy)
        assistant.generation_config.num_assistant_tokens = 8
        assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
        logging.disable(logging.WARNING)
        try:
            assert torch.equal(llama.generate(ids, max_new_tokens=new, assistant_model=assistant, **GREEDY), greedy)
        finally:
            logging.disable(logging.NOTSET)


@pytest.mark.parametrize("family", ["llama", "glm4_moe"])  # the second one's configuration counts such layers
def test_mtp_is_refused_in_words(family):
    model = model_of(family)
    with SETTINGS(model), pytest.raises(ValueError, match="use_mtp drafts with layers that LMInfinite does not patch"):
        model.generate(prompt(5), use_mtp=True, max_new_tokens=2)


def test_a_second_turn_reads_what_is_new_alone(llama, monkeypatch):
    """Also where the conversation is longer than a chunk: transformers 5.19 would feed all of it again."""
    monkeypatch.setattr("hf_longtrunc.LMInfinite.prefill_chunk", 16)
    with SETTINGS(llama):
        first = llama.generate(prompt(40), max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        seen = cache_of(first).get_seq_length()
        ids = torch.cat([first.sequences, prompt(30)], dim=1)
        going_on = {CACHE: cache_of(first), "return_dict_in_generate": True, "max_new_tokens": 1}
        again = llama.generate(ids, **going_on, **GREEDY)
        assert (seen, cache_of(again).get_seq_length()) == (42, ids.shape[1])


def test_no_warning_of_a_maximum_length_that_is_none(llama, caplog):
    llama.config.max_position_embeddings = 12
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with SETTINGS(llama):
            llama.generate(prompt(15), max_new_tokens=3, **GREEDY)
        assert "exceeded the model's predefined maximum" not in caplog.text
        llama.generate(prompt(15), max_new_tokens=3, **GREEDY)
        assert "exceeded the model's predefined maximum" in caplog.text
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


def test_a_compiled_model_is_refused_in_words(llama):
    with pytest.raises(ValueError, match="_orig_mod"):
        SETTINGS.attach(torch.compile(llama, backend="eager"))


def test_layers_outside_their_decoder_are_refused(llama):
    from transformers.masking_utils import create_causal_mask

    states, angles = torch.zeros(1, 4, 32), (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    with SETTINGS(llama):
        mask = create_causal_mask(
            config=llama.config,
            inputs_embeds=states,
            attention_mask=None,
            position_ids=None,
            **{CACHE: None},
        )
        with pytest.raises(ValueError, match="outside its decoder"):
            llama.model.layers[0](states, attention_mask=mask, position_embeddings=angles)


# -- a prompt in chunks by itself ------------------------------------------------------------------------------------


@pytest.mark.skipif(CACHE != "cache", reason="older transformers do not go on from a cache in chunks")
def test_a_long_prompt_is_read_in_chunks(llama, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.LMInfinite.prefill_chunk", 16)
    ids, mask = padded(prompt(50, batch=2), 5)
    options = {"max_new_tokens": 12, **GREEDY}
    sizes = []
    with SETTINGS(llama):
        expected = llama.generate(ids, attention_mask=mask, prefill_chunk_size=100, **options)
        hook = llama.model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        assert torch.equal(llama.generate(ids, attention_mask=mask, **options), expected)
        assert max(sizes) == 16
        beams = llama.generate(ids, attention_mask=mask, num_beams=2, **options)
        assert torch.equal(beams, llama.generate(ids, attention_mask=mask, num_beams=2, use_cache=False, **options))
        hook.remove()
        embeds = llama.get_input_embeddings()(ids)
        assert torch.equal(llama.generate(inputs_embeds=embeds, attention_mask=mask, **options), expected[:, 55:])


@pytest.mark.parametrize("technique", [SETTINGS, DualChunkAttention(chunk_length=9, trained_length=12)])
@pytest.mark.parametrize("cached", [False, True])
def test_masked_columns_between_tokens_are_refused_where_layers_count_them(technique, cached):
    model, mask = model_of("gemma3_text"), torch.ones(1, 30, dtype=torch.long)
    mask[:, 12:15] = 0
    with technique(model):
        options = {CACHE: ring_cache(model)} if cached else {"use_cache": False}
        with pytest.raises(ValueError, match=r"zeros between real tokens.*pad on the left alone"):
            model(prompt(30), attention_mask=mask, **options)


# -- threads ---------------------------------------------------------------------------------------------------------


def in_threads(tasks):
    results, errors = [None] * len(tasks), []

    def run(index, task):
        try:
            results[index] = task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


@pytest.mark.parametrize("technique", [SETTINGS, TOP_K, TOP_BLOCKS])
@pytest.mark.parametrize("left", [0, 6])
def test_four_threads_on_one_model_say_what_each_says_alone(llama, technique, left):
    texts = [prompt(n) for n in (30, 45, 33, 60)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with technique(llama):

            def task(text):
                ids, mask = padded(text, left)
                return lambda: llama.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY)

            tasks = [task(text) for text in texts]
            alone = [task() for task in tasks]
            for _ in range(2):
                assert all(map(torch.equal, in_threads(tasks), alone))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.real_model
@pytest.mark.xdist_group("real_model")
@pytest.mark.parametrize("kind", ["padded", "TopBlocks"])
def test_two_threads_on_the_real_model(real_model, kind):
    """HF_LONGTRUNC_GENERATIONS=50 gives each thread fifty."""
    model, tokenizer = real_model
    retrieval = TopBlocks(blocks=2, block_size=8, voting_rows=4, rows=8) if kind == "TopBlocks" else None
    words = ["The keeper climbed the stairs. ", "A whale rose beside the boat. "]
    texts = [tokenizer(word * 12, return_tensors="pt")["input_ids"][:, : 32 + 3 * i] for i, word in enumerate(words)]
    with LMInfinite(num_sink_tokens=4, window_length=24, retrieval=retrieval)(model):

        def task(text):
            ids, mask = padded(text, 9 if kind == "padded" else 0)
            return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)

        tasks = [task(text) for text in texts]
        alone = [task() for task in tasks]
        for _ in range(int(os.environ.get("HF_LONGTRUNC_GENERATIONS", "1"))):
            assert all(map(torch.equal, in_threads(tasks), alone))


# -- wrappers and ranks ----------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks(tmp_path):
    ranks = two_ranks(Path(__file__).with_name("two_ranks.py"), tmp_path)
    assert ranks == [["tensor_parallel", "ddp", "fully_shard"]] * 2


# -- one token -------------------------------------------------------------------------------------------------------


def test_a_decoded_token_is_followed_in_four_frames_of_ours(llama):
    deepest = 0
    package = str(Path(__file__).parents[2] / "hf_longtrunc")

    def watch(frame, event, argument):
        nonlocal deepest
        if event == "call":
            depth, current = 0, frame
            while current is not None:
                depth += current.f_code.co_filename.startswith(package)
                current = current.f_back
            deepest = max(deepest, depth)

    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(30), **{CACHE: cache})
        sys.setprofile(watch)
        try:
            logits(llama, prompt(1), **{CACHE: cache})
        finally:
            sys.setprofile(None)
    assert deepest <= 4


def test_generate_hands_out_the_cache_under_its_name(llama):
    with SETTINGS(llama):
        output = llama.generate(prompt(5), max_new_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert all(isinstance(layer, LambdaCacheLayer) for layer in cache_of(output).layers)
