"""What attach holds a technique and a model to, and what it says before a long prompt is read."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial, wraps
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from hf_longtrunc import (
    DualChunkAttention,
    HFLongtruncError,
    LMInfinite,
    StreamingLLM,
    TopBlocks,
    TopK,
    UnsupportedModelError,
)
from hf_longtrunc.attention import dual_chunk, lambda_attention, patch, path_check, probe
from hf_longtrunc.attention.lambda_attention import SinkWindowLaw
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.models import cache_of

from .reference import Naive, Rope, install
from .test_lm_infinite import enable_checkpointing, logits, model_of, prompt
from .tiny_models import tiny_model

S, L = 2, 8
ARM = LMInfinite(num_sink_tokens=S, window_length=L)


@pytest.fixture
def llama():
    return model_of("llama")


@pytest.fixture
def unchecked():
    """Paths are tried once for each kind of rotation, models once for each technique: here they are tried again."""
    path_check._error.cache_clear()
    probe._checked.clear()
    yield
    path_check._error.cache_clear()
    probe._checked.clear()


def plant_far(monkeypatch):
    monkeypatch.setattr(SinkWindowLaw, "far_query_offsets", lambda self, positions: self.max_distance + 1 - positions)


def plant_split(monkeypatch):
    whole = lambda_attention.LambdaAttention._split_block
    monkeypatch.setattr(lambda_attention.LambdaAttention, "_split_block", lambda self, a, b: whole(self, a, b) * 1.001)


def plant_masked(name, monkeypatch):
    whole = lambda_attention.LambdaAttention._block
    factor = {name: 1.001}
    monkeypatch.setattr(
        lambda_attention.LambdaAttention,
        "_block",
        lambda self, a, b, path: whole(self, a, b, path) * factor.get(path, 1),
    )


def plant_ring(monkeypatch):
    keep = RingCacheLayer._rotate_sink_keys
    monkeypatch.setattr(RingCacheLayer, "_rotate_sink_keys", lambda self, to, cos, sin: keep(self, to, cos, -sin))


def plant_mask(monkeypatch):
    from hf_longtrunc.attention import sink_window

    keep = sink_window.sdpa_attention
    monkeypatch.setattr(sink_window, "sdpa_attention", lambda q, k, v, seen, *rest: keep(q, k, v, None, *rest))


def plant_chunks(monkeypatch):
    keep = dual_chunk._parts
    monkeypatch.setattr(dual_chunk, "_parts", lambda *args: list(keep(*args))[-2:])


FAULTS = [
    (plant_far, ARM),
    (plant_split, ARM),
    (partial(plant_masked, "sdpa"), ARM),
    (partial(plant_masked, "eager"), ARM),
    (plant_ring, ARM),
    (plant_mask, ARM),
    (plant_chunks, DualChunkAttention()),
]


@pytest.mark.parametrize(("plant", "technique"), FAULTS)
def test_a_technique_with_one_wrong_path_is_refused_at_attach(plant, technique, llama, unchecked, monkeypatch):
    with technique(llama):
        pass
    path_check._error.cache_clear()
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"differs by .* from its own law of distances"):
        technique(llama)
    monkeypatch.undo()
    path_check._error.cache_clear()
    with technique(llama):
        pass


def test_an_unchanged_model_is_probed_once_and_a_changed_one_again(unchecked, monkeypatch):
    model, ran = tiny_model("llama").requires_grad_(False), []
    decoder, run = model.model, type(model.model).forward
    counted = wraps(run)(lambda *args, **kwargs: ran.append(1) or run(*args, **kwargs))
    monkeypatch.setattr(type(decoder), "forward", counted)

    def forwards(technique=ARM):
        ran.clear()
        with technique(model):
            return len(ran)

    assert forwards() > 0
    assert forwards() == 0
    assert forwards(DualChunkAttention()) > 0
    assert forwards() == 0
    changes = {
        "weights": lambda: decoder.layers[0].self_attn.q_proj.weight.mul_(1.0),
        "config": lambda: setattr(model.config, "rms_norm_eps", 1e-7),
        "a module's settings": lambda: setattr(decoder.layers[1].self_attn, "scaling", 0.5),
        "dtype": lambda: model.double(),
        "attention": lambda: model.set_attn_implementation("eager"),
        "layers": lambda: decoder.layers.pop(1),
    }
    for what, change in changes.items():
        change()
        assert forwards() > 0, what
        assert forwards() == 0, what
    decoder.norm.register_forward_hook(lambda *_: None)
    assert [forwards() > 0, forwards() > 0] == [True, True]


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.filterwarnings("ignore:.*non-meta parameter:UserWarning")
@pytest.mark.parametrize("placement", ["dispatched", "offloaded", "on disk"])
def test_a_model_on_several_devices_is_probed_once(placement, unchecked, tmp_path, monkeypatch):
    model = tiny_model("llama").requires_grad_(False)
    if placement == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif placement == "offloaded":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    probed, keep = [], patch.probe
    monkeypatch.setattr(patch, "probe", lambda decoder, *args: probed.append(decoder) or keep(decoder, *args))
    for _ in range(2):
        with ARM(model):
            model(prompt(20))
    assert len(probed) == 1
    norm = model.model.norm
    if placement != "on disk":  # where a changed file is not noticed
        held = norm if placement == "dispatched" else SimpleNamespace(weight=norm._hf_hook.weights_map["weight"])
        held.weight.mul_(1.0)
        with ARM(model):
            assert len(probed) == 2
    probed.clear()
    add_hook_to_module(norm, Doubling(), append=True)
    for count in (1, 2):
        with ARM(model):
            assert len(probed) == count


def test_what_is_remembered_of_a_model_goes_with_it(unchecked):
    model = tiny_model("llama")
    with ARM(model):
        pass
    assert len(probe._checked) == 1
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None
    assert len(probe._checked) == 0


class Quantised(torch.nn.Linear):
    """A linear layer whose inputs are rounded to a few levels for each token, as W8A8 does to 127 on either side."""

    levels = 7

    def forward(self, x):
        scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-9) / self.levels
        return super().forward((x / scale).round() * scale)


def test_a_model_that_amplifies_rounding_is_measured_by_its_own_noise(llama):
    for module in llama.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Quantised
    with ARM(llama):
        assert logits(llama, prompt(40)).isfinite().all()


def longrope(**changes):
    """Phi-3.5: trained on 32 tokens with short factors, stretched to 64 with long ones."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 3.0, 4.0, 5.0],
    }  # fmt: skip
    changes = {"max_position_embeddings": 64, "original_max_position_embeddings": 32, **changes}
    return tiny_model("phi3", rope_parameters=rope, **changes).requires_grad_(False)


@pytest.mark.parametrize(("window", "factors"), [(16, [1.0, 1.0, 1.0, 1.0]), (64, [2.0, 3.0, 4.0, 5.0])])
def test_longrope_takes_the_factors_of_its_window(window, factors):
    """Within the original length the short factors, beyond it the long ones, at every position of the text."""
    ids, model, reference = prompt(30), longrope(), longrope().double()
    exponents = torch.arange(0, 8, 2, dtype=torch.float64) / 8
    rope = Rope(8, frequencies=1 / (torch.tensor(factors, dtype=torch.float64) * 1e4**exponents))
    scale = model.model.rotary_emb.attention_scaling
    with LMInfinite(num_sink_tokens=S, window_length=window)(model) as handle:
        layer = next(iter(handle.layers.values()))
        assert torch.allclose(layer.rotation.frequencies, rope.frequencies, rtol=1e-6)
        got = logits(model, ids)
    frozen = {"inv_freq": rope.frequencies.float()}
    for name, value in frozen.items():
        setattr(reference.model.rotary_emb, name, value)
    reference.model.rotary_emb.forward = _fixed(reference.model.rotary_emb, rope.frequencies, scale)
    install(reference, Naive(S, window, window, rope), f"naive_longrope_{window}")
    expected = logits(reference, ids)
    assert (got - expected).abs().max() < 5e-5 * float(expected.abs().max())


def _fixed(rotary, frequencies, scale):
    def forward(x, position_ids):
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)

    return forward


def test_errors_can_be_told_apart(llama):
    with pytest.raises(HFLongtruncError) as caught:
        ARM(tiny_model("gpt2"))
    assert type(caught.value) is UnsupportedModelError
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ValueError, match="already") as other, ARM(llama):
        ARM(llama)
    assert not isinstance(other.value, HFLongtruncError)


def test_a_wrong_call_names_the_right_one(llama):
    with pytest.raises(TypeError, match=r"patch a model by LMInfinite\(...\)\(model\)"):
        LMInfinite(llama)
    with pytest.raises(TypeError, match=r"with LMInfinite\(...\)\(model\):"), LMInfinite():
        pass
    with pytest.raises(TypeError, match=r"no setting 'window'. Did you mean window_length"):
        LMInfinite(window=5)
    with pytest.raises(TypeError, match=r"no setting 'sinks'. Did you mean num_sink_tokens"):
        StreamingLLM(sinks=5)
    for wrong in (llama, 42):
        with pytest.raises(TypeError, match="takes the model's tokenizer"):
            TopBlocks.for_chat(wrong)


def test_gradients_after_detach_are_a_sentence(llama):
    llama.requires_grad_(True).train()
    enable_checkpointing(llama)
    with ARM(llama):
        loss = llama(prompt(30), labels=prompt(30), use_cache=False).loss
    with pytest.raises(RuntimeError, match=r"Call backward\(\) before detach"):
        loss.backward()


def test_compiled_decoding_is_refused_where_states_or_texts_grow(llama):
    with ARM(tiny_model("lfm2").requires_grad_(False)) as handle, pytest.raises(ValueError, match="recurrent"):
        handle.compile()
    with DualChunkAttention()(llama) as handle, pytest.raises(ValueError, match="cache of DualChunkAttention grows"):
        handle.compile()


@pytest.mark.parametrize("technique", [ARM, StreamingLLM(window_length=L), DualChunkAttention(chunk_length=9)])
def test_an_explanation_says_what_holds(llama, technique):
    before, ids = logits(llama, prompt(20)), prompt(50)
    told = technique.explain(llama)
    assert told.supported
    assert "2 patched" in told.layers
    with technique(llama) as handle:
        output = llama.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        layers = cache_of(output).layers
        assert str(handle.explanation()) == str(told)
    held = sum(getattr(layer, "nbytes", layer.keys.nbytes + layer.values.nbytes) for layer in layers)
    assert told.cache_bytes(layers[0].get_seq_length()) == held
    assert "as without the patch up to" in str(told)
    assert before.isfinite().all()


def test_an_explanation_says_why_not():
    told = ARM.explain(tiny_model("gpt2"))
    assert not told.supported
    assert "absolute positions" in told.reason
    assert "reason" in str(told)


def test_an_explanation_counts_retrieval_and_windows():
    gemma = tiny_model("gemma3_text").requires_grad_(False)
    told = LMInfinite(num_sink_tokens=S, window_length=L, retrieval=TopK(k=2, first_layer=0)).explain(gemma)
    assert "1 patched, 1 with a sliding window of their own as they are" in told.layers
    assert told.bytes_per_token > 0
    assert told.constant_bytes > 0


DRAFTS = 4  # with the token before them no more than the rows that read


@pytest.mark.parametrize(
    "technique", [LMInfinite(num_sink_tokens=S, window_length=L), DualChunkAttention(chunk_length=20)]
)
def test_blocks_are_selected_before_drafts_join(llama, technique):
    """Prompt lookup feeds drafts in the question's own forward: they neither score nor hide the question."""
    ending = (5, 6)
    rows = {"voting_rows": 3, "rows": 6, "ending_ids": ending}
    chat = TopBlocks(blocks=1, block_size=4, first_layer=0, first_voting_layer=0, **rows)
    ids = prompt(70)
    ids[0, -2:] = torch.tensor(ending)
    with replace(technique, retrieval=chat)(llama):
        plain = llama.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        drafted = llama.generate(
            ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=DRAFTS, return_dict_in_generate=True
        )
    selections = [cache_of(output).layers[0].selection for output in (plain, drafted)]
    assert selections[0] is not None
    assert torch.equal(selections[0].indices, selections[1].indices)
    assert torch.equal(plain.sequences, drafted.sequences)
