"""The parameter from which each truncation sampler keeps a token, for rows sorted by probability.

Each row of scores is sorted once, into surprisals s = -log p in ascending order. Cumulative sums of p and of -p log p
then answer for all samplers.

Transformers' own samplers follow transformers 5.24: ties stay together, top-h reads the 100 most probable tokens only.
The arithmetic is in float64; a sampler in float32 may decide otherwise on a token at its threshold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int

    Interval = tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]

TOP_H_TOKENS = 100


class Ranked(NamedTuple):
    """Rows of surprisals -log p in nats, smallest first; `mass` and `entropy` are those of the first 0, 1, .. V tokens.

    The last column of `entropy` is the row's entropy in nats; the others are the sums of -p log p up to there.
    """

    surprisal: Float[Tensor, "rows vocab"]
    mass: Float[Tensor, "rows sums"]
    entropy: Float[Tensor, "rows sums"]


class Method(NamedTuple):
    """A sampler; `critical(rows, rank)` is the parameter [rows] from which it keeps the token of that rank, or inf."""

    parameter: str | None  # its name; a sampler without one has critical value 1 where it refuses the token
    keeps_more: bool  # whether a larger parameter keeps more tokens
    critical: Callable[[Ranked, Tensor], Tensor]


def ranked(scores: Float[Tensor, "rows vocab"]) -> Ranked:
    """Put each row of scores in order; tokens at -inf have probability 0 and come last."""
    # On values alone NumPy's sort takes a tenth of the time of torch's on a CPU.
    ordered = torch.from_numpy(np.sort(scores.detach().float().cpu().numpy())).flip(-1)
    surprisal = -ordered.double().log_softmax(-1)
    probs = (-surprisal).exp()
    return Ranked(surprisal, _sums(probs), _sums(probs * surprisal.clamp_max(1e3)))


def rank_of(scores: Float[Tensor, "rows vocab"], tokens: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Count the tokens of each row that are more probable than its own of `tokens`."""
    return (scores.float() > scores.float().gather(1, tokens[:, None])).sum(-1).cpu()


def _sums(values: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows sums"]:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def at(values: Float[Tensor, "rows n"], places: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return one value of each row."""
    return values.gather(1, places[:, None])[:, 0]


def entropy_of(rows: Ranked) -> Float[Tensor, " rows"]:
    """Return the entropy of each row, in nats."""
    return rows.entropy[:, -1]


def _first_stays(rank: Tensor, critical: Tensor, value: float) -> Tensor:
    return torch.where(rank == 0, value, critical)


def _epsilon_critical(rows: Ranked, rank: Tensor) -> Tensor:
    return _first_stays(rank, (-at(rows.surprisal, rank)).exp(), 1.0)


def _eta_critical(rows: Ranked, rank: Tensor) -> Tensor:
    # The largest epsilon with p >= min(epsilon, sqrt(epsilon) exp(-H)).
    log_p = -at(rows.surprisal, rank)
    return _first_stays(rank, torch.maximum(log_p, 2 * (log_p + entropy_of(rows))).exp().clamp_max(1), 1.0)


def deviation(rows: Ranked) -> Tensor:
    """Return the standard deviation of the scores that are not -inf."""
    alive = rows.surprisal.isfinite()
    values = torch.where(alive, rows.surprisal, 0)
    count = alive.sum(-1, keepdim=True)
    centred = torch.where(alive, values - values.sum(-1, keepdim=True) / count, 0)
    return (centred.square().sum(-1) / count[:, 0]).sqrt()


def _top_n_sigma_critical(rows: Ranked, rank: Tensor) -> Tensor:
    return _first_stays(rank, (at(rows.surprisal, rank) - rows.surprisal[:, 0]) / deviation(rows), 0.0)


def collision(rows: Ranked, normalized: bool) -> Tensor:
    """Return p-less' threshold as a surprisal [rows]."""
    probs, size = (-rows.surprisal).exp(), rows.surprisal.shape[1]
    if normalized:
        probs = (probs - 1 / size) * math.sqrt(size / max(size - 1, 1))
    return -probs.square().sum(-1).log()


def _p_less(normalized: bool) -> Method:
    def refused(rows: Ranked, rank: Tensor) -> Tensor:
        return ((rank > 0) & (at(rows.surprisal, rank) > collision(rows, normalized))).double()

    return Method(None, False, refused)


def _typical_critical(rows: Ranked, rank: Tensor) -> Tensor:
    """Return the total probability of the tokens nearer to the entropy than the token itself."""
    own, entropy = at(rows.surprisal, rank), entropy_of(rows)
    first, last = nearer(rows, (own - entropy).abs(), is_strict=True)
    # The token's own end is known without rounding.
    last = torch.where(own >= entropy, rank, last)
    first = torch.where(own < entropy, torch.searchsorted(rows.surprisal, own[:, None], right=True)[:, 0], first)
    return _above((at(rows.mass, last) - at(rows.mass, first)).clamp_min(0))


def nearer(rows: Ranked, distance: Tensor, is_strict: bool) -> Interval:
    """Return the interval of tokens with a surprisal within `distance` [rows] of the entropy."""
    ends = [(entropy_of(rows) + sign * distance)[:, None].contiguous() for sign in (-1, 1)]
    first = torch.searchsorted(rows.surprisal, ends[0], right=is_strict)[:, 0]
    last = torch.searchsorted(rows.surprisal, ends[1], right=not is_strict)[:, 0]
    return first, last


def top_h_shares(rows: Ranked) -> Tensor:
    """Return the share of the entropy that the first 1, 2, .. of the 100 most probable tokens, renormalised, have."""
    surprisal = rows.surprisal[:, :TOP_H_TOKENS]
    log_probs = (-surprisal).log_softmax(-1)
    entropy = (log_probs.exp() * -log_probs.clamp_min(-1e3)).cumsum(-1)
    return entropy / entropy[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)


def _top_h_critical(rows: Ranked, rank: Tensor) -> Tensor:
    shares = top_h_shares(rows)
    reached = at(shares, rank.clamp_max(shares.shape[1] - 1))
    return _first_stays(rank, torch.where(rank < shares.shape[1], reached, torch.inf), 0.0)


def min_k_count(rows: Ranked) -> Tensor:
    """Return how many tokens min-k keeps at its paper's tau, 3, which matters in nearly flat rows only."""
    following = torch.nn.functional.pad(rows.surprisal[:, 1:], (0, 1), value=torch.inf)
    places = torch.arange(1, following.shape[1] + 1)
    steepest = torch.where(following.isfinite(), (following - rows.surprisal) / places, 0).argmax(-1) + 1
    alive = rows.surprisal.isfinite()
    extent = torch.where(alive, rows.surprisal, -torch.inf).amax(-1) - rows.surprisal[:, 0]
    return torch.maximum(steepest, (3 / extent).floor().clamp_max(following.shape[1]).long()).minimum(alive.sum(-1))


def _above(values: Tensor) -> Tensor:
    """Return the next larger number: these samplers keep tokens strictly below their parameter."""
    return values.nextafter(torch.tensor(torch.inf, dtype=values.dtype))


METHODS = {
    "eta": Method("epsilon", False, _eta_critical),
    "epsilon": Method("epsilon", False, _epsilon_critical),
    "top-n-sigma": Method("n", True, _top_n_sigma_critical),
    "p-less": _p_less(normalized=False),
    "p-less normalized": _p_less(normalized=True),
    "top-p": Method("top_p", True, lambda rows, rank: _above(at(rows.mass, rank))),
    "top-k": Method("top_k", True, lambda _, rank: (rank + 1).double()),
    "min-p": Method("min_p", False, lambda rows, rank: (rows.surprisal[:, 0] - at(rows.surprisal, rank)).exp()),
    "typical": Method("typical_p", True, _typical_critical),
    "top-h": Method("top_h", True, _top_h_critical),
    "min-k": Method(None, False, lambda rows, rank: (rank >= min_k_count(rows)).double()),
}
