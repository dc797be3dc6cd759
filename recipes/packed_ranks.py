"""The same packed rows in one process, in two under DDP and in two under FSDP2: the losses of every step, in fp64.

    python recipes/packed_ranks.py

starts itself by torchrun on two processes of this machine, over gloo. Each of them takes every second row of a batch,
and the sum of its losses is divided by the targets of the whole batch, as Trainer does. Expected: differences of
rounding, under 1e-13. Cost: half a CPU minute.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_longtrunc import BestFitPackingCollator, PackedDataset, pack

SEQ_LENGTH, BATCH = 64, 4
WAYS = ("alone", "DDP", "FSDP2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        raise SystemExit(subprocess.call([*torchrun, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}))
    distributed.init_process_group("gloo")
    rng = np.random.default_rng(0)
    documents = [{"input_ids": rng.integers(3, 90, length)} for length in rng.integers(2, 60, 40 * arguments.steps)]
    packed = pack(documents, SEQ_LENGTH, row_multiple=BATCH)
    found = {way: losses(way, packed, arguments.steps) for way in WAYS}
    if distributed.get_rank() == 0:
        print_table(found)
    distributed.destroy_process_group()


def losses(way: str, packed: PackedDataset, steps: int) -> list[float]:
    """Train for some steps on the first rows; return the mean loss over all targets of every step."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny()).double()
    rank, world = (0, 1) if way == "alone" else (distributed.get_rank(), distributed.get_world_size())
    if way == "DDP":
        model = DistributedDataParallel(model)
    elif way == "FSDP2":
        mesh = init_device_mesh("cpu", (world,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    collate = BestFitPackingCollator(SEQ_LENGTH)
    seen = []
    for step in range(steps):
        rows = [packed[index] for index in range(step * BATCH, (step + 1) * BATCH)]
        targets = int((collate(rows)["labels"] != -100).sum())
        mine = summed_loss(model, collate(rows[rank::world])) / targets
        optimizer.zero_grad()
        torch.autograd.backward(mine * world)  # both ways take the mean of the processes' gradients
        optimizer.step()
        total = mine.detach().clone()
        if world > 1:
            distributed.all_reduce(total)
        seen.append(total.item())
    return seen


def summed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the loss summed over targets, in the logits' precision: transformers' own is taken in fp32."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def tiny() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )


def print_table(found: dict[str, list[float]]) -> None:
    table = Table(title="loss of every step on the same packed rows, fp64", title_justify="left")
    for heading in ("step", "one process", "DDP, two", "FSDP2, two", "furthest apart"):
        table.add_column(heading, justify="right")
    for step, values in enumerate(zip(*(found[way] for way in WAYS), strict=True)):
        table.add_row(str(step), *(f"{value:.15f}" for value in values), f"{max(values) - min(values):.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
