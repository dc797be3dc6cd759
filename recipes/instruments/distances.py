"""Relative distances that drawn position ids let a model meet in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_longtrunc.positions.cream import Positions, Sampler


def distances_seen(
    sampler: Sampler, length: int, window: int, factor: int, draws: int, seed: int = 0
) -> NDArray[np.int64]:
    """Count in how many of `draws` documents each relative distance 0..fN - 1 occurs, [fN].

    Each pair of runs contributes an interval of distances, so a document costs the square of its number of runs:
    little for CREAM and PoSE, much for random positions.
    """
    changes = np.zeros(factor * window + 1, np.int64)
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        for low, high in _intervals(sampler(length, window, factor, generator)):
            changes[low] += 1
            changes[high + 1] -= 1
    return np.cumsum(changes[:-1])


def _intervals(ids: Positions) -> list[tuple[int, int]]:
    """Return the disjoint intervals of distances that occur between two of the ids."""
    cuts = np.flatnonzero(np.diff(ids) != 1) + 1
    first, last = ids[np.append(0, cuts)], ids[np.append(cuts, len(ids)) - 1]
    low = np.maximum(first[:, None] - last, 0)
    high = last[:, None] - first
    merged: list[tuple[int, int]] = []
    order = np.argsort(low[high >= 0], kind="stable")
    for start, end in zip(low[high >= 0][order].tolist(), high[high >= 0][order].tolist(), strict=True):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
