"""The collator and its hooks: documents, ids, the gradients of a reference, and nothing else touched."""

from __future__ import annotations

import copy
import hashlib
import pickle

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM, default_data_collator

from hf_longtrunc import BestFitPackingCollator, CreamCollator, CreamPositions, pack
from hf_longtrunc.positions.collator import documents_of
from hf_longtrunc.positions.rope_hooks import ROPE_IDS
from tests.conftest import tiny_config

WINDOW, FACTOR = 48, 4
LENGTHS = (20, 9, 19)  # of the documents in the packed row, which they fill


def tokens(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 97, length).tolist() for length in lengths]


def whole(examples):
    """Rows of one document each, without positions and without a mask."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids.clone()}


def padded(examples, side="right"):
    width = max(len(example["input_ids"]) for example in examples)
    batch = {name: torch.zeros(len(examples), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for row, example in enumerate(examples):
        ids = torch.tensor(example["input_ids"])
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
    return batch


def cream(inner=whole, **changes):
    return CreamCollator(inner, **{"window": WINDOW, "factor": FACTOR, **changes})


def attached(collator, model):
    collator.attach(model)
    collator.set_epoch(0)
    return collator


def tiny(**changes):
    return tiny_config(max_position_embeddings=WINDOW * FACTOR, **changes)


def double(**changes):
    return LlamaForCausalLM(tiny(**changes)).double().train()


def packed_batch(collator):
    examples = [{"input_ids": ids} for ids in tokens(*LENGTHS)]
    return collator([pack(examples, WINDOW)[0]])


# -- which documents, which ids ----------------------------------------------------------------------------------------


def expected(collator, ids, epoch=0):
    """What one document must be given, drawn from the definition of its seed."""
    digest = hashlib.blake2b(np.array(ids, "<i8").tobytes(), digest_size=16).digest()
    rng = np.random.default_rng([collator.seed, epoch, *np.frombuffer(digest, "<u4").tolist()])
    return CreamPositions()(len(ids), WINDOW, FACTOR, rng).tolist()


def test_whole_rows_are_documents():
    collator = attached(cream(), double())
    rows = tokens(WINDOW, WINDOW)
    batch = collator([{"input_ids": row} for row in rows])
    assert batch[ROPE_IDS].tolist() == [expected(collator, row) for row in rows]
    assert batch[ROPE_IDS][:, -1].tolist() == [WINDOW * FACTOR - 1] * 2
    assert set(batch) == {"input_ids", "labels", ROPE_IDS}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_belongs_to_no_document(side):
    collator = attached(cream(lambda examples: padded(examples, side)), double())
    rows = tokens(30, WINDOW, 1)
    ids = collator([{"input_ids": row} for row in rows])[ROPE_IDS]
    for row, given in zip(rows, ids.tolist(), strict=True):
        real = slice(0, len(row)) if side == "right" else slice(WINDOW - len(row), WINDOW)
        assert given[real] == expected(collator, row)
        assert sum(given) == sum(given[real])


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_every_packed_document_has_its_own_draw(layout):
    inner = BestFitPackingCollator(WINDOW, pad_token_id=0, layout=layout)
    collator = attached(cream(inner), double())
    batch = packed_batch(collator)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 3
    for start, end in zip(starts, [*starts[1:], WINDOW], strict=True):
        row = batch["input_ids"][0, start:end].tolist()
        assert batch[ROPE_IDS][0, start:end].tolist() == expected(collator, row)
    plain = packed_batch(inner)
    assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(plain[name])) for name in plain)


def test_documents_begin_at_every_jump_however_short():
    """One-token documents and jumps forwards are borders to transformers too, whatever the padding."""
    positions = torch.tensor([[0, 0, 1, 5, 6, 0], [0, 1, 2, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]])
    numbers = documents_of(torch.zeros(2, 6, dtype=torch.long), positions, mask)
    assert numbers.tolist() == [[1, 2, 2, 3, 3, 0], [0, 1, 1, 2, 0, 3]]


def test_ids_depend_on_seed_epoch_and_tokens_alone():
    collator, rows = attached(cream(seed=3), double()), tokens(WINDOW, WINDOW, WINDOW)
    examples = [{"input_ids": row} for row in rows]
    together = collator(examples)[ROPE_IDS]
    alone = torch.cat([collator([example])[ROPE_IDS] for example in reversed(examples)])
    assert torch.equal(together, alone.flip(0))
    assert not torch.equal(together[0], together[1])
    collator.set_epoch(1)
    later = collator(examples)[ROPE_IDS]
    assert later.tolist() == [expected(collator, row, epoch=1) for row in rows]
    assert not torch.equal(later, together)
    assert not torch.equal(attached(cream(seed=4), double())(examples)[ROPE_IDS], together)


def test_global_random_state_is_left_alone():
    collator = attached(cream(), double())
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    collator([{"input_ids": row} for row in tokens(WINDOW)])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_workers_draw_the_same_and_hear_of_the_epoch():
    rows = datasets.Dataset.from_dict({"input_ids": tokens(*[WINDOW] * 8)})
    collator = attached(cream(default_data_collator), double())
    here = DataLoader(rows, batch_size=2, collate_fn=collator)
    there = DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        collator.set_epoch(epoch)
        ours, theirs = (torch.cat([batch[ROPE_IDS] for batch in loader]) for loader in (here, there))
        assert torch.equal(ours, theirs)
        assert ours.tolist() == [expected(collator, row, epoch) for row in rows["input_ids"]]


@pytest.mark.parametrize("scheme", ["cream", "pose", "random", "contiguous", CreamPositions.official("relativity")])
def test_schemes(scheme):
    collator = attached(cream(scheme=scheme), double())
    ids = collator([{"input_ids": row} for row in tokens(WINDOW)])[ROPE_IDS]
    assert (ids.diff(dim=-1) > 0).all()
    assert (int(ids.max()) < WINDOW) == (scheme == "contiguous")
    assert torch.equal(
        pickle.loads(pickle.dumps(collator))([{"input_ids": row} for row in tokens(WINDOW)])[ROPE_IDS], ids
    )


# -- the gradients -----------------------------------------------------------------------------------------------------


def head_gradient(model, batch, start, end, use_cache=False):
    """Gradient of the last logits of a document with respect to the embeddings of all tokens, [n, hidden]."""
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    extra = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    logits = model(inputs_embeds=embeddings, use_cache=use_cache, **extra).logits
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    (logits[0, end - 4 : end] @ weights).sum().backward()
    return embeddings.grad[0]


def reference_gradient(model, input_ids, positions, blocks, start, end):
    """The same with the ids as position_ids and a mask of our own: causal, and within a block."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module._forward_pre_hooks.clear()
    reference.set_attn_implementation("eager")
    n = input_ids.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril() & (blocks[:, None] == blocks)
    mask = torch.zeros(n, n, dtype=torch.double).masked_fill(~seen, -torch.inf)[None, None]
    batch = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
    return head_gradient(reference, batch, start, end)


def assert_near(found, wanted, tolerance=2e-6):
    """Eager attention takes its softmax in fp32 whatever the model's dtype."""
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_tail_reaches_head_as_in_the_reference(attention, use_cache, is_packed):
    """Whatever separates documents in the plain batch separates them here, and within one all is connected.

    With a cache, transformers ignores the borders of packed documents (`check_packed` says so): the reference does too.
    """
    model = double()
    model.set_attn_implementation(attention)
    if is_packed:
        batch = packed_batch(attached(cream(BestFitPackingCollator(WINDOW, pad_token_id=0)), model))
        blocks = (batch["position_ids"][0] == 0).cumsum(0) * (not use_cache)
        start, end = 0, int((batch["position_ids"][0][1:] == 0).nonzero()[0]) + 1
    else:
        batch = attached(cream(), model)([{"input_ids": row} for row in tokens(WINDOW)])
        blocks, (start, end) = torch.zeros(WINDOW), (0, WINDOW)
    ids = batch[ROPE_IDS]
    assert (ids[0, start:end].diff() > 1).any()
    gradient = head_gradient(model, batch, start, end, use_cache)
    expected = reference_gradient(model, batch["input_ids"], ids, blocks, start, end)
    assert gradient[start].abs().max() > 1e-4
    assert_near(gradient, expected)
    if is_packed and not use_cache:
        assert gradient[end:].abs().max() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about its own compiler
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_packed", [False, True])
def test_flex_attention_sees_what_eager_does(is_packed):
    """Logits only: flex has no backward pass on a CPU. Eager: what is compared is which ids and documents it gets."""
    model = LlamaForCausalLM(tiny()).train()
    collator = attached(cream(BestFitPackingCollator(WINDOW, pad_token_id=0) if is_packed else whole), model)
    batch = packed_batch(collator) if is_packed else collator([{"input_ids": row} for row in tokens(WINDOW)])
    logits = []
    for attention in ("eager", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits.append(model(**batch, use_cache=False).logits)
    assert_near(logits[1], logits[0], 1e-4)


def test_packed_documents_are_each_as_alone():
    """Logits and gradients of a packed row equal those of its documents one by one, each at its own ids."""
    model = double()
    batch = packed_batch(attached(cream(BestFitPackingCollator(WINDOW, pad_token_id=0)), model))
    logits = model(**batch, use_cache=False).logits[0]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    for start, end in zip(starts, [*starts[1:], WINDOW], strict=True):
        alone = {name: batch[name][:, start:end] for name in ("input_ids", ROPE_IDS)}
        torch.testing.assert_close(logits[start:end], model(**alone, use_cache=False).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_canary_bare_ids_are_isolated_by_todays_transformers(attention):
    """Why the ids do not travel as position_ids: head and tail would never meet, and nothing would say so.

    The day this fails transformers has changed, and the hooks may be reconsidered.
    """
    model = double()
    model.set_attn_implementation(attention)
    collator = attached(cream(), model)
    batch = collator([{"input_ids": row} for row in tokens(WINDOW)])
    collator.detach()
    bare = {"input_ids": batch["input_ids"], "position_ids": batch[ROPE_IDS]}
    jump = int((batch[ROPE_IDS][0].diff() > 1).nonzero()[-1]) + 1
    gradient = head_gradient(model, bare, 0, WINDOW)
    assert gradient[:jump].abs().max() == 0
    assert gradient[jump:].abs().max() > 1e-4
    assert head_gradient(model, bare, 0, WINDOW, use_cache=True)[0].abs().max() > 1e-4  # it hides behind a cache


# -- checkpointing, LoRA, wrapping -------------------------------------------------------------------------------------


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        torch.testing.assert_close(found[1][name], wanted[1][name], rtol=1e-12, atol=1e-14)


def enable_checkpointing(model, use_reentrant):
    # Named so from transformers 5.22 on, which deprecates the old name.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = double()
    collator = attached(cream(), model)
    batch = collator([{"input_ids": row} for row in tokens(WINDOW, WINDOW)])
    plain = loss_and_gradients(model, batch)
    enable_checkpointing(model, use_reentrant)
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, batch), plain)


class RotatesInLayers(LlamaForCausalLM):
    """A model whose layers ask the rotary module themselves, so that checkpointing asks again in the backward pass."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_pre_hook(self._rotate, with_kwargs=True)

    def _rotate(self, layer, args, kwargs):
        return args, kwargs | {"position_embeddings": self.model.rotary_emb(args[0], kwargs["position_ids"])}


def test_layers_run_again_find_the_ids_of_their_forward():
    torch.manual_seed(1)
    model = RotatesInLayers(tiny()).double().train()
    collator = attached(cream(), model)
    batch = collator([{"input_ids": row} for row in tokens(WINDOW, WINDOW)])
    plain = loss_and_gradients(model, batch)
    enable_checkpointing(model, False)
    assert_same(loss_and_gradients(model, batch), plain)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
@pytest.mark.parametrize("order", ["wrapped first", "attached first"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_lora(order, is_checkpointed):
    """Loss and adapter gradients equal those of the same adapters under a mask and ids of our own."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    collator, model = cream(), double()
    if order == "attached first":
        collator.attach(model)
    torch.manual_seed(2)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False).double().train()
    if order == "wrapped first":
        collator.attach(tuned)
    batch = collator([{"input_ids": row} for row in tokens(WINDOW)])
    if is_checkpointed:
        enable_checkpointing(tuned.get_base_model(), False)
        tuned.enable_input_require_grads()
    found = loss_and_gradients(tuned, batch)
    collator.detach()
    bare = {name: batch[name] for name in ("input_ids", "labels")}
    mask = torch.zeros(1, 1, WINDOW, WINDOW, dtype=torch.double)
    mask.masked_fill_(torch.ones(WINDOW, WINDOW, dtype=torch.bool).triu(1), -torch.inf)
    wanted = loss_and_gradients(tuned, {**bare, "position_ids": batch[ROPE_IDS], "attention_mask": mask})
    assert found[1].keys() == wanted[1].keys()
    assert len(found[1]) == 8
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=0)
    for name in wanted[1]:
        torch.testing.assert_close(found[1][name], wanted[1][name], rtol=1e-4, atol=1e-9)
    assert (loss_and_gradients(tuned, bare)[0] - found[0]).abs() > 1e-3


def test_data_parallel_replicas_have_their_own_ids():
    """nn.DataParallel runs copies of the modules with parts of the batch, in threads."""
    model = double()
    collator = attached(cream(), model)
    batches = [collator([{"input_ids": row}]) for row in tokens(WINDOW, WINDOW)]
    whole_batch = collator([{"input_ids": row} for row in tokens(WINDOW, WINDOW)])
    replicas = [shallow_replica(model) for _ in batches]
    outputs = [replica(**batch, use_cache=False).logits for replica, batch in zip(replicas, batches, strict=True)]
    torch.testing.assert_close(torch.cat(outputs), model(**whole_batch, use_cache=False).logits)


def shallow_replica(module):
    """What torch.nn.parallel.replicate makes of a module, without a second device."""
    copied = module._replicate_for_data_parallel()
    copied._parameters = module._parameters
    copied._buffers = module._buffers
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else shallow_replica(child)
    return copied


# -- only in training, and gone afterwards -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
def test_evaluation_is_that_of_the_plain_collator_to_the_bit(is_packed):
    model = double().eval()
    inner = BestFitPackingCollator(WINDOW, pad_token_id=0) if is_packed else whole
    collate = packed_batch if is_packed else (lambda c: c([{"input_ids": row} for row in tokens(WINDOW)]))
    before = model(**collate(inner), use_cache=False)
    collator = attached(cream(inner), model)
    model.train()
    moved = model(**collate(collator), use_cache=False)
    model.eval()
    after = model(**collate(collator), use_cache=False)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert (moved.loss - before.loss).abs() > 1e-4
    prompt = collate(inner)["input_ids"][:, :5]
    assert torch.equal(model.generate(prompt, max_new_tokens=3)[:, :5], prompt)
    collator.detach()


def test_detached_model_is_as_before():
    model = double()
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    collator = attached(cream(), model)
    model(**collator([{"input_ids": row} for row in tokens(WINDOW)]), use_cache=False)
    collator.detach()
    collator.detach()
    assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {n: set(v) for n, v in state.items()}
    plain = whole([{"input_ids": row} for row in tokens(WINDOW)])
    assert torch.equal(model(**plain).loss, copy.deepcopy(model)(**plain).loss)


def test_ids_reach_the_rotary_module_and_nothing_else():
    """Layers never see them, and a rotary module uses them however it is handed its position_ids."""
    model, seen = double(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    batch = attached(cream(), model)([{"input_ids": row} for row in tokens(WINDOW)])
    model(**batch, use_cache=False)
    assert ROPE_IDS not in seen[0]
    rotary, x, plain = model.model.rotary_emb, torch.zeros(1, dtype=torch.double), torch.arange(WINDOW)[None]
    own = type(rotary).forward(rotary, x, batch[ROPE_IDS])
    for found in (rotary(x, plain), rotary(x, position_ids=plain)):
        assert all(map(torch.equal, found, own))


def test_a_training_batch_without_ids_is_plain_text():
    """The ids of one batch never reach the next one."""
    model = double()
    plain = whole([{"input_ids": row} for row in tokens(WINDOW)])
    before = model(**plain, use_cache=False).loss
    collator = attached(cream(), model)
    model(**collator([{"input_ids": row} for row in tokens(WINDOW, seed=1)]), use_cache=False)
    assert torch.equal(model(**plain, use_cache=False).loss, before)


@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_another_family(rotary_pct):
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=WINDOW * FACTOR, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
        "partial_rotary_factor": rotary_pct}, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).double().train()
    batch = attached(cream(), model)([{"input_ids": row} for row in tokens(WINDOW)])
    gradient = head_gradient(model, batch, 0, WINDOW)
    expected = reference_gradient(model, batch["input_ids"], batch[ROPE_IDS], torch.zeros(WINDOW), 0, WINDOW)
    assert_near(gradient, expected)
    assert gradient[0].abs().max() > 1e-7


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be a whole number of at least 1, got 0"),
        ({"window": 4.0}, TypeError, "window must be a whole number of at least 1, got 4.0 of type float"),
        ({"factor": True}, TypeError, "factor must be a whole number"),
        ({"seed": -1}, ValueError, "seed must be a whole number of at least 0, got -1"),
        (
            {"scheme": "yarn"},
            ValueError,
            "scheme must be one of cream, pose, random, contiguous, or a sampler, got 'yarn'",
        ),
        ({"scheme": ["cream"]}, ValueError, r"scheme must be one of cream.*got \['cream'\]"),
        ({"inner": 3}, TypeError, "inner must be a collator"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        cream(**changes)


def test_collating_for_no_model_is_refused():
    examples = [{"input_ids": row} for row in tokens(WINDOW)]
    collator = cream()
    with pytest.raises(ValueError, match=r"attached to no model.*attach\(model\)"):
        collator(examples)
    collator.attach(double())
    collator(examples)
    collator.detach()
    with pytest.raises(ValueError, match="attached to no model"):
        collator(examples)


def test_attaching_twice_is_refused():
    model = double()
    collator = attached(cream(), model)
    with pytest.raises(ValueError, match=r"this CreamCollator is attached to a model already: detach\(\)"):
        collator.attach(double())
    with pytest.raises(ValueError, match="a CreamCollator is attached to this model already"):
        attached(cream(), model)
    collator.detach()
    attached(cream(), model)


def test_models_that_cannot_be_served_are_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary modules"):
        attached(cream(), tiny_gpt2)
    with pytest.raises(TypeError, match="model must be a transformers model"):
        attached(cream(), torch.nn.Linear(2, 2))


def test_bad_batches_are_named():
    collator = attached(cream(lambda examples: {"inputs_embeds": torch.zeros(1, 4, 8)}), double())
    with pytest.raises(ValueError, match=r"must have input_ids \[rows, n\] as a torch tensor"):
        collator([])
    collator = attached(cream(), double())
    with pytest.raises(ValueError, match="a document of 49 tokens does not fit the window of 48"):
        collator([{"input_ids": row} for row in tokens(WINDOW + 1)])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, r"must have input_ids \[rows, n\] as a torch tensor"),
        (
            {"position_ids": torch.arange(7)[None]},
            r"position_ids must be \[rows, n\] as input_ids \[2, 8\], got \[1, 7\]",
        ),
        ({"position_ids": torch.arange(8).expand(3, 2, 8)}, r"position_ids must be .* got \[3, 2, 8\]"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]] * 2)},
            "must hold 0 and 1, got 1 to 2; documents are",
        ),
        ({"attention_mask": torch.ones(2, 1, 8, 8)}, "has a block mask and no position_ids.*one document"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)}, "has seq_idx and no position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 16])}, "has cu_seq_lens_q and no position_ids"),
    ],
)
def test_documents_of_a_row_that_are_told_apart_otherwise_are_not_drawn_as_one(columns, message):
    batch = {"input_ids": torch.arange(16).view(2, 8)}
    collator = attached(cream(lambda examples: batch | columns if columns else None), double())
    with pytest.raises(ValueError, match=message):
        collator([])


@pytest.mark.parametrize("mask", [torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 1, 8, 8)])
def test_positions_say_where_documents_begin_whatever_the_mask(mask):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    batch = {"input_ids": torch.arange(16).view(2, 8), "position_ids": positions, "attention_mask": mask}
    collator = attached(cream(lambda examples: batch), double())
    ids = collator([])["rope_position_ids"]
    assert ids[0, :3].tolist() == expected(collator, [0, 1, 2])
    assert ids[0, 3:].tolist() == expected(collator, [3, 4, 5, 6, 7])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_virtual_tokens_are_noticed():
    model = double()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    collator = attached(cream(), tuned)
    batch = collator([{"input_ids": row} for row in tokens(WINDOW)])
    with pytest.raises(ValueError, match=r"adds tokens \(prompt tuning\)"):
        tuned(**batch)
