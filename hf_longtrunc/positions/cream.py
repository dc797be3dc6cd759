"""Position ids with the distances of a long window for short documents: CREAM, PoSE, random and ordinary positions.

A document of n <= N tokens (N: the trained window) gets n increasing ids in [0, fN). CREAM's ids form three runs of
consecutive numbers:

    head [0, k)      middle (P_e - m, P_e], m = n - 2k      tail [fN - k, fN)

Distances between runs are long, distances within a run are those of training. k is large (n // 3, "relativity": the
most pairs of tokens across runs) or small (4f, "continuity": a long middle). The middle's end is drawn so that the
middle of the long window is covered as often as its ends:

    r in {2 .. 2f} about 1 + f      P_e uniform on {k + (m - 1) r // 2 .. r N // 2 - k - 1}

All samplers have the signature `(length, window, factor, generator)` and draw from that generator only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hf_longtrunc.arguments import check_choice, check_float

Positions: TypeAlias = NDArray[np.int64]
# (length, window, factor, generator) -> ids [length], increasing, out of [0, factor * window)
Sampler: TypeAlias = Callable[[int, int, int, np.random.Generator], Positions]
Variant = Literal["relativity", "continuity"]

# Rotary angles are taken in fp32, which tells no whole numbers above this apart.
LAST_POSITION = 2**24
_MAX_ENDS = 8  # head and tail of the continuity variant are never longer than this part of a document


@dataclass(frozen=True, kw_only=True)
class CreamPositions:
    """CREAM's position ids: head, middle and tail of a document spread over the long window.

    Called with `(length, window, factor, generator)` it returns ids [length]: strictly increasing, from 0 to
    factor * window - 1 (a single token stays at 0). With factor 1, a document as long as the window gets its ordinary
    positions. Cost: two or three draws and one array.

    Args:
        sigma: standard deviation of r; the middle lies within the first r/2 windows. None: 3/8 of the factor.
        tails: "renormalised" draws r again if it lies outside 2..2f, "clipped" sets it to 2 or 2f.
        variant: of head and tail; None draws one for each document, with probability 1/2.
        is_safe: limit head and tail of "continuity" to an eighth of the document each; without it they are 4f tokens.

    Raises:
        ValueError: a length outside 0..window, a factor below 1, or, with `is_safe=False`, no room for a middle.

    Source: Wu, Zhao, Zheng 2024, "An Efficient Recipe for Long Context Extension via Middle-Focused Positional
    Encoding", arXiv 2406.07138, section 3. Deviations of the defaults (`official()` has none of them): sigma grows with
    the factor, the Gaussian is renormalised instead of clipped, head and tail are bounded. For a document shorter than
    the window, the lengths of the runs follow from the document's length instead of N.

    Examples:
        >>> CreamPositions(variant="relativity")(9, 16, 4, np.random.default_rng(0)).tolist()
        [0, 1, 2, 25, 26, 27, 61, 62, 63]
    """

    sigma: float | None = None
    tails: Literal["renormalised", "clipped"] = "renormalised"
    variant: Variant | None = None
    is_safe: bool = True

    def __post_init__(self) -> None:
        if self.sigma is not None:
            check_float("sigma", self.sigma, gt=0)
        check_choice("tails", self.tails, ("renormalised", "clipped"))
        if self.variant is not None:
            check_choice("variant", self.variant, ("relativity", "continuity"))

    @classmethod
    def official(cls, variant: Variant | None = None) -> CreamPositions:
        """Return the sampler of the paper's code: sigma 3, clipped, head and tail of 4f tokens.

        That code draws one variant for some thousands of documents; pass one for the same effect.
        """
        return cls(sigma=3.0, tails="clipped", variant=variant, is_safe=False)

    def __call__(self, length: int, window: int, factor: int, generator: np.random.Generator) -> Positions:
        """Draw the ids [length] of one document."""
        check_lengths(length, window, factor)
        if length < 2:
            return np.zeros(length, np.int64)
        variant = self.variant or ("relativity", "continuity")[generator.integers(2)]
        ends = self.ends(length, factor, variant)
        low, high = middle_ends(length, window, ends, self.stretch(generator.random(), factor))
        end, middle, long = int(generator.integers(low, high + 1)), length - 2 * ends, factor * window
        runs = (0, ends), (end - middle + 1, end + 1), (long - ends, long)
        return np.concatenate([np.arange(*run, dtype=np.int64) for run in runs])

    def ends(self, length: int, factor: int, variant: Variant) -> int:
        """Return k, the number of tokens in the head, and in the tail."""
        if variant == "relativity":
            ends = max(length // 3, 1)
        else:
            ends = min(4 * factor, max(length // _MAX_ENDS, 1)) if self.is_safe else 4 * factor
        if 2 * ends > length:
            raise ValueError(
                f"head and tail of 4 * factor = {ends} tokens each do not fit a document of {length}: the official "
                "form needs longer documents or a smaller factor; CreamPositions() has no such limit"
            )
        return ends

    def stretch(self, u: float, factor: int) -> int:
        """Return r in 2..2f for u uniform on [0, 1): the middle lies within the first r/2 windows."""
        if factor == 1:
            return 2
        gaussian = NormalDist(1 + factor, self.sigma or 3 * factor / 8)
        if self.tails == "clipped":
            return int(min(max(gaussian.inv_cdf(max(u, 5e-324)), 2), 2 * factor))
        low, high = gaussian.cdf(1.5), gaussian.cdf(2 * factor + 0.5)
        return min(max(round(gaussian.inv_cdf(low + u * (high - low))), 2), 2 * factor)


def middle_ends(length: int, window: int, ends: int, stretch: int) -> tuple[int, int]:
    """Return the first and the last id that the middle's last token may have."""
    middle = length - 2 * ends
    return ends + (middle - 1) * stretch // 2, stretch * window // 2 - ends - 1


def pose_positions(length: int, window: int, factor: int, generator: np.random.Generator) -> Positions:
    """Return PoSE's ids with two chunks: the first starts at 0, the second after a uniform skip of 0..fN - n.

    The first chunk has 1..n - 1 tokens, uniformly. Source: Zhu et al. 2024, arXiv 2309.10400, section 3.

    Examples:
        >>> pose_positions(6, 8, 4, np.random.default_rng(0)).tolist()
        [0, 1, 2, 3, 4, 22]
    """
    check_lengths(length, window, factor)
    ids = np.arange(length, dtype=np.int64)
    if length > 1:
        ids[generator.integers(1, length) :] += generator.integers(factor * window - length + 1)
    return ids


def random_positions(length: int, window: int, factor: int, generator: np.random.Generator) -> Positions:
    """Return ids drawn from [0, fN) without replacement, sorted (Ruoss et al. 2023, arXiv 2305.16843).

    Examples:
        >>> random_positions(4, 8, 4, np.random.default_rng(0)).tolist()
        [8, 15, 19, 24]
    """
    check_lengths(length, window, factor)
    return np.sort(generator.choice(factor * window, length, replace=False, shuffle=False))


def contiguous_positions(length: int, window: int, factor: int, generator: np.random.Generator) -> Positions:
    """Return ordinary positions 0..n - 1; nothing is drawn.

    Examples:
        >>> contiguous_positions(4, 8, 4, np.random.default_rng(0)).tolist()
        [0, 1, 2, 3]
    """
    check_lengths(length, window, factor)
    return np.arange(length, dtype=np.int64)


SCHEMES: dict[str, Sampler] = {
    "cream": CreamPositions(),
    "pose": pose_positions,
    "random": random_positions,
    "contiguous": contiguous_positions,
}


def check_lengths(length: int, window: int, factor: int) -> None:
    """Raise ValueError for a document longer than the window, and for a window or factor out of range."""
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if factor * window > LAST_POSITION:
        raise ValueError(
            f"factor * window must be at most {LAST_POSITION}, the last position that fp32 angles tell from the next "
            f"one, got {factor} * {window}"
        )
    if not 0 <= length <= window:
        raise ValueError(
            f"a document of {length} tokens does not fit the window of {window} that the model was trained on: cut the "
            "documents to the window, or name a larger window"
        )
