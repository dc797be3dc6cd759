"""Matching against the samplers themselves: at the matched parameter each refuses the share that was asked for."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    SoftmaxBasis,
    TopNSigmaLogitsProcessor,
)
from hf_longtrunc.evaluation.matching import (
    PARAMETERS,
    critical_parameters,
    keeps_more,
    match_table,
    matched_parameter,
    matched_parameters,
    refused_shares,
)

IDS = torch.randint(0, 97, (41,), generator=torch.Generator().manual_seed(3))


def refused(model, processor):
    """How many tokens of the text the sampler refuses."""
    with torch.no_grad():
        logits = model(IDS[None]).logits[0, :-1]
    return int((processor(None, logits).gather(1, IDS[1:, None]) == -torch.inf).sum())


def test_every_method_refuses_what_was_asked(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 4)
    columns = critical_parameters(tiny_model, IDS, basis, chunk=7)
    processors = {
        "eta": EtaLogitsProcessor,
        "epsilon": EpsilonLogitsProcessor,
        "top-n-sigma": TopNSigmaLogitsProcessor,
        "top-p": TopPLogitsWarper,
        "top-k": lambda k: TopKLogitsWarper(int(k)),
        "min-p": MinPLogitsWarper,
        "typical": TypicalLogitsWarper,
        "top-h": TopHLogitsWarper,
        "BAT on epsilon": lambda e: BasisAwareLogitsProcessor(basis, e, cutoff="epsilon", mode="mask", floor=0),
        "BAT on eta": lambda e: BasisAwareLogitsProcessor(basis, e, mode="mask", floor=0),
    }
    assert set(processors) == {name for name, parameter in PARAMETERS.items() if parameter}
    for method, make in processors.items():
        for share in (0.1, 0.5):
            parameter = matched_parameter(method, columns[method], share)
            # A hair to the laxer side: the critical token itself, and tau*'s tolerance.
            parameter *= 1 if method == "top-k" else 1 + 1e-5 * (1 if keeps_more(method) else -1)
            assert refused(tiny_model, make(parameter)) == int(share * 40), method
    assert columns["BAT on epsilon"] >= columns["epsilon"]


def test_p_less_refuses_what_it_refuses(tiny_model):
    columns = critical_parameters(tiny_model, IDS)
    assert not any(name.startswith("BAT") for name in columns)
    for name, normalized in (("p-less", False), ("p-less normalized", True)):
        share = refused(tiny_model, PLessLogitsProcessor(normalized=normalized)) / 40
        assert refused_shares(columns)[name] == share
        assert name not in matched_parameters(columns)[0]
        assert f"{name} refuses {share:.1%}" in match_table(columns).caption
    with pytest.raises(ValueError, match="method must be one of 'eta'"):
        matched_parameter("p-less", columns["p-less"], 0.1)


def test_bat_takes_a_subset_of_the_tokens_evenly_spread(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 4)
    whole, part = (critical_parameters(tiny_model, IDS, basis, bat_tokens=n, chunk=9) for n in (99, 10))
    assert [len(whole["BAT on eta"]), len(part["BAT on eta"]), len(part["eta"])] == [40, 10, 40]
    assert part["BAT on eta"] == pytest.approx(whole["BAT on eta"][::4])
    rows = matched_parameters(part)
    assert "BAT on eta" in rows[-1]  # 10 %
    assert "BAT on eta" not in rows[0]  # 5 %


def test_a_sampler_that_never_keeps_a_token_has_no_parameter():
    """Top-h reads the 100 most probable tokens."""
    columns = {"top-h": [math.inf] * 20 + [0.5] * 80}
    assert matched_parameters(columns)[-1]["top-h"] == math.inf
    assert list(match_table(columns).columns[-1].cells) == ["none"]
    assert matched_parameter("top-h", columns["top-h"], 0.2) == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match=r"share must be a number of at least 0\.5 and below 1, got 1\.0"):
        matched_parameter("eta", [0.1, 0.2], 1.0)
    with pytest.raises(ValueError, match=r"share must be a number of at least 0\.5"):
        matched_parameter("eta", [0.1, 0.2], 0.4)
    with pytest.raises(ValueError, match="a share of 10% needs a text of at least 11 tokens, got 10"):
        matched_parameters({"eta": [0.1] * 9})


def test_shares_that_the_tokens_cannot_tell_apart_are_left_out():
    ordered = {"eta": [n / 100 for n in range(100)]}
    assert [row["refused"] for row in matched_parameters(ordered)] == [0.01, 0.02, 0.05, 0.1]
    assert [row["eta"] for row in matched_parameters(ordered)] == [0.01, 0.02, 0.05, 0.1]
    assert len(match_table(ordered).columns) == 7
