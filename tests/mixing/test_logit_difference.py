"""The mathematics of processors that read a second model, each against loops in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, strategies as st

from hf_longtrunc.mixing.logit_difference import (
    contrast,
    exclude_tail,
    forget_retain_loss,
    guidance,
    keep_tail,
    likely_tokens,
    logit_difference,
    proxy,
)

INF = math.inf
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(1, 2), (3, 5), (2, 97), (2, 3, 31)])


def rows(seed, shape, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).log_softmax(-1)


def three(seed, shape):
    return [rows(3 * seed + index, shape) for index in range(3)]


def distribution(weights):
    """[V] numbers, -inf for none -> log of their normalised exponentials, in Python floats."""
    total = sum(math.exp(weight) for weight in weights if weight > -INF)
    return [weight - math.log(total) if weight > -INF else -INF for weight in weights]


def by_rows(function, *tensors):
    """A function of lists of floats, row by row."""
    flat = [tensor.double().reshape(-1, tensor.shape[-1]).tolist() for tensor in tensors]
    return torch.tensor([function(*row) for row in zip(*flat, strict=True)]).reshape(tensors[0].shape)


def naive_likely(p, rate):
    largest = sorted(p, reverse=True)
    bar = min(largest[max(1, int(rate * len(p))) - 1], largest[0] + math.log(rate))
    return [value >= bar for value in p]


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-5, rtol=1e-5)


@given(seeds, shapes, st.floats(0, 2), st.floats(0.01, 1))
def test_each_formula_against_loops(seed, shape, strength, share):
    p, q, r = three(seed, shape)
    close(
        logit_difference(p, q, strength),
        by_rows(lambda p, q: distribution([a - strength * b for a, b in zip(p, q, strict=True)]), p, q),
    )
    close(
        proxy(p, q, r, strength),
        by_rows(
            lambda p, q, r: distribution([a + strength * (b - c) for a, b, c in zip(p, q, r, strict=True)]), p, q, r
        ),
    )
    close(
        guidance(p, q, strength),
        by_rows(lambda p, q: distribution([b + strength * (a - b) for a, b in zip(p, q, strict=True)]), p, q),
    )
    close(
        contrast(p, q, share),
        by_rows(
            lambda p, q: distribution(
                [a - b if a >= max(p) + math.log(share) - 1e-9 else -INF for a, b in zip(p, q, strict=True)]
            ),
            p,
            q,
        ),
    )


@given(seeds, shapes, st.floats(0.005, 1))
def test_filters_against_loops(seed, shape, rate):
    p, q, _ = three(seed, shape)
    likely = likely_tokens(p, rate)
    assert torch.equal(likely.double(), by_rows(lambda p: [float(keep) for keep in naive_likely(p, rate)], p))
    difference = logit_difference(p, q, 0.75)

    def excluded(difference, likely):
        return distribution([d if keep else -INF for d, keep in zip(difference, likely, strict=True)])

    def kept(difference, likely, p):
        mass = sum(math.exp(a) for a, keep in zip(p, likely, strict=True) if keep)
        head = excluded(difference, likely)
        return [d + math.log(mass) if keep else a for d, a, keep in zip(head, p, likely, strict=True)]

    close(exclude_tail(difference, likely), by_rows(excluded, difference, likely))
    close(keep_tail(difference, likely, p), by_rows(kept, difference, likely, p))


@given(seeds, shapes, st.floats(0, 2), st.floats(0.005, 1))
def test_every_result_is_normalised_and_scoring_is_finite(seed, shape, strength, rate):
    p, q, r = three(seed, shape)
    difference = logit_difference(p, q, strength)
    likely = likely_tokens(p, rate)
    scoring = keep_tail(difference, likely, p)
    assert scoring.isfinite().all()
    results = [difference, contrast(p, q, rate), proxy(p, q, r, strength), guidance(p, q, strength), scoring]
    for result in [*results, exclude_tail(difference, likely)]:
        close(result.exp().sum(-1), torch.ones(shape[:-1]))


def test_closed_forms_of_the_logit_difference():
    p, q, _ = three(1, (4, 97))
    uniform = torch.zeros_like(p).log_softmax(-1)
    close(logit_difference(p, q, 0.0), p)
    close(logit_difference(p, uniform, 0.75), p)
    close(logit_difference(p, p, 1.0), uniform)
    close(logit_difference(p, p, 0.75), (0.25 * p).log_softmax(-1))


def test_a_constant_on_the_scores_changes_nothing():
    p, q, r = three(2, (4, 97))
    close(logit_difference(p, q + 7, 0.75), logit_difference(p, q, 0.75))
    close(contrast(p, q + 7, 0.1), contrast(p, q, 0.1))
    close(proxy(p, q + 7, r - 2, 1.5), proxy(p, q, r, 1.5))


def test_closed_forms_of_the_others():
    p, q, _ = three(3, (4, 97))
    close(guidance(p, q, 1.0), p)
    close(guidance(p, q, 0.0), q)
    close(proxy(p, q, q, 1.5), p)
    assert (contrast(p, q, 1.0) > -INF).sum(-1).tolist() == [1] * 4
    uniform = torch.zeros_like(p).log_softmax(-1)
    close(contrast(p, uniform, 1e-30), p)


def test_a_token_that_the_target_excludes_stays_excluded():
    p, q, r = three(4, (2, 11))
    p[0, 3] = q[0, 3] = r[0, 3] = -INF  # -inf minus -inf would be NaN
    for result in (logit_difference(p, q, 1.0), contrast(p, q, 0.1), proxy(p, q, r, 1.0), guidance(p, q, 1.5)):
        assert result[0, 3] == -INF
        assert not result.isnan().any()


def test_ties_on_the_bar_are_likely():
    p = torch.zeros(1, 200).log_softmax(-1)
    assert likely_tokens(p, 0.01).all()


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.5])
@pytest.mark.parametrize("num_items", [None, 12])
def test_loss_is_the_loop_over_cross_entropy_and_kl(beta, num_items):
    torch.manual_seed(1)
    logits = 3 * torch.randn(4, 7, 13, dtype=torch.float32)
    labels = torch.randint(0, 13, (4, 7))
    labels[2:] = torch.where(labels[2:] % 3 > 0, -1, labels[2:])
    labels[:, :2] = -100
    total, items = 0.0, 0
    for row in range(4):
        for column in range(6):
            p = distribution(logits[row, column].tolist())
            label = labels[row, column + 1].item()
            if label == -100:
                continue
            items += 1
            kl = sum(1 / 13 * (math.log(1 / 13) - value) for value in p)
            total += beta * (math.log(13) + kl) if label == -1 else -p[label]
    expected = total / (num_items or items)
    assert forget_retain_loss(logits, labels, beta, num_items).item() == pytest.approx(expected, rel=1e-5)


def test_loss_of_an_accumulated_batch_is_the_sum_of_its_parts():
    torch.manual_seed(2)
    logits, labels = torch.randn(4, 7, 13), torch.randint(-1, 13, (4, 7))
    parts = [forget_retain_loss(logits[i : i + 1], labels[i : i + 1], 2.0, 24) for i in range(4)]
    torch.testing.assert_close(sum(parts), forget_retain_loss(logits, labels, 2.0))


def test_loss_of_a_batch_without_labels_is_zero_and_has_a_gradient():
    logits = torch.randn(2, 5, 13, requires_grad=True)
    loss = forget_retain_loss(logits, torch.full((2, 5), -100), 1.0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
