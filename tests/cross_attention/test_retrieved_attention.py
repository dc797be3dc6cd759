"""Absorbed attention against keys and values that are really built, head by head and query by query."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_longtrunc.cross_attention.datastore import Datastore
from hf_longtrunc.cross_attention.retrieved_attention import Heads, retrieved_attention

HEADS, HEAD_DIM, WIDTH, NEW = 3, 4, 7, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def random_heads(**changes) -> Heads:
    def weight():
        return torch.randn(HEADS, HEAD_DIM, WIDTH, dtype=torch.float64)

    def bias():
        return torch.randn(HEADS, HEAD_DIM, dtype=torch.float64)

    return Heads(weight(), bias(), weight(), bias(), **{"scaling": 0.3, **changes})


def naive(query, states, k, heads):
    """Attend with keys and values for one row [heads, new, head_dim]; dropout draws in the order of scores."""
    output = torch.empty_like(query)
    values, weights = [], []
    for head in range(HEADS):
        keys = states @ heads.key_weight[head].T + heads.key_bias[head]
        values.append(states @ heads.value_weight[head].T + heads.value_bias[head])
        for new in range(NEW):
            scores = keys @ query[head, new] * heads.scaling
            if heads.softcap is not None:
                scores = heads.softcap * torch.tanh(scores / heads.softcap)
            best = scores.argsort(descending=True)[:k]
            weights.append((best, scores[best].softmax(-1)))
    dropped = F.dropout(torch.stack([w for _, w in weights]), heads.dropout)
    for place, ((best, _), left) in enumerate(zip(weights, dropped, strict=True)):
        head, new = divmod(place, NEW)
        output[head, new] = left @ values[head][best]
    return output


@pytest.mark.parametrize("changes", [{}, {"softcap": 0.5}, {"dropout": 0.5}, {"scaling": 1.0}], ids=str)
@pytest.mark.parametrize("k", [1, 4, 11, 20])
def test_it_is_attention_with_keys_and_values(changes, k):
    heads, states = random_heads(**changes), torch.randn(11, WIDTH, dtype=torch.float64)
    query = torch.randn(1, HEADS, NEW, HEAD_DIM, dtype=torch.float64)
    torch.manual_seed(1)
    found = retrieved_attention(query, [Datastore(states)], [k], heads)
    torch.manual_seed(1)
    torch.testing.assert_close(found[0], naive(query[0], states, k, heads), **CLOSE)


def test_rows_ask_the_store_of_their_text():
    heads, sizes = random_heads(), (11, 5)
    texts = [torch.randn(n, WIDTH, dtype=torch.float64) for n in sizes]
    query = torch.randn(6, HEADS, NEW, HEAD_DIM, dtype=torch.float64)  # three beams of each
    found = retrieved_attention(query, [Datastore(states) for states in texts], [3, 5], heads)
    for row in range(6):
        torch.testing.assert_close(found[row], naive(query[row], texts[row // 3], [3, 5][row // 3], heads), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    heads, states = random_heads(), torch.randn(50, WIDTH, dtype=torch.float64)
    query = torch.randn(1, HEADS, NEW, HEAD_DIM, dtype=torch.float64)
    halves = Heads(*(part.to(dtype) for part in heads[:4]), heads.scaling)
    found = retrieved_attention(query.to(dtype), [Datastore(states.to(dtype))], [50], halves)
    assert found.dtype == dtype
    torch.testing.assert_close(found[0].double(), naive(query[0], states, 50, heads), rtol=0.1, atol=0.1)
