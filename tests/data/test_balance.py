"""Steps of equal work: the dealing against a naive one, the costs against a count, and what trainers read of it."""

from __future__ import annotations

import pickle

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from hf_longtrunc import BalancedRows, BestFitPackingCollator, pack
from hf_longtrunc.data.balance import deal_rows
from tests.data.corpora import raw_examples
from tests.data.test_training import StopAfter, trained

SEQ_LENGTH = 64
LENGTHS = np.clip(np.random.default_rng(5).lognormal(2.6, 1.0, 700), 2, 64).astype(int).tolist()


def packed(**options):
    return pack(raw_examples(LENGTHS), SEQ_LENGTH, **options)


def naive_cost(row) -> int:
    """The squared length of every document, and of the padding behind them."""
    bounds = [*np.flatnonzero(np.asarray(row["position_ids"]) == 0).tolist(), len(row["input_ids"])]
    lengths = [*np.diff(bounds).tolist(), SEQ_LENGTH - len(row["input_ids"])]
    return sum(length**2 for length in lengths)


def naive_deal(cost, rows_per_step, window, rng):
    order = rng.permutation(len(cost)).tolist()
    full = len(order) // rows_per_step
    windows, rest = max(1, full * rows_per_step // window), order[full * rows_per_step :]
    steps, begin = [], 0
    for index in range(windows):
        size = (full // windows + (index < full % windows)) * rows_per_step
        part = sorted(order[begin : begin + size], key=lambda row: cost[row])
        steps += [part[i : i + rows_per_step] for i in range(0, size, rows_per_step)]
        begin += size
    return [row for step in rng.permutation(len(steps)) for row in steps[step]] + rest


def test_dealing_equals_the_naive_one_and_keeps_every_row():
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows, rows_per_step = int(rng.integers(1, 60)), int(rng.integers(1, 9))
        cost, seed = rng.integers(0, 9, rows), int(rng.integers(99))
        options = (rows_per_step, int(rng.integers(rows_per_step, 40)))
        order = deal_rows(cost, *options, np.random.default_rng(seed)).tolist()
        assert order == naive_deal(cost, *options, np.random.default_rng(seed))
        assert sorted(order) == list(range(rows))


def test_costs_are_those_of_the_documents_and_the_padding(tmp_path):
    rows = packed(row_multiple=8)
    assert BalancedRows(rows, 8).cost.tolist() == [naive_cost(row) for row in rows]
    written = rows.materialize(tmp_path)
    assert BalancedRows(written, 8).cost.tolist() == [naive_cost(row) for row in rows]
    some = written.select(range(3, 20))
    assert BalancedRows(some, 2).cost.tolist() == [naive_cost(rows[index]) for index in range(3, 20)]
    balanced = BalancedRows(written, 8)
    assert written.select(balanced.order)[5] == balanced[5]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_reads_its_part_of_steps_of_like_cost(ranks):
    """What accelerate hands to every rank of `ranks`: every row once, the same steps, two rows a rank and batch."""
    rows = packed(row_multiple=8)
    balanced = BalancedRows(rows, 8)
    orders = []
    for epoch in range(2):
        batches = []
        for rank in range(ranks):
            loader = prepare_data_loader(
                DataLoader(balanced, 2, collate_fn=lambda rows: [naive_cost(row) for row in rows]),
                num_processes=ranks, process_index=rank, put_on_device=False,
            )  # fmt: skip
            loader.set_epoch(epoch)
            batches.append(list(loader))
        costs = [cost for step in zip(*batches, strict=True) for batch in step for cost in batch]
        assert costs == [naive_cost(balanced[index]) for index in range(len(balanced))]
        orders.append(balanced.order.tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(rows)))
    assert orders[0] != orders[1]
    steps = balanced.cost[balanced.order].reshape(-1, 8)
    shuffled = np.random.default_rng(0).permutation(balanced.cost).reshape(-1, 8)
    assert (steps.max(1) - steps.mean(1)).mean() < (shuffled.max(1) - shuffled.mean(1)).mean() / 4


def test_trainer_reads_it_in_order_epoch_by_epoch_and_resumes(tmp_path):
    seen = []

    class Recorded(BalancedRows):
        def __getitem__(self, index):
            seen.append(int(self.order[index]))
            return super().__getitem__(index)

    def dataset():
        seen.clear()
        return Recorded(packed(row_multiple=8).shard(0, 2), 8)

    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "dtype": torch.float32}
    collator, steps = BestFitPackingCollator(SEQ_LENGTH), len(dataset()) // 4 + 6  # into the second epoch
    orders = BalancedRows(dataset().rows, 8), BalancedRows(dataset().rows, 8)
    orders[1].set_epoch(1)
    whole = trained(tmp_path / "whole", dataset(), collator, steps=steps, **settings)
    expected = [*orders[0].order.tolist(), *orders[1].order.tolist()]
    assert seen[: 4 * steps] == expected[: 4 * steps]
    folder, stop = tmp_path / "cut", steps - 3
    trained(folder, dataset(), collator, steps=steps, callbacks=[StopAfter(stop)], **settings)
    resumed = trained(folder, dataset(), collator, steps=steps, resume=str(folder / f"checkpoint-{stop}"), **settings)
    assert torch.equal(resumed, whole)


def test_an_order_is_a_function_of_seed_and_epoch():
    rows = packed()
    first, second = BalancedRows(rows, 4, seed=1), BalancedRows(rows, 4, seed=1)
    second.set_epoch(3)
    assert first.order.tolist() != second.order.tolist()
    second.set_epoch(0)
    assert first.order.tolist() == second.order.tolist() == pickle.loads(pickle.dumps(first)).order.tolist()
    assert first.order.tolist() != BalancedRows(rows, 4, seed=2).order.tolist()
    assert f"{len(rows):,} rows in steps of 4" in repr(first)
    example = pack([{"input_ids": [5] * n} for n in (8, 3, 2, 8, 5, 3, 3)], 8)
    assert sorted(len(set(row["position_ids"])) for row in BalancedRows(example, 2, seed=3)) == [3, 5, 8, 8]


def test_what_has_no_rows_of_documents_is_refused():
    with pytest.raises(TypeError, match=r"what pack\(\) makes of a dataset with a length.*got list"):
        BalancedRows([{"input_ids": [1]}], 4)
    with pytest.raises(ValueError, match=r"must have seq_lengths.*\['input_ids'\]"):
        BalancedRows(datasets.Dataset.from_dict({"input_ids": [[1]]}), 4)
    with pytest.raises(ValueError, match="window must be a whole number of at least 8, got 4"):
        BalancedRows(packed(), 8, window=4)
    with pytest.raises(ValueError, match="rows_per_step must be a whole number of at least 1"):
        BalancedRows(packed(), 0)
