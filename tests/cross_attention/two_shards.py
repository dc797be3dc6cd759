"""Run by `tests.launch` on two ranks: each holds a part of the states, both ask the same questions."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_longtrunc.cross_attention.datastore import Datastore, ShardedDatastore

STATES, SIZES = 41, [29, 12]  # the second rank has fewer states than are asked for


def answers(store, queries) -> dict[str, torch.Tensor]:
    found = {}
    for k in (1, 5, 20, 41, 60):
        scores, ids = store.search(queries, k)
        found |= {f"scores{k}": scores, f"ids{k}": ids, f"sums{k}": store.weighted_sum(ids, scores.softmax(-1))}
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    states, queries = torch.randn(STATES, 6, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    mine = states.split(SIZES)[rank]
    store = ShardedDatastore([Datastore(part) for part in mine.split(10)], dist.group.WORLD)
    torch.save(answers(store, queries), folder / f"rank{rank}.pt")
    if rank == 0:
        torch.save(answers(Datastore(states), queries), folder / "whole.pt")
    dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text("{}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
