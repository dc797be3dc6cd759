"""Under Trainer and accelerate: active in training only, the same after a resume, different documents on two ranks."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_longtrunc import BestFitPackingCollator, CreamCollator, extend_context, pack
from hf_longtrunc.positions.rope_hooks import ROPE_IDS
from tests.conftest import tiny_config
from tests.launch import two_ranks
from tests.positions.test_collator import enable_checkpointing

WINDOW, FACTOR = 32, 4
WORKER = Path(__file__).with_name("two_ranks.py")
rng = np.random.default_rng(11)
DOCUMENTS = [{"input_ids": rng.integers(2, 97, WINDOW).tolist()} for _ in range(16)]


def rows(examples):
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids.clone()}


class Recorder(Trainer):
    """Keeps the first token and the ids of every row that a training step saw."""

    def training_step(self, model, inputs, *args):
        for tokens, ids in zip(inputs["input_ids"].tolist(), inputs[ROPE_IDS].tolist(), strict=True):
            self.seen.append([tokens, ids])
        return super().training_step(model, inputs, *args)


def trained(
    folder,
    *,
    steps=6,
    resume=None,
    callbacks=(),
    scheme="cream",
    attach=True,
    report="",
    dataset=None,
    is_told=True,
    model=None,
    **arguments,
):
    torch.manual_seed(0)
    if model is None:
        model = LlamaForCausalLM(tiny_config(max_position_embeddings=WINDOW))
        extend_context(model, FACTOR, "ntk")
    collator = CreamCollator(rows, WINDOW, FACTOR, scheme=scheme, seed=5)
    if attach:
        collator.attach(model)
    settings = {"per_device_train_batch_size": 2, "max_steps": steps, "seed": 3, "output_dir": str(folder)}
    settings |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    settings |= {"learning_rate": 1e-2, "logging_strategy": "no", "dataloader_pin_memory": False}
    settings |= {"ddp_backend": "gloo"} if report else {}
    documents = datasets.Dataset.from_list(DOCUMENTS)
    trainer = Recorder(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=documents if dataset is None else dataset,
        eval_dataset=documents.select(range(4)),
        data_collator=collator,
        callbacks=[collator, *callbacks] if is_told else [],
    )
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.steps


def parameters(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def by_document(seen):
    draws: dict[tuple[int, ...], list[list[int]]] = {}
    for tokens, ids in seen:
        draws.setdefault(tuple(tokens), []).append(ids)
    return draws


@pytest.mark.parametrize(("workers", "cuts"), [(0, [5, 10]), (2, [10])])
def test_resumed_in_mid_epoch_it_draws_the_same(tmp_path, workers, cuts):
    """12 steps of 8 an epoch, cut in the first and in the second: the same ids, the same parameters."""
    settings = {"steps": 12, "dataloader_num_workers": workers}
    whole = trained(tmp_path / "whole", **settings)
    folder, seen, resume = tmp_path / "cut", [], None
    for cut in cuts:
        seen += trained(folder, resume=resume, callbacks=[StopAfter(cut)], **settings).seen
        resume = str(folder / f"checkpoint-{cut}")
    last = trained(folder, resume=resume, **settings)
    # A Trainer may draw a batch that it does not use: the batches of the steps count.
    assert seen + last.seen == whole.seen
    assert torch.equal(parameters(last), parameters(whole))


def with_adapter(base):
    """A LoRA adapter on a base model of which it is stored where it comes from."""
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # what peft asks a model for
def test_an_adapter_resumes_and_is_loaded_at_the_long_window_or_the_way_there_is_said(tmp_path):
    """6 steps, cut after 3; the base model is stored as it was, and after extend_context."""
    LlamaForCausalLM(tiny_config(max_position_embeddings=WINDOW)).save_pretrained(tmp_path / "short")

    def extended(folder):
        base = AutoModelForCausalLM.from_pretrained(folder)
        extend_context(base, FACTOR, "ntk")
        return base

    extended(tmp_path / "short").save_pretrained(tmp_path / "long")
    said = rf"{tmp_path}/short', loaded anew, reads {WINDOW} tokens, and the model in training {WINDOW * FACTOR}"
    with pytest.warns(UserWarning, match=said):
        whole = trained(tmp_path / "whole", model=with_adapter(extended(tmp_path / "short")), callbacks=[StopAfter(6)])

    def of_long(**options):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "long")
        return trained(tmp_path / "cut", model=with_adapter(base), **options)

    of_long(callbacks=[StopAfter(3)])
    resumed = of_long(resume=str(tmp_path / "cut" / "checkpoint-3"), callbacks=[StopAfter(6)])
    assert torch.equal(parameters(resumed), parameters(whole))
    ids = torch.arange(2 * WINDOW)[None] % 97
    wanted = whole.model.eval()(ids).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-6")
    assert torch.equal(loaded.eval()(ids).logits, wanted)
    # Without the stored base model: not at the long window by itself, and as the warning says.
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert not torch.equal(loaded.eval()(ids).logits, wanted)
    loaded = PeftModel.from_pretrained(extended(tmp_path / "short"), tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(loaded.eval()(ids).logits, wanted)


def test_every_epoch_draws_anew(tmp_path):
    trainer = trained(tmp_path, steps=16)
    draws = by_document(trainer.seen)
    assert len(draws) == len(DOCUMENTS)
    assert {len(ids) for ids in draws.values()} == {2}
    # In so small a window two draws may fall together.
    assert sum(first != second for first, second in draws.values()) >= len(DOCUMENTS) - 2


def test_evaluation_in_training_equals_that_of_the_plain_collator(tmp_path):
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=3)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    attached = trainer.evaluate()["eval_loss"]
    collator = trainer.data_collator
    collator.detach()
    trainer.data_collator = rows
    assert trainer.evaluate()["eval_loss"] == attached == logged[-1]


def test_training_a_model_that_is_not_attached_stops_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"not attached to this CreamCollator: call attach\(model\) before train"):
        trained(tmp_path, attach=False)


def test_contiguous_scheme_is_ordinary_training(tmp_path):
    ours = trained(tmp_path, scheme="contiguous")
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(max_position_embeddings=WINDOW))
    extend_context(model, FACTOR, "ntk")
    plain = Trainer(model, ours.args, train_dataset=datasets.Dataset.from_list(DOCUMENTS), data_collator=rows)
    plain.train()
    assert torch.equal(parameters(ours), parameters(plain))
    assert not torch.equal(parameters(trained(tmp_path)), parameters(plain))


def test_packed_training_runs_and_differs_from_plain(tmp_path):
    examples = [{"input_ids": document["input_ids"][: 5 + n]} for n, document in enumerate(DOCUMENTS)]

    def final(scheme):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(max_position_embeddings=WINDOW))
        extend_context(model, FACTOR, "ntk")
        collator = CreamCollator(BestFitPackingCollator(WINDOW, pad_token_id=0), WINDOW, FACTOR, scheme=scheme)
        collator.attach(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        enable_checkpointing(model, False)
        rows = pack(examples, WINDOW)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[collator])
        trainer.train()
        return parameters(trainer)

    assert (final("cream") - final("contiguous")).abs().max() > 1e-3


def test_every_pass_over_a_stream_draws_anew(tmp_path):
    """Trainer takes all of its passes over a stream for parts of one epoch."""
    stream = datasets.Dataset.from_list(DOCUMENTS).to_iterable_dataset()
    draws = by_document(trained(tmp_path, steps=24, dataset=stream).seen)
    assert {len(ids) for ids in draws.values()} == {3}
    assert sum(len({tuple(ids) for ids in drawn}) == 3 for drawn in draws.values()) >= len(DOCUMENTS) - 3


def test_without_the_callback_it_is_said_that_every_epoch_draws_the_same(tmp_path):
    with pytest.warns(UserWarning, match=r"callbacks=\[collator\]"):
        trained(tmp_path, steps=9, is_told=False)


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_see_different_documents_with_different_ids(tmp_path):
    ranks = two_ranks(WORKER, tmp_path)
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    draws = [by_document(rank["seen"]) for rank in ranks]
    assert [len(seen) for seen in draws] == [6, 6]
    assert not draws[0].keys() & draws[1].keys()
    assert len({tuple(ids[0]) for seen in draws for ids in seen.values()}) == 12  # no two documents share a draw
    # And each draw is the one that a single process would have made.
    alone = by_document(trained(tmp_path, steps=8).seen)
    assert all(alone[tokens][0] == ids[0] for seen in draws for tokens, ids in seen.items())
