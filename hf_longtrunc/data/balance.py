"""Rows in an order that gives all ranks of a training step equal work.

Packed rows have equally many tokens and unequal cost: a layer spends about 12 h n + sum(length^2) on a row of n tokens
and hidden size h, as attention is quadratic in each document. All ranks wait for the most expensive row of a step. As n
is the same for all rows, the sum of the squared lengths orders them by cost for any model.

    shuffle the rows; cut them into windows; sort each window by cost; every `rows_per_step` rows of it are a step;
    shuffle the steps

The rows of a step cost about the same, and so do the rows of a part of a step: ranks, batch size and accumulation may
change if a step's rows divide `rows_per_step`. No row is added or left out. The price: documents of similar length
share a step. Gradient accumulation over several steps mixes them.

Measured on lognormal corpora, the most expensive of 64 ranks over their mean: up to 1.21, 1.63 and 3.43 at rows of 8k,
32k and 131k in random order, at most 1.013 in this one (recipes/equal_steps.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from hf_longtrunc.arguments import check_int
from hf_longtrunc.data.dataset import PackedDataset

if TYPE_CHECKING:
    from numpy.typing import NDArray


def deal_rows(cost: NDArray[Any], rows_per_step: int, window: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return an order of rows of `cost` [rows] in which every `rows_per_step` consecutive rows cost about the same.

    At least `window` rows are sorted together. Rows that do not fill a group come last.
    """
    order, steps = rng.permutation(len(cost)), len(cost) // rows_per_step
    last = order[steps * rows_per_step :]
    shuffled = order[: steps * rows_per_step].reshape(steps, rows_per_step)
    windows = [part.ravel() for part in np.array_split(shuffled, max(1, shuffled.size // window))]
    dealt = np.concatenate([rows[np.argsort(cost[rows], kind="stable")] for rows in windows])
    return np.concatenate([rng.permutation(dealt.reshape(shuffled.shape)).ravel(), last])


class BalancedRows(TorchDataset[dict[str, Any]]):
    """Packed rows in an order that gives the ranks of a step equal work: read them in order, without shuffling.

    With Trainer: `TrainingArguments(train_sampling_strategy="sequential")`. With accelerate and in plain loops:
    `DataLoader(rows, batch_size)` without `shuffle`. Row i does not depend on the ranks, so resuming works as for any
    dataset. Trainer and accelerate call `set_epoch`; workers that stay alive over epochs keep the first order.

    Args:
        rows: a `PackedDataset`, or a `datasets.Dataset` of written rows with `seq_lengths`.
        rows_per_step: ranks times rows per rank, or a multiple. `pack(..., row_multiple=rows_per_step)` completes the
            last step.
        window: rows that are sorted together. A smaller one makes steps less equal; a larger one puts documents of rare
            lengths into one step.
        seed: for shuffling.

    `order` holds the row numbers in `rows`: for trainers that need a `datasets.Dataset`, use
    `written.select(balanced.order)`.

    Raises:
        TypeError: other rows.
        ValueError: rows without `seq_lengths`; a number out of range.

    Examples:
        >>> packed = pack([{"input_ids": [5] * n} for n in (8, 3, 2, 8, 5, 3, 3)], 8)
        >>> [len(set(row["position_ids"])) for row in BalancedRows(packed, 2, seed=3)]
        [8, 8, 3, 5]
    """

    def __init__(self, rows: Any, rows_per_step: int, *, window: int = 8192, seed: int = 0) -> None:
        self.rows = rows
        self.rows_per_step = check_int("rows_per_step", rows_per_step, minimum=1)
        self.window = check_int("window", window, minimum=self.rows_per_step)
        self.seed = check_int("seed", seed, minimum=0)
        self.cost = _squared_lengths(rows)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the order of this epoch; it depends on the seed and the epoch only."""
        rng = np.random.default_rng((self.seed, check_int("epoch", epoch, minimum=0)))
        self.order = deal_rows(self.cost, self.rows_per_step, self.window, rng)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[int(self.order[index])]
        return row

    def __repr__(self) -> str:
        return f"<BalancedRows: {len(self):,} rows in steps of {self.rows_per_step:,}, of {self.rows!r}>"


def _squared_lengths(rows: Any) -> NDArray[np.int64]:
    """Return the sum of squared document lengths of each row; its padding counts as a document."""
    if isinstance(rows, PackedDataset):
        lengths, (begins, stops) = rows.packing.length[rows.packing.items].astype(np.int64), rows.spans()
        fills, squares = (
            np.diff(np.append(0, np.cumsum(of))[[begins, stops]], axis=0)[0] for of in (lengths, lengths**2)
        )
        cost: NDArray[np.int64] = squares + (rows.packing.seq_length - fills) ** 2
        return cost
    if not hasattr(rows, "column_names"):
        raise TypeError(
            "rows must be what pack() makes of a dataset with a length, or a datasets.Dataset that materialize() "
            f"wrote, got {type(rows).__name__}"
        )
    if "seq_lengths" not in rows.column_names:
        raise ValueError(
            f"rows must have seq_lengths, the lengths of their documents, got the columns {rows.column_names}: write "
            "them by materialize() with that column"
        )
    column = rows.with_format("arrow")[:]["seq_lengths"].combine_chunks()
    lengths, counts = column.flatten().to_numpy(), column.value_lengths().to_numpy()
    numbers = np.repeat(np.arange(len(rows)), counts)
    fills = _sums(lengths, numbers, len(rows))
    return _sums(lengths.astype(np.int64) ** 2, numbers, len(rows)) + (int(fills.max(initial=0)) - fills) ** 2


def _sums(values: NDArray[Any], numbers: NDArray[Any], rows: int) -> NDArray[np.int64]:
    """Sum the values of every row; a float64 holds these sums exactly."""
    return np.bincount(numbers, weights=values, minlength=rows).astype(np.int64)
