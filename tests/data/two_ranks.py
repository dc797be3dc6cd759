"""Run by `accelerate launch` in two processes: an epoch of Trainer; each rank writes down what it saw."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hf_longtrunc import BalancedRows, BestFitPackingCollator, check_packed, pack
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples, segments
from tests.data.test_training import LENGTHS, SEQ_LENGTH, Examples


class Recorder(Trainer):
    """Keeps the documents of every batch."""

    def training_step(self, model, inputs, *args):
        for row in range(len(inputs["input_ids"])):
            self.documents += segments({name: inputs[name][row] for name in ("input_ids", "position_ids", "labels")})
        return super().training_step(model, inputs, *args)


def train(folder: Path, dataset, layout="rows", **options) -> tuple[Recorder, LlamaForCausalLM]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", per_device_train_batch_size=3,
        disable_tqdm=True, dataloader_pin_memory=False, ddp_backend="gloo", learning_rate=1e-2, **options,
    )  # fmt: skip
    collator = BestFitPackingCollator(SEQ_LENGTH, layout=layout)
    trainer = Recorder(model, arguments, train_dataset=dataset, data_collator=collator)
    trainer.documents = []
    trainer.train()
    return trainer, model


def main(folder: Path) -> None:
    packed = pack(raw_examples(LENGTHS), SEQ_LENGTH, row_multiple=2 * 3)
    probe = BestFitPackingCollator(SEQ_LENGTH)([packed[0]])
    check_packed(LlamaForCausalLM(tiny_config()), probe | {"use_cache": False})
    trainer, model = train(folder, packed, num_train_epochs=1)
    streamed, _ = train(folder, pack(Examples(raw_examples(LENGTHS)), SEQ_LENGTH, pool_size=40), max_steps=4)
    flat, _ = train(
        folder, pack(Examples(raw_examples(LENGTHS)), SEQ_LENGTH, pool_size=40), "flat", max_steps=4,
        accelerator_config={"dispatch_batches": False},
    )  # fmt: skip
    try:  # shares, dealt out once more by accelerate
        whole = datasets.Dataset.from_list(raw_examples(LENGTHS)).to_iterable_dataset(4)
        shares = split_dataset_by_node(whole, torch.distributed.get_rank(), 2)
        train(folder, pack(shares, SEQ_LENGTH), max_steps=1, accelerator_config={"dispatch_batches": False})
        refused = ""
    except ValueError as error:
        refused = str(error)
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "recipes/packed_ranks.py"))
    steps = runpy.run_path(str(Path(__file__).parents[2] / "recipes/equal_steps.py"))
    report = {
        "operations": steps["operations"](BalancedRows(pack(raw_examples(LENGTHS), SEQ_LENGTH), 2), 4, SEQ_LENGTH),
        "losses": {way: recipe["losses"](way, packed, 3) for way in recipe["WAYS"]},
        "flat": flat.documents,
        "refused": refused,
        "world": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "documents": trainer.documents,
        "streamed": streamed.documents,
        "parameters": [parameter.sum().item() for parameter in model.parameters()],
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
