"""The tokens kept of sorted rows, against the samplers themselves."""

from __future__ import annotations

import math

import pytest

from hf_longtrunc.evaluation.ranked import METHODS, ranked
from instruments.kept import KEPT, kept_mass_and_entropy
from tests.evaluation.test_ranked import SAMPLERS


def test_every_sampler_is_there():
    assert list(KEPT) == list(METHODS)


@pytest.mark.parametrize("name", KEPT)
def test_kept_is_what_the_sampler_keeps(name, scores):
    """As many tokens, as probable, as uncertain, row by row."""
    make, parameters = SAMPLERS[name]
    probs = scores.double().softmax(-1)
    for parameter in parameters:
        alive = ~make(parameter)(None, scores.clone()).isneginf()
        alive &= ~scores.isneginf()
        first, last = KEPT[name](ranked(scores), parameter)
        mass, entropy = kept_mass_and_entropy(ranked(scores), (first, last))
        for row in range(len(scores)):
            inside = probs[row][alive[row]]
            if name != "top-p" or 1 - float(inside.sum()) > 1e-6:
                assert math.isclose(mass[row], inside.sum(), rel_tol=1e-6), (parameter, row)
            share = inside / inside.sum()
            assert math.isclose(entropy[row], -(share * share.log()).sum(), abs_tol=2e-5), (parameter, row)
