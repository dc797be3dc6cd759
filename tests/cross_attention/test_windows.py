"""The window planner against the paper's rule, told state by state."""

from __future__ import annotations

import random

import pytest

from hf_longtrunc.cross_attention.windows import Window, plan_windows


def test_vectors_of_the_design():
    expected = [
        (0, 1024, 0, 768),
        (512, 1536, 256, 768),
        (1024, 2048, 256, 768),
        (1536, 2560, 256, 768),
        (1976, 3000, 328, 1024),
    ]
    assert plan_windows(3000, 1024, 0.5) == expected


@pytest.mark.parametrize(
    ("tokens", "length", "overlap", "expected"),
    [
        (7, 8, 0.5, [(0, 7, 0, 7)]),
        (8, 8, 0.5, [(0, 8, 0, 8)]),
        (9, 8, 0.5, [(0, 8, 0, 6), (1, 9, 5, 8)]),
        (12, 8, 0.5, [(0, 8, 0, 6), (4, 12, 2, 8)]),
        (16, 8, 0.0, [(0, 8, 0, 8), (8, 16, 0, 8)]),
        (3, 1, 0.5, [(0, 1, 0, 1), (1, 2, 0, 1), (2, 3, 0, 1)]),
        (10, 8, 0.99, [(0, 8, 0, 5), (2, 10, 3, 8)]),
    ],
)
def test_small_vectors(tokens, length, overlap, expected):
    assert plan_windows(tokens, length, overlap) == [Window(*window) for window in expected]


def naive_owner(tokens: int, length: int, overlap: float) -> list[int]:
    """Return for every state the start of the window that keeps it."""
    if tokens <= length:
        return [0] * tokens
    margin = int(length * overlap / 2)
    owners = []
    for state in range(tokens):
        start = 0
        while state >= start + length - margin:  # this window has left it to the next
            start += length - 2 * margin
        owners.append(min(start, tokens - length))
    return owners


def test_a_thousand_random_plans_keep_every_state_once_where_the_rule_says():
    random.seed(0)
    for _ in range(1000):
        length, overlap = random.randint(1, 60), random.choice([0.0, 0.25, 0.5, 0.75, random.random()])
        tokens = random.randint(1, 400)
        owners: list[int] = []
        for start, stop, keep_start, keep_stop in plan_windows(tokens, length, overlap):
            assert 0 <= start < stop <= tokens
            assert stop - start == min(tokens, length)
            assert start + keep_start == len(owners)
            owners += [start] * (keep_stop - keep_start)
        assert owners == naive_owner(tokens, length, overlap)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 8, 0.5), "tokens"), ((8, 0, 0.5), "length"), ((8, 4, 1.0), "overlap")]
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_windows(*arguments)
