"""Under Trainer and accelerate: the same trajectory as padding, every token once on two ranks, resumed exactly."""

from __future__ import annotations

import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_longtrunc import BestFitPackingCollator, pack
from hf_longtrunc.data.documents import IGNORE
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples, segments
from tests.launch import two_ranks

SEQ_LENGTH = 64
LENGTHS = np.random.default_rng(7).integers(2, 40, 96).tolist()
WORKER = Path(__file__).with_name("two_ranks.py")


def pad(examples):
    """Collate as the field does: a row a document, padded to the longest; the first token is never a target."""
    width = max(len(example["input_ids"]) for example in examples)
    batch = {name: torch.zeros(len(examples), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        ids = torch.tensor(example["input_ids"])
        batch["input_ids"][row, : len(ids)], batch["attention_mask"][row, : len(ids)] = ids, 1
        batch["labels"][row, 1 : len(ids)] = ids[1:]
    return batch


def token_mean(outputs, labels, num_items_in_batch=None):
    """The mean over targets in the logits' own precision: transformers' loss is always taken in fp32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / num_items_in_batch


def trained(folder, dataset, collator, *, dtype=torch.float64, steps=12, resume=None, callbacks=(), **arguments):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).to(dtype)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": steps, "seed": 3}
    settings |= {"output_dir": str(folder), "report_to": "none", "save_strategy": "no", "use_cpu": True}
    settings |= {"disable_tqdm": True, "learning_rate": 1e-2, "logging_strategy": "no", "dataloader_pin_memory": False}
    trainer = Trainer(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=dataset,
        data_collator=collator,
        compute_loss_func=token_mean,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class StopAfter(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.steps


@pytest.mark.filterwarnings("ignore:packing within this batch", "ignore:the collator got documents without labels")
def test_twelve_steps_on_raw_documents_equal_the_padded_run(tmp_path):
    dataset = datasets.Dataset.from_list(raw_examples(LENGTHS))
    padded = trained(tmp_path, dataset, pad)
    for workers in (0, 2):
        packed = trained(tmp_path, dataset, BestFitPackingCollator(SEQ_LENGTH), dataloader_num_workers=workers)
        assert (packed - padded).abs().max() < 1e-12
    start = trained(tmp_path, dataset, pad, steps=1, learning_rate=0.0)
    assert (padded - start).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_resumed_in_mid_epoch_it_equals_the_uninterrupted_run(tmp_path, kind):
    def dataset():
        examples = raw_examples(LENGTHS * 4)
        return pack(examples if kind == "dataset" else (Examples(examples)), SEQ_LENGTH, pool_size=60)

    collator = BestFitPackingCollator(SEQ_LENGTH)
    settings = {"per_device_train_batch_size": 2, "dtype": torch.float32, "steps": 10}
    whole = trained(tmp_path / "whole", dataset(), collator, **settings)
    folder = tmp_path / "cut"
    trained(folder, dataset(), collator, callbacks=[StopAfter(4)], **settings)
    resumed = trained(folder, dataset(), collator, resume=str(folder / "checkpoint-4"), **settings)
    assert torch.equal(resumed, whole)


@pytest.mark.filterwarnings(
    "ignore:the collator got documents without labels"
)  # the loader that failed is still active
@pytest.mark.parametrize("workers", [0, 1])
def test_flat_batches_of_a_stream_are_refused_where_accelerate_would_cut_their_ends(tmp_path, workers):
    """In one process it cuts the ends down to the first, without a word."""
    stream, collator = (
        pack(Examples(raw_examples(LENGTHS)), SEQ_LENGTH),
        BestFitPackingCollator(SEQ_LENGTH, layout="flat"),
    )
    model = LlamaForCausalLM(tiny_config())
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "dataloader_num_workers": workers}
    arguments = TrainingArguments(str(tmp_path), **settings)
    with pytest.raises(ValueError, match=r'accelerator_config=\{"dispatch_batches": False\}'):
        Trainer(model, arguments, train_dataset=stream, data_collator=collator).train()
    assert len(collator(raw_examples(LENGTHS))["cu_seq_lens_q"]) == len(LENGTHS) + 1  # by hand, afterwards
    arguments = TrainingArguments(str(tmp_path), **settings, accelerator_config={"dispatch_batches": False})
    trainer = Trainer(model, arguments, train_dataset=stream, data_collator=collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["cu_seq_lens_q"][-1] == batch["input_ids"].shape[1]


class Examples:
    """A stream that can be read again, without a length."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.xdist_group("two_ranks")
def test_two_ranks_make_the_same_steps_and_see_every_token_once(tmp_path):
    ranks = two_ranks(WORKER, tmp_path)
    assert ranks[0]["world"] == ranks[1]["world"] == 2
    assert ranks[0]["steps"] == ranks[1]["steps"] > 3
    assert all("one of 2 shares" in rank["refused"] for rank in ranks)  # most documents would never be read
    seen = sorted(tuple(document) for rank in ranks for document in rank["documents"])
    assert seen == sorted(tuple(example["input_ids"]) for example in raw_examples(LENGTHS))
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    streamed = [tuple(document) for rank in ranks for document in rank["streamed"]]
    assert set(streamed) <= set(seen)
    flat = [tuple(document) for rank in ranks for document in rank["flat"]]
    assert len(flat) == len(set(flat)) > 30
    assert set(flat) <= set(seen)
    assert len(streamed) == len(set(streamed)) > 30  # four steps of the stream: no document on both ranks
    alone, ddp, fsdp = (np.array(ranks[1]["losses"][way]) for way in ("alone", "DDP", "FSDP2"))
    assert len(alone) == len(set(alone)) == 3
    np.testing.assert_allclose([ddp, fsdp], [alone, alone], rtol=1e-13)
    np.testing.assert_allclose(ranks[0]["operations"], ranks[1]["operations"], rtol=0.05)  # steps of equal work


class Recorder(Trainer):
    """Keeps the learnable segments of every batch."""

    def training_step(self, model, inputs, *args):
        rows = [{name: values[row] for name, values in inputs.items()} for row in range(len(inputs["input_ids"]))]
        self.seen = [*getattr(self, "seen", []), *(segment for row in rows for segment in segments(row))]
        self.targets = getattr(self, "targets", 0) + int((inputs["labels"] != IGNORE).sum())
        return super().training_step(model, inputs, *args)


def recorded(folder, dataset, **arguments):
    settings = {"num_train_epochs": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments = TrainingArguments(str(folder), **settings, disable_tqdm=True, **arguments)
    model = LlamaForCausalLM(tiny_config())
    trainer = Recorder(model, arguments, train_dataset=dataset, data_collator=BestFitPackingCollator(SEQ_LENGTH))
    trainer.train()
    return trainer


def test_rows_written_with_few_columns_stay_rows_under_trainer(tmp_path, recwarn):
    """Trainer drops seq_lengths, TRL position_ids: without the other one a row was one document."""
    packed = pack(datasets.Dataset.from_list(raw_examples(LENGTHS)), SEQ_LENGTH)
    rows = packed.materialize(tmp_path / "rows", dtype="int32", columns=["input_ids", "seq_lengths"])
    seen = recorded(tmp_path, rows).seen
    assert sorted(seen) == sorted(example["input_ids"] for example in raw_examples(LENGTHS))
    assert not [warning for warning in recwarn if "without labels" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:packing within this batch")
def test_masks_that_trainer_drops_are_spoken_of(tmp_path):
    examples = [row | {"completion_mask": [0] * (len(row["input_ids"]) - 1) + [1]} for row in raw_examples(LENGTHS)]
    dataset = datasets.Dataset.from_list(examples)
    with pytest.warns(
        UserWarning, match=r"without labels: every token .* completion_mask.*remove_unused_columns=False"
    ):
        assert recorded(tmp_path, dataset).targets == sum(LENGTHS) - len(LENGTHS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without labels")
        assert recorded(tmp_path, dataset, remove_unused_columns=False).targets == len(LENGTHS)
        assert recorded(tmp_path, pack(dataset, SEQ_LENGTH)).targets == len(LENGTHS)
        BestFitPackingCollator(SEQ_LENGTH)(raw_examples(LENGTHS))  # by hand nothing is dropped
