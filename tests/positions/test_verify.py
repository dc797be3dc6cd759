"""The self-test passes models that read distances from their rotary ids, and names what is wrong with the others."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_longtrunc import CreamCollator, extend_context, verify_positions
from tests.conftest import tiny_config

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [None, "yarn", "ntk", "linear"])
@pytest.mark.parametrize("attached", [False, True])
def test_rotary_models_pass_and_are_left_as_they_were(dtype, method, attached):
    model = LlamaForCausalLM(tiny_config(attention_dropout=0.5)).to(dtype).train()
    model.model.layers[0].eval()
    if method:
        extend_context(model, 4, method)
    if attached:
        CreamCollator(dict, model.config.max_position_embeddings // 4, 4).attach(model)
    before = [(module.training, set(vars(module)), len(module._forward_pre_hooks)) for module in model.modules()]
    verify_positions(model)
    after = [(module.training, set(vars(module)), len(module._forward_pre_hooks)) for module in model.modules()]
    assert [flag for flag, _, _ in before] == [flag for flag, _, _ in after]
    assert [hooks for _, _, hooks in before] == [hooks for _, _, hooks in after]
    assert attached or before == after


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_lora_passes_and_prompt_tuning_is_refused():
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    verify_positions(get_peft_model(LlamaForCausalLM(tiny_config()), lora))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"prompt or prefix tuning.*use LoRA"):
        verify_positions(get_peft_model(LlamaForCausalLM(tiny_config()), prompt))


def test_alibi_and_learned_positions_are_refused(tiny_gpt2):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    for model in (bloom, tiny_gpt2):
        with pytest.raises(ValueError, match="has no rotary modules"):
            verify_positions(model)
    with pytest.raises(TypeError, match="model must be a transformers model"):
        verify_positions(nn.Linear(2, 2))


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match=r"layers that see a window of their own only .*16"):
        verify_positions(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)))
    verify_positions(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)))


def test_frequencies_that_depend_on_the_length_are_refused():
    config = tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ValueError, match=r"depend on the length of the text .*dynamic.*use extend_context"):
        verify_positions(LlamaForCausalLM(config))


class Learned(LlamaForCausalLM):
    """A rotary model with learned positions beside."""

    def __init__(self, config):
        super().__init__(config)
        self.places = nn.Embedding(300, config.hidden_size)
        self.model.register_forward_pre_hook(self._place, with_kwargs=True)

    def _place(self, decoder, args, kwargs):
        ids = kwargs.pop("input_ids")
        position_ids = kwargs.get("position_ids")
        places = torch.arange(ids.shape[1])[None] if position_ids is None else position_ids
        return args, kwargs | {"inputs_embeds": decoder.embed_tokens(ids) + self.places(places)}


class Tokens(LlamaForCausalLM):
    """A model that hands its decoder nothing of what it is given beyond the tokens, as Falcon's does."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, use_cache=False)


class Deaf(LlamaForCausalLM):
    """A model whose rotary module is there and is not called."""

    def __init__(self, config):
        super().__init__(config)
        self.model.__dict__["rotary_emb"] = self.model.rotary_emb.forward


class Absolute(LlamaForCausalLM):
    """Frequencies that change with the position itself."""

    def __init__(self, config):
        super().__init__(config)
        rotary = self.model.rotary_emb
        forward = rotary.forward
        rotary.forward = lambda x, position_ids: forward(x, position_ids.double().pow(1.3))


class Blind(LlamaForCausalLM):
    """Every token sees itself only."""

    def forward(self, input_ids=None, **kwargs):
        n = input_ids.shape[1]
        mask = torch.full((n, n), -torch.inf).fill_diagonal_(0.0)[None, None]
        return super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Learned, "it reads absolute positions beside the rotary ones"),
        (Deaf, "none of its rotary modules was called"),
        (Absolute, "its positions are not relative"),
    ],
)
def test_models_that_read_positions_otherwise_are_refused(kind, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        verify_positions(kind(tiny_config()))


def test_a_model_that_hands_on_tokens_alone_is_served():
    verify_positions(Tokens(tiny_config()))


def test_a_blind_model_is_refused():
    with pytest.raises(ValueError, match="leave"):
        verify_positions(Blind(tiny_config()))


@pytest.mark.real_model
def test_the_real_model_passes_scaled_and_unscaled(real_model):
    verify_positions(real_model[0])
