"""The contract of LM-Infinite on eight families: equal to the definition, whatever the path that leads there."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hf_longtrunc import LambdaCacheLayer, LMInfinite, TopK
from hf_longtrunc.attention.lm_infinite import trained_length
from hf_longtrunc.models import CACHE, cache_of

from .reference import Naive, Rope, install, is_visible
from .tiny_models import tiny_model

S, L = 3, 10
SETTINGS = LMInfinite(num_sink_tokens=S, window_length=L)
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt_neox", "cohere", "gptj", "bloom"]
N = 3 * L + 4


def prompt(n=N, batch=1):
    return torch.randint(3, 90, (batch, n))


def model_of(family):
    if family == "gptj" and CACHE != "cache":
        pytest.skip("before transformers 5.24 GPT-J masks by itself, and is refused")
    # Sharper logits than a random model's, so that a wrong key shows.
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    return tiny_model(family, **(changes if family == "gpt_neox" else {})).requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def llama():
    return model_of("llama")


def logits(model, ids, **inputs):
    """Return the logits of a forward; `cache` is called what the installed transformers calls it."""
    return model(ids, **{CACHE if name == "cache" else name: value for name, value in inputs.items()}).logits


def ring_cache(model):
    """The cache that generate() builds on a patched model."""
    inputs = {}
    model._prepare_cache_for_generation(model.generation_config, inputs, None, 1, 1)
    return inputs[CACHE]


def in_chunks(model, ids, sizes, cache, **inputs):
    parts, start = [], 0
    for size in sizes:
        parts.append(logits(model, ids[:, start : start + size], cache=cache))
        start += size
    assert start == ids.shape[1]
    return torch.cat(parts, dim=1)


# -- 1: the definition -----------------------------------------------------------------------------------------------


def naive_logits(family, ids, sinks, window, max_distance):
    """Logits of an unpatched model whose attention is computed pair by pair."""
    model = model_of(family).double()
    head_dim = 8
    rope = {
        "gpt_neox": Rope(4),
        "cohere": Rope(head_dim, pairs=True, base=5e5),
        "gptj": Rope(4, pairs=True),
        "gemma3_text": Rope(head_dim, base=1e6),
    }.get(family, Rope(head_dim))
    naive = Naive(sinks, window, max_distance, rope)
    if family == "bloom":
        return naive_bloom_logits(model, ids, naive)
    install(model, naive)
    return logits(model, ids)


def naive_bloom_logits(model, ids, naive):
    n, heads = ids.shape[1], model.config.n_head
    away = torch.tensor([[naive.distance(a, b) for b in range(n)] for a in range(n)])
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
    model.transformer.build_alibi_tensor = lambda *args, **kwargs: -slopes[:, None, None] * away
    seen = torch.tensor([[is_visible(a, b, naive.sinks, naive.window) for b in range(n)] for a in range(n)])
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(~seen, -math.inf)
    from transformers.models.bloom import modeling_bloom

    keep, modeling_bloom.create_causal_mask = modeling_bloom.create_causal_mask, lambda **kwargs: mask[None, None]
    try:
        return logits(model, ids, attention_mask=torch.ones_like(ids))
    finally:
        modeling_bloom.create_causal_mask = keep


@pytest.mark.parametrize("max_distance", [L, L + 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_is_the_definition(family, max_distance):
    ids = prompt()
    expected = naive_logits(family, ids, S, L, max_distance)
    model = model_of(family)
    unpatched = logits(model, ids)
    with LMInfinite(num_sink_tokens=S, window_length=L, max_distance=max_distance)(model):
        patched = logits(model, ids)
    assert (patched - expected).abs().max() < 2e-5 * max(1.0, float(expected.abs().max()))
    assert (patched - unpatched)[:, L:].abs().max() > 1e-2
    model.double()
    with LMInfinite(num_sink_tokens=S, window_length=L, max_distance=max_distance)(model):
        exact = logits(model, ids)
    # The reference keeps the model's own fp32 cosines where they are cached: hence not 1e-12.
    assert (exact - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))


# -- 2: within the window, and after it is over ----------------------------------------------------------------------


def test_within_the_window_and_after_detaching_nothing_has_changed(model):
    ids = prompt(30)
    before = logits(model, ids)
    with LMInfinite(num_sink_tokens=S, window_length=30)(model):
        assert (logits(model, ids) - before).abs().max() < 2e-5
    assert torch.equal(logits(model, ids), before)


def snapshot(model):
    modules = [(name, dict(module.__dict__), dict(module._buffers)) for name, module in model.named_modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return modules, hooks, model.config.to_dict()


def test_detaching_restores_every_attribute_after_an_exception_too(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    registered = list(AttentionInterface().valid_keys()), list(AttentionMaskInterface().valid_keys())
    modules, hooks, config = snapshot(model)
    with pytest.raises(ValueError, match="must cover"), SETTINGS(model):
        logits(model, prompt(), attention_mask=torch.ones(1, N - 1))
    modules_after, hooks_after, config_after = snapshot(model)
    assert hooks_after == hooks
    assert config_after == config
    for (name, before, buffers), (_, after, buffers_after) in zip(modules, modules_after, strict=True):
        assert before.keys() == after.keys(), name
        assert all(before[key] is after[key] for key in before if not isinstance(before[key], dict)), name
        assert all(buffers[key] is buffers_after[key] for key in buffers), name
    assert registered == (list(AttentionInterface().valid_keys()), list(AttentionMaskInterface().valid_keys()))


# -- 3: path independence --------------------------------------------------------------------------------------------


def test_any_chunking_is_one_prefill(model):
    ids = prompt()
    with SETTINGS(model):
        whole = logits(model, ids)
        for sizes in ([1] * N, [1, N - 1], [7] * 4 + [N - 28], [L, 1, 1, 1, N - L - 3], [N - 1, 1]):
            for cache in (ring_cache(model), DynamicCache(config=model.config)):
                assert (in_chunks(model, ids, sizes, cache) - whole).abs().max() < 3e-5, (sizes, type(cache.layers[0]))


def test_token_by_token_far_beyond_the_ring(llama, monkeypatch):
    monkeypatch.setattr(LambdaCacheLayer, "ROLLBACK", 4)
    ids = prompt(80)
    with SETTINGS(llama):
        whole = logits(llama, ids)
        for sizes in ([1] * 80, [40, *[1] * 40], [1] * 20 + [40] + [1] * 20, [5] * 16):
            cache = ring_cache(llama)
            assert (in_chunks(llama, ids, sizes, cache) - whole).abs().max() < 3e-5
            assert cache.get_seq_length() == 80


def test_crop_leaves_no_trace(llama, monkeypatch):
    monkeypatch.setattr(LambdaCacheLayer, "ROLLBACK", 8)
    ids = prompt(90)
    with SETTINGS(llama):
        whole = logits(llama, ids)
        cache = ring_cache(llama)
        in_chunks(llama, ids[:, :40], [40], cache)
        for start in range(40, 80, 4):  # four kept out of nine, again and again
            logits(llama, torch.cat([ids[:, start : start + 4], prompt(5)], dim=1), cache=cache)
            cache.crop(-5)
            assert cache.get_seq_length() == start + 4
        assert (in_chunks(llama, ids[:, 80:], [1] * 10, cache) - whole[:, 80:]).abs().max() < 3e-5
        with pytest.raises(ValueError, match="cannot take back 10 tokens"):
            cache.crop(-10)
        cache.crop(-9)
        assert (in_chunks(llama, ids[:, 81:], [9], cache) - whole[:, 81:]).abs().max() < 3e-5


def test_two_chat_turns_are_one_conversation(model):
    ids = prompt(25)
    with SETTINGS(model):
        first = model.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        second_ids = torch.cat([first.sequences, prompt(15)], dim=1)
        again = model.generate(second_ids, max_new_tokens=12, do_sample=False, **{CACHE: cache_of(first)})
        fresh = model.generate(second_ids, max_new_tokens=12, do_sample=False)
        uncached = model.generate(second_ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(again, fresh)
    assert torch.equal(again, uncached)


@pytest.mark.parametrize("sizes", [[1] * (N - 20), [N - 20]])
def test_a_conversation_goes_on_under_a_new_patch(model, sizes):
    ids = prompt()
    with SETTINGS(model):
        whole, cache = logits(model, ids), ring_cache(model)
        in_chunks(model, ids[:, :20], [19, 1], cache)
    with SETTINGS(model):
        rest = in_chunks(model, ids[:, 20:], sizes, cache)
    assert (rest - whole[:, 20:]).abs().max() < 3e-5


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys_share_the_ring(family):
    """Their last layers attend with keys of earlier ones, and run for the rows whose logits are kept alone."""
    model, ids = model_of(family).double(), prompt(60)
    with SETTINGS(model):
        whole, cache = logits(model, ids), ring_cache(model)
        assert sum(isinstance(layer, LambdaCacheLayer) for layer in cache.layers) == 2
        parts = in_chunks(model, ids, [20, 15, *[1] * 25], cache)
        assert (parts - whole).abs().max() < 1e-9
        cache = ring_cache(model)
        for part in ids.split(20, dim=1):
            last = logits(model, part, cache=cache, logits_to_keep=1)
        assert (last - whole[:, -1:]).abs().max() < 1e-9


# -- 4: padding, lengths, settings at the edge -----------------------------------------------------------------------


def test_a_left_padded_row_is_the_row_alone(model):
    lengths = [1, S - 1, S, L - 1, L, L + 1, 3 * L]
    rows = [prompt(n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    with SETTINGS(model):
        batch = logits(model, ids, attention_mask=mask)
        for index, row in enumerate(rows):
            assert (batch[index, width - row.shape[1] :] - logits(model, row)[0]).abs().max() < 3e-5
        together = model.generate(ids, attention_mask=mask, max_new_tokens=2 * L, do_sample=False)
        for index, row in enumerate(rows):
            alone = model.generate(row, max_new_tokens=2 * L, do_sample=False)
            assert torch.equal(together[index, width:], alone[0, row.shape[1] :]), lengths[index]


def test_a_prompt_in_chunks_smaller_than_its_padding(model):
    ids = torch.cat([torch.nn.functional.pad(prompt(9), (16, 0)), prompt(25)])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 20, "do_sample": False}
    with SETTINGS(model):
        whole = model.generate(ids, **options)
        assert torch.equal(model.generate(ids, prefill_chunk_size=4, **options), whole)


@pytest.mark.parametrize("n", [1, L - 1, L, L + 1, L + S])
def test_lengths_around_the_window(llama, n):
    ids = prompt(n)
    with SETTINGS(llama):
        whole = logits(llama, ids)
        assert (in_chunks(llama, ids, [1] * n, ring_cache(llama)) - whole).abs().max() < 3e-5
    assert (whole - naive_logits("llama", ids, S, L, L)).abs().max() < 1e-4


@pytest.mark.parametrize(("sinks", "window"), [(0, L), (0, 1), (3, 1), (20, 5), (3, 40)])
def test_settings_at_the_edge(model, sinks, window):
    ids = prompt()
    with LMInfinite(num_sink_tokens=sinks, window_length=window)(model):
        whole = logits(model, ids)
        assert (in_chunks(model, ids, [1] * N, ring_cache(model)) - whole).abs().max() < 3e-5
        assert (in_chunks(model, ids, [20, N - 20], ring_cache(model)) - whole).abs().max() < 3e-5


# -- 5: memory -------------------------------------------------------------------------------------------------------


def test_cache_bytes_are_constant(llama):
    def size(cache):
        held = [held for layer in cache.layers for held in vars(layer).values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in held if isinstance(tensor, torch.Tensor))

    with SETTINGS(llama):
        cache = ring_cache(llama)
        assert all(isinstance(layer, LambdaCacheLayer) for layer in cache.layers)
        logits(llama, prompt(20), cache=cache)
        early, addresses = size(cache), [layer.keys.data_ptr() for layer in cache.layers]
        for _ in range(150):
            logits(llama, prompt(1), cache=cache)
        logits(llama, prompt(300), cache=cache)
        assert size(cache) == early
        assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
        assert cache.get_seq_length() == 470


class Largest(TorchDispatchMode):
    """The largest tensor that any operation inside the block made or touched, and the masks of its attention calls.

    Buffers that are given do not count, nor do views of them.
    """

    def __init__(self, buffers=()):
        super().__init__()
        self.known = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        self.elements = 0
        self.masks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.masks.append((kwargs or {}).get("attn_mask"))
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_step_costs_the_same_however_long_the_stream(llama):
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(), cache=cache)
        with Largest() as early:
            logits(llama, prompt(1), cache=cache)
        for layer in cache.layers:
            layer.seen = layer.written = 10_000_000
        with Largest() as late:
            logits(llama, prompt(1), cache=cache)
    assert late.elements == early.elements


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])  # of the latter, keys are made afresh from the cache
def test_decoding_neither_copies_the_ring_nor_masks_a_full_one(family):
    model = model_of(family)
    with LMInfinite(num_sink_tokens=S, window_length=500)(model):
        cache = ring_cache(model)
        logits(model, prompt(600), cache=cache)
        buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
        with Largest([*buffers, *model.parameters()]) as step:
            logits(model, prompt(1), cache=cache)
    assert len(step.masks) == len(cache.layers)
    assert all(mask is None for mask in step.masks)
    if family == "llama":
        assert 0 < step.elements < buffers[0].numel() / 4


# -- 6: generate in its modes, compile, gradients --------------------------------------------------------------------


def test_generate_with_and_without_cache_agree(model):
    ids = prompt(25)
    options = {"max_new_tokens": 40, "do_sample": False}
    with SETTINGS(model):
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, **{CACHE: DynamicCache(config=model.config)}, **options))
        assert torch.equal(cached, model.generate(ids, prefill_chunk_size=7, **options))
        expected = logits(model, cached)[:, 24:-1].argmax(-1)
    assert torch.equal(cached[:, 25:], expected)


def test_beam_search(model):
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    ids = prompt(25, batch=2)
    with SETTINGS(model):
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_beam_search_with_padding(llama):
    ids = torch.cat([torch.nn.functional.pad(prompt(9), (16, 0)), prompt(25)])
    mask = (ids != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "num_beams": 3}
    with SETTINGS(llama):
        assert torch.equal(llama.generate(ids, **options), llama.generate(ids, use_cache=False, **options))


def test_assisted_and_prompt_lookup_decoding(llama):
    ids = prompt(8).repeat(1, 4)
    # Token 0 is padding: an assistant's generate() takes it for a column without a token.
    options = {"max_new_tokens": 24, "do_sample": False, "suppress_tokens": [0]}
    assistant = model_of("llama")
    with SETTINGS(llama):
        greedy = llama.generate(ids, **options)
        assert torch.equal(llama.generate(ids, prompt_lookup_num_tokens=5, **options), greedy)
        logging.disable(logging.WARNING)  # transformers warns about how it calls its own generate() for an assistant
        try:
            assert torch.equal(llama.generate(ids, assistant_model=assistant, **options), greedy)
            with SETTINGS(assistant):
                assert torch.equal(llama.generate(ids, assistant_model=assistant, **options), greedy)
        finally:
            logging.disable(logging.NOTSET)


def test_rows_of_a_cache_can_be_repeated_and_chosen(llama):
    ids = torch.cat([torch.nn.functional.pad(prompt(9), (16, 0)), prompt(25)])
    mask = (ids != 0).long()
    following = prompt(1, batch=4)
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    with SETTINGS(llama):
        cache = ring_cache(llama)
        llama(ids, attention_mask=mask, **{CACHE: cache})
        cache.batch_repeat_interleave(2)
        got = logits(llama, following, cache=cache, attention_mask=longer.repeat_interleave(2, 0))
        text = torch.cat([ids.repeat_interleave(2, 0), following], dim=1)
        expected = logits(llama, text, attention_mask=longer.repeat_interleave(2, 0))[:, -1:]
        assert (got - expected).abs().max() < 3e-5
        chosen = torch.tensor([3, 0])
        cache.batch_select_indices(chosen)
        mask = torch.nn.functional.pad(longer.repeat_interleave(2, 0)[chosen], (0, 1), value=1)
        got = logits(llama, following[:2], cache=cache, attention_mask=mask)
        expected = logits(llama, torch.cat([text[chosen], following[:2]], dim=1), attention_mask=mask)[:, -1:]
        assert (got - expected).abs().max() < 3e-5


def test_compiled_decoding_is_two_graphs_without_a_number_that_changes():
    """One until the ring is full, one from then on; `generate` adds none for other prompts."""
    command = [sys.executable, "-m", "tests.attention.compiled_decode", "16"]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    steps, generations, elsewhere = result.stdout.splitlines() or [result.stderr, "", ""]
    assert steps == "16 tokens: 2 graphs, numbers that they take: 0", steps
    assert generations == "generate: 2 graphs, 0 later, numbers: 0"
    assert elsewhere == "caches from elsewhere go on: True"


def test_reading_the_middle_does_not_compile(llama):
    settings = LMInfinite(window_length=L, retrieval=TopK(first_layer=0))
    with settings(llama) as handle, pytest.raises(ValueError, match="leave it out"):
        handle.compile()


def enable_checkpointing(model):
    """By the name that this transformers gives it: 5.17 knows the older one only."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_references(checkpointing):
    ids = prompt()
    model = model_of("llama").double().requires_grad_(True)
    install(model, Naive(S, L, L, Rope(8)))
    model(ids, labels=ids).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model = model_of("llama").double().requires_grad_(True).train()
    if checkpointing:
        enable_checkpointing(model)
    with SETTINGS(model):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


# -- 7: far away -----------------------------------------------------------------------------------------------------


def test_a_million_tokens_from_here_it_is_the_same(llama):
    ids = prompt()
    with SETTINGS(llama):
        here = logits(llama, ids)
        shifted = torch.arange(N)[None] + 1_000_000
        assert (logits(llama, ids, position_ids=shifted) - here).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_ten_million_tokens_into_a_stream_distances_are_exact(family):
    """A row behind ten million columns of padding that no one stores: the angles are those of far away."""
    model = model_of(family)
    ids = prompt(5 * L)
    with SETTINGS(model):
        here = in_chunks(model, ids, [1] * (5 * L), ring_cache(model))
        cache = ring_cache(model)
        logits(model, ids[:, : 3 * L], cache=cache)
        far = 10_000_000
        for layer in cache.layers:
            jump = far - far % layer.window_length  # the same slots
            layer.keys[:, :, S:] = moved(model, layer, jump)
            layer.seen, layer.written = layer.seen + jump, layer.written + jump
        there = in_chunks(model, ids[:, 3 * L :], [1] * (2 * L), cache)
    assert (there - here[:, 3 * L :]).abs().max() < 1e-4


def moved(model, layer, jump):
    """The ring's keys as if they had come `jump` tokens later."""
    patch = model.get_decoder()._hf_longtrunc_patch
    rotation = next(iter(patch.layers.values())).rotation
    keys = layer.keys[:, :, S:]
    return keys if rotation is None else rotation.rotate(keys, torch.full((1, keys.shape[2]), jump))


# -- the surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_peft_wrapper_is_patched_through_and_may_come_later(llama, patch_first):
    peft = pytest.importorskip("peft")
    ids = prompt()
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if patch_first:
        patch = SETTINGS.attach(llama)
        wrapped = peft.get_peft_model(llama, adapter)
        patched = logits(wrapped, ids)
        patch.detach()
    else:
        wrapped = peft.get_peft_model(llama, adapter)
        with SETTINGS(wrapped):
            patched = logits(wrapped, ids)
    plain = logits(wrapped, ids)
    assert (patched - plain)[:, :L].abs().max() < 2e-5
    assert (patched - plain)[:, L:].abs().max() > 1e-2


def test_other_models_are_not_touched(llama):
    other = AutoModelForCausalLM.from_config(llama.config).eval().requires_grad_(False)
    assert other.config is llama.config or other.config == llama.config
    other.config = llama.config  # shared, as some users' code does
    ids = prompt()
    alone = logits(other, ids)
    with SETTINGS(llama):
        patched = logits(llama, ids)
        assert torch.equal(logits(other, ids), alone)
        with LMInfinite(num_sink_tokens=1, window_length=5)(other):
            assert (logits(other, ids) - alone).abs().max() > 1e-2
            assert torch.equal(logits(llama, ids), patched)
        assert torch.equal(logits(other, ids), alone)


def test_saving_a_patched_model_saves_the_model(llama, tmp_path):
    ids = prompt()
    before = logits(llama, ids)
    with SETTINGS(llama):
        llama.save_pretrained(tmp_path)
    assert "lm_infinite" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), before)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # before 5.24: the weights are on "meta"
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
@pytest.mark.parametrize("placement", ["dispatched", "offloaded"])
@pytest.mark.filterwarnings("ignore:.*non-meta parameter:UserWarning")
def test_a_model_that_accelerate_has_placed_is_patched_through_its_hooks(family, placement):
    accelerate = pytest.importorskip("accelerate")
    ids, options = prompt(), {"max_new_tokens": 5, "do_sample": False}
    model = model_of(family)
    before = logits(model, ids)
    with SETTINGS(model):
        expected, text = logits(model, ids), model.generate(ids, **options)
    if placement == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with SETTINGS(model):
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(model.generate(ids, **options), text)
    assert torch.equal(logits(model, ids), before)


def test_falcon_with_alibi_sees_a_window_of_its_last_tokens():
    """ALiBi knows distances alone, so one layer over a window is that layer on the window's tokens."""
    model = tiny_model("falcon", alibi=True, num_hidden_layers=1).requires_grad_(False)
    ids = prompt()
    with LMInfinite(num_sink_tokens=0, window_length=L)(model):
        got = logits(model, ids)
    for i in range(N):
        assert (got[0, i] - logits(model, ids[:, max(0, i - L + 1) : i + 1])[0, -1]).abs().max() < 2e-5, i
    with SETTINGS(model):
        whole = logits(model, ids)
        assert (in_chunks(model, ids, [7, 20, *[1] * (N - 27)], ring_cache(model)) - whole).abs().max() < 3e-5
        assert (whole - got)[:, L + 1 :].abs().max() > 1e-2


def test_attach_and_detach(llama):
    ids = prompt()
    before = logits(llama, ids)
    patch = SETTINGS.attach(llama)
    assert (logits(llama, ids) - before).abs().max() > 1e-2
    with pytest.raises(ValueError, match="patched by LMInfinite already"):
        SETTINGS.attach(llama)
    with pytest.raises(TypeError, match="detach first"):
        copy.deepcopy(llama)
    patch.detach()
    patch.detach()
    assert torch.equal(logits(llama, ids), before)
    assert torch.equal(logits(copy.deepcopy(llama), ids), before)


def test_our_cache_refuses_an_unpatched_model(llama):
    with SETTINGS(llama):
        cache = ring_cache(llama)
        logits(llama, prompt(), cache=cache)
    with pytest.raises(ValueError, match="no longer is"):
        logits(llama, prompt(1), cache=cache)
    with LMInfinite(num_sink_tokens=S, window_length=L + 1)(llama), pytest.raises(ValueError, match="was built for"):
        logits(llama, prompt(1), cache=cache)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens must be a whole number of at least 0"),
        ({"num_sink_tokens": 1.5}, TypeError, "num_sink_tokens must be a whole number"),
        ({"window_length": 0}, ValueError, "window_length must be a whole number of at least 1"),
        ({"window_length": "8"}, TypeError, "window_length must be a whole number"),
        ({"window_length": True}, TypeError, "window_length must be a whole number"),
        ({"window_length": 8, "max_distance": 7}, ValueError, "max_distance must be a whole number of at least 8"),
        ({"path": "fast"}, ValueError, "path must be one of"),
        ({"retrieval": 5}, TypeError, "retrieval must be TopK"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        LMInfinite(**arguments)


def test_bad_calls(llama):
    ids = prompt()
    with pytest.raises(TypeError, match="model must be a transformers"):
        SETTINGS.attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="trained length"):
        LMInfinite(max_distance=100).attach(llama)
    with SETTINGS(llama):
        with pytest.raises(ValueError, match="makes its own mask"):
            logits(llama, ids, attention_mask=torch.zeros(1, 1, N, N))
        with pytest.raises(ValueError, match="must cover the"):
            logits(llama, ids, attention_mask=torch.ones(1, N - 1))
        with pytest.raises(ValueError, match="count up by one"):
            logits(llama, ids, position_ids=torch.arange(N)[None] % 10)
        with pytest.raises(ValueError, match="count up by one"):
            logits(llama, ids, position_ids=torch.arange(N)[None] * 2, attention_mask=torch.ones_like(ids))
        with pytest.raises(ValueError, match="cannot be used on a model patched by LMInfinite: leave it out"):
            llama.generate(ids, cache_implementation="static", max_new_tokens=2)
        with pytest.raises(ValueError, match="a StaticCache cannot be used"):
            logits(llama, ids, cache=StaticCache(llama.config, max_cache_len=64))
        with pytest.raises(ValueError, match="continuous batching"):
            llama.generate_batch([[5, 6]])
        llama.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="set_attn_implementation"):
            logits(llama, ids)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "absolute positions"),
        ("opt", "absolute positions"),
        ("mamba", "no attention layers"),
        ("minimax", "a class of its own"),
        ("recurrent_gemma", "each of its attention layers was trained with a sliding window"),
    ],
)
def test_models_without_a_distance_to_limit_are_refused(family, reason):
    model = tiny_model(family)
    ids = prompt()
    before = logits(model, ids)
    with pytest.raises(ValueError, match=reason):
        SETTINGS.attach(model)
    assert torch.equal(logits(model, ids), before)


def test_windowed_layers_are_left_alone_and_a_model_of_nothing_else_is_refused():
    with pytest.raises(ValueError, match="sliding window of its own"):
        SETTINGS.attach(tiny_model("mistral", sliding_window=8))


def test_the_trained_length_comes_from_the_config(llama):
    assert trained_length(llama.config) == 256
    llama.config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256
    }  # fmt: skip
    assert trained_length(llama.config) == 1024
