"""Unlimiformer on tiny encoder-decoders, in double precision, against references that share no code with it."""

from __future__ import annotations

import copy
import gc
import io
import re
from functools import partial

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, MoEModelOutput

from hf_longtrunc import Datastore, FaissDatastore, ShardedDatastore, Unlimiformer
from hf_longtrunc.cross_attention import long_encoder
from hf_longtrunc.models import CACHE, cache_of
from tests.cross_attention.seq2seq_models import FAMILIES, VOCABULARY, random_ids, tiny_seq2seq
from tests.cross_attention.test_windows import naive_owner

WINDOW = 16
EVERYTHING = 10_000
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
GENERATED = {"rtol": 1e-5, "atol": 1e-5}  # generate() hands scores out in single precision


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> PreTrainedModel:
    return tiny_seq2seq(request.param)


# -- references --------------------------------------------------------------------------------------------------------


def stitched(model, ids, window=WINDOW, overlap=0.5):
    """Encode one row [1, n] window by window with the unmodified encoder, and pick every state from its window."""
    length = ids.shape[1]
    owners = naive_owner(length, window, overlap)
    encoded = {start: model.get_encoder()(input_ids=ids[:, start : start + window])[0] for start in set(owners)}
    return torch.stack([encoded[start][:, state - start] for state, start in enumerate(owners)], dim=1)


def cross_attentions(model):
    names = ("encoder_attn", "EncDecAttention", "cross_attn", "cross_attention")
    return [m for name, m in model.get_decoder().named_modules() if name.rpartition(".")[2] in names]


def projected(module, names, states):
    """Project states [n, width] by head: [heads, n, head_dim]."""
    linear = next(getattr(module, name) for name in names if hasattr(module, name))
    head_dim = getattr(module, "head_dim", None) or module.key_value_proj_dim
    return linear(states).unflatten(-1, (-1, head_dim)).transpose(0, 1)


def naive_scores(module, hidden, states):
    """Return the scores [heads, new, n] of one row, keys and all, biases included."""
    query, key = projected(module, ("q_proj", "q"), hidden), projected(module, ("k_proj", "k"), states)
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).transpose(1, 2) * module.scaling
    cap = getattr(module, "attn_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


def naive_top_k_attention(k, module, args, kwargs, output):
    """Forward hook: what a cross-attention module gives if each head of each query sees only its k best states."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    states = next(kwargs[name] for name in ("key_value_states", "encoder_hidden_states") if name in kwargs)
    rows = []
    for h, s in zip(hidden, states, strict=True):
        scores = naive_scores(module, h, s)
        worst = scores.argsort(-1, descending=True)[..., k:]
        weights = scores.scatter(-1, worst, -torch.inf).softmax(-1)
        value = projected(module, ("v_proj", "v"), s)
        rows.append((weights @ value.repeat_interleave(len(scores) // len(value), 0)).transpose(0, 1).flatten(1))
    out = next(getattr(module, name) for name in ("out_proj", "o_proj", "o") if hasattr(module, name))
    return out(torch.stack(rows)), *output[1:]


class naive_top_k:  # noqa: N801  reads as a context
    def __init__(self, model, k):
        self.hooks = [
            module.register_forward_hook(partial(naive_top_k_attention, k), with_kwargs=True)
            for module in cross_attentions(model)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def full_attention(model, states, mask=None, **inputs):
    mask = torch.ones(states.shape[:2], dtype=torch.long) if mask is None else mask
    return model(encoder_outputs=encoder_outputs(model, states), attention_mask=mask, **inputs)


def encoder_outputs(model, states):
    is_moe = model.config.model_type in ("nllb-moe", "switch_transformers")
    return MoEModelOutput(states) if is_moe else BaseModelOutput(states)


def close(model):
    """Return the tolerances for a model: T5Gemma's norms and routers of experts work in single precision."""
    is_single = model.config.model_type in ("t5gemma", "nllb-moe", "switch_transformers")
    return {"rtol": 1e-5, "atol": 1e-5} if is_single else CLOSE


def assert_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, **close(model), msg=name)


def padded(rows, side="right"):
    """Return ids and mask [rows, longest] of rows of unlike length."""
    longest = max(len(row) for row in rows)
    ids, mask = torch.ones(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


# -- k >= n: full attention over the stitched states -------------------------------------------------------------------


def test_retrieving_everything_is_full_attention_logits_loss_and_gradients(model):
    ids, labels = random_ids(2, 50), random_ids(2, 6, seed=1)
    model.zero_grad()
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW, encode_batch=3)(model):
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states = torch.cat([stitched(model, row[None]) for row in ids])
    expected = full_attention(model, states, labels=labels)
    expected.loss.backward()
    torch.testing.assert_close(output.encoder_last_hidden_state, states, **close(model))
    torch.testing.assert_close(output.logits, expected.logits, **close(model))
    torch.testing.assert_close(output.loss, expected.loss, **close(model))
    assert_gradients(model, gradients)


def skip_if_layers_draw(model, ids):
    """Before 5.24 some models draw a number for every layer, whether it may be dropped or not."""
    before = torch.get_rng_state()
    model.get_encoder()(ids)
    if not torch.equal(torch.get_rng_state(), before):
        pytest.skip("the model's layers draw random numbers, so two ways to run it cannot be seeded alike")


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    ],
    ids=["greedy", "beams", "beams returned", "sampled"],
)
def test_retrieving_everything_generates_what_full_attention_does(model, mode):
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (50, 37)])
    if "do_sample" in mode:
        skip_if_layers_draw(model, ids)
    settings = {"max_new_tokens": 7, "output_scores": True, "return_dict_in_generate": True, **mode}
    with torch.no_grad():
        states = [stitched(model, row[None, :n]) for row, n in zip(ids, (50, 37), strict=True)]
    states = torch.cat([states[0], torch.nn.functional.pad(states[1], (0, 0, 0, 13))])
    torch.manual_seed(3)
    expected = model.generate(encoder_outputs=encoder_outputs(model, states), attention_mask=mask, **settings)
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW)(model):
        torch.manual_seed(3)
        output = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    for scores, others in zip(output.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, others, **GENERATED)


# -- k < n: the k best, of every head of every query -------------------------------------------------------------------


class Recorder(Datastore):
    """Keeps the ids that were found."""

    found: list

    def search(self, queries, k):
        scores, ids = super().search(queries, k)
        Recorder.found.append(ids)
        return scores, ids


def test_each_head_finds_the_brute_force_set(model):
    k = 5
    ids, decoder_ids = random_ids(1, 60), random_ids(1, 4, seed=1)
    Recorder.found, expected = [], []

    def brute_force(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        states = next(kwargs[name] for name in ("key_value_states", "encoder_hidden_states") if name in kwargs)
        expected.append(naive_scores(module, hidden[0], states[0]).topk(k).indices.flatten(0, 1))

    hooks = [m.register_forward_pre_hook(brute_force, with_kwargs=True) for m in cross_attentions(model)]
    with Unlimiformer(top_k=k, window=WINDOW, index=Recorder)(model), torch.no_grad():
        Recorder.found.clear()
        expected.clear()
        model(input_ids=ids, decoder_input_ids=decoder_ids)
    for hook in hooks:
        hook.remove()
    assert len(Recorder.found) == len(expected) == 2
    for found, best in zip(Recorder.found, expected, strict=True):
        assert torch.equal(found.sort().values, best.sort().values)


@pytest.mark.parametrize("k", [1, 7])
def test_logits_and_gradients_of_top_k_are_the_naive_ones(model, k):
    ids, decoder_ids = random_ids(2, 50), random_ids(2, 4, seed=1)
    model.zero_grad()
    with Unlimiformer(top_k=k, window=WINDOW)(model):
        output = model(input_ids=ids, decoder_input_ids=decoder_ids)
        output.logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    states = torch.cat([stitched(model, row[None]) for row in ids])
    everything = full_attention(model, states, decoder_input_ids=decoder_ids).logits
    with naive_top_k(model, k):
        expected = full_attention(model, states, decoder_input_ids=decoder_ids).logits
    expected.square().mean().backward()
    torch.testing.assert_close(output.logits, expected, **close(model))
    assert (expected - everything).abs().max() > 1e-4
    assert_gradients(model, gradients)


def test_every_step_retrieves_the_first_one_too(model):
    k = 2
    ids = random_ids(1, 60)
    settings = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    with Unlimiformer(top_k=k, window=WINDOW)(model):
        output = model.generate(ids, **settings)
    with torch.no_grad():
        states = stitched(model, ids)
        with naive_top_k(model, k):
            expected = full_attention(model, states, decoder_input_ids=output.sequences[:, :-1]).logits[0]
        everything = full_attention(model, states, decoder_input_ids=output.sequences[:, :-1]).logits[0]
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits[0], expected[step].float(), **GENERATED, msg=f"step {step}")
    assert (everything[0] - expected[0]).abs().max() > 1e-4, "step 0 must differ from full attention to mean anything"


# -- padding, beams, caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("k", [3, None])
def test_a_padded_row_is_the_row_alone(model, side, k):
    rows = [random_ids(1, n, seed=n)[0] for n in (50, 33, WINDOW, 7)]
    ids, mask = padded(rows, side)
    decoder_ids = random_ids(4, 3, seed=1)
    with Unlimiformer(top_k=k, window=WINDOW, encode_batch=4)(model), torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        alone = [
            model(input_ids=row[None], decoder_input_ids=d[None]).logits
            for row, d in zip(rows, decoder_ids, strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), **close(model))


def test_rows_with_holes_see_no_hole():
    model = tiny_seq2seq()
    ids, decoder_ids = random_ids(1, 50), random_ids(1, 4, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 20:25] = 0
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW)(model), torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids)
    expected = full_attention(model, output.encoder_last_hidden_state, mask, decoder_input_ids=decoder_ids)
    torch.testing.assert_close(output.logits, expected.logits, **close(model))


def test_one_encoding_under_two_masks():
    model, ids = tiny_seq2seq(), random_ids(1, 50)
    states, mask = torch.randn(1, 50, 32, dtype=torch.float64), torch.ones_like(ids)
    half = mask.clone()
    half[0, 25:] = 0
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW)(model), torch.no_grad():
        found = [full_attention(model, states, some, decoder_input_ids=ids[:, :4]).logits for some in (mask, half)]
    with torch.no_grad():
        for logits, some in zip(found, (mask, half), strict=True):
            expected = full_attention(model, states, some, decoder_input_ids=ids[:, :4]).logits
            torch.testing.assert_close(logits, expected, **CLOSE)


def test_beams_share_the_encoder_states_and_no_keys_are_kept(model):
    ids, seen = random_ids(2, 50), []

    def note(module, args, kwargs):
        states = next(kwargs[name] for name in ("key_value_states", "encoder_hidden_states") if name in kwargs)
        seen.append((states.shape[0], states.data_ptr()))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in cross_attentions(model)]
    with Unlimiformer(top_k=4, window=WINDOW)(model):
        seen.clear()
        output = model.generate(ids, num_beams=4, max_new_tokens=4, return_dict_in_generate=True)
    for hook in hooks:
        hook.remove()
    assert len(set(seen)) == 1
    assert seen[0][0] == 2
    assert cache_of(output).cross_attention_cache.get_seq_length() == 0


def test_a_static_cache_goes_on_working(model):
    ids = random_ids(1, 50)
    with Unlimiformer(top_k=4, window=WINDOW)(model):
        expected = model.generate(ids, max_new_tokens=6)
        assert torch.equal(model.generate(ids, max_new_tokens=6, cache_implementation="static"), expected)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_an_assistant_changes_nothing():
    model, assistant, ids = tiny_seq2seq(), tiny_seq2seq(decoder_layers=1), random_ids(1, 50)
    with Unlimiformer(top_k=4, window=WINDOW)(model), Unlimiformer(top_k=4, window=WINDOW)(assistant):
        expected = model.generate(ids, max_new_tokens=12)
        assert torch.equal(model.generate(ids, max_new_tokens=12, assistant_model=assistant), expected)


def test_a_continued_forward_with_a_cache_is_the_whole_forward():
    model, ids, decoder_ids = tiny_seq2seq(), random_ids(2, 50), random_ids(2, 6, seed=1)
    with Unlimiformer(top_k=4, window=WINDOW)(model), torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=decoder_ids).logits
        first = model(input_ids=ids, decoder_input_ids=decoder_ids[:, :4], use_cache=True)
        rest = model(
            encoder_outputs=BaseModelOutput(first.encoder_last_hidden_state),
            decoder_input_ids=decoder_ids[:, 4:],
            **{CACHE: cache_of(first)},
        )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations(implementation):
    model, ids = tiny_seq2seq(), random_ids(1, 50)
    expected = tiny_seq2seq()
    model.set_attn_implementation(implementation)
    with Unlimiformer(top_k=3, window=WINDOW)(model), torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        states = stitched(expected, ids)
        with naive_top_k(expected, 3):
            torch.testing.assert_close(
                logits, full_attention(expected, states, decoder_input_ids=ids[:, :4]).logits, **CLOSE
            )


def test_inputs_embeds_are_cut_like_tokens():
    model, ids = tiny_seq2seq(), random_ids(2, 50)
    with Unlimiformer(top_k=3, window=WINDOW)(model), torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds, decoder_input_ids=ids[:, :4]).logits, expected, **CLOSE)


def test_a_tuple_is_returned_where_one_is_asked_for():
    model, ids = tiny_seq2seq(), random_ids(2, 50)
    with Unlimiformer(top_k=3, window=WINDOW)(model), torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids[:, :4], return_dict=False)[0], expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
def test_adapters_on_keys_and_values_count():
    from peft import LoraConfig, get_peft_model

    model = tiny_seq2seq()
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], init_lora_weights=False)
    )
    adapted = adapted.double().eval()
    ids, decoder_ids = random_ids(1, 50), random_ids(1, 4, seed=1)
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW)(adapted):
        output = adapted(input_ids=ids, decoder_input_ids=decoder_ids)
        output.logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    expected = full_attention(adapted, stitched(model, ids), decoder_input_ids=decoder_ids).logits
    expected.sum().backward()
    torch.testing.assert_close(output.logits, expected, **close(model))
    assert_gradients(adapted, gradients)


# -- short inputs and detaching: the model itself ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 9, WINDOW])
def test_an_input_that_fits_the_window_is_the_unmodified_model_to_the_bit(model, length):
    ids, mask = padded([random_ids(1, n, seed=n)[0] for n in (length, max(1, length - 4))])
    settings = {"max_new_tokens": 5, "num_beams": 2, "output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits
        expected_beams = model.generate(ids, attention_mask=mask, **settings)
        with Unlimiformer(top_k=1, window=WINDOW)(model):
            assert torch.equal(model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4]).logits, expected)
            beams = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(beams.sequences, expected_beams.sequences)
    assert all(torch.equal(a, b) for a, b in zip(beams.scores, expected_beams.scores, strict=True))


def traces(model):
    """Everything that could remain of a patch: attributes of every module, and hooks."""
    return {
        name: (sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks), module.training)
        for name, module in model.named_modules()
    }


def test_detaching_gives_the_model_back_to_the_bit(model):
    ids = random_ids(2, WINDOW)
    before, attributes = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits, traces(model)
    patch = Unlimiformer(window=WINDOW).attach(model)
    model.generate(random_ids(1, 50), max_new_tokens=3)
    assert traces(model) != attributes
    patch.detach()
    patch.detach()
    assert traces(model) == attributes
    assert torch.equal(model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits, before)


def test_detaching_after_an_exception():
    model, ids = tiny_seq2seq().train(), random_ids(1, 50)
    attributes = traces(model)
    with pytest.raises(IndexError), Unlimiformer(window=WINDOW)(model):
        model(input_ids=ids, decoder_input_ids=ids + 1000)
    assert traces(model) == attributes


def test_what_is_saved_is_the_plain_model(tmp_path):
    model = tiny_seq2seq()
    with Unlimiformer(window=WINDOW)(model):
        model.save_pretrained(tmp_path)
    assert not re.search("unlimiformer", (tmp_path / "config.json").read_text(), re.IGNORECASE)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# -- training ----------------------------------------------------------------------------------------------------------


def test_retrieval_training_is_retrieval_with_gradients():
    model, ids, labels = tiny_seq2seq(), random_ids(2, 50), random_ids(2, 5, seed=1)
    with Unlimiformer(top_k=3, window=WINDOW)(model):
        expected = model(input_ids=ids, labels=labels).loss
        model.train()
        loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.get_encoder().layers.parameters() if p.ndim == 2
    )


def test_random_training_attends_to_random_states_of_each_layer():
    model, ids = tiny_seq2seq().train(), random_ids(1, 50)
    skip_if_layers_draw(model, ids)
    decoder_ids = random_ids(1, 4, seed=1)
    with Unlimiformer(top_k=6, window=WINDOW, training="random")(model):
        torch.manual_seed(5)
        output = model(input_ids=ids, decoder_input_ids=decoder_ids)
        torch.manual_seed(6)
        other = model(input_ids=ids, decoder_input_ids=decoder_ids)
        output.logits.sum().backward()
    assert not torch.equal(output.logits, other.logits)
    assert model.get_encoder().layers[0].fc1.weight.grad.abs().sum() > 0
    states = stitched(model, ids)
    torch.manual_seed(5)
    chosen = iter([torch.randperm(50)[:6], torch.randperm(50)[:6]])
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "key_value_states": states[:, next(chosen)], "attention_mask": None},
            ),
            with_kwargs=True,
        )
        for module in cross_attentions(model)
    ]
    expected = full_attention(model, states, decoder_input_ids=decoder_ids)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(output.logits, expected.logits, **close(model))


def test_a_model_in_eval_mode_retrieves_whatever_the_training():
    model, ids = tiny_seq2seq(), random_ids(1, 50)
    logits = []
    for training in ("retrieval", "random", "alternating"):
        with Unlimiformer(top_k=3, window=WINDOW, training=training)(model):
            logits.append(model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_alternating_training_takes_turns():
    model, ids = tiny_seq2seq().train(), random_ids(1, 50)
    with Unlimiformer(top_k=3, window=WINDOW)(model):
        retrieved = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    with Unlimiformer(top_k=3, window=WINDOW, training="alternating")(model):
        logits = [model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits for _ in range(4)]
    assert [torch.equal(x, retrieved) for x in logits] == [False, True, False, True]


def test_trainer_trains(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_seq2seq().float()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    examples = [{"input_ids": random_ids(1, 50, seed=i)[0], "labels": random_ids(1, 5, seed=i)[0]} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", per_device_train_batch_size=2, max_steps=4,
        disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    with Unlimiformer(top_k=3, window=WINDOW, training="alternating")(model):
        loss = Trainer(model, arguments, train_dataset=examples).train().training_loss
    assert loss > 0
    for name in ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.1.encoder_attn.k_proj.weight"):
        assert not torch.equal(before[name], model.get_parameter(name))


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", ["retrieval", "random", "alternating"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_changes_no_gradient(family, reentrant, training):
    model, ids, labels = tiny_seq2seq(family).train(), random_ids(2, 50), random_ids(2, 5, seed=1)
    ids, mask = padded([ids[0], ids[1, :30]])
    mask[0, 20:23] = 0

    def gradients():
        model.zero_grad()
        torch.manual_seed(7)
        with Unlimiformer(top_k=3, window=WINDOW, training=training)(model):
            losses = [model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss for _ in range(2)]
            (losses[0] + 2 * losses[1]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


def test_attention_dropout_is_the_layers_own():
    model, ids = tiny_seq2seq(attention_dropout=0.5).train(), random_ids(1, 50)
    with Unlimiformer(top_k=EVERYTHING, window=WINDOW)(model):
        once, again = (model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits for _ in range(2))
        assert not torch.equal(once, again)
        model.eval()
        once, again = (model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits for _ in range(2))
        assert torch.equal(once, again)


# -- indexes, progress -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # FAISS's bindings, when imported
def test_faiss_flat_generates_what_the_exact_search_does(model):
    pytest.importorskip("faiss")
    ids = random_ids(2, 60)
    settings = {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True, "num_beams": 2}
    with Unlimiformer(top_k=4, window=WINDOW)(model):
        expected = model.generate(ids, **settings)
    with Unlimiformer(top_k=4, window=WINDOW, index="faiss:Flat")(model):
        output = model.generate(ids, **settings)
    for logits, others in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, others, **GENERATED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_index_is_built_once_a_text_and_not_once_a_step(monkeypatch):
    pytest.importorskip("faiss")
    model, built = tiny_seq2seq(), []
    monkeypatch.setattr(
        FaissDatastore,
        "__init__",
        lambda self, states, index: (built.append(index), Datastore.__init__(self, states))[1],
    )
    monkeypatch.setattr(FaissDatastore, "search", Datastore.search)
    with Unlimiformer(top_k=4, window=WINDOW, index="faiss:HNSW8")(model):
        built.clear()
        model.generate(random_ids(2, 60), max_new_tokens=6, num_beams=2)
        assert built == ["HNSW8"] * 2
        model.generate(random_ids(1, 60, seed=1), max_new_tokens=6)
        assert built == ["HNSW8"] * 3


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # before 5.24: the weights are on "meta"
def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_seq2seq(), random_ids(1, 50)
    with Unlimiformer(top_k=4, window=WINDOW)(model):
        expected = model.generate(ids, max_new_tokens=5)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert cross_attentions(model)[0].k_proj.weight.is_meta
    with Unlimiformer(top_k=4, window=WINDOW)(model):
        assert torch.equal(model.generate(ids, max_new_tokens=5), expected)


def test_a_store_of_ones_own():
    model, ids = tiny_seq2seq(), random_ids(1, 60)

    def in_parts(states):
        return ShardedDatastore([Datastore(part) for part in states.split(25)])

    with torch.no_grad():
        with Unlimiformer(top_k=4, window=WINDOW)(model):
            expected = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
        with Unlimiformer(top_k=4, window=WINDOW, index=in_parts)(model):
            torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits, expected, **CLOSE)


def test_a_long_encode_shows_its_progress(monkeypatch, capsys):
    model = tiny_seq2seq()
    with Unlimiformer(window=WINDOW)(model):
        model.generate(random_ids(1, 50), max_new_tokens=2)
        assert "encoding" not in capsys.readouterr().err
        monkeypatch.setattr(long_encoder, "_SECONDS_BEFORE_PROGRESS", 0)
        # A command whose output is piped, run by an earlier test, switches transformers' bars off for the process.
        monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
        model.generate(random_ids(1, 50), max_new_tokens=2)
        assert "encoding" in capsys.readouterr().err


# -- texts: each its own, and none longer than it is read --------------------------------------------------------------


def alive():
    """Return how many stores are alive."""
    gc.collect()
    return sum(type(thing) is Datastore for thing in gc.get_objects())


@pytest.fixture
def new_objects_alone():
    """Let the garbage collector look at objects of this test only: a collection of all takes most of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("new_objects_alone")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [(50,), (50, 37)])
def test_a_text_is_freed_at_the_end_of_its_generation(beams, lengths):
    model, (ids, mask) = tiny_seq2seq(), padded([random_ids(1, n)[0] for n in lengths])
    seen, before = [], alive()

    def see(*_):
        seen.append(alive() - before)
        return torch.ones(len(lengths) * beams, VOCABULARY)

    with Unlimiformer(top_k=4, window=WINDOW)(model):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=beams, logits_processor=[see])
        assert seen == [len(lengths)] * 3
        assert alive() == before


@pytest.mark.usefixtures("new_objects_alone")
def test_a_text_is_freed_after_an_exception():
    model, before = tiny_seq2seq(), alive()

    def fail(*_):
        raise KeyboardInterrupt

    with Unlimiformer(top_k=4, window=WINDOW)(model):
        try:
            model.generate(random_ids(1, 50), max_new_tokens=3, logits_processor=[fail])
        except KeyboardInterrupt:
            assert alive() > before
        assert alive() == before


@pytest.mark.usefixtures("new_objects_alone")
def test_states_that_are_held_outside_are_let_go_when_detached():
    model, before = tiny_seq2seq(), alive()
    with Unlimiformer(top_k=4, window=WINDOW)(model), torch.no_grad():
        states = model(input_ids=random_ids(1, 50), decoder_input_ids=random_ids(1, 3)).encoder_last_hidden_state
        assert alive() == before + 1
    assert alive() == before
    assert states.shape == (1, 50, 32)


class Counted(Datastore):
    """Counts how many were built."""

    built = 0

    def __init__(self, states):
        super().__init__(states)
        Counted.built += 1


def test_two_texts_in_turns_are_each_built_once_and_each_their_own():
    model, decoder_ids = tiny_seq2seq(), random_ids(1, 3, seed=9)
    texts = [model.get_encoder()(random_ids(1, 50, seed=seed))[0].detach() for seed in range(2)]
    with Unlimiformer(top_k=3, window=WINDOW, index=Counted)(model), torch.no_grad():
        Counted.built = 0
        alone = [full_attention(model, states, decoder_input_ids=decoder_ids).logits for states in texts]
        for _ in range(3):
            for states, expected in zip(texts, alone, strict=True):
                assert torch.equal(full_attention(model, states, decoder_input_ids=decoder_ids).logits, expected)
        assert Counted.built == 2


def test_states_overwritten_in_place_are_read_anew():
    model, decoder_ids = tiny_seq2seq(), random_ids(1, 3, seed=9)
    mask = torch.ones(1, 50, dtype=torch.long)
    mask[0, 20:25] = 0  # such a store holds copies
    states = torch.randn(1, 50, 32, dtype=torch.float64)
    with Unlimiformer(top_k=3, window=WINDOW)(model), torch.no_grad():
        full_attention(model, states, mask, decoder_input_ids=decoder_ids)
        other = states.flip(1)
        expected = full_attention(model, other, mask, decoder_input_ids=decoder_ids).logits
        states.copy_(other)
        assert torch.equal(full_attention(model, states, mask, decoder_input_ids=decoder_ids).logits, expected)


def test_inference_mode():
    model, ids = tiny_seq2seq(), random_ids(1, 50)
    with Unlimiformer(top_k=3, window=WINDOW)(model):
        expected = model.generate(ids, max_new_tokens=5, num_beams=2)
        with torch.inference_mode():
            assert torch.equal(model.generate(ids, max_new_tokens=5, num_beams=2), expected)


def test_random_training_needs_no_index():
    model, ids = tiny_seq2seq().train(), random_ids(1, 50)

    def refuse(states):
        raise AssertionError

    with Unlimiformer(top_k=3, window=WINDOW, training="random", index=refuse)(model):
        model(input_ids=ids, labels=ids[:, :4]).loss.backward()


def test_an_index_that_raises_says_so_itself():
    def broken(states):
        raise KeyError("my own index")

    model, ids = tiny_seq2seq(), random_ids(1, 50)
    with Unlimiformer(window=WINDOW, index=broken)(model), pytest.raises(KeyError, match="my own index"):
        model.generate(ids, max_new_tokens=2)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be a whole number"),
        ({"window": 0}, ValueError, "window must be a whole number of at least 1, got 0"),
        ({"overlap": 1.0}, ValueError, "overlap must be a number of at least 0 and below 1, got 1.0"),
        ({"overlap": -0.1}, ValueError, "overlap"),
        ({"index": "Flat"}, ValueError, "index must begin with 'faiss:', as in 'faiss:HNSW32', got 'Flat'"),
        ({"index": 3}, TypeError, "index must be None"),
        ({"encode_batch": 0}, ValueError, "encode_batch must be a whole number of at least 1"),
        ({"encode_batch": None}, TypeError, "encode_batch must be a whole number"),
        (
            {"training": "chunked"},
            ValueError,
            "training must be one of 'retrieval', 'random', 'alternating', got 'chunked'",
        ),
    ],
)
def test_settings_out_of_range_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        Unlimiformer(**settings)


def test_a_window_over_the_encoders_positions_is_refused():
    with pytest.raises(ValueError, match="window must be at most 64, the positions that this BartConfig"):
        Unlimiformer(window=65).attach(tiny_seq2seq())
    with pytest.raises(ValueError, match="window must be at most 64"):
        Unlimiformer(window=65).attach(tiny_seq2seq("led"))


def test_the_window_comes_from_the_config():
    for family in ("bart", "led", "t5", "t5gemma"):
        patch = Unlimiformer().attach(tiny_seq2seq(family))
        assert (patch.window, patch.top_k) == (64, 64)
    with pytest.raises(ValueError, match=r"MT5Config does not say how long .*: pass window="):
        Unlimiformer().attach(tiny_seq2seq("mt5"))


def test_a_decoder_only_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"needs an encoder-decoder .* LlamaForCausalLM .* see LMInfinite"):
        Unlimiformer().attach(tiny_model)
    with pytest.raises(TypeError, match=r"Unlimiformer: model must be a transformers model, .* got Linear"):
        Unlimiformer().attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["nllb-moe", "switch_transformers"])
def test_router_logits_of_a_long_input_are_refused(family):
    model, labels = tiny_seq2seq(family), random_ids(1, 5)
    expected = model(input_ids=random_ids(1, WINDOW), labels=labels, output_router_logits=True).loss
    with Unlimiformer(window=WINDOW)(model):
        found = model(input_ids=random_ids(1, WINDOW), labels=labels, output_router_logits=True).loss
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match="output_router_logits must be False for inputs of more than 16 tokens"):
            model(input_ids=random_ids(1, 50), labels=labels, output_router_logits=True)


def test_an_encoder_of_sound_is_refused():
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=97, num_mel_bins=8, max_source_positions=30,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[],
        begin_suppress_tokens=[],
    )  # fmt: skip
    with pytest.raises(ValueError, match="an encoder that reads token ids"):
        Unlimiformer(window=8).attach(WhisperForConditionalGeneration(config))


def test_patches_do_not_nest():
    model = tiny_seq2seq()
    with (
        Unlimiformer(window=WINDOW)(model),
        pytest.raises(ValueError, match="attached to this BartForConditionalGeneration already: detach"),
    ):
        Unlimiformer(window=WINDOW).attach(model)
    with Unlimiformer(window=WINDOW)(model):
        pass


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_model_is_not_copied_while_it_is_attached_nor_is_a_part_of_it_that_was_changed(family):
    model = tiny_seq2seq(family)
    with Unlimiformer(window=WINDOW)(model):
        for part in (model, model.get_encoder(), model.get_decoder(), cross_attentions(model)[0]):
            with pytest.raises(TypeError, match=r"cannot be copied or pickled.*detach first, copy or save it"):
                copy.deepcopy(part)
        with pytest.raises(TypeError, match="detach first, copy or save it, and attach again"):
            torch.save(model, io.BytesIO())
    copy.deepcopy(model)


@pytest.mark.parametrize("family", ["fsmt", "t5gemma2", "prophetnet"])
def test_decoders_without_cross_attention_of_its_own_are_refused(family):
    model = tiny_seq2seq(family).float()
    attributes = traces(model)
    with pytest.raises(ValueError, match="no module that attends to encoder states alone, a row at a time"):
        Unlimiformer(window=WINDOW).attach(model)
    assert traces(model) == attributes


def test_without_faiss_the_error_comes_when_attaching(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    model = tiny_seq2seq()
    attributes = traces(model)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[faiss\]"'):
        Unlimiformer(window=WINDOW, index="faiss:Flat").attach(model)
    assert traces(model) == attributes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unknown_index_is_refused_when_attaching_and_one_for_the_models_width_is_not():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=r"faiss\.index_factory knows, got 'Flatt'"):
        Unlimiformer(window=WINDOW, index="faiss:Flatt").attach(tiny_seq2seq())
    with Unlimiformer(window=WINDOW, index="faiss:IVF4,PQ16")(tiny_seq2seq()):
        pass


def test_masks_that_cannot_be_cut_are_refused():
    model, ids = tiny_seq2seq(), random_ids(2, 50)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with Unlimiformer(window=WINDOW)(model):
        with pytest.raises(ValueError, match="attention_mask has no real token in row 1"):
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4])
        with pytest.raises(
            ValueError, match=r"attention_mask must have a number per token, \[rows, 50\], got shape \(2, 40\)"
        ):
            model(input_ids=ids, attention_mask=mask[:, :40], decoder_input_ids=ids[:, :4])


def test_cross_attention_that_computes_something_else_is_refused():
    model = tiny_seq2seq()
    attributes = traces(model)
    module = cross_attentions(model)[0]
    plain = module.forward
    module.forward = lambda *args, **kwargs: (2 * plain(*args, **kwargs)[0], None)
    with pytest.raises(ValueError, match=r"cannot change BartForConditionalGeneration: .*not reproduced"):
        Unlimiformer(window=WINDOW).attach(model)
    del module.forward
    assert traces(model) == attributes
