r"""Truncation samplers on rows in order of probability, in pure torch: what each keeps, and from which parameter on.

With s = -log p in ascending order, everything that these samplers keep of a row is an interval of it, nearly always one
that begins at the first token. Sums over the first n tokens then tell the probability and the entropy of what is kept,
for any number of samplers and parameters, at one sort a row.

Transformers' own samplers are read as transformers 5.24 writes them: ties stay together, top-h looks at the 100 most
probable tokens only. All arithmetic is in float64, so a token on the bar may fall otherwise there, in float32.
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
    """A sampler with one parameter, or with none.

    Attributes:
        parameter: its name, None where there is nothing to set.
        keeps_more: whether a larger parameter keeps more.
        critical: (rows, rank) -> the parameter [rows] at which it begins to keep the token that `rank` tokens of its
            row are more probable than; inf where it never does. Without a parameter: 1 where it refuses the token.
        kept: (rows, parameter) -> the first kept token of each row, and the first behind it that is not.
    """

    parameter: str | None
    keeps_more: bool
    critical: Callable[[Ranked, Tensor], Tensor]
    kept: Callable[[Ranked, float], Interval]


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


def kept_mass_and_entropy(rows: Ranked, kept: Interval) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Return the probability of what is kept, and the entropy in nats of the kept tokens renormalised."""
    mass, entropy = ((_at(sums, kept[1]) - _at(sums, kept[0])) for sums in (rows.mass, rows.entropy))
    return mass, (entropy / mass + mass.log()).clamp_min(0)


def _sums(values: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows sums"]:
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))


def _at(values: Float[Tensor, "rows n"], places: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return values.gather(1, places[:, None])[:, 0]


def _total(rows: Ranked) -> Float[Tensor, " rows"]:
    return rows.entropy[:, -1]


def _up_to(rows: Ranked, bar: Tensor | float) -> Interval:
    """All tokens of at most so much surprisal, the first one always."""
    bars = torch.as_tensor(bar, dtype=torch.float64).expand(len(rows.surprisal))
    last = torch.searchsorted(rows.surprisal, bars[:, None].contiguous(), right=True)[:, 0].clamp_min(1)
    return torch.zeros_like(last), last


def _first_stays(rank: Tensor, critical: Tensor, value: float) -> Tensor:
    return torch.where(rank == 0, value, critical)


def _epsilon_critical(rows: Ranked, rank: Tensor) -> Tensor:
    return _first_stays(rank, (-_at(rows.surprisal, rank)).exp(), 1.0)


def _eta_critical(rows: Ranked, rank: Tensor) -> Tensor:
    # The largest epsilon with p >= min(epsilon, sqrt(epsilon) exp(-H)).
    log_p = -_at(rows.surprisal, rank)
    return _first_stays(rank, torch.maximum(log_p, 2 * (log_p + _total(rows))).exp().clamp_max(1), 1.0)


def _eta_kept(rows: Ranked, epsilon: float) -> Interval:
    return _up_to(rows, (_total(rows) - math.log(epsilon) / 2).clamp_min(-math.log(epsilon)))


def _deviation(rows: Ranked) -> Tensor:
    """Return the standard deviation of the scores that are not -inf."""
    alive = rows.surprisal.isfinite()
    values = torch.where(alive, rows.surprisal, 0)
    count = alive.sum(-1, keepdim=True)
    centred = torch.where(alive, values - values.sum(-1, keepdim=True) / count, 0)
    return (centred.square().sum(-1) / count[:, 0]).sqrt()


def _top_n_sigma_critical(rows: Ranked, rank: Tensor) -> Tensor:
    return _first_stays(rank, (_at(rows.surprisal, rank) - rows.surprisal[:, 0]) / _deviation(rows), 0.0)


def _collision(rows: Ranked, normalized: bool) -> Tensor:
    """P-less' bar, as a surprisal."""
    probs, size = (-rows.surprisal).exp(), rows.surprisal.shape[1]
    if normalized:
        probs = (probs - 1 / size) * math.sqrt(size / max(size - 1, 1))
    return -probs.square().sum(-1).log()


def _p_less(normalized: bool) -> Method:
    def refused(rows: Ranked, rank: Tensor) -> Tensor:
        return ((rank > 0) & (_at(rows.surprisal, rank) > _collision(rows, normalized))).double()

    return Method(None, False, refused, lambda rows, _: _up_to(rows, _collision(rows, normalized)))


def _top_p_kept(rows: Ranked, top_p: float) -> Interval:
    last = (rows.mass[:, :-1] < top_p).sum(-1).clamp_min(1)
    return torch.zeros_like(last), last


def _top_k_kept(rows: Ranked, k: float) -> Interval:
    last = torch.full((len(rows.surprisal),), min(int(k), rows.surprisal.shape[1]))
    return torch.zeros_like(last), last


def _typical_critical(rows: Ranked, rank: Tensor) -> Tensor:
    """Probability of the tokens whose surprisal is nearer to the entropy."""
    own, entropy = _at(rows.surprisal, rank), _total(rows)
    first, last = _nearer(rows, (own - entropy).abs(), is_strict=True)
    # The token's own end is known without rounding.
    last = torch.where(own >= entropy, rank, last)
    first = torch.where(own < entropy, torch.searchsorted(rows.surprisal, own[:, None], right=True)[:, 0], first)
    return _above((_at(rows.mass, last) - _at(rows.mass, first)).clamp_min(0))


def _typical_kept(rows: Ranked, mass: float) -> Interval:
    """Find the smallest interval about the entropy that holds so much, by bisecting its half-width."""
    low, high = torch.zeros(len(rows.surprisal), dtype=torch.float64), _furthest(rows)
    for _ in range(60):
        middle = (low + high) / 2
        first, last = _nearer(rows, middle, is_strict=False)
        enough = _at(rows.mass, last) - _at(rows.mass, first) >= mass
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return _nearer(rows, high, is_strict=False)


def _furthest(rows: Ranked) -> Tensor:
    finite = torch.where(rows.surprisal.isfinite(), rows.surprisal, 0)
    return (finite - _total(rows)[:, None]).abs().amax(-1) * (1 + 1e-12)


def _nearer(rows: Ranked, distance: Tensor, is_strict: bool) -> Interval:
    ends = [(_total(rows) + sign * distance)[:, None].contiguous() for sign in (-1, 1)]
    first = torch.searchsorted(rows.surprisal, ends[0], right=is_strict)[:, 0]
    last = torch.searchsorted(rows.surprisal, ends[1], right=not is_strict)[:, 0]
    return first, last


def _top_h_shares(rows: Ranked) -> Tensor:
    """Entropy of the first 1, 2, .. tokens among the 100 most probable, renormalised, over that of all of them."""
    surprisal = rows.surprisal[:, :TOP_H_TOKENS]
    log_probs = (-surprisal).log_softmax(-1)
    entropy = (log_probs.exp() * -log_probs.clamp_min(-1e3)).cumsum(-1)
    return entropy / entropy[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)


def _top_h_critical(rows: Ranked, rank: Tensor) -> Tensor:
    shares = _top_h_shares(rows)
    reached = _at(shares, rank.clamp_max(shares.shape[1] - 1))
    return _first_stays(rank, torch.where(rank < shares.shape[1], reached, torch.inf), 0.0)


def _top_h_kept(rows: Ranked, top_h: float) -> Interval:
    last = (_top_h_shares(rows) <= top_h).sum(-1).clamp_min(1)
    return torch.zeros_like(last), last


def _min_k_count(rows: Ranked) -> Tensor:
    """Return how many tokens min-k keeps at its paper's tau, 3, which matters in nearly flat rows only."""
    following = torch.nn.functional.pad(rows.surprisal[:, 1:], (0, 1), value=torch.inf)
    places = torch.arange(1, following.shape[1] + 1)
    steepest = torch.where(following.isfinite(), (following - rows.surprisal) / places, 0).argmax(-1) + 1
    alive = rows.surprisal.isfinite()
    extent = torch.where(alive, rows.surprisal, -torch.inf).amax(-1) - rows.surprisal[:, 0]
    return torch.maximum(steepest, (3 / extent).floor().clamp_max(following.shape[1]).long()).minimum(alive.sum(-1))


def _min_k_kept(rows: Ranked, _: float) -> Interval:
    last = _min_k_count(rows)
    return torch.zeros_like(last), last


def _above(values: Tensor) -> Tensor:
    """Return the next number: these samplers keep what stands strictly below their parameter."""
    return values.nextafter(torch.tensor(torch.inf, dtype=values.dtype))


METHODS = {
    "eta": Method("epsilon", False, _eta_critical, _eta_kept),
    "epsilon": Method("epsilon", False, _epsilon_critical, lambda rows, epsilon: _up_to(rows, -math.log(epsilon))),
    "top-n-sigma": Method(
        "n",
        True,
        _top_n_sigma_critical,
        lambda rows, n: _up_to(rows, rows.surprisal[:, 0] + n * _deviation(rows)),
    ),
    "p-less": _p_less(normalized=False),
    "p-less normalized": _p_less(normalized=True),
    "top-p": Method("top_p", True, lambda rows, rank: _above(_at(rows.mass, rank)), _top_p_kept),
    "top-k": Method("top_k", True, lambda _, rank: (rank + 1).double(), _top_k_kept),
    "min-p": Method(
        "min_p",
        False,
        lambda rows, rank: (rows.surprisal[:, 0] - _at(rows.surprisal, rank)).exp(),
        lambda rows, share: _up_to(rows, rows.surprisal[:, 0] - math.log(share)),
    ),
    "typical": Method("typical_p", True, _typical_critical, _typical_kept),
    "top-h": Method("top_h", True, _top_h_critical, _top_h_kept),
    "min-k": Method(None, False, lambda rows, rank: (rank >= _min_k_count(rows)).double(), _min_k_kept),
}
