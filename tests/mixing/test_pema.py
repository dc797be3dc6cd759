"""PEMA: closed forms, naive references, and every mode of generation against recomputation from the ids alone."""

from __future__ import annotations

import json
import math
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LogitsProcessor,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_longtrunc import (
    PEMA,
    GradualUnrolling,
    PEMAAdapter,
    PEMALogitsProcessor,
    PEMAMemory,
    attach_processors,
    build_pema_memory,
    train_pema,
)
from hf_longtrunc.head import LanguageModelHead, head_inputs
from hf_longtrunc.mixing.pema import fit_adapter, interpolate, pema_loss, reconstruction_basis
from hf_longtrunc.saving import save_folder
from tests.command_line import model_folder  # noqa: F401
from tests.conftest import tiny_config

INF = math.inf
WIDTH, VOCAB = 32, 97
PROMPTS = [[7, 8, 9], [1, 5, 9, 13, 5, 9]]
PADDED = torch.tensor([[0, 0, 0, *PROMPTS[0]], PROMPTS[1]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def settings_of_a_tiny_model() -> dict:
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " max_position_embeddings bos_token_id eos_token_id pad_token_id initializer_range"
    return {name: getattr(tiny_config(), name) for name in names.split()}


def tiny(config_class, model_class, **changes):
    torch.manual_seed(3)
    return model_class(config_class(**{**settings_of_a_tiny_model(), **changes})).eval()


@pytest.fixture
def tiny_mistral():
    return tiny(MistralConfig, MistralForCausalLM, sliding_window=4)


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def model(request, tiny_model, tiny_gpt2):
    models = {"llama": tiny_model, "gpt2": tiny_gpt2}
    return models.get(request.param) or request.getfixturevalue("tiny_mistral")


def random_adapter(rank=6, seed=7) -> PEMAAdapter:
    adapter = PEMAAdapter(WIDTH, rank, VOCAB, generator=torch.Generator().manual_seed(seed)).eval()
    nn.init.normal_(adapter.B_pd, std=0.3, generator=torch.Generator().manual_seed(seed + 1))
    return adapter


def identity_adapter() -> PEMAAdapter:
    adapter = PEMAAdapter(WIDTH, WIDTH, VOCAB).eval()
    with torch.no_grad():
        adapter.B_pd.copy_(torch.linalg.inv(adapter.A))
    return adapter


# -- the mixture and its share -----------------------------------------------------------------------------------------


def mixture_in_loops(pema, scores, share):
    rows = []
    for z, s, weight in zip(pema.tolist(), scores.tolist(), share.tolist(), strict=True):
        alive = [x > -INF for x in s]
        p = [math.exp(x - max(z)) * on for x, on in zip(z, alive, strict=True)]
        q = [math.exp(x - max(s)) for x in s]
        rows.append([weight * a / sum(p) + (1 - weight) * b / sum(q) for a, b in zip(p, q, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 12), st.booleans())
def test_the_mixture_is_the_loop_and_a_distribution(seed, rows, vocab, is_cut):
    generator = torch.Generator().manual_seed(seed)
    pema, scores = (4 * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    if is_cut:
        scores[:, 1] = -INF
    share = torch.rand(rows, generator=generator)
    share[0] = seed % 3 / 2
    before = scores.clone()
    mixed = interpolate(pema, scores, share)
    torch.testing.assert_close(mixed.double().exp(), mixture_in_loops(pema, scores, share), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(rows))
    assert torch.equal(scores, before)
    assert ((mixed == -INF) == (scores == -INF)).all()


def test_share_zero_is_the_model_and_share_one_the_adapter():
    pema, scores = torch.randn(2, 9), torch.randn(2, 9)
    assert torch.equal(interpolate(pema, scores, torch.zeros(2)), scores.log_softmax(-1))
    assert torch.equal(interpolate(pema, scores, torch.ones(2)), pema.log_softmax(-1))


def test_gradual_unrolling_is_the_formula():
    schedule = GradualUnrolling(source_length=[4, 10], prompt_length=20, lambda_max=0.9)
    for width in range(20, 40):
        expected = [(0.9 * max(0.0, 1 - (width - 20) / length)) ** 2 for length in (4, 4, 4, 10, 10, 10)]
        torch.testing.assert_close(schedule.shares(width, 6), torch.tensor(expected))
    assert GradualUnrolling(source_length=5, prompt_length=3).shares(3, 2).tolist() == pytest.approx([0.81, 0.81])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "source_length must be a whole number of at least 1, got 0"),
        (([], 3), "at least one prompt, got none"),
        (([4, 0], 3), "source_length must be a whole number of at least 1, got 0"),
        ((4, 0), "prompt_length must be a whole number of at least 1"),
        ((4, 3, 1.1), r"lambda_max must be a number of at least 0 and of at most 1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualUnrolling(**dict(zip(("source_length", "prompt_length", "lambda_max"), arguments, strict=False)))


def test_a_schedule_that_does_not_fit_the_call():
    with pytest.raises(ValueError, match="prompt_length is 9, but input_ids have 8 columns"):
        GradualUnrolling(source_length=4, prompt_length=9).shares(8, 1)
    with pytest.raises(ValueError, match="names 2 prompts, which 3 rows cannot belong to"):
        GradualUnrolling(source_length=[4, 5], prompt_length=2).shares(8, 3)


# -- the adapter, its two stages ---------------------------------------------------------------------------------------


def test_stage_one_reaches_the_optimum_of_eckart_and_young():
    hidden = torch.randn(300, 24) * torch.logspace(0, -1, 24) + torch.randn(24)
    singular = torch.linalg.svdvals(hidden.double())
    for rank in (1, 5, 23, 24):
        basis = reconstruction_basis(hidden, rank).double()
        rest = hidden.double() - hidden.double() @ basis @ basis.T
        assert float(rest.square().sum()) == pytest.approx(float(singular[rank:].square().sum()), rel=1e-5, abs=1e-8)
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double(), atol=1e-6, rtol=0)


def test_gradient_steps_on_stage_one_come_to_it_and_not_below():
    """The paper's own way: fails if the solved basis were of another problem (centred, say)."""
    hidden = (torch.randn(64, 6, dtype=torch.float64) + 0.5) * torch.tensor([3, 2, 1, 0.7, 0.5, 0.3])
    a, b = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, line_search_fn="strong_wolfe")

    def loss_of_stage_one():
        optimizer.zero_grad()
        loss = (hidden @ a.T @ b - hidden).square().mean()
        loss.backward()
        return loss

    optimizer.step(loss_of_stage_one)
    loss = loss_of_stage_one()
    basis = reconstruction_basis(hidden.float(), 2).double()
    solved = (hidden @ basis @ basis.T - hidden).square().mean()
    assert float(solved) <= loss.item() + 1e-7
    assert float(solved) == pytest.approx(loss.item(), rel=1e-3)


def test_the_loss_is_the_loop():
    adapter, head = random_adapter(), nn.Linear(WIDTH, VOCAB)
    adapter.B_rct.copy_(torch.randn(WIDTH, 6))
    hidden, tokens = torch.randn(5, WIDTH), torch.randint(0, VOCAB, (5,))
    total = 0.0
    for f, y in zip(hidden, tokens, strict=True):
        down = adapter.A @ f
        state = adapter.B_pd @ down
        square = sum(d.item() ** 2 for d in adapter.B_rct @ down - f) / WIDTH
        total += 0.3 * square - 0.7 * (head.weight @ state + head.bias).log_softmax(0)[y].item()
    loss = pema_loss(adapter, head, hidden, tokens, 0.3)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)


def test_stage_two_starts_even_and_learns_and_leaves_the_head_alone():
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    memory = PEMAMemory(torch.randn(40, WIDTH), torch.randint(0, VOCAB, (40,)), VOCAB)
    adapter = PEMAAdapter(WIDTH, 16, VOCAB)
    start = adapter.A.detach().clone()
    losses = fit_adapter(adapter, memory, head, kappa=0.0, epochs=1, batch_size=40)
    assert losses == pytest.approx([math.log(VOCAB)], rel=1e-5)
    assert torch.equal(adapter.B_rct, reconstruction_basis(memory.hidden, 16))
    losses = fit_adapter(adapter, memory, head, kappa=0.2, epochs=60, batch_size=8, learning_rate=1e-2)
    assert losses[-1] < 0.3 * losses[0]
    assert head.weight.grad is None
    assert not torch.equal(adapter.A, start)
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_training_depends_on_its_seed_alone(tiny_model):
    memory = PEMAMemory(torch.randn(20, WIDTH), torch.randint(0, VOCAB, (20,)), VOCAB)

    def train(seed):
        torch.rand(int(torch.randint(1, 9, ())))
        return train_pema(tiny_model, memory, rank=4, epochs=2, batch_size=8, seed=seed)

    first, again, other = train(1), train(1), train(2)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.A, other.A)
    assert not first.training
    assert tiny_model.lm_head.weight.grad is None


def test_the_default_rank_fits_the_model(tiny_model):
    memory = PEMAMemory(torch.randn(4, WIDTH), torch.randint(0, VOCAB, (4,)), VOCAB)
    assert train_pema(tiny_model, memory, epochs=1).rank == WIDTH < 512


def test_bad_training(tiny_model):
    memory = PEMAMemory(torch.randn(20, WIDTH), torch.randint(0, VOCAB, (20,)), VOCAB)
    with pytest.raises(ValueError, match="rank must be a whole number from 1 to 32"):
        train_pema(tiny_model, memory, rank=33)
    with pytest.raises(ValueError, match="kappa must be a number"):
        train_pema(tiny_model, memory, rank=4, kappa=2)
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1"):
        train_pema(tiny_model, memory, rank=4, epochs=0)
    with pytest.raises(ValueError, match="the memory was made for states of width 16"):
        train_pema(tiny_model, PEMAMemory(torch.randn(2, 16), torch.tensor([1, 2]), VOCAB), rank=4)


def test_an_adapter_saved_and_loaded(tmp_path):
    adapter = random_adapter()
    adapter.B_rct.normal_()
    adapter.save_pretrained(tmp_path / "new" / "folder")
    loaded = PEMAAdapter.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(PEMAAdapter.load(tmp_path / "new" / "folder").A, adapter.A)
    hidden = torch.randn(3, WIDTH)
    assert torch.equal(loaded(hidden), adapter(hidden))
    assert torch.equal(loaded.reconstruct(hidden), adapter.reconstruct(hidden))
    assert repr(loaded) == repr(adapter)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["pema_adapter.safetensors"]
    with pytest.raises(FileNotFoundError, match="holds no saved pema_adapter"):
        PEMAAdapter.from_pretrained(tmp_path)


# -- the memory --------------------------------------------------------------------------------------------------------


def examples_of(generator) -> list[dict]:
    rows = []
    for length in (5, 9, 2, 7, 12):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    rows[1]["labels"][-1] = -100
    rows.append({"input_ids": [1, 2, 3], "labels": [1, -100, -100]})  # its only target has no context
    return rows


@torch.no_grad()
def last_hidden_states(model, ids, **inputs):
    return model(input_ids=ids, output_hidden_states=True, use_cache=False, **inputs).hidden_states[-1]


def test_the_memory_is_each_example_run_alone(model):
    examples = examples_of(torch.Generator().manual_seed(4))
    expected = []
    for example in examples:
        states = last_hidden_states(model, torch.tensor([example["input_ids"]]))[0]
        targets = enumerate(example["labels"])
        expected += [(states[place - 1], label) for place, label in targets if place and label != -100]
    model.train()
    model.lm_head.eval()
    for batch_size in (1, 4, 50):
        memory = build_pema_memory(model, examples, batch_size=batch_size)
        assert memory.tokens.tolist() == [label for _, label in expected]
        torch.testing.assert_close(memory.hidden, torch.stack([state for state, _ in expected]), atol=2e-6, rtol=1e-5)
    assert model.training
    assert not model.lm_head.training
    assert not model.lm_head._forward_pre_hooks


def test_a_memory_of_a_dataset(tiny_model):
    datasets = pytest.importorskip("datasets")
    examples = examples_of(torch.Generator().manual_seed(4))
    memory = build_pema_memory(tiny_model, datasets.Dataset.from_list(examples))
    assert torch.equal(memory.hidden, build_pema_memory(tiny_model, examples).hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_saved_and_mapped(tmp_path, dtype):
    memory = PEMAMemory(torch.randn(20, 8).to(dtype), torch.randint(0, VOCAB, (20,)), VOCAB)
    memory.save_pretrained(tmp_path)
    loaded = PEMAMemory.from_pretrained(tmp_path)
    assert torch.equal(loaded.hidden, memory.hidden)
    assert torch.equal(loaded.tokens, memory.tokens)
    assert repr(loaded) == "PEMAMemory(20 rows of width 8, vocab_size=97)"
    memory.save(tmp_path / "again")
    assert torch.equal(PEMAMemory.load(tmp_path / "again").tokens, memory.tokens)


HIDDEN, TOKENS = torch.randn(3, 4), torch.tensor([1, 2, 3])
WRONG_MEMORIES = {
    "NaN": ({"hidden": HIDDEN * torch.nan, "tokens": TOKENS}, {"vocab_size": 9}, "must be finite"),
    "no tokens": ({"hidden": HIDDEN}, {"vocab_size": 9}, "without tokens"),
    "no vocabulary": ({"hidden": HIDDEN, "tokens": TOKENS}, {}, "without vocab_size"),
    "other tokens": ({"hidden": HIDDEN, "tokens": TOKENS + 9}, {"vocab_size": 9}, r"tokens must lie in 0\.\.8"),
    "flat": ({"hidden": HIDDEN[0], "tokens": TOKENS}, {"vocab_size": 9}, r"dimensions \[rows width\]"),
}


@pytest.mark.parametrize("case", WRONG_MEMORIES)
def test_a_memory_that_is_none_is_named(tmp_path, case):
    tensors, settings, message = WRONG_MEMORIES[case]
    save_folder(tmp_path, "pema_memory", tensors, settings)
    with pytest.raises(ValueError, match=message):
        PEMAMemory.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["pema_memory", "pema_adapter"])
def test_a_flipped_bit_is_noticed(tmp_path, kind):
    saved = PEMAMemory(HIDDEN, TOKENS, 9) if kind == "pema_memory" else random_adapter()
    saved.save_pretrained(tmp_path)
    data = bytearray((tmp_path / f"{kind}.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / f"{kind}.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        type(saved).from_pretrained(tmp_path)


WRONG_ADAPTERS = {
    "fp64": (lambda t: {n: v.double() for n, v in t.items()}, {}, None),
    "NaN": (lambda t: t | {"A": t["A"] * torch.nan}, {}, "must be finite"),
    "no B_pd": (lambda t: {n: v for n, v in t.items() if n != "B_pd"}, {}, "without B_pd"),
    "a layer norm of before": (lambda t: t | {"norm.weight": torch.ones(WIDTH)}, {"layer_norm": True}, "norm.weight"),
    "settings of before": (lambda t: t, {"layer_norm": False}, None),
    "another rank": (lambda t: t, {"rank": 3}, "do not fit its settings"),
    "no rank": (lambda t: t, {"rank": None}, "without rank"),
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_an_adapter_that_is_none_is_named(tmp_path, case):
    tensors, changes, message = WRONG_ADAPTERS[case]
    adapter = random_adapter()
    settings = {name: getattr(adapter, name) for name in ("hidden_size", "rank", "vocab_size")} | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    save_folder(tmp_path, "pema_adapter", tensors(adapter.state_dict()), settings)
    if message is None:
        assert torch.equal(PEMAAdapter.from_pretrained(tmp_path).A, adapter.A)
    else:
        with pytest.raises(ValueError, match=message):
            PEMAAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"input_ids": [1, 2]}, "example 0 has no column 'labels'"),
        ({"input_ids": [1, 2], "labels": [1]}, "equally long lists"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels that are shifted by one"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "at least one row"),
    ],
)
def test_bad_examples(tiny_model, example, message):
    with pytest.raises(ValueError, match=message):
        build_pema_memory(tiny_model, [example])
    assert not tiny_model.lm_head._forward_pre_hooks


def test_texts_are_no_examples(tiny_model):
    with pytest.raises(TypeError, match=r"example 0 must be a mapping .* got str: tokenize texts first"):
        build_pema_memory(tiny_model, ["a"])


def test_bad_memories():
    with pytest.raises(ValueError, match="floating-point matrix"):
        PEMAMemory(torch.zeros(3), torch.zeros(3, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.4"):
        PEMAMemory(torch.zeros(2, 3), torch.tensor([1, 5]), 5)


# -- the head ----------------------------------------------------------------------------------------------------------

HEADS = {
    "capped": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "scaled up front": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    "divided": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
    "plain": (MistralConfig, MistralForCausalLM, {}),
}


def model_with_a_head(kind):
    config_class, model_class, changes = HEADS[kind]
    return tiny(config_class, model_class, **changes)


@pytest.mark.parametrize("kind", HEADS)
def test_states_go_through_the_models_own_head_operations(kind):
    model = model_with_a_head(kind)
    ids = torch.randint(1, VOCAB, (2, 7))
    torch.testing.assert_close(
        LanguageModelHead(model)(last_hidden_states(model, ids)), model(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", HEADS)
def test_where_b_pd_a_is_the_identity_p_pema_is_p_lm(kind):
    """Closed form, whatever the share: the mixture is the model."""
    model = model_with_a_head(kind)
    for share in (0.3, 1.0):
        with PEMALogitsProcessor(model, identity_adapter(), share) as pema:
            result = generate(model, [pema], output_scores=True, output_logits=True)
        for logits, scores in zip(result.logits, result.scores, strict=True):
            torch.testing.assert_close(scores, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_bias_belongs_to_the_head(tiny_model):
    head = nn.Linear(WIDTH, VOCAB)
    head.weight = tiny_model.lm_head.weight
    nn.init.normal_(head.bias)
    tiny_model.lm_head = head
    ids = torch.tensor([[1, 5, 9]])
    states = last_hidden_states(tiny_model, ids)
    torch.testing.assert_close(LanguageModelHead(tiny_model)(states), tiny_model(ids).logits)


def test_an_unknown_operation_on_the_logits_is_refused(tiny_model, monkeypatch):
    forward = tiny_model.forward

    def squared(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits**2
        return output

    monkeypatch.setattr(tiny_model, "forward", squared)
    with pytest.raises(ValueError, match="LlamaForCausalLM does something to its logits"):
        PEMALogitsProcessor(tiny_model, random_adapter())


def test_bfloat16_models_train_and_generate(tiny_model):
    model = tiny_model.to(torch.bfloat16)
    memory = build_pema_memory(model, examples_of(torch.Generator().manual_seed(4)))
    assert memory.hidden.dtype is torch.bfloat16
    adapter = train_pema(model, memory, rank=8, epochs=2)
    assert adapter.A.dtype is torch.float32
    with PEMALogitsProcessor(model, adapter) as pema:
        assert generate(model, [pema], output_scores=True).scores[0].dtype is torch.float32


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_peft_model(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model, config).eval()
    with PEMALogitsProcessor(adapted, identity_adapter(), 1.0) as pema:
        result = generate(adapted, [pema], output_scores=True, output_logits=True)
    torch.testing.assert_close(result.scores[3], result.logits[3].log_softmax(-1), atol=1e-4, rtol=1e-4)


# -- generation --------------------------------------------------------------------------------------------------------


class BruteForce(LogitsProcessor):
    """The mixture recomputed from the ids alone: no hook, no cache, W by hand."""

    def __init__(self, model, adapter, share):
        self.model, self.adapter, self.share = model, adapter, share

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        mask = ((input_ids != 0).cumsum(-1) > 0).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        states = last_hidden_states(self.model, input_ids, attention_mask=mask, position_ids=positions)[:, -1]
        p_lm = (states @ self.model.lm_head.weight.T).softmax(-1)
        p_pema = (self.adapter(states) @ self.model.lm_head.weight.T).softmax(-1)
        share = self.share(input_ids) if callable(self.share) else self.share
        return (share * p_pema + (1 - share) * p_lm).log()


class Seen(LogitsProcessor):
    """Keeps what a processor was given and gave."""

    def __init__(self, processor):
        self.processor, self.calls = processor, []

    def __call__(self, input_ids, scores):
        result = self.processor(input_ids, scores)
        self.calls.append((input_ids.clone(), scores, result))
        return result


def generate(model, processors, ids=PADDED, mask=MASK, **options):
    torch.manual_seed(11)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        logits_processor=processors,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "4 beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 4, "do_sample": True, "top_k": 0},
    "several returns": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}
MODES_OF_ALL = [mode for mode in MODES if mode != "static cache"]


def same_as_brute_force(model, mode, ids=PADDED, mask=MASK, share=0.5, interpolation=0.5):
    adapter = random_adapter()
    brute = BruteForce(model, adapter, share)
    with PEMALogitsProcessor(model, adapter, interpolation) as pema:
        seen = Seen(pema)
        ours = generate(model, [seen], ids, mask, **MODES[mode])
    assert len(seen.calls) == 6
    for input_ids, scores, result in seen.calls:
        torch.testing.assert_close(result, brute(input_ids, scores), atol=1e-4, rtol=0)
    assert torch.equal(ours.sequences, generate(model, [brute], ids, mask, **MODES[mode]).sequences)
    return ours.sequences


@pytest.mark.parametrize("mode", MODES_OF_ALL)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "left-padded"])
def test_every_mode_is_recomputation_from_the_ids(model, mode, is_padded):
    prompts = (PADDED, MASK) if is_padded else (PADDED[:, 3:], MASK[:, 3:])
    mixed = same_as_brute_force(model, mode, *prompts)
    assert not torch.equal(mixed, generate(model, [], *prompts, **MODES[mode]).sequences)


def test_static_cache(tiny_model):
    same_as_brute_force(tiny_model, "static cache")


@pytest.mark.parametrize("mode", ["greedy", "4 beams", "several returns"])
def test_gradual_unrolling_in_generation(tiny_model, mode):
    """Each row's share from its own source length and from the ids: the same under beams and padding."""
    lengths = [3, 8]

    def share(input_ids):
        rows = len(input_ids)
        step = input_ids.shape[1] - PADDED.shape[1]
        own = [lengths[row // (rows // 2)] for row in range(rows)]
        return torch.tensor([[(0.9 * max(0.0, 1 - step / length)) ** 2] for length in own])

    schedule = GradualUnrolling(source_length=lengths, prompt_length=PADDED.shape[1])
    same_as_brute_force(tiny_model, mode, share=share, interpolation=schedule)


def test_several_calls_in_one_block(tiny_model):
    """Another batch, and a call that goes on from what the last one wrote."""
    adapter = random_adapter()
    brute = BruteForce(tiny_model, adapter, 0.5)
    one = torch.tensor([[4, 5, 6, 7]])
    with PEMALogitsProcessor(tiny_model, adapter) as pema:
        first = generate(tiny_model, [pema]).sequences
        second = generate(tiny_model, [pema], one, torch.ones_like(one)).sequences
        third = generate(tiny_model, [pema], second, torch.ones_like(second), num_beams=3).sequences
    assert torch.equal(first, generate(tiny_model, [brute]).sequences)
    assert torch.equal(second, generate(tiny_model, [brute], one, torch.ones_like(one)).sequences)
    assert torch.equal(third, generate(tiny_model, [brute], second, torch.ones_like(second), num_beams=3).sequences)


def test_the_models_logits_are_stored_as_they_were(tiny_model):
    """transformers hands out the very tensor that output_logits stores."""
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema:
        stored = generate(tiny_model, [pema], output_logits=True)
    sequences = stored.sequences
    mask = torch.cat([MASK, torch.ones_like(sequences[:, 6:])], dim=1)
    logits = tiny_model(sequences, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(torch.stack(stored.logits, 1), logits[:, 5:-1], atol=1e-5, rtol=1e-5)


def test_what_an_earlier_processor_removed_stays_removed(tiny_model):
    """P_PEMA alone would bring the end of the text back before min_new_tokens."""
    eos = int(generate(tiny_model, [BruteForce(tiny_model, random_adapter(), 0.9)]).sequences[1, 6])
    with PEMALogitsProcessor(tiny_model, random_adapter(), 0.9) as pema:
        options = {"eos_token_id": eos, "pad_token_id": 0}
        assert (generate(tiny_model, [pema], **options).sequences[1, 6:] == eos).any()
        held = generate(tiny_model, [pema], min_new_tokens=6, **options).sequences
    assert not (held[:, 6:] == eos).any()


# -- the block ---------------------------------------------------------------------------------------------------------


@contextmanager
def left_as_it_was(model):
    before = model(PADDED).logits
    yield
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(model(PADDED).logits, before)


def test_the_block_leaves_nothing_behind(tiny_model):
    with left_as_it_was(tiny_model):
        pema = PEMALogitsProcessor(tiny_model, random_adapter())
        assert not tiny_model.lm_head._forward_pre_hooks, "making one touches nothing"
        with pema:
            generate(tiny_model, [pema])
        with pytest.raises(RuntimeError, match="stop here"), pema:
            raise RuntimeError("stop here")
        with pytest.raises(ValueError, match="outside its block"):
            generate(tiny_model, [pema])


def test_a_block_can_be_entered_again_but_not_twice_at_once(tiny_model):
    pema = PEMALogitsProcessor(tiny_model, random_adapter())
    for _ in range(2):
        with pema:
            generate(tiny_model, [pema])
            with pytest.raises(ValueError, match="in use already"):
                pema.__enter__()
    assert not tiny_model.lm_head._forward_pre_hooks


def test_the_handle_is_the_processor(tiny_model):
    """By `with`, by attach and detach, and the same tokens as by the earlier name."""
    adapter = random_adapter()
    with PEMALogitsProcessor(tiny_model, adapter, 0.3) as pema:
        expected = generate(tiny_model, [pema]).sequences
    with left_as_it_was(tiny_model):
        with PEMA(adapter, interpolation=0.3)(tiny_model) as pema:
            assert torch.equal(generate(tiny_model, [pema]).sequences, expected)
        pema = PEMA(adapter, interpolation=np.float32(0.3)).attach(tiny_model)
        assert torch.equal(generate(tiny_model, [pema]).sequences, expected)
        assert "PEMA(PEMAAdapter(" in repr(pema)
        assert "on LlamaForCausalLM: the input of its output embedding is read" in repr(pema)
        pema.detach()
        pema.detach()
        assert "detached" in repr(pema)
        with pytest.raises(ValueError, match="outside its block"):
            generate(tiny_model, [pema])


def test_a_generation_without_it_in_the_block_changes_nothing(tiny_model):
    """It used to pile up the states of these, and to refuse the next call for prompt lookup."""
    with PEMA(random_adapter())(tiny_model) as pema:
        expected = generate(tiny_model, [pema]).sequences
        generate(tiny_model, [])
        tiny_model(PADDED)
        assert torch.equal(generate(tiny_model, [pema]).sequences, expected)


def test_threads_have_states_of_their_own(tiny_model):
    prompts = [torch.randint(1, VOCAB, (1, 6)) for _ in range(12)]
    with PEMA(random_adapter(), interpolation=0.9)(tiny_model) as pema:
        alone = [generate(tiny_model, [pema], ids, torch.ones_like(ids)).sequences for ids in prompts]
        with ThreadPoolExecutor(3) as pool:
            together = list(
                pool.map(lambda ids: generate(tiny_model, [pema], ids, torch.ones_like(ids)).sequences, prompts)
            )
    assert all(map(torch.equal, together, alone))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own import
def test_a_compiled_model_is_refused_with_the_way_out(tiny_model):
    with pytest.raises(ValueError, match="compile that afterwards"):
        PEMA(random_adapter()).attach(torch.compile(tiny_model))
    with pytest.raises(TypeError, match="adapter must be a PEMAAdapter"):
        PEMA(tiny_model)


def test_two_adapters_at_once(tiny_model):
    """The second mixes into what the first returned; neither hears the other's use of the head."""
    one, two = (PEMALogitsProcessor(tiny_model, random_adapter(seed=seed), 0.3) for seed in (7, 9))
    with one, two:
        scores = generate(tiny_model, [one, two], output_scores=True).scores[0]
    first, second = (BruteForce(tiny_model, part.adapter, 0.3)(PADDED, None).exp() for part in (one, two))
    plain = BruteForce(tiny_model, one.adapter, 0.0)(PADDED, None).exp()
    alone = (second - 0.7 * plain) / 0.3
    torch.testing.assert_close(scores.exp(), 0.3 * alone + 0.7 * first, atol=1e-5, rtol=1e-4)


REFUSED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "saw 0 since the last one"),
    "guidance": ({"guidance_scale": 1.5}, "saw 2 since the last one"),
    "chunks": ({"prefill_chunk_size": 2}, "saw 3 since the last one"),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_that_cannot_be_right_are_refused(tiny_model, mode):
    options, message = REFUSED[mode]
    ids = torch.tensor([PROMPTS[1]])
    refused = pytest.raises(ValueError, match=f"one forward of the model for every step, and {message}")
    with left_as_it_was(tiny_model), PEMALogitsProcessor(tiny_model, random_adapter(), 1e-9) as pema, refused:
        generate(tiny_model, [pema], ids, torch.ones_like(ids), **options)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_assisted_decoding_is_refused(tiny_model):
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    ids = torch.tensor([PROMPTS[1]])
    refused = pytest.raises(ValueError, match="assisted decoding")
    with left_as_it_was(tiny_model), PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        generate(tiny_model, [pema], ids, torch.ones_like(ids), assistant_model=assistant)


def test_several_positions_of_one_forward_are_refused(tiny_model):
    """What assisted decoding does once its candidates are there: no second row of scores from the same forward."""
    adapter, ids = random_adapter(), PADDED[:, 3:]
    expected = BruteForce(tiny_model, adapter, 0.5)(ids, None)
    with PEMALogitsProcessor(tiny_model, adapter) as pema, torch.no_grad():
        logits = tiny_model(ids).logits
        mixed = pema(ids, logits[:, -1])
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="saw 0 since the last one"):
            pema(ids, logits[:, -1])


def test_continuous_batching_is_refused(tiny_model):
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, attach_processors(tiny_model, [pema]):
        outputs = tiny_model.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
    assert not any(output.generated_tokens for output in outputs.values())  # transformers logs why a request failed


def test_another_models_scores_are_refused(tiny_model, tiny_gpt2):
    refused = pytest.raises(ValueError, match="the model that PEMALogitsProcessor was given")
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        generate(tiny_gpt2, [pema])


def test_inputs_embeds_are_refused(tiny_model):
    embeds = tiny_model.get_input_embeddings()(PADDED)
    refused = pytest.raises(ValueError, match="instead of inputs_embeds")
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        tiny_model.generate(inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=2, logits_processor=[pema])


def test_scores_of_other_rows_or_tokens_are_refused(tiny_model):
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, torch.no_grad():
        for rows, vocab in ((1, VOCAB), (2, VOCAB + 1)):
            scores = torch.randn(rows, vocab)
            tiny_model(PADDED)
            with pytest.raises(ValueError, match=r"scores must have shape \(2, 97\)"):
                pema(PADDED[:rows], scores)


def test_adapters_and_models_that_do_not_fit(tiny_model):
    with pytest.raises(ValueError, match="a vocabulary of 98, this model has 32 and 97"):
        PEMALogitsProcessor(tiny_model, PEMAAdapter(WIDTH, 4, VOCAB + 1))
    with pytest.raises(ValueError, match="the adapter was made for states of width 16"):
        PEMALogitsProcessor(tiny_model, PEMAAdapter(16, 4, VOCAB))
    with pytest.raises(ValueError, match=r"interpolation must be a number of at least 0 and of at most 1, got 1\.5"):
        PEMALogitsProcessor(tiny_model, random_adapter(), 1.5)
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        PEMALogitsProcessor(tiny_model.model, random_adapter())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        PEMALogitsProcessor(t5, random_adapter())


def test_head_inputs_lets_go_after_an_exception(tiny_model):
    with pytest.raises(RuntimeError, match="stop here"), head_inputs(tiny_model.lm_head, lambda states: None):
        raise RuntimeError("stop here")
    assert not tiny_model.lm_head._forward_pre_hooks


def test_training_makes_the_targets_likely(tiny_model):
    """From memory to generation: what was taught comes out, and not without the adapter."""
    taught = [[1, 5, 9, 13, 20, 21, 22, 23], [4, 6, 8, 30, 31, 32, 33, 34]]
    examples = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in taught]
    memory = build_pema_memory(tiny_model, examples)
    adapter = train_pema(tiny_model, memory, rank=16, epochs=150, learning_rate=5e-3)
    prompts = torch.tensor([ids[:3] for ids in taught])
    assert F.cross_entropy(LanguageModelHead(tiny_model)(adapter(memory.hidden)), memory.tokens) < 0.1
    with PEMALogitsProcessor(tiny_model, adapter, 0.7) as pema:
        said = generate(tiny_model, [pema], prompts, torch.ones_like(prompts)).sequences
    assert said[:, :8].tolist() == taught
    assert generate(tiny_model, [], prompts, torch.ones_like(prompts)).sequences[:, :8].tolist() != taught


def test_the_recipe_runs(model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = Path(__file__).parents[2] / "recipes" / "pema.py"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    options = ["--examples", "2", "--tests", "2", "--epochs", "1", "--rank", "4"]
    monkeypatch.setattr(
        sys, "argv", ["pema.py", *options, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    assert not ended.value.code
    assert "exact match" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "pema.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len({record["arm"] for record in records})
    assert PEMAAdapter.load(tmp_path / "out" / "adapter").rank == 4


@pytest.mark.real_model
def test_on_the_real_model(real_model):
    """Left-padded, 2 beams: the scores of every step are those of the ids alone."""
    model, tokenizer = real_model
    prompts = ["Dear colleagues,", "The capital of France is the city of"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    examples = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    adapter = train_pema(model, build_pema_memory(model, examples), rank=16, epochs=1)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with PEMALogitsProcessor(model, adapter) as pema:
        seen = Seen(pema)
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False, logits_processor=[seen])
    for input_ids, _, result in seen.calls:
        for row, mixed in zip(input_ids, result, strict=True):
            states = last_hidden_states(model, row[row != tokenizer.pad_token_id][None])[:, -1]
            p_lm, p_pema = (
                torch.softmax(state @ model.lm_head.weight.T, -1) for state in (states, adapter(states).detach())
            )
            torch.testing.assert_close(mixed.exp(), (0.5 * p_pema + 0.5 * p_lm)[0], atol=1e-5, rtol=1e-3)
