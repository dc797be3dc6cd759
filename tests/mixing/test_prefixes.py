"""The address of a cache: the rows and columns that it shares with new ones, against loops."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from hf_longtrunc.mixing.prefixes import address, common_prefix


def naive(cached, new):
    def shared(old, row):
        columns = 0
        for left, right in zip(old, row, strict=False):
            if left != right:
                break
            columns += 1
        return columns

    best = []
    for place, row in enumerate(new):
        lengths = [shared(old, row) for old in cached]
        own = place if place < len(cached) and lengths[place] == max(lengths) else lengths.index(max(lengths))
        best.append((max(lengths), own))
    return min(length for length, _ in best), [row for _, row in best]


matrices = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))


@given(matrices, matrices)
def test_against_loops(old, new):
    draw = [
        torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))
        for rows, columns, seed in (old, new)
    ]
    prefix = common_prefix(*draw)
    length, rows = naive(draw[0].tolist(), draw[1].tolist())
    assert prefix.length == length
    assert (list(range(len(draw[1]))) if prefix.rows is None else prefix.rows.tolist()) == rows


def test_rows_that_continue_themselves_are_left_in_place():
    cached = torch.tensor([[5, 6], [5, 6], [7, 8]])
    assert common_prefix(cached, torch.cat([cached, torch.ones(3, 1, dtype=torch.long)], 1)) == (2, None)


def test_beams_that_were_permuted_are_found():
    cached = torch.tensor([[5, 6, 1], [5, 6, 2], [5, 6, 3]])
    prefix = common_prefix(cached, torch.tensor([[5, 6, 3, 9], [5, 6, 1, 9], [5, 6, 3, 8]]))
    assert prefix.length == 3
    assert prefix.rows.tolist() == [2, 0, 2]


def test_a_masked_column_is_another_column():
    ids = torch.tensor([[0, 5]])
    seen, hidden = address(ids, torch.ones(1, 2, dtype=torch.long)), address(ids, torch.tensor([[0, 1]]))
    assert common_prefix(seen, hidden) == (0, None) or common_prefix(seen, hidden).length == 0
    assert common_prefix(hidden, hidden) == (2, None)
