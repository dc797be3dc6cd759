"""Wilson's interval of a share."""

from __future__ import annotations

import math

from hf_longtrunc.arguments import check_float, check_fraction, check_int


def wilson_interval(mean: float, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a share: the p with |mean - p| <= z sqrt(p (1 - p) / count).

    Args:
        mean: share of successes. For the mean of scores in [0, 1] the interval is too wide, never too narrow.
        count: number of trials, at least 1.
        z: the normal quantile; the default covers the true share in 95 % of experiments.

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.

    Examples:
        >>> [round(end, 2) for end in wilson_interval(0.9, 20)]
        [0.7, 0.97]
    """
    mean, count, z = check_fraction("mean", mean), check_int("count", count, minimum=1), check_float("z", z, gt=0)
    middle = mean + z * z / (2 * count)
    half = z * math.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    # The ends that are exact are not left to rounding.
    return (middle - half) / scale if mean > 0 else 0.0, (middle + half) / scale if mean < 1 else 1.0
