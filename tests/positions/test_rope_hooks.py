"""The way of the ids to the rotary modules: whose they are, in which thread, in which copy, and whether they arrive."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    LlamaForCausalLM,
)

from hf_longtrunc import CreamCollator, extend_context, verify_positions
from hf_longtrunc.positions.rope_hooks import ROPE_IDS
from tests.positions.test_collator import FACTOR, WINDOW, attached, cream, double, tiny, tokens


def examples(seed=0, rows=1):
    return [{"input_ids": row} for row in tokens(*[WINDOW] * rows, seed=seed)]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def test_the_handle_is_a_block_and_says_what_is_changed():
    model, collator = double(), cream()
    plain = cream().inner(examples())
    before = logits(model, plain)
    with collator.attach(model) as handle:
        batch = collator(examples())
        assert repr(handle) == (
            "<CreamCollator on LlamaForCausalLM: 1 rotary modules rotate by rope_position_ids in training mode; "
            "detach() takes it back>"
        )
        assert not torch.equal(logits(model, batch), before)
    assert repr(handle) == "<CreamCollator on LlamaForCausalLM: detached>"
    assert torch.equal(logits(model, plain), before)
    with pytest.raises(ValueError, match="attached to no model"):
        collator(examples())
    with pytest.raises(RuntimeError, match="on purpose"), collator.attach(model):
        raise RuntimeError("on purpose")
    collator.attach(model)
    collator.detach()


def test_two_threads_get_what_each_alone_gets():
    """Forwards held at each other's middle: one thread's ids never reach the other's rotary module."""
    model = double()
    collator = attached(cream(), model)
    batches = [collator(examples(seed)) for seed in range(2)]
    alone = [logits(model, batch) for batch in batches]
    both = threading.Barrier(2)
    model.model.embed_tokens.register_forward_hook(lambda *_: (both.wait(30), None)[1])  # behind the taking of ids
    found = [None, None]

    def run(index):
        found[index] = logits(model, batches[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, alone))


def test_a_layer_run_again_in_autograds_thread_finds_the_ids_or_refuses():
    model = double()
    batch = attached(cream(), model)(examples())
    rotary, x, plain = model.model.rotary_emb, torch.zeros(1, dtype=torch.double), torch.arange(WINDOW)[None]
    logits(model, batch)
    own, found, errors = type(rotary).forward(rotary, x, batch[ROPE_IDS]), [], []

    def elsewhere():
        try:
            found.append(rotary(x, plain))
        except ValueError as error:
            errors.append(str(error))

    def run(target):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()

    run(elsewhere)
    assert all(map(torch.equal, found[0], own))
    run(lambda: logits(model, batch))
    run(elsewhere)
    assert len(found) == 1
    assert "it cannot be known which thread's positions are meant" in errors[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_plain_model_that_can_be_attached(copied):
    model = double()
    collator = attached(cream(), model)
    batch = collator(examples())
    moved = logits(model, batch)
    other = copied(model)
    with pytest.raises(ValueError, match=r"is a copy of a model that CREAM is attached to.*attach\(copy\)"):
        logits(other, batch)
    plain = {name: value for name, value in batch.items() if name != ROPE_IDS}
    assert torch.equal(logits(other.eval(), batch), logits(model.eval(), plain))
    with cream().attach(other.train()):
        assert torch.equal(logits(other, batch), moved)
        assert torch.equal(logits(model.train(), batch), moved)


def test_an_average_of_weights_can_be_attached():
    model = double()
    collator = attached(cream(), model)
    average = AveragedModel(model)
    collator.detach()
    collator.attach(average)
    assert torch.equal(logits(average, collator(examples())), logits(model, {**cream().inner(examples())})) is False


@pytest.mark.parametrize("order", ["wrapped first", "attached first"])
def test_data_parallel_wrappers(order):
    model = double()
    wrapper, collator = nn.DataParallel(model), cream()
    collator.attach(wrapper if order == "wrapped first" else model)
    batch = collator(examples())
    assert torch.equal(logits(wrapper, batch), logits(model, batch))
    verify_positions(wrapper)


def test_compiled_afterwards_it_is_the_same_and_compiled_before_it_is_refused():
    model, collator = double(num_hidden_layers=1), cream()
    for compiled in (torch.compile(model, backend="eager"), torch.compile(nn.DataParallel(model), backend="eager")):
        with pytest.raises(ValueError, match=r"compiled model.*attach to the model inside, `model._orig_mod`"):
            collator.attach(compiled)
    with collator.attach(model):
        batch, later = collator(examples()), collator(examples(1))
        compiled = torch.compile(model, backend="eager")
        for each in (batch, later):
            torch.testing.assert_close(logits(compiled, each), logits(model, each))
        verify_positions(compiled)
    in_place = double(num_hidden_layers=1)
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled model.*in place; load the model again, attach"):
        collator.attach(in_place)


SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def falcon():
    return FalconForCausalLM(FalconConfig(**SMALL, alibi=False, max_position_embeddings=WINDOW * FACTOR))


def japanese():
    config = GPTNeoXJapaneseConfig(
        **SMALL, max_position_embeddings=WINDOW * FACTOR, hidden_dropout=0.0, attention_dropout=0.0
    )
    return GPTNeoXJapaneseForCausalLM(config)


@pytest.mark.parametrize("make", [falcon, japanese])
def test_models_that_hand_no_further_arguments_to_their_decoder_are_trained_at_the_ids(make):
    model = make().double().train()
    collator = attached(cream(), model)
    batch = collator(examples())
    plain = {name: value for name, value in batch.items() if name != ROPE_IDS}
    assert (logits(model, batch) - logits(model, plain)).abs().max() > 1e-6
    with torch.no_grad():  # with a cache, jumps are no borders of documents
        wanted = model(**plain, position_ids=batch[ROPE_IDS], use_cache=True).logits
    torch.testing.assert_close(logits(model, batch), wanted, rtol=1e-5, atol=1e-6)


def test_ids_that_reach_no_rotary_module_are_heard_of():
    model = double()
    batch = attached(cream(), model)(examples())
    rotary = model.model.rotary_emb
    model.model.__dict__["rotary_emb"] = rotary.forward  # past the hooks
    with pytest.raises(ValueError, match="none of its rotary modules was called"):
        logits(model, batch)
    del model.model.__dict__["rotary_emb"]
    logits(model, batch)


def test_a_forward_that_failed_leaves_nothing_to_the_next():
    model = double()
    collator = attached(cream(), model)
    batch = collator(examples())
    plain = {name: value for name, value in batch.items() if name != ROPE_IDS}
    wanted = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", raising)
        with pytest.raises(RuntimeError, match="out of memory"):
            logits(model, batch)
    assert torch.equal(model.model(plain["input_ids"])[0], wanted.eval().model(plain["input_ids"])[0])
    assert torch.equal(logits(model, plain), logits(wanted, plain))


def raising(*args, **kwargs):
    raise RuntimeError("out of memory")


def test_the_decoder_alone_takes_ids_too():
    model = double()
    batch = attached(cream(), model)(examples())
    whole = logits(model, batch)
    hidden = model.model(batch["input_ids"], use_cache=False, **{ROPE_IDS: batch[ROPE_IDS]})[0]
    assert torch.equal(model.lm_head(hidden), whole)


# -- the window --------------------------------------------------------------------------------------------------------


def test_without_extend_context_the_ids_would_lie_beyond_the_window():
    model = LlamaForCausalLM(tiny())
    extended = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"\[0, {4 * extended}\).*is {extended}: call extend_context\(model, 4\)"):
        CreamCollator(dict, extended, 4).attach(model)
    extend_context(model, 4)
    with pytest.raises(ValueError, match="give as window the max_position_embeddings from before it"):
        CreamCollator(dict, model.config.max_position_embeddings, 4).attach(model)
    with CreamCollator(dict, extended, 4).attach(model):
        pass
    with pytest.warns(UserWarning, match=r"this training reaches no position from \d+ on"):
        CreamCollator(dict, extended, 2).attach(model)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_the_window_of_a_model_in_a_peft_wrapper():
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="call extend_context"):
        CreamCollator(dict, WINDOW, 2 * FACTOR).attach(get_peft_model(LlamaForCausalLM(tiny()), lora))


@pytest.mark.parametrize("window", [np.int64(WINDOW), np.int32(WINDOW), torch.tensor(WINDOW)])
def test_numpy_and_torch_integers_are_numbers(window):
    collator = CreamCollator(cream().inner, window, np.int64(FACTOR), seed=np.int64(3))
    assert (type(collator.window), type(collator.factor), type(collator.seed)) == (int, int, int)
    collator.set_epoch(np.int64(2))
    collator.attach(double())
    assert collator(examples())[ROPE_IDS].shape == (1, WINDOW)


# -- what a sampler and an epoch may be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampled", "error", "message"),
    [
        (lambda n: np.arange(n) + 0.5, TypeError, "must return 48 integers .*got float64"),
        (lambda n: np.arange(n - 1), TypeError, r"must return 48 integers .*shape \(47,\)"),
        (lambda n: np.arange(n) > 3, TypeError, "must return 48 integers .*got bool"),
        (lambda n: None, TypeError, "must return 48 integers .*got object"),
        (lambda n: np.arange(n) - 1, ValueError, r"out of \[0, factor \* window\) = \[0, 192\), got ids from -1"),
        (lambda n: np.arange(n) + 192 - n + 1, ValueError, "got ids from 145 to 192"),
        (lambda n: np.zeros(n, int), ValueError, "got ids from 0 to 0, not increasing"),
        (lambda n: np.arange(n)[::-1], ValueError, "not increasing"),
    ],
)
def test_what_a_sampler_returns_is_checked(sampled, error, message):
    collator = attached(cream(scheme=lambda length, *_: sampled(length)), double())
    with pytest.raises(error, match=message):
        collator(examples())


def test_a_sampler_may_return_a_list_and_any_integers():
    for ids in (list(range(WINDOW)), np.arange(WINDOW, dtype=np.uint16)):
        collator = attached(cream(scheme=lambda *_, ids=ids: ids), double())
        assert collator(examples())[ROPE_IDS].tolist() == [list(range(WINDOW))]


@pytest.mark.parametrize("epoch", [1.7, True, "1", -1, None])
def test_an_epoch_is_a_whole_number(epoch):
    with pytest.raises((TypeError, ValueError), match="epoch must be a whole number of at least 0"):
        cream().set_epoch(epoch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 10**6}, r"factor \* window must be at most 16777216, the last position that fp32 angles tell"),
        ({"factor": True}, "factor must be a whole number of at least 1, got True"),
        ({"factor": 2.0}, "factor must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "a"}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
    ],
)
def test_numbers_that_are_none(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cream(**changes)


def test_the_factor_of_extend_context_has_an_end_too():
    with pytest.raises(ValueError, match="trained window of 192, at most 512, got 1000000"):
        extend_context(tiny(), 10**6)


def test_options_are_named():
    with pytest.raises(TypeError, match="positional"):
        CreamCollator(dict, WINDOW, FACTOR, "pose")


def test_a_collator_that_nobody_tells_the_epoch_says_so_once():
    collator = cream()
    collator.attach(double())
    batch = examples(rows=2)
    collator(batch)
    with pytest.warns(
        UserWarning, match=r"a second epoch.*or the data hold the document twice.*callbacks=\[collator\].*set_epoch"
    ):
        collator(batch)
    collator(batch)
    contiguous = cream(scheme="contiguous")
    contiguous.attach(double())
    contiguous(batch)
    contiguous(batch)
