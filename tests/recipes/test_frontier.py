"""The divergence frontier against loops over its formula, and k-means against what it must find."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from instruments.frontier import clusters, frontier, frontier_area


def naive_area(p, q, points, scale):
    p, q = ([(count + 0.5) / (sum(counts) + 0.5 * len(counts)) for count in counts] for counts in (p, q))
    curve = [(1.0, 0.0)]
    for n in range(1, points + 1):
        w = n / (points + 1)
        r = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
        missed = [sum(a * math.log(a / c) for a, c in zip(one, r, strict=True)) for one in (q, p)]
        curve.append((math.exp(-scale * missed[0]), math.exp(-scale * missed[1])))
    curve.append((0.0, 1.0))
    return sum((x - x2) * (y + y2) / 2 for (x, y), (x2, y2) in pairwise(curve))


@pytest.mark.parametrize("seed", range(6))
def test_area_is_the_formulas(seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randint(0, 30, (2, 4, 7), generator=generator)
    areas = frontier_area(frontier(p.float(), q.float(), points=9, scale=3.0))
    assert areas.tolist() == pytest.approx(
        [naive_area(*pair, 9, 3.0) for pair in zip(p.tolist(), q.tolist(), strict=True)]
    )


def test_area_of_equal_and_of_disjoint_sets():
    p, q = torch.tensor([[300.0, 0, 200], [9e6, 0, 0]]), torch.tensor([[300.0, 0, 200], [0, 9e6, 0]])
    areas = frontier_area(frontier(p, q))
    assert float(areas[0]) == pytest.approx(1, abs=1e-12)
    assert 0 < float(areas[1]) < 0.02
    assert torch.allclose(areas, frontier_area(frontier(q, p)), atol=1e-12)  # it does not matter which is which


def test_clusters_are_those_of_separate_clouds():
    centres = torch.tensor([[0.0, 9], [9, 0], [-9, 0], [0, -9]])
    of = torch.arange(200) % 4
    vectors = centres[of] + torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        labels = clusters(vectors, 4, seed)
        assert {int(a) for a in labels} == {0, 1, 2, 3}
        assert all(len(labels[of == n].unique()) == 1 for n in range(4))
    assert torch.equal(clusters(vectors, 4, 1), clusters(vectors, 4, 1))


def test_no_vector_is_nearer_to_another_clusters_mean():
    vectors = torch.randn(300, 5, generator=torch.Generator().manual_seed(1))
    labels = clusters(vectors, 12)
    means = torch.stack([vectors[labels == n].mean(0) for n in range(12)])
    assert torch.equal(torch.cdist(vectors, means).argmin(1), labels)


def test_clusters_of_fewer_different_vectors_than_clusters():
    labels = clusters(torch.tensor([[1.0], [1.0], [2.0], [2.0]]), 3)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    with pytest.raises(ValueError, match="count must be at most the number of vectors, 4, got 5"):
        clusters(torch.zeros(4, 1), 5)
