"""The plan against a sequential best-fit decreasing, what a packing must be, and lengths that are none."""

from __future__ import annotations

import random
from collections import Counter
from inspect import unwrap

import numpy as np
import pytest
from hypothesis import given, strategies as st

from hf_longtrunc import PackedDataset, pack_in_order
from hf_longtrunc.data import packing as packing_module
from hf_longtrunc.data.packing import best_fit_decreasing, plan_rows

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=60).filter(any)


def sequential(lengths: list[int], seq_length: int) -> list[list[tuple[int, int, int]]]:
    """Best-fit decreasing as the paper says it: a row at a time, the first come first served among equal rows."""
    pieces = [
        (document, start, min(seq_length, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_length)
    ]
    rows: list[list[tuple[int, int, int]]] = []
    space: list[int] = []
    arrived: list[int] = []  # when a row came to its present space
    for turn, piece in enumerate(sorted(pieces, key=lambda piece: -piece[2])):
        fitting = [row for row in range(len(rows)) if space[row] >= piece[2]]
        best = min(fitting, key=lambda row: (space[row], arrived[row]), default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            space.append(seq_length)
            arrived.append(turn)
        rows[best].append(piece)
        space[best] -= piece[2]
        arrived[best] = turn
    return rows


def rows_of(packing) -> list[list[tuple[int, int, int]]]:
    return [
        [(int(packing.document[p]), int(packing.start[p]), int(packing.length[p])) for p in packing.row(row)]
        for row in range(len(packing))
    ]


def random_case(rng: random.Random) -> tuple[list[int], int]:
    seq_length = rng.choice([1, 2, 3, 5, 8, 13, 16, 31, 64])
    longest = rng.choice([1, 2, seq_length // 2 + 1, seq_length, 3 * seq_length])
    return [rng.randint(1, longest) for _ in range(rng.randint(1, rng.choice([3, 12, 60])))], seq_length


def test_equals_sequential_best_fit_decreasing_item_for_item_in_5000_cases():
    rng = random.Random(0)
    for _ in range(5000):
        lengths, seq_length = random_case(rng)
        ours = rows_of(best_fit_decreasing(lengths, seq_length, min_piece=1))
        assert ours == sequential(lengths, seq_length), (lengths, seq_length)


def test_the_papers_example_of_appendix_b():
    """Rows of 8 hold 8, 6, 6 and 4: the piece of 3 joins the 4, the tightest that takes it."""
    rows = rows_of(best_fit_decreasing([8, 6, 6, 4, 3], 8))
    assert rows == [[(0, 0, 8)], [(1, 0, 6)], [(2, 0, 6)], [(3, 0, 4), (4, 0, 3)]]


@given(LENGTHS, st.integers(1, 40))
def test_every_token_lies_in_one_row_and_no_row_overflows(lengths, seq_length):
    packing = best_fit_decreasing(lengths, seq_length, min_piece=1)
    tokens = Counter((d, t) for row in rows_of(packing) for d, s, n in row for t in range(s, s + n))
    assert tokens == Counter((d, t) for d, n in enumerate(lengths) for t in range(n))
    assert packing.fills().max() <= seq_length
    assert packing.fills().min() > 0
    assert sorted(packing.items) == list(range(len(packing.items)))


@given(LENGTHS, st.integers(2, 40), st.randoms(use_true_random=False), st.integers(0, 5))
def test_fills_depend_neither_on_order_nor_on_the_seed(lengths, seq_length, rng, seed):
    shuffled = rng.sample(lengths, len(lengths))
    fills = sorted(best_fit_decreasing(lengths, seq_length, min_piece=1).fills())
    assert sorted(best_fit_decreasing(shuffled, seq_length, min_piece=1, seed=seed).fills()) == fills


def test_the_seed_moves_equal_pieces_and_is_reproducible():
    lengths = [5, 3] * 40
    first, again, other = (best_fit_decreasing(lengths, 8, seed=seed) for seed in (1, 1, 2))
    assert rows_of(first) == rows_of(again)
    assert rows_of(first) != rows_of(other)
    assert rows_of(first) != rows_of(best_fit_decreasing(lengths, 8))


@given(LENGTHS, st.integers(2, 40), st.sampled_from(["split", "truncate", "drop"]), st.integers(1, 4))
def test_stats_count_what_happened(lengths, seq_length, long, min_piece):
    min_piece = min(min_piece, seq_length)
    try:
        packing = best_fit_decreasing(lengths, seq_length, long=long, min_piece=min_piece)
    except ValueError as error:
        assert "nothing is left to pack" in str(error)  # noqa: PT017
        return
    stats, rows = packing.stats(), rows_of(packing)
    kept = Counter(d for row in rows for d, _, n in row for _ in range(n))
    pieces = [piece for row in rows for piece in row]
    assert stats["documents"] == len(lengths)
    assert stats["tokens"] == sum(kept.values())
    assert stats["dropped_tokens"] == sum(lengths) - stats["tokens"]
    assert stats["dropped_documents"] == sum(d not in kept for d in range(len(lengths)))
    assert stats["truncated_documents"] == len({d for d, _, n in pieces if n < lengths[d]})
    assert stats["rows"] == len(rows)
    assert stats["ideal_rows"] == -(-stats["tokens"] // seq_length)
    assert stats["efficiency"] == pytest.approx(stats["tokens"] / (len(rows) * seq_length))
    assert stats["documents_per_row"] == pytest.approx(len(pieces) / len(rows))
    assert all(n >= min_piece for _, _, n in pieces)
    assert long == "split" or all(s == 0 for _, s, _ in pieces)


@given(LENGTHS, st.integers(1, 40))
def test_cuts_by_concatenation_are_those_of_the_sliced_stream(lengths, seq_length):
    stream = [document for document, length in enumerate(lengths) for _ in range(length)]
    chunks = [stream[start : start + seq_length] for start in range(0, len(stream), seq_length)]
    cut = sum(sum(document in chunk for chunk in chunks) > 1 for document in range(len(lengths)))
    stats = best_fit_decreasing(lengths, seq_length, min_piece=1).stats()
    assert stats["truncated_by_concatenation"] == cut


@given(st.lists(st.integers(0, 30), min_size=33, max_size=33).filter(any))
def test_a_plan_needs_the_histogram_only(histogram):
    lengths = [size for size in range(1, 33) for _ in range(histogram[size])]
    if not lengths:
        return
    plan = plan_rows(np.array(histogram), 32)
    assert plan.num_rows == len(sequential(lengths, 32))
    assert int((plan.rows * plan.pieces).sum()) == len(lengths)


def test_a_thousand_million_documents_are_planned_from_their_histogram():
    histogram = np.arange(2048, -1, -1) * 1000
    plan = plan_rows(histogram, 2048)
    assert histogram.sum() > 2e9
    ideal = -(-int((histogram * np.arange(2049)).sum()) // 2048)
    assert ideal <= plan.num_rows < 1.001 * ideal
    assert len(plan.first) < 4 * 2048


def test_rows_longer_than_65536_tokens_and_corpora_beyond_2_to_the_31():
    lengths = [70_000, 130_000, 1, 66_000, 140_000] + [100_000] * 30_000
    packing = best_fit_decreasing(lengths, 200_000, min_piece=1)
    assert packing.stats()["tokens"] == sum(lengths) > 2**31
    assert rows_of(packing)[:3] == [
        [(4, 0, 140_000), (2, 0, 1)],
        [(1, 0, 130_000), (0, 0, 70_000)],
        [(5, 0, 100_000), (6, 0, 100_000)],
    ]


def test_one_document_longer_than_2_to_the_31_tokens():
    packing = best_fit_decreasing([2**31 + 5, 7], 2**20)
    assert rows_of(packing)[1:] == [[(0, start, 2**20)] for start in range(2**20, 2**31, 2**20)] + [
        [(1, 0, 7), (0, 2**31, 5)]
    ]


def test_documents_all_longer_than_half_a_row_have_a_row_each():
    packing = best_fit_decreasing([5, 6, 7, 5], 8)
    assert len(packing) == 4
    assert packing.stats()["efficiency"] == 23 / 32


def test_long_documents_are_split_shortened_dropped_or_refused():
    lengths = [20, 3, 9]
    assert rows_of(best_fit_decreasing(lengths, 8)) == [[(0, 0, 8)], [(0, 8, 8)], [(2, 0, 8)], [(0, 16, 4), (1, 0, 3)]]
    assert best_fit_decreasing(lengths, 8).stats()["dropped_tokens"] == 1  # document 2's ninth: a lone token
    assert best_fit_decreasing(lengths, 8, min_piece=1).stats()["dropped_tokens"] == 0
    assert rows_of(best_fit_decreasing(lengths, 8, long="truncate")) == [[(0, 0, 8)], [(2, 0, 8)], [(1, 0, 3)]]
    assert rows_of(best_fit_decreasing(lengths, 8, long="drop")) == [[(1, 0, 3)]]
    with pytest.raises(ValueError, match=r"document 0 has 20 tokens.*\"split\""):
        best_fit_decreasing(lengths, 8, long="error")
    assert len(best_fit_decreasing([8, 3], 8, long="error")) == 2


def test_empty_documents_are_counted():
    stats = best_fit_decreasing([0, 5, 0], 8).stats()
    assert (stats["dropped_documents"], stats["dropped_tokens"], stats["rows"]) == (2, 0, 1)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([], ValueError, "no documents"),
        ([0, 0], ValueError, "nothing is left to pack"),
        ([3, -2], ValueError, r"negative, got -2 for document 1"),
        ([3.0, 2.0], TypeError, "integers, got float64"),
        ([[1, 2]], ValueError, r"shape \(1, 2\)"),
        (7, ValueError, r"shape \(\)"),
        (["3"], TypeError, "integers, got"),
        ([True], TypeError, "integers, got bool"),
        ([3, None], TypeError, "integers, got object"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        unwrap(best_fit_decreasing)(lengths, 8)


@pytest.mark.parametrize(
    ("seq_length", "error"),
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("2048", TypeError)],
)
def test_bad_seq_length(seq_length, error):
    with pytest.raises(error, match=f"seq_length must be .*{seq_length}"):
        unwrap(best_fit_decreasing)([3], seq_length)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"long": "cut"}, "long must be one of 'split'"),
        ({"min_piece": 0}, "min_piece"),
        ({"min_piece": 9}, "min_piece"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        unwrap(best_fit_decreasing)([3], 8, **option)


def test_the_result_is_read_only_and_the_input_stays_the_callers():
    lengths = np.array([3, 4])
    packing = best_fit_decreasing(lengths, 8)
    for name in ("items", "offsets", "document", "start", "length", "document_lengths"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(packing, name)[0] = 1
    lengths[0] = 5
    assert packing.document_lengths[0] == 3


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.uint64])
def test_lengths_of_any_integer_type(dtype):
    assert rows_of(best_fit_decreasing(np.array([100, 27], dtype), 127)) == [[(0, 0, 100), (1, 0, 27)]]


def test_shapes_and_dtypes_are_checked_in_this_run():
    assert unwrap(packing_module.plan_rows) is not packing_module.plan_rows


def next_fit(lengths, seq_length):
    """The definition, piece by piece: (document, start, length) of the pieces of every row."""
    rows = []
    for document, length in enumerate(lengths):
        for start in range(0, length, seq_length):
            piece = document, start, min(seq_length, length - start)
            if not rows or sum(size for *_, size in rows[-1]) + piece[2] > seq_length:
                rows.append([])
            rows[-1].append(piece)
    return rows


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.integers(1, 17))
def test_packing_in_order_is_next_fit(lengths, seq_length):
    packing = pack_in_order(lengths, seq_length, min_piece=1)
    rows = [
        [(int(packing.document[p]), int(packing.start[p]), int(packing.length[p])) for p in packing.row(row)]
        for row in range(len(packing))
    ]
    assert rows == next_fit(lengths, seq_length)
    assert packing.stats()["tokens"] == sum(lengths)


def test_rows_in_order_hold_the_documents_in_order():
    documents = [{"input_ids": [n] * (1 + n % 7)} for n in range(40)]
    plan = pack_in_order([len(document["input_ids"]) for document in documents], 8, min_piece=1)
    rows = PackedDataset(documents, plan, seed=None)
    assert np.concatenate([row["input_ids"] for row in rows]).tolist() == [
        token for document in documents for token in document["input_ids"]
    ]
    with pytest.raises(ValueError, match="document 1 has 9 tokens"):
        pack_in_order([3, 9], 8, long="error")
