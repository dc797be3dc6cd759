"""Figures with 95 % intervals, by a bootstrap over blocks (windows or prompts)."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BOOTSTRAPS = 2000


def resampled(blocks: int, seed: int = 0) -> Array:
    """Return the weight of each block, [1 + BOOTSTRAPS, blocks]: 1 in the first row, drawn in the others."""
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=BOOTSTRAPS)
    return np.vstack([np.ones((1, blocks), dtype=drawn.dtype), drawn])


def bootstrapped(values: Array) -> list[float]:
    """Return a figure and half of its 95 % interval, from [figure, its bootstraps]."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return [round(float(values[0]), 5), round(float(high - low) / 2, 5)]


def mean(values: Array) -> list[float]:
    """Return the mean of blocks and half of its 95 % interval."""
    return bootstrapped(resampled(len(values)) @ values / len(values))


def ratio(sums: Array, counts: Array, digits: int) -> str:
    """Return a ratio of sums over blocks as text, with half of its 95 % interval, by a bootstrap over blocks."""
    if not counts.sum():
        return ""
    weights = resampled(len(counts))
    value, half = bootstrapped((weights @ sums) / (weights @ counts).clip(1))
    return f"{value:.{digits}f} ± {half:.{digits}f}"
