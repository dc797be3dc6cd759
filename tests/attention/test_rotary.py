"""Every RoPE scaling that transformers knows, read off the model that carries it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_longtrunc import LMInfinite
from hf_longtrunc.attention.rope import ExactRotary, UnsupportedModelError, find_rotation, rotations_of

from .reference import Naive, Rope, install

S, L, N = 3, 10, 40
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip


def scaled_llama(kind):
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_model_is_the_definition(kind):
    ids = torch.randint(3, 90, (1, N))
    model = scaled_llama(kind)
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        patched = model(ids).logits
    # Frequencies of a text of L tokens: for dynamic and longrope those of the unscaled length.
    rotary = model.model.rotary_emb
    frequencies = rotary.original_inv_freq if kind in ("dynamic", "longrope") else rotary.inv_freq
    install(model, Naive(S, L, L, Rope(8, frequencies=frequencies)))
    if kind == "longrope":  # the unpatched model would take its long factors for these N tokens
        model.config.rope_parameters["original_max_position_embeddings"] = N
    assert (patched - model(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_do_not_depend_on_the_running_length(kind):
    ids = torch.randint(3, 90, (1, 200))
    model = scaled_llama(kind)
    before = model(ids[:, :12]).logits
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with LMInfinite(num_sink_tokens=S, window_length=12)(model):
        assert (model(ids[:, :12]).logits - before).abs().max() < 2e-5
        whole = model(ids).logits
        assert (model(ids[:, :100]).logits - whole[:, :100]).abs().max() < 2e-5
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(model(ids[:, :12]).logits, before)


def test_a_window_beyond_the_original_length_takes_the_long_factors():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **SCALINGS["longrope"]}
    model = Phi3ForCausalLM(Phi3Config(**SIZES, rope_parameters=rope)).eval().requires_grad_(False)
    ids = torch.randint(3, 90, (1, 30))
    before = model(ids).logits
    with LMInfinite(num_sink_tokens=S, window_length=30)(model):
        assert (model(ids).logits - before).abs().max() < 2e-5


def test_what_is_no_rotation_is_refused():
    source = ExactRotary(scaled_llama("default").model.rotary_emb, None, L, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 4, 8)
    candidates = rotations_of(8, x.device, [source])
    assert find_rotation(x, x, candidates) is None
    with pytest.raises(ValueError, match="no rotation of planes"):
        find_rotation(x, x.flip(-1), candidates)


def test_a_weighted_norm_behind_the_rotation_is_refused():
    """Its scores are no function of the distance: the case that a probe finds and no list of names would."""
    model = scaled_llama("default")
    from transformers.models.llama import modeling_llama

    keep = modeling_llama.apply_rotary_pos_emb
    scale = torch.linspace(0.5, 2, 8)
    modeling_llama.apply_rotary_pos_emb = lambda *args, **kwargs: tuple(x * scale for x in keep(*args, **kwargs))
    try:
        with pytest.raises(ValueError, match="no rotation of planes"):
            LMInfinite(num_sink_tokens=S, window_length=L).attach(model)
    finally:
        modeling_llama.apply_rotary_pos_emb = keep


@pytest.mark.parametrize(
    "answer",
    [
        lambda cos, sin: None,
        lambda cos, sin: {"cos": cos, "sin": sin},
        lambda cos, sin: cos,
        lambda cos, sin: (cos, sin, sin),
        lambda cos, sin: (cos[0], sin[0]),
        lambda cos, sin: (cos, sin[..., :3]),
    ],
)
def test_a_rotary_module_that_answers_in_another_form_is_refused(answer):
    class OtherForm(LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            return answer(*super().forward(x, position_ids))

    module = OtherForm(scaled_llama("default").config)
    with pytest.raises(UnsupportedModelError, match="OtherForm answers with something else than cosines and sines"):
        ExactRotary(module, None, L, torch.Generator().manual_seed(0))
