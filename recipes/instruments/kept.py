"""The tokens that each truncation sampler keeps of rows sorted by probability, with their probability and entropy.

All samplers but typical keep the first n tokens of a sorted row; typical keeps an interval. The cumulative sums of a
`Ranked` row give the probability and the entropy of any interval without another pass over the vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_longtrunc.evaluation.ranked import (
    Ranked,
    at,
    collision,
    deviation,
    entropy_of,
    min_k_count,
    nearer,
    top_h_shares,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int

    Interval = tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]


def kept_mass_and_entropy(rows: Ranked, kept: Interval) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the probability of the kept tokens, and the entropy in nats of the kept tokens renormalised."""
    mass, entropy = ((at(sums, kept[1]) - at(sums, kept[0])) for sums in (rows.mass, rows.entropy))
    return mass, (entropy / mass + mass.log()).clamp_min(0)


def _eta_kept(rows: Ranked, epsilon: float) -> Interval:
    return _up_to(rows, (entropy_of(rows) - math.log(epsilon) / 2).clamp_min(-math.log(epsilon)))


def _top_p_kept(rows: Ranked, top_p: float) -> Interval:
    last = (rows.mass[:, :-1] < top_p).sum(-1).clamp_min(1)
    return torch.zeros_like(last), last


def _top_k_kept(rows: Ranked, k: float) -> Interval:
    last = torch.full((len(rows.surprisal),), min(int(k), rows.surprisal.shape[1]))
    return torch.zeros_like(last), last


def _typical_kept(rows: Ranked, mass: float) -> Interval:
    """Find the smallest interval about the entropy that holds so much, by bisecting its half-width."""
    low, high = torch.zeros(len(rows.surprisal), dtype=torch.float64), _furthest(rows)
    for _ in range(60):
        middle = (low + high) / 2
        first, last = nearer(rows, middle, is_strict=False)
        enough = at(rows.mass, last) - at(rows.mass, first) >= mass
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return nearer(rows, high, is_strict=False)


def _furthest(rows: Ranked) -> Tensor:
    finite = torch.where(rows.surprisal.isfinite(), rows.surprisal, 0)
    return (finite - entropy_of(rows)[:, None]).abs().amax(-1) * (1 + 1e-12)


def _top_h_kept(rows: Ranked, top_h: float) -> Interval:
    last = (top_h_shares(rows) <= top_h).sum(-1).clamp_min(1)
    return torch.zeros_like(last), last


def _min_k_kept(rows: Ranked, _: float) -> Interval:
    last = min_k_count(rows)
    return torch.zeros_like(last), last


def _up_to(rows: Ranked, bar: Tensor | float) -> Interval:
    """All tokens of at most so much surprisal, the first one always."""
    bars = torch.as_tensor(bar, dtype=torch.float64).expand(len(rows.surprisal))
    last = torch.searchsorted(rows.surprisal, bars[:, None].contiguous(), right=True)[:, 0].clamp_min(1)
    return torch.zeros_like(last), last


# Sampler -> (rows, its parameter) -> the first kept token of each row, and the first one after it that is not kept.
KEPT: dict[str, Callable[[Ranked, float], Interval]] = {
    "eta": _eta_kept,
    "epsilon": lambda rows, epsilon: _up_to(rows, -math.log(epsilon)),
    "top-n-sigma": lambda rows, n: _up_to(rows, rows.surprisal[:, 0] + n * deviation(rows)),
    "p-less": lambda rows, _: _up_to(rows, collision(rows, normalized=False)),
    "p-less normalized": lambda rows, _: _up_to(rows, collision(rows, normalized=True)),
    "top-p": _top_p_kept,
    "top-k": _top_k_kept,
    "min-p": lambda rows, share: _up_to(rows, rows.surprisal[:, 0] - math.log(share)),
    "typical": _typical_kept,
    "top-h": _top_h_kept,
    "min-k": _min_k_kept,
}
