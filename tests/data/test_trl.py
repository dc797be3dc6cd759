"""Beside TRL, where it is installed: its trainer takes packed rows, its best-fit decreasing opens as many."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import BestFitPackingCollator, best_fit_decreasing, pack
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples, segments

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.transformers_own_deprecation("")]
trl = pytest.importorskip("trl", exc_type=ImportError)

SEQ_LENGTH = 64
LENGTHS = np.random.default_rng(7).integers(2, 60, 60).tolist()


def sft(folder, dataset, processing_class, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    collator = settings.pop("collator", None)
    arguments = trl.SFTConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", seed=1,
        per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=False, logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True}, **{"max_steps": 3} | settings,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=dataset, data_collator=collator, processing_class=processing_class
    )
    trainer.train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_sft_trainer_takes_the_written_rows_with_either_collator(tmp_path, tokenizer, monkeypatch):
    """TRL's padding-free batch and ours train the same: both hold the documents apart."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = pack(datasets.Dataset.from_list(raw_examples(LENGTHS)), SEQ_LENGTH).materialize()
    theirs = sft(tmp_path, rows, tokenizer, padding_free=True, max_length=None)
    ours = sft(tmp_path, rows, tokenizer, collator=BestFitPackingCollator(SEQ_LENGTH), max_length=None)
    flat = BestFitPackingCollator(SEQ_LENGTH, layout="flat")
    assert (theirs - ours).abs().max() < 1e-5
    assert (theirs - sft(tmp_path, rows, tokenizer, collator=flat, max_length=None)).abs().max() < 1e-5


def test_sft_trainer_refuses_the_view(tmp_path, tokenizer):
    """It takes `datasets.Dataset` only: hence `materialize()`."""
    packed = pack(datasets.Dataset.from_list(raw_examples(LENGTHS)), SEQ_LENGTH)
    with pytest.raises(TypeError, match="must be a `Dataset`"):
        sft(tmp_path, packed, tokenizer, collator=BestFitPackingCollator(SEQ_LENGTH), max_length=None)


def test_as_many_rows_as_trls_best_fit_decreasing_over_the_whole_set():
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000), 2, 4000).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    table = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, pa.nulls(int(offsets[-1])))})
    assert len(_pack_bfd(table, 1024, "split")) == len(best_fit_decreasing(lengths, 1024, min_piece=1))


def segments_seen(monkeypatch, train):
    """Return the learnable segments of all batches that SFTTrainer makes, and the targets in them."""
    batches = []
    step = trl.SFTTrainer.training_step
    monkeypatch.setattr(
        trl.SFTTrainer,
        "training_step",
        lambda self, model, inputs, *a: batches.append(inputs) or step(self, model, inputs, *a),
    )
    train()
    rows = [{name: batch[name][i] for name in batch} for batch in batches for i in range(len(batch["input_ids"]))]
    return [segment for row in rows for segment in segments(row)], sum(
        int((b["labels"] != -100).sum()) for b in batches
    )


def test_rows_with_few_columns_and_raw_masks_under_sft_trainer(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    masked = [row | {"completion_mask": [0] * (len(row["input_ids"]) - 1) + [1]} for row in raw_examples(LENGTHS)]
    dataset = datasets.Dataset.from_list(raw_examples(LENGTHS))
    rows = pack(dataset, SEQ_LENGTH).materialize(columns=["input_ids", "seq_lengths"])
    collator = BestFitPackingCollator(SEQ_LENGTH)
    settings = {"max_length": None, "max_steps": -1, "num_train_epochs": 1}
    seen, _ = segments_seen(monkeypatch, lambda: sft(tmp_path, rows, tokenizer, collator=collator, **settings))
    assert sorted(seen) == sorted(row["input_ids"] for row in raw_examples(LENGTHS))
    raw = datasets.Dataset.from_list(masked)
    with pytest.warns(UserWarning, match="completion_mask.*remove_unused_columns=False"):
        sft(tmp_path, raw, tokenizer, collator=BestFitPackingCollator(SEQ_LENGTH), **settings)
    settings["remove_unused_columns"] = False
    _, targets = segments_seen(monkeypatch, lambda: sft(tmp_path, raw, tokenizer, collator=collator, **settings))
    assert targets == len(LENGTHS)
