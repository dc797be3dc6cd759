"""Frequencies of every method against closed forms, after a round trip through a checkpoint; refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
)

from hf_longtrunc import CreamCollator, extend_context
from tests.command_line import model_folder  # noqa: F401
from tests.conftest import tiny_config

WINDOW, FACTOR, DIM = 256, 4, 8


def ordinary(theta, dim):
    return np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])


def yarn(theta, dim, window, factor):
    """Peng et al. 2023, section 3.2: r(i) turns in a window; below 1 turn divided, above 32 kept, a ramp between."""

    def dimension_of(turns):
        return dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension_of(32)), 0), min(math.ceil(dimension_of(1)), dim - 1)
    divided = np.clip((np.arange(dim // 2) - low) / (max(high - low, 1e-3)), 0, 1)
    plain = ordinary(theta, dim)
    return plain / factor * divided + plain * (1 - divided)


def closed_form(method, theta, dim, window=WINDOW, factor=FACTOR):
    if method == "ntk":
        return ordinary(theta * factor ** (dim / (dim - 2)), dim)
    return ordinary(theta, dim) / factor if method == "linear" else yarn(theta, dim, window, factor)


def reloaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def frequencies(model):
    return model.base_model.rotary_emb.inv_freq.double().numpy()


@pytest.mark.parametrize("method", ["yarn", "ntk", "linear"])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_frequencies_live_and_after_a_round_trip(method, theta, tmp_path):
    model = LlamaForCausalLM(tiny_config(rope_parameters={"rope_type": "default", "rope_theta": theta})).eval()
    before = frequencies(model)
    assert extend_context(model, FACTOR, method) == WINDOW * FACTOR
    again = reloaded(model, tmp_path)
    for other in (model, again):
        np.testing.assert_allclose(frequencies(other), closed_form(method, theta, DIM), rtol=1e-6)
        assert other.config.max_position_embeddings == WINDOW * FACTOR
        scale = 0.1 * math.log(FACTOR) + 1 if method == "yarn" else 1.0
        assert other.base_model.rotary_emb.attention_scaling == pytest.approx(scale)
    assert not np.allclose(frequencies(model), before, rtol=1e-2)
    ids = torch.arange(300)[None] % 97
    assert torch.equal(model(ids).logits, again(ids).logits)
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "yarn": {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": WINDOW},
        "linear": {"rope_type": "linear", "rope_theta": theta, "factor": 4.0},
        "ntk": {"rope_type": "default", "rope_theta": theta * FACTOR ** (DIM / (DIM - 2))},
    }
    assert saved["rope_parameters"] == expected[method]
    assert set(saved) == set(LlamaConfig(**saved).to_dict()) & set(saved)


@pytest.mark.parametrize("method", ["yarn", "ntk", "linear"])
def test_a_config_alone_and_one_that_lacks_rope_theta(method):
    config = tiny_config()
    config.rope_parameters = {"rope_type": "default"}
    extend_context(config, FACTOR, method)
    assert config.rope_parameters["rope_theta"] == (10_000.0 * FACTOR ** (8 / 6) if method == "ntk" else 10_000.0)
    np.testing.assert_allclose(frequencies(LlamaForCausalLM(config)), closed_form(method, 10_000.0, DIM), rtol=1e-6)


@pytest.mark.parametrize("method", ["yarn", "ntk", "linear"])
def test_partial_rotary_dimensions(method, tmp_path):
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=WINDOW, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
        "partial_rotary_factor": 0.5}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    extend_context(model, FACTOR, method)
    for other in (model, reloaded(model, tmp_path)):
        np.testing.assert_allclose(frequencies(other), closed_form(method, 1e4, 8), rtol=1e-6)


def test_only_full_attention_layers_of_nested_parameters_are_scaled():
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        max_position_embeddings=WINDOW, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    local = dict(config.rope_parameters["sliding_attention"])
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    extend_context(config, FACTOR, "linear")
    assert config.rope_parameters["sliding_attention"] == local
    full = {"rope_type": "linear", "rope_theta": theta, "factor": 4.0}
    assert config.rope_parameters["full_attention"] == full


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("method", ["yarn", "ntk", "linear"])
def test_scaled_models_are_refused_and_left_alone(method):
    model = LlamaForCausalLM(tiny_config(rope_parameters=dict(LLAMA3)))
    before, config = frequencies(model), model.config.to_dict()
    with pytest.raises(ValueError, match=r"scaled already \(rope_type 'llama3', factor 8.0.*Start from the unscaled"):
        extend_context(model, FACTOR, method)
    assert model.config.to_dict() == config
    assert (frequencies(model) == before).all()
    once = tiny_config()
    extend_context(once, FACTOR, "yarn")
    with pytest.raises(ValueError, match="scaled already"):
        extend_context(once, FACTOR, method)


def test_dtype_device_and_hooks_are_in_order():
    model = LlamaForCausalLM(tiny_config()).to(torch.bfloat16)
    extend_context(model, FACTOR)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    np.testing.assert_allclose(frequencies(model), closed_form("yarn", 10_000.0, DIM), rtol=1e-6)


def test_tokenizer_limit_is_set(model_folder):  # noqa: F811
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    extend_context(tiny_config(), FACTOR, tokenizer=tokenizer)
    assert tokenizer.model_max_length == WINDOW * FACTOR


@pytest.mark.parametrize(
    ("factor", "method", "error", "message"),
    [
        (1, "yarn", ValueError, "factor must be a whole number of at least 2, got 1"),
        (2.5, "yarn", TypeError, "factor must be a whole number of at least 2, got 2.5"),
        (4, "dynamic", ValueError, "method must be one of 'yarn', 'ntk', 'linear', got 'dynamic'"),
    ],
)
def test_bad_arguments_are_named(factor, method, error, message):
    with pytest.raises(error, match=message):
        extend_context(tiny_config(), factor, method)


def test_models_without_rotary_positions_or_with_cream_are_refused():
    with pytest.raises(ValueError, match="GPT2Config has no rope_parameters"):
        extend_context(GPT2Config(), FACTOR)
    model = LlamaForCausalLM(tiny_config())
    CreamCollator(dict, WINDOW // FACTOR, FACTOR).attach(model)
    with pytest.raises(ValueError, match=r"extend_context comes before attach\(\)"):
        extend_context(model, FACTOR)
    assert model.config.max_position_embeddings == WINDOW
    with pytest.raises(TypeError, match="model_or_config must be"):
        extend_context("a name", FACTOR)


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": WINDOW, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("what", ["model", "config"])
@pytest.mark.parametrize(
    ("config", "method"), [(Phi3Config, "yarn"), (Phi3Config, "linear"), (MixtralConfig, "yarn")], ids=str
)
def test_what_transformers_refuses_afterwards_is_refused_before_anything_is_changed(config, method, what):
    config = config(**SMALL)
    model = AutoModelForCausalLM.from_config(config) if what == "model" else config
    before, rotary = config.to_dict(), getattr(getattr(model, "model", None), "rotary_emb", None)
    with pytest.raises(ValueError, match=rf"{type(config).__name__} cannot be scaled by '{method}'(.|\n)*method=.ntk"):
        extend_context(model, FACTOR, method)
    assert config.to_dict() == before
    if what == "model":
        assert model.model.rotary_emb is rotary


@pytest.mark.parametrize("config", [Phi3Config, MixtralConfig])
def test_they_can_be_scaled_by_ntk_and_saved(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config(**SMALL))
    extend_context(model, FACTOR, "ntk")
    assert (frequencies(reloaded(model, tmp_path)) == frequencies(model)).all()


def test_the_live_rotary_module_reads_the_models_own_config():
    model = LlamaForCausalLM(tiny_config())
    extend_context(model, FACTOR)
    assert model.model.rotary_emb.config is model.config


@pytest.mark.parametrize("is_reloaded", [False, True])
@pytest.mark.parametrize("method", ["yarn", "ntk", "linear"])
def test_ntk_twice_is_refused(method, is_reloaded, tmp_path):
    model = LlamaForCausalLM(tiny_config())
    extend_context(model, FACTOR, "ntk")
    model = reloaded(model, tmp_path) if is_reloaded else model
    with pytest.raises(ValueError, match=r"scaled already: rope_theta 63496\.0.* is no whole number"):
        extend_context(model, FACTOR, method)


@pytest.mark.parametrize("head_dim", [4, 6])
def test_ntk_twice_is_refused_of_few_dimensions_too(head_dim):
    """4 ** (4 / 2) and 4 ** (6 / 4) are whole numbers, and so would the base be."""
    config = tiny_config(head_dim=head_dim)
    extend_context(config, 4, "ntk")
    assert config.rope_parameters["rope_theta"] == pytest.approx(10_000 * 4 ** (head_dim / (head_dim - 2)), rel=1e-15)
    with pytest.raises(ValueError, match="scaled already"):
        extend_context(config, 4, "ntk")
    config = tiny_config(head_dim=2)
    with pytest.raises(ValueError, match='method "ntk" needs 4 rotary dimensions or more'):
        extend_context(config, 4, "ntk")
    assert config.rope_parameters["rope_theta"] == 10_000


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_an_adapter_is_warned_of_and_read_back_as_the_warning_says(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    with pytest.warns(UserWarning, match=r"checkpoint of a PEFT adapter holds neither.*extend_context\(base_model, 4"):
        extend_context(tuned, FACTOR)
    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    extend_context(base, FACTOR)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(300)[None] % 97
    assert torch.equal(tuned.eval()(ids).logits, again.eval()(ids).logits)


def test_wrappers():
    model = LlamaForCausalLM(tiny_config())
    assert extend_context(torch.nn.DataParallel(model), np.int64(FACTOR)) == WINDOW * FACTOR
    np.testing.assert_allclose(frequencies(model), closed_form("yarn", 10_000.0, DIM), rtol=1e-6)
    with pytest.raises(ValueError, match="extend_context cannot change a compiled model"):
        extend_context(torch.compile(LlamaForCausalLM(tiny_config()), backend="eager"), FACTOR)


@pytest.mark.parametrize(("length", "factor"), [(4096, 64), (8192, 128)])
def test_a_length_is_no_factor(length, factor):
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=64))
    expected = (
        rf"how many times the trained window of 64, at most 512, got {length}: for a window of {length} .* {factor}"
    )
    with pytest.raises(ValueError, match=expected):
        extend_context(model, length)
    assert model.config.max_position_embeddings == 64
