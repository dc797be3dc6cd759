"""How long the ranks of a step wait for each other: rows in random order, and in steps of equal work.

    python recipes/equal_steps.py            # simulated: 8 and 64 ranks, rows of 8k, 32k and 131k
    python recipes/equal_steps.py --train    # two real processes over gloo, operations counted by torch

Simulated: documents of three lognormal corpora, packed by best fit; a rank has a row a step, and a row of n tokens
costs 12 h n + sum(length^2), h = 2048. Shown is the most expensive rank of a step over the mean of its ranks, mean of
all steps. Expected: at most 1.03 by `BalancedRows`. `--train` counts a forward and backward of a small Llama with
attention over one document at a time. Expected: the two ranks of a step differ by at most 5 %, on average by less
than 1 %. Cost: a CPU minute each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from hf_longtrunc import BalancedRows, BestFitPackingCollator, PackedDataset, best_fit_decreasing, pack
from hf_longtrunc.data.balance import deal_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

RANKS, SEQ_LENGTHS, HIDDEN = (8, 64), (8192, 32_768, 131_072), 2048
CORPORA = {"web pages": (6.2, 1.1), "longer": (7.0, 1.4), "books too": (7.5, 1.7)}  # of log length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="of each simulated corpus")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    if not arguments.train:
        Console(width=110).print(simulated(arguments.tokens))
        return
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        raise SystemExit(subprocess.call([*torchrun, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}))
    distributed.init_process_group("gloo")
    table = trained(arguments.steps)
    if distributed.get_rank() == 0:
        Console(width=110).print(table)
    distributed.destroy_process_group()


def simulated(tokens: int) -> Table:
    table = Table(title="most expensive rank of a step over its mean", title_justify="left")
    names = [f"{ranks} ranks, {order}" for order in ("random", "balanced") for ranks in RANKS]
    for heading in ("documents", "rows of", "rows", *names):
        table.add_column(heading, justify="left" if heading == "documents" else "right")
    for name, (mean, deviation) in CORPORA.items():
        rng = np.random.default_rng(0)
        documents = int(tokens / np.exp(mean + deviation**2 / 2))
        lengths = np.maximum(2, rng.lognormal(mean, deviation, documents)).astype(np.int64)
        for seq_length in SEQ_LENGTHS:
            packing = best_fit_decreasing(lengths, seq_length, seed=0)
            pieces = packing.length[packing.items].astype(np.float64)
            squares = np.add.reduceat(pieces**2, packing.offsets[:-1])
            cost = 12 * HIDDEN * packing.fills() + squares
            dealt = deal_rows(squares, max(RANKS), 8192, np.random.default_rng(0))
            orders = rng.permutation(len(cost)), dealt
            waits = [f"{waiting(cost[order], ranks):.3f}" for order in orders for ranks in RANKS]
            table.add_row(name, f"{seq_length:,}", f"{len(packing):,}", *waits)
    return table


def waiting(cost: NDArray[Any], ranks: int) -> float:
    steps = cost[: len(cost) // ranks * ranks].reshape(-1, ranks)
    return float((steps.max(1) / steps.mean(1)).mean())


def trained(steps: int) -> Table:
    """Train on both orders; count the operations of every rank at every step."""
    seq_length, world = 512, distributed.get_world_size()
    lengths = np.clip(np.random.default_rng(0).lognormal(4.2, 1.2, 200 * steps), 2, seq_length).astype(int)
    rng = np.random.default_rng(1)
    packed = pack([{"input_ids": rng.integers(3, 97, length)} for length in lengths], seq_length, row_multiple=world)
    table = Table(title="operations of a step's two ranks: larger over smaller", title_justify="left")
    for heading in ("rows", "mean", "largest"):
        table.add_column(heading, justify="left" if heading == "rows" else "right")
    rows: dict[str, PackedDataset | BalancedRows] = {"random order": packed, "balanced": BalancedRows(packed, 2)}
    for name, dataset in rows.items():
        counts = torch.tensor(operations(dataset, steps, seq_length))
        of_all = [torch.empty_like(counts) for _ in range(world)]
        distributed.all_gather(of_all, counts)
        ratios = torch.stack(of_all).amax(0) / torch.stack(of_all).amin(0) - 1
        table.add_row(name, f"{ratios.mean():+.2%}", f"{ratios.max():+.2%}")
    return table


def operations(dataset: Any, steps: int, seq_length: int) -> list[float]:
    torch.manual_seed(0)
    AttentionInterface.register("a_document_at_a_time", a_document_at_a_time)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=None, eos_token_id=None)  # fmt: skip
    alone = LlamaForCausalLM(config)
    alone.set_attn_implementation("a_document_at_a_time")
    model = DistributedDataParallel(alone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, shuffle=False)
    loader = DataLoader(dataset, 1, sampler=sampler, collate_fn=BestFitPackingCollator(seq_length, layout="flat"))
    counts = []
    for _, batch in zip(range(steps), loader, strict=False):
        # On a CPU torch counts the operations of attention only in this form.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(float(counter.get_total_flops()))
    return counts


def a_document_at_a_time(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    spans = [slice(*pair) for pair in pairwise(kwargs["cu_seq_lens_q"].tolist())]
    parts = [
        scaled_dot_product_attention(query[:, :, span], key[:, :, span], value[:, :, span], is_causal=True)
        for span in spans
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main()
