"""Critical parameters of sorted rows, against the samplers themselves."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from hf_longtrunc import (
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    PLessLogitsProcessor,
    TopNSigmaLogitsProcessor,
)
from hf_longtrunc.evaluation.ranked import METHODS, rank_of, ranked

SAMPLERS = {
    "eta": (EtaLogitsProcessor, [1e-4, 2e-3, 0.1]),
    "epsilon": (EpsilonLogitsProcessor, [1e-4, 2e-3, 0.1]),
    "top-n-sigma": (TopNSigmaLogitsProcessor, [0.5, 1.5, 3.0]),
    "p-less": (lambda _: PLessLogitsProcessor(), [0.0]),
    "p-less normalized": (lambda _: PLessLogitsProcessor(normalized=True), [0.0]),
    "top-p": (TopPLogitsWarper, [0.1, 0.6, 0.97]),
    "top-k": (TopKLogitsWarper, [1, 7, 300]),
    "min-p": (MinPLogitsWarper, [1e-3, 0.05, 0.5]),
    "typical": (TypicalLogitsWarper, [0.1, 0.6, 0.97]),
    "top-h": (TopHLogitsWarper, [0.1, 0.6, 0.97]),
    "min-k": (lambda _: MinKLogitsProcessor(), [0.0]),
}


@pytest.fixture(scope="module")
def scores():
    """Flat rows, peaked rows, rows with tokens at -inf."""
    rows = torch.randn(60, 401, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 6, 60)[:, None]
    rows[::7, 50:300] = -torch.inf
    return rows


def test_every_method_has_a_sampler():
    assert list(SAMPLERS) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_critical_is_where_the_sampler_begins_to_keep_a_token(name, scores):
    make, _ = SAMPLERS[name]
    method = METHODS[name]
    tokens = torch.multinomial(scores.softmax(-1).sqrt(), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    rank = rank_of(scores, tokens)
    assert (rank >= 100).sum() >= 5
    critical = method.critical(ranked(scores), rank).tolist()
    for row, token in enumerate(tokens.tolist()):

        def keeps(parameter, row=row, token=token):
            return bool(make(parameter)(None, scores[row : row + 1].clone())[0, token] > -torch.inf)

        value = critical[row]
        if method.parameter is None:
            assert keeps(None) == (value == 0)
            continue
        if name == "top-h" and rank[row] >= 100:
            assert math.isinf(value)
            assert not keeps(1.0)
            continue
        step = 1e-4 if method.keeps_more else -1e-4
        keeping, refusing = value * (1 + step) + step * 1e-3, value * (1 - step)
        if name == "top-k":
            keeping, refusing = int(value), int(value) - 1
        top = {"top-n-sigma": math.inf, "top-k": 401}.get(name, 1 - 1e-6)
        if 0 < keeping < top:
            assert keeps(keeping), (row, value)
        if 0 < refusing < top and value not in (0.0, 1.0) and refusing > 1e-6:
            assert not keeps(refusing), (row, value)
