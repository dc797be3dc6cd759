"""The thresholds against a per-token reference in double precision, and the edges of what a row can be."""

from __future__ import annotations

import math

import jaxtyping
import pytest
import torch
from hypothesis import given, strategies as st

from hf_longtrunc.sampling import cutoffs
from hf_longtrunc.sampling.cutoffs import below, softmax_rows, threshold_of

INF = math.inf
SCORES = st.floats(-60, 60, width=32) | st.just(-INF)
ROWS = st.lists(SCORES, min_size=1, max_size=70).filter(lambda row: max(row) > -INF)
EPSILONS = st.floats(1e-6, 0.999)


def naive_softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(score - top) for score in row]
    return [weight / math.fsum(weights) for weight in weights]


def naive_entropy(row: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in naive_softmax(row) if p > 0)


def naive_eta(row: list[float], epsilon: float) -> float:
    return min(epsilon, math.sqrt(epsilon) * math.exp(-naive_entropy(row)))


def kept(scores: torch.Tensor, epsilon: float, threshold="eta", **options) -> torch.Tensor:
    rows = softmax_rows(scores)
    return ~below(scores, rows, threshold_of(threshold, rows, epsilon), **options)


@given(ROWS)
def test_entropy_is_shannons_in_nats(row):
    assert softmax_rows(torch.tensor([row])).entropy.item() == pytest.approx(naive_entropy(row), abs=2e-5)


@given(ROWS, EPSILONS)
def test_threshold_is_the_papers_formula(row, epsilon):
    rows = softmax_rows(torch.tensor([row]))
    eta = (threshold_of("eta", rows, epsilon) - rows.log_total).exp().item()
    assert eta == pytest.approx(naive_eta(row, epsilon), rel=5e-5)


@given(ROWS, EPSILONS)
def test_kept_set_is_the_papers_away_from_the_bar(row, epsilon):
    probs, eta = naive_softmax(row), naive_eta(row, epsilon)
    for p, score, is_kept in zip(probs, row, kept(torch.tensor([row]), epsilon)[0].tolist(), strict=True):
        if score == max(row):
            assert is_kept
        elif abs(p - eta) > 1e-4 * eta:
            assert is_kept == (p >= eta)


@given(ROWS, EPSILONS)
def test_epsilon_keeps_what_reaches_it_and_the_maximum(row, epsilon):
    mask = kept(torch.tensor([row]), epsilon, "epsilon")[0].tolist()
    for p, score, is_kept in zip(naive_softmax(row), row, mask, strict=True):
        if abs(p - epsilon) > 1e-4 * epsilon:
            assert is_kept == (p >= epsilon or score == max(row))


@given(ROWS, EPSILONS, st.integers(1, 80))
def test_min_tokens_to_keep_is_the_top_of_the_row_with_ties(row, epsilon, minimum):
    scores = torch.tensor([row])
    threshold = sorted(row, reverse=True)[min(minimum, len(row)) - 1]
    expected = kept(scores, epsilon) | (scores >= threshold)
    assert torch.equal(kept(scores, epsilon, min_tokens_to_keep=minimum), expected)


@given(ROWS, st.floats(-1000, 1000))
def test_a_constant_added_to_a_row_changes_nothing_beyond_rounding(row, shift):
    rows, shifted = softmax_rows(torch.tensor([row])), softmax_rows(torch.tensor([row]) + shift)
    assert shifted.entropy.item() == pytest.approx(rows.entropy.item(), abs=5e-3)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1023, 1024, 1025, 50257])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab, threads):
    scores = torch.randn(16, vocab) * 4
    torch.set_num_threads(threads)
    try:
        together = softmax_rows(scores)
        alone = [softmax_rows(scores[i : i + 1]) for i in range(16)]
        shuffled = softmax_rows(scores.flip(0))
    finally:
        torch.set_num_threads(1)
    for field in ("z", "total", "entropy"):
        assert torch.equal(getattr(together, field), torch.cat([getattr(row, field) for row in alone]))
        assert torch.equal(getattr(together, field), getattr(shuffled, field).flip(0))


def test_also_where_a_level_of_the_tree_is_long_enough_to_be_split():
    torch.set_num_threads(2)
    try:
        values = torch.rand(4, 32 * 40_000)
        assert torch.equal(cutoffs._row_sum(values), torch.cat([cutoffs._row_sum(row[None]) for row in values]))
    finally:
        torch.set_num_threads(1)


def test_tensor_sum_would_not_be():
    """Why `_row_sum` exists. If torch's own sum becomes batch-invariant, this fails and the tree can go."""
    values = torch.rand(16, 50257)
    torch.set_num_threads(2)
    try:
        alone = torch.cat([values[i : i + 1].sum(-1) for i in range(16)])
        assert not torch.equal(alone, values.sum(-1))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("n", [1, 5, 32, 33, 64, 1000, 1024, 1056, 40000])
def test_row_sum_is_the_sum(n):
    values = torch.rand(3, n)
    expected = values.double().sum(-1, keepdim=True)
    torch.testing.assert_close(cutoffs._row_sum(values).double(), expected, rtol=1e-6, atol=0)


def test_one_finite_token():
    row = torch.tensor([[-INF, 3.0, -INF]])
    rows = softmax_rows(row)
    assert rows.entropy.item() == 0
    assert threshold_of("eta", rows, 0.01).item() == pytest.approx(math.log(0.01))
    assert kept(row, 0.01).tolist() == [[False, True, False]]


@pytest.mark.parametrize("epsilon", [1e-4, 0.5, 0.999999])
@pytest.mark.parametrize("vocab", [2, 3, 1000, 50257])
def test_equal_scores_are_all_kept(vocab, epsilon):
    row = torch.full((1, vocab), 2.5)
    assert softmax_rows(row).entropy.item() == pytest.approx(math.log(vocab), rel=1e-6)
    assert kept(row, epsilon).all()
    assert kept(row, epsilon, "epsilon").all(), "the maximum stays, and every token ties with it"


def test_vocabulary_of_one():
    assert kept(torch.tensor([[-7.0]]), 0.5).tolist() == [[True]]


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 0.0], [INF, 1.0, 0.0], [-INF, -INF, -INF], [INF, math.nan, -INF]])
@pytest.mark.parametrize("threshold", ["eta", "epsilon"])
def test_a_row_that_is_no_distribution_is_left_alone_and_harms_no_neighbour(bad, threshold):
    good = [5.0, 0.0, -20.0]
    mask = kept(torch.tensor([bad, good]), 0.05, threshold)
    assert mask[0].all()
    assert torch.equal(mask[1:], kept(torch.tensor([good]), 0.05, threshold))
    assert not mask[1].all()


def test_tokens_at_minus_infinity_leave_the_entropy_of_the_rest():
    rest = torch.randn(1, 40)
    padded = torch.cat([rest, torch.full((1, 500), -INF)], dim=1)
    assert softmax_rows(padded).entropy.item() == pytest.approx(softmax_rows(rest).entropy.item(), rel=1e-6)


def test_any_number_of_leading_dimensions():
    scores = torch.randn(2, 3, 50)
    assert torch.equal(kept(scores, 0.01), kept(scores.view(6, 50), 0.01).view(2, 3, 50))
    assert torch.equal(kept(scores[0, 0], 0.01), kept(scores, 0.01)[0, 0])


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'scores'"):
        softmax_rows(torch.tensor([[1, 2, 3]]))


def chi_square_holds(counts: torch.Tensor, probs: torch.Tensor) -> bool:
    """Under its 1e-4 quantile, by Wilson and Hilferty; rare entries share a bin."""
    expected = probs * counts.sum()
    likely = expected >= 5
    bins = torch.cat([expected[likely], expected[~likely].sum()[None]]).double()
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
    used = bins > 0
    degrees = int(used.sum()) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((seen - bins)[used] ** 2 / bins[used]).sum()) < limit


@pytest.mark.parametrize("size", [5, 33, 300, 5001, 70_001])
@pytest.mark.parametrize("refusals", [0, 200])
def test_draws_are_in_proportion(size, refusals):
    """Also after entries have been removed one by one; 10^6 draws and 10^3 refusals pass too."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(1, size, generator=generator).mul(2.5).exp()
    values[0, ::4] = 0

    def drawn(rows: int) -> torch.Tensor:
        uniform = torch.rand(rows, 1, dtype=torch.float64, generator=generator)
        return cutoffs.draw(values.expand(rows, -1), uniform)[:, 0]

    for _ in range(min(refusals, size // 3)):
        place = int(drawn(1))
        assert values[0, place] > 0, "no entry twice, and none of value zero"
        values[0, place] = 0
    counts = torch.bincount(torch.cat([drawn(5_000 if size < 10_000 else 500) for _ in range(8)]), minlength=size)
    assert counts[values[0] == 0].sum() == 0
    assert chi_square_holds(counts, values[0].double() / values.double().sum())


def test_a_draw_at_either_end_has_a_value_and_a_row_draws_alone():
    values = torch.zeros(3, 3100)
    values[0, 700], values[1, 3], values[1, 3099], values[2] = 1e-30, 2.0, 1e-9, 1.0
    for uniform in (0.0, 0.3, 1 - 2**-53):
        uniforms = torch.full((3, 1), uniform, dtype=torch.float64)
        together = cutoffs.draw(values, uniforms)
        assert (values.gather(1, together) > 0).all()
        for row in range(3):
            alone = cutoffs.draw(values[row : row + 1], uniforms[:1])
            assert alone.item() == together[row].item()
