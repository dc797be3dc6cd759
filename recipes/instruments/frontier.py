"""How far apart two sets of texts lie: the frontier of Kullback-Leibler divergences between their clusters.

Each text is a vector. The vectors of all sets are put into clusters together, and a set is then what shares of it lie
in which cluster. Of two sets p and q, every mixture r = w p + (1 - w) q misses both a little: KL(q || r) grows with
what p writes and q does not, KL(p || r) with the reverse. The frontier of the two over all w lies between sets that
are equal (area 1) and sets without a common cluster (area 0).

Source: Pillutla et al. 2021, "MAUVE", arXiv 2102.01454, sections 2 and 3; the half that is added to every count is that
of Pillutla et al. 2023, arXiv 2212.14578 (Krichevsky-Trofimov). Deviations: the vectors are clustered as they are, with
no principal components, and those of all sets together, so that all are held against each other in the same clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from instruments.bootstrap import BOOTSTRAPS, resampled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int

    from instruments.bootstrap import Array

_ROUNDS = 100
_CLUSTERINGS = 5


def clusters(vectors: Float[Tensor, "texts width"], count: int, seed: int = 0) -> Int[Tensor, " texts"]:
    """Put vectors into `count` clusters by k-means, and return the number of each one's cluster.

    The centres start at vectors drawn in proportion to their squared distance from those drawn before (k-means++,
    Arthur and Vassilvitskii 2007). A centre that loses all of its vectors stays where it was.

    Raises:
        ValueError: there are fewer vectors than clusters.

    Cost: up to 100 products of all vectors with all centres.
    """
    if len(vectors) < count:
        raise ValueError(f"count must be at most the number of vectors, {len(vectors)}, got {count}")
    generator = torch.Generator().manual_seed(seed)
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    while len(centres) < count:
        squares = torch.cdist(vectors, centres).amin(1).square().double()
        weights = squares if squares.any() else torch.ones_like(squares)  # fewer different vectors than clusters
        centres = torch.cat([centres, vectors[torch.multinomial(weights, 1, generator=generator)]])
    labels = torch.cdist(vectors, centres).argmin(1)
    for _ in range(_ROUNDS):
        members = torch.nn.functional.one_hot(labels, count).to(vectors.dtype)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ vectors / sizes.clamp_min(1), centres)
        before, labels = labels, torch.cdist(vectors, centres).argmin(1)
        if torch.equal(before, labels):
            break
    return labels


def frontier(
    p: Float[Tensor, "*sets clusters"], q: Float[Tensor, "*sets clusters"], points: int = 25, scale: float = 5.0
) -> Float[Tensor, "*sets points 2"]:
    """Return the frontier of two sets of texts, from (0, 1) to (1, 0): points (exp(-c KL(q || r)), exp(-c KL(p || r))).

    Args:
        p: how many texts of a set lie in each cluster; half a text is added everywhere.
        q: the same of the other.
        points: mixtures r between the two; the two ends come in addition.
        scale: c above; the paper takes 5.
    """
    p, q = ((counts.double() + 0.5) / (counts.double() + 0.5).sum(-1, keepdim=True) for counts in (p, q))
    share = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1, None]
    mixture = share * p[..., None, :] + (1 - share) * q[..., None, :]  # [*sets, points, clusters]
    missed = [(one[..., None, :] * (one[..., None, :] / mixture).log()).sum(-1) for one in (q, p)]
    curve = torch.stack(missed, -1).mul(-scale).exp()
    ends = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).expand(*curve.shape[:-2], 2, 2)
    # The larger the share of p, the more of q is missed: with it the first coordinate falls.
    return torch.cat([ends[..., :1, :], curve.flip(-2), ends[..., 1:, :]], -2)


def frontier_area(curve: Float[Tensor, "*sets points 2"]) -> Float[Tensor, "*sets"]:
    """Return the area under a frontier, between 0 and 1: MAUVE, where texts of one set are held against human ones."""
    return torch.trapezoid(curve[..., 1], curve[..., 0], dim=-1)


def frontier_areas(arms: Mapping[str, Tensor], elsewhere: Tensor) -> dict[str, Array]:
    """Return the area under each arm's frontier to `elsewhere`, [1 + BOOTSTRAPS]: of the texts, and of resampled texts.

    It is the mean of several clusterings of all texts together, with one cluster for ten texts of an arm.
    """
    count = max(2, len(elsewhere) // 10)
    everything, sizes = torch.cat([*arms.values(), elsewhere]), [*map(len, arms.values()), len(elsewhere)]
    ours, theirs = (torch.from_numpy(resampled(len(elsewhere), seed)).double() for seed in (0, 1))
    areas = dict.fromkeys(arms, torch.zeros(1 + BOOTSTRAPS, dtype=torch.float64))
    for seed in range(_CLUSTERINGS):
        one_hot = torch.nn.functional.one_hot(clusters(everything, count, seed), count).double()
        members = torch.split(one_hot, sizes)
        reference = theirs @ members[-1]
        for name, inside in zip(arms, members, strict=False):
            areas[name] = areas[name] + frontier_area(frontier(ours @ inside, reference)) / _CLUSTERINGS
    return {name: values.numpy() for name, values in areas.items()}
