"""Matching against the samplers themselves: at the matched epsilon each refuses the share that was asked for."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    SoftmaxBasis,
    TopNSigmaLogitsProcessor,
)
from hf_longtrunc.evaluation.matching import critical_epsilons, match_table, matched_epsilon, matched_epsilons


def test_every_method_refuses_what_was_asked(tiny_model):
    ids = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(3))
    basis = SoftmaxBasis.from_model(tiny_model, 4)
    columns = critical_epsilons(tiny_model, ids, basis)
    with torch.no_grad():
        logits = tiny_model(ids[None]).logits[0, :-1]
    processors = {
        "epsilon": EpsilonLogitsProcessor,
        "eta": EtaLogitsProcessor,
        "BAT on epsilon": lambda e: BasisAwareLogitsProcessor(basis, e, cutoff="epsilon", mode="mask", floor=0),
        "BAT on eta": lambda e: BasisAwareLogitsProcessor(basis, e, mode="mask", floor=0),
        "top-n-sigma (1/n)": lambda inverse: TopNSigmaLogitsProcessor(1 / inverse),
    }
    for method, make in processors.items():
        for share in (0.1, 0.5):
            epsilon = matched_epsilon(columns[method], share)
            # A hair below: the critical token itself, and tau*'s tolerance.
            refused = [(make(epsilon * f)(None, logits).gather(1, ids[1:, None]) == -torch.inf).sum() for f in (0.999,)]
            assert refused[0] == int(share * 40), method
        assert columns["BAT on epsilon"] >= columns["epsilon"]


def test_bad_input():
    with pytest.raises(ValueError, match=r"share must be a number of at least 0\.5 and below 1, got 1\.0"):
        matched_epsilon([0.1, 0.2], 1.0)
    with pytest.raises(ValueError, match=r"share must be a number of at least 0\.5"):
        matched_epsilon([0.1, 0.2], 0.4)
    with pytest.raises(ValueError, match="a share of 10% needs a text of at least 11 tokens, got 10"):
        matched_epsilons({"eta": [0.1] * 9})


def test_shares_that_the_tokens_cannot_tell_apart_are_left_out():
    ordered = {"eta": [n / 100 for n in range(100)]}
    assert [row["refused"] for row in matched_epsilons(ordered)] == [0.01, 0.02, 0.05, 0.1]
    assert [row["eta"] for row in matched_epsilons(ordered)] == [0.01, 0.02, 0.05, 0.1]
    assert match_table(ordered).row_count == 4
