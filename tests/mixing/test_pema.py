"""PEMA: its mixture, its two stages, its memory and the head, against closed forms and naive references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hf_longtrunc import (
    GradualUnrolling,
    PEMAAdapter,
    PEMALogitsProcessor,
    PEMAMemory,
    build_pema_memory,
    train_pema,
)
from hf_longtrunc.head import LanguageModelHead
from hf_longtrunc.mixing.pema import fit_adapter, interpolate, pema_loss, reconstruction_basis
from hf_longtrunc.saving import save_folder
from tests.mixing.pema_models import (
    INF,
    VOCAB,
    WIDTH,
    examples_of,
    generate,
    identity_adapter,
    last_hidden_states,
    random_adapter,
    tiny,
)

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
