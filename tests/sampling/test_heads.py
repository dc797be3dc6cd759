"""Proofs on every kind of head: their space is the gradient's own, and exact programs refute none."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from hf_longtrunc import SoftmaxBasis, SupportChecker
from hf_longtrunc.head import LanguageModelHead, head_inputs

VOCAB, WIDTH, RANK, TAU = 97, 32, 5, 0.02
IDS = torch.tensor([[1, 5, 9, 13, 40]])


def tiny(config_class, model_class, **changes):
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "pad_token_id": 0,
    }
    return model_class(config_class(**{**settings, **changes})).eval()


def llama(**changes):
    return tiny(LlamaConfig, LlamaForCausalLM, **changes)


def with_a_bias():
    model, head = llama(), nn.Linear(WIDTH, VOCAB)
    nn.init.normal_(head.weight, std=0.4)
    nn.init.normal_(head.bias)
    model.lm_head = head
    return model


def padded():
    model = llama(vocab_size=VOCAB + 7)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] = 0
    return model


def adapted():
    peft = pytest.importorskip("peft", reason="LoRA is peft's")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    return peft.get_peft_model(llama(), config).eval()


def quantized(kind=nn.Linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(llama(), {kind}, dtype=torch.qint8)


HEADS = {
    "untied": llama,
    "tied": lambda: tiny(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    ).eval(),
    "final_logit_softcapping": lambda: tiny(
        Gemma2Config, Gemma2ForCausalLM, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "logits_soft_cap": lambda: tiny(
        RecurrentGemmaConfig, RecurrentGemmaForCausalLM, lru_width=WIDTH, logits_soft_cap=5.0, w_init_variance_scale=1.0
    ),
    "output_logit_soft_cap": lambda: tiny(
        xLSTMConfig, xLSTMForCausalLM, num_heads=2, output_logit_soft_cap=5.0, chunk_size=16, num_blocks=2
    ),
    "a scale in front": lambda: tiny(CohereConfig, CohereForCausalLM, logit_scale=0.25),
    "a divisor": lambda: tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=2.0),
    "a bias": with_a_bias,
    "padded vocabulary": padded,
    "LoRA": adapted,
    "quantised by torch": quantized,
    "an encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ).eval(),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def slopes_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token's logits, and by how much each of them moves with the state that goes into the embedding.

    By central differences of the whole model, in double precision where the head has it.
    """
    module, seen = model.get_output_embeddings(), []
    options = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}

    def logits(move=None):
        def see(states):
            seen.append(states)
            return states if move is None else torch.cat([states[:, :-1], states[:, -1:] + move], dim=1)

        with torch.no_grad(), head_inputs(module, see):
            return model(IDS, use_cache=False, **options).logits[0, -1].double()

    plain, size = logits(), 1e-2 * float(seen[0].abs().max())
    moves = size * torch.eye(seen[0].shape[-1], dtype=seen[0].dtype)
    return plain, torch.stack([(logits(move) - logits(-move)) / (2 * size) for move in moves], dim=1)


def can_be_zero(columns: np.ndarray, probs: np.ndarray, token: int, sigma: float) -> bool:
    """HiGHS: whether some p within [0, sigma p-hat] has p-hat's image under `columns` and nothing on `token`."""
    matrix = (np.concatenate([np.ones((len(probs), 1)), columns], axis=1) * probs[:, None]).T
    matrix /= np.abs(matrix).sum(1, keepdims=True)
    cost = np.zeros(len(probs))
    cost[token] = 1
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    result = linprog(cost, A_eq=matrix, b_eq=matrix.sum(1), bounds=[(0, sigma)] * len(cost), options=options)
    assert result.status == 0
    return bool(result.fun < 1e-9)


@pytest.mark.parametrize("kind", HEADS)
def test_every_decision_is_that_of_an_exact_program_on_the_models_own_slopes(kind):
    model = HEADS[kind]()
    logits, slopes = slopes_of(model)
    if kind == "quantised by torch":  # whose input is rounded: differences see steps
        slopes = model.lm_head.weight().dequantize().double()
    checker = SupportChecker(SoftmaxBasis.from_model(model, RANK))
    row = checker._row(logits)
    ours = row.basis[:, 1:] * row.probs[:, None].sqrt()
    theirs = slopes * row.probs[:, None].sqrt()
    columns = slopes @ torch.linalg.lstsq(theirs, ours, driver="gelsd").solution
    assert (columns - row.basis[:, 1:]).abs().max() < 5e-3 * row.basis[:, 1:].abs().max()
    probs = row.probs.numpy()
    tokens = ((row.probs < TAU) & (row.probs > 1e-5)).nonzero()[:30, 0]
    decisions = checker.check(logits, TAU, tokens).tolist()
    exact = [1 - 2 * can_be_zero(columns.numpy(), probs, token, 1 / (1 - TAU)) for token in tokens.tolist()]
    assert decisions == exact
    assert len(tokens) >= 10, "too easy a row"


def test_a_cap_is_found_without_its_name():
    caps = {kind: LanguageModelHead(make()).cap for kind, make in HEADS.items()}
    capped = {"final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"}
    assert {kind for kind, cap in caps.items() if cap is not None} == capped
    assert all(caps[kind] == pytest.approx(5, rel=1e-6) for kind in capped)


def test_a_cap_that_the_models_logits_are_far_below():
    model = HEADS["final_logit_softcapping"]()
    model.config.final_logit_softcapping = 500.0
    assert SoftmaxBasis.from_model(model, RANK).softcap == pytest.approx(500, rel=1e-6)


@pytest.mark.parametrize("kind", ["logits_soft_cap", "a divisor", "LoRA", "quantised by torch"])
def test_the_head_from_outside_is_the_models(kind):
    model, seen = HEADS[kind](), []
    with torch.no_grad(), head_inputs(model.get_output_embeddings(), seen.append):
        logits = model(IDS, use_cache=False).logits
    torch.testing.assert_close(LanguageModelHead(model)(seen[0]), logits, atol=1e-4, rtol=1e-4)


def test_a_quantised_head_is_read_as_it_acts():
    model = quantized()
    weight = LanguageModelHead(model).weight()
    torch.testing.assert_close(weight, model.lm_head.weight().dequantize(), atol=1e-6, rtol=1e-6)
    basis = SoftmaxBasis.from_model(model, RANK)
    basis.check_model(model)


class Squashed(nn.Module):
    """A head that is no linear map."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, states):
        return self.inner(states.relu())


def test_what_is_no_affine_map_is_refused():
    model = llama()
    model.set_output_embeddings(Squashed(model.lm_head))
    with pytest.raises(ValueError, match="is no affine map of its input"):
        SoftmaxBasis.from_model(model, RANK)


def test_another_function_of_the_logits_is_refused(monkeypatch):
    model = llama()
    forward = model.forward

    def bent(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.abs().sqrt() * output.logits.sign()
        return output

    monkeypatch.setattr(model, "forward", bent)
    with pytest.raises(ValueError, match="does something to its logits"):
        SoftmaxBasis.from_model(model, RANK)


def test_probing_leaves_the_model_and_the_generator_alone():
    model = llama(attention_dropout=0.5).train()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    SoftmaxBasis.from_model(model, RANK)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not model.lm_head._forward_pre_hooks
