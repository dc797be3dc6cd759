"""Matching against the samplers themselves: at the matched epsilon each refuses the share that was asked for."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import BasisAwareLogitsProcessor, EpsilonLogitsProcessor, EtaLogitsProcessor, SoftmaxBasis
from hf_longtrunc.evaluation.matching import critical_epsilons, matched_epsilon


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
    }
    for method, make in processors.items():
        for share in (0.1, 0.5):
            epsilon = matched_epsilon(columns[method], share)
            # A hair below: the critical token itself, and tau*'s tolerance.
            refused = [(make(epsilon * f)(None, logits).gather(1, ids[1:, None]) == -torch.inf).sum() for f in (0.999,)]
            assert refused[0] == int(share * 40), method
        assert columns["BAT on epsilon"] >= columns["epsilon"]


def test_bad_input():
    with pytest.raises(ValueError, match="share must lie"):
        matched_epsilon([0.1], 1.0)
