"""The record of one sampling step, for `TruncationTrace`, in pure torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Candidates = np.ndarray[Any, np.dtype[np.void]]
    # (row, its tokens) -> margins of their proofs
    Prove = Callable[[int, np.ndarray[Any, Any]], np.ndarray[Any, Any]]

# Relative: a token this close to the threshold is neither above nor below it, to fp32 rounding.
_ON_THRESHOLD = 1e-5
_CANDIDATE = np.dtype([("token", np.int32), ("probability", np.float32), ("kept", np.bool_), ("margin", np.float32)])


@dataclass(frozen=True)
class TruncationRecord:
    """One row at one step; probabilities are those before the first processor.

    Examples:
        >>> record = TruncationRecord(0, 0, 5, entropy=2.0, threshold=0.01, lowest_kept=0.02, kept=9, kept_mass=0.9)
        >>> round(record.eta_threshold(epsilon=0.02), 5)
        0.01914

    Attributes:
        run: number of the generation, from 0; a new prompt starts a new one.
        row: row of the batch (under beam search the beam's slot).
        position: tokens before this one, padding included.
        entropy: of the full distribution, in nats.
        threshold: probability threshold of the last processor with a `threshold` method, or None.
        lowest_kept: the smallest kept probability.
        kept: number of tokens that can still be drawn; in basis-aware truncation's sample mode, that it draws from.
        kept_mass: their probability.
        kept_below: number of kept tokens below the threshold (rescued by basis-aware truncation), None without one.
        cut_above: number of cut tokens at or above the threshold, None without one.
        token, probability, rank: of the drawn token (rank 1 = the most probable), None while it is unknown.
        is_kept: whether that token could be drawn; a sampler may have cut it in a text that was only read.
        critical_threshold: the token's basis-aware probability, if the trace computes it.
        candidates: some tokens of the step, the most probable first, as a NumPy array of records with the fields
            `token`, `probability`, `kept` and `margin`; see `TruncationTrace(candidates=...)`.
    """

    run: int
    row: int
    position: int
    entropy: float
    threshold: float | None
    lowest_kept: float
    kept: int
    kept_mass: float
    kept_below: int | None = None
    cut_above: int | None = None
    token: int | None = None
    probability: float | None = None
    rank: int | None = None
    is_kept: bool | None = None
    critical_threshold: float | None = None
    candidates: Candidates | None = field(default=None, compare=False, repr=False)

    def eta_threshold(self, epsilon: float) -> float:
        """Return eta-sampling's threshold at this step: min(epsilon, sqrt(epsilon) exp(-entropy))."""
        return min(epsilon, math.sqrt(epsilon) * math.exp(-self.entropy))

    def is_refused_by_eta(self, epsilon: float) -> bool:
        """Return whether eta-sampling would have cut the drawn token; False while that is unknown."""
        if self.probability is None or self.rank == 1:
            return False
        return self.probability < self.eta_threshold(epsilon) * (1 - _ON_THRESHOLD)

    @property
    def is_rescued(self) -> bool:
        """Whether the drawn token lies below the threshold, kept by basis-aware truncation's proof."""
        if self.probability is None or self.threshold is None or self.rank == 1:
            return False
        return self.probability < self.threshold * (1 - _ON_THRESHOLD)


def step_columns(probs: Tensor, entropy: Tensor, kept: Tensor, threshold: Tensor | None) -> list[list[Any]]:
    """Return lists over rows: entropy, threshold, lowest kept, number and mass kept, kept below and cut above it."""
    lowest = probs.masked_fill(~kept, torch.inf).amin(-1)
    mass = probs.masked_fill(~kept, 0).sum(-1).clamp_max(1)
    columns = [entropy[:, 0].tolist(), lowest.tolist(), kept.sum(-1).tolist(), mass.tolist()]
    unknown = [None] * len(lowest)
    if threshold is None:
        return [columns[0], unknown, *columns[1:], unknown, unknown]
    below = (kept & (probs < threshold * (1 - _ON_THRESHOLD))).sum(-1).tolist()
    above = (~kept & (probs > threshold * (1 + _ON_THRESHOLD))).sum(-1).tolist()
    return [columns[0], threshold[:, 0].tolist(), *columns[1:], below, above]


def step_candidates(
    probs: Tensor, kept: Tensor, threshold: Tensor | None, count: int, prove: Prove | None
) -> list[Candidates | None]:
    """Return for each row [V] its most probable tokens and those on both sides of the cut: arrays of `_CANDIDATE`."""
    if not count:
        return [None] * len(probs)
    half = min((count + 1) // 2, probs.shape[-1])
    most = probs.topk(min(count, probs.shape[-1])).indices
    last_kept = probs.masked_fill(~kept, torch.inf).topk(half, largest=False).indices
    first_cut = probs.masked_fill(kept, -1).topk(half).indices
    # Where a side has fewer tokens, or no token was cut, the rest of the sort is left out.
    is_last_kept = kept.gather(-1, last_kept) & ~kept.all(-1, keepdim=True)
    is_meant = torch.cat([torch.ones_like(most) > 0, is_last_kept, ~kept.gather(-1, first_cut)], dim=-1).cpu().numpy()
    found = torch.cat([most, last_kept, first_cut], dim=-1)
    near = np.zeros(found.shape, _CANDIDATE)
    near["token"], near["probability"] = found.cpu().numpy(), probs.gather(-1, found).cpu().numpy()
    near["kept"], near["margin"] = kept.gather(-1, found).cpu().numpy(), np.nan
    candidates = [_in_order(row[meant]) for row, meant in zip(near, is_meant, strict=True)]
    if threshold is not None and prove is not None:
        for row, (each, limit) in enumerate(zip(candidates, threshold[:, 0].tolist(), strict=True)):
            rescued = each["kept"] & (each["probability"] < limit * (1 - _ON_THRESHOLD))
            if rescued.any():
                each["margin"][rescued] = prove(row, each["token"][rescued])
    return list(candidates)


def _in_order(candidates: Candidates) -> Candidates:
    """Return every token once, the most probable first."""
    once = candidates[np.unique(candidates["token"], return_index=True)[1]]
    return once[np.argsort(-once["probability"], kind="stable")]
