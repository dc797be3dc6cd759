"""Rules by rank and without a threshold: exact counts, top-h, min-k, XTC and DRY against loops in double precision."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from transformers import TopHLogitsWarper

from hf_longtrunc import (
    DRYLogitsProcessor,
    MinKLogitsProcessor,
    TopHLogitsProcessor,
    XTCLogitsProcessor,
    sampler_by_name,
    sampler_names,
)
from hf_longtrunc.sampling import cutoffs
from hf_longtrunc.sampling.cutoffs import Softmax, below, softmax_rows
from hf_longtrunc.sampling.dry import repetitions
from hf_longtrunc.serving.rows import parse_request, truncate

INF = math.inf
ROWS = st.lists(st.floats(-30, 30, width=32) | st.just(-INF), min_size=1, max_size=40).filter(lambda r: max(r) > -INF)


def spread_rows(rows: int, vocab: int, seed: int) -> torch.Tensor:
    """Flat rows, peaked rows, rows with a heavy head."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 3.0, 8.0])[torch.arange(rows) % 4, None]
    heads = 12 * (torch.rand(rows, vocab, generator=generator) < 2 / vocab)
    return torch.randn(rows, vocab, generator=generator) * scale + heads


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_bar_that_is_a_tokens_own_keeps_as_many_as_asked(count):
    """log p + log Z rounds up above z in every ninth row: four of five were kept."""
    wrong = 0
    for seed in range(34):
        scores = spread_rows(1000, 199, seed)
        rows = softmax_rows(scores)
        ordered = rows.z.sort(-1, descending=True).values
        kept = (~below(scores, rows, ordered[:, count - 1 : count])).sum(-1)
        wrong += int(((kept != count) & (ordered[:, count - 1] != ordered[:, count])).sum())
    assert wrong == 0


def naive_probs(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(score - top) for score in row]
    return [weight / math.fsum(weights) for weight in weights]


def naive_top_h(row: list[float], share: float) -> tuple[int, bool]:
    """How many of the most probable tokens are kept, and whether rounding may decide otherwise."""
    terms = [-p * math.log(p) if p > 0 else 0.0 for p in sorted(naive_probs(row), reverse=True)]
    goal = share * math.fsum(terms)
    sums = [math.fsum(terms[: n + 1]) for n in range(len(terms))]
    near = any(abs(each - goal) <= 1e-4 * (goal + 1e-3) for each in sums)
    return max(1, sum(each <= goal for each in sums)), near


@given(ROWS, st.floats(0.05, 1))
def test_top_h_is_its_definition(row, share):
    count, near = naive_top_h(row, share)
    kept = (TopHLogitsProcessor(share)(None, torch.tensor([row])) > -INF)[0].tolist()
    if not near:
        threshold = sorted(row, reverse=True)[count - 1]
        assert all(
            is_kept == (score >= threshold) for score, is_kept in zip(row, kept, strict=True) if score > -INF
        ) or any(abs(score - threshold) < 1e-5 for score in row if score != threshold)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.9])
def test_top_h_keeps_what_transformers_keeps_on_ten_thousand_rows(share):
    """Theirs over the whole vocabulary: it renormalises the 100 most probable tokens unless told otherwise."""
    ours, theirs, differing = TopHLogitsProcessor(share), TopHLogitsWarper(share), 0
    theirs.top_n = 499
    for seed in range(4):
        scores = spread_rows(850, 499, seed)
        kept = ours(None, scores) > -INF
        rows = (kept != (theirs(None, scores) > -INF)).any(-1).nonzero()[:, 0].tolist()
        # Where fp32 moves the goal across a sum, or tokens tie, of which theirs keeps some.
        for row in rows:
            ordered = scores[row].double().sort(descending=True).values
            terms = -ordered.softmax(-1) * ordered.log_softmax(-1)
            distance = terms.cumsum(0) - share * terms.sum()
            count = int((distance <= 0).sum())
            assert (
                int(kept[row].sum()) == count
                or distance.abs().min() < 1e-6
                or ordered[count - 1 : count + 1].diff() < 1e-6
            )
        differing += len(rows)
    assert differing <= 12


def naive_min_k(row: list[float], tau: float) -> int:
    ordered = sorted((score for score in row if score > -INF), reverse=True)
    drops = [(ordered[i] - ordered[i + 1]) / (i + 1) for i in range(len(ordered) - 1)]
    count = 1 + max(range(len(drops)), key=lambda i: (drops[i], -i)) if drops else 1
    extent = ordered[0] - ordered[-1]
    least = math.floor(tau / extent) if extent else (len(row) if tau else 0)
    return min(max(count, least), len(ordered))


def test_min_k_is_its_definition():
    generator = random.Random(0)
    for case in range(300):
        size = generator.choice([1, 2, 7, 130, 300, 1500])
        scale = generator.choice([0.01, 1.0, 5.0])
        row = (torch.randn(size) * scale).tolist()
        if case % 3 == 0 and size > 2:
            row[generator.randrange(size)] = -INF
        tau = generator.choice([0.0, 0.5, 3.0])
        kept = MinKLogitsProcessor(tau)(None, torch.tensor([row])) > -INF
        assert int(kept.sum()) == naive_min_k(row, tau), (size, scale, tau)
        assert kept[0, row.index(max(row))]


def test_min_k_looks_past_its_head():
    """A cliff behind 200 tokens that are nearly alike, and a row so flat that tau keeps 300."""
    cliff = [-1e-3 * place for place in range(200)] + [-30.0 - 1e-3 * place for place in range(400)]
    flat = [-1e-5 * place for place in range(1000)]
    for row, count in ((cliff, 200), (flat, 300)):
        assert naive_min_k([float(torch.tensor(each)) for each in row], 3.0) == pytest.approx(count, abs=1)
        kept = MinKLogitsProcessor(3.0)(None, torch.tensor([row])) > -INF
        assert int(kept.sum()) == pytest.approx(count, abs=1)


def test_min_k_is_the_same_at_every_temperature():
    scores = spread_rows(400, 997, 0)
    scores = scores[scores.amax(-1) - scores.amin(-1) > 3]
    for temperature in (0.125, 4.0):
        ours = MinKLogitsProcessor(0.0)
        assert torch.equal(ours(None, scores) > -INF, ours(None, scores / temperature) > -INF)


@pytest.mark.parametrize(
    "processor", [TopHLogitsProcessor(0.4), TopHLogitsProcessor(0.99), MinKLogitsProcessor()], ids=repr
)
def test_a_head_that_grows_gives_what_a_sort_of_the_row_gives(processor, monkeypatch):
    scores = spread_rows(64, 3001, 1)
    scores[3, :2000] = -INF
    small = processor(None, scores)
    monkeypatch.setattr(cutoffs, "_HEAD", 3001)
    assert torch.equal(processor(None, scores), small)
    assert torch.equal(small, torch.cat([processor(None, row[None]) for row in scores]))


def naive_xtc(row: list[float], threshold: float) -> list[bool]:
    """Which tokens are left where it is decided to exclude."""
    probs = naive_probs(row)
    reaching = [score for score, p in zip(row, probs, strict=True) if p >= threshold]
    least = min(reaching, default=0.0)  # by scores: probabilities of scores that nearly agree are equal in fp64
    return [not (len(reaching) > 1 and score > least) for score in row]


@example([0.0, 0.5, 2.0**-126], 0.25)
@given(ROWS, st.floats(0.01, 0.6))
def test_xtc_is_its_definition(row, threshold):
    probs = naive_probs(row)
    if any(abs(p - threshold) < 1e-5 for p in probs):
        return
    kept = XTCLogitsProcessor(threshold, 1.0)(None, torch.tensor([row]))[0]
    left = naive_xtc(row, threshold)
    reaching = [score for score, p in zip(row, probs, strict=True) if p >= threshold]
    if any(0 < score - min(reaching) < 1e-4 for score in reaching):  # 1e-38 above 0 is a tie in fp32
        return
    assert [bool(k > -INF) for k in kept] == [
        score > -INF and is_left for score, is_left in zip(row, left, strict=True)
    ]
    assert torch.equal(XTCLogitsProcessor(threshold, 0.0)(None, torch.tensor([row])), torch.tensor([row]))


def test_xtc_decides_for_each_row_as_often_as_asked():
    scores = torch.tensor([2.0, 1.9, -3.0]).repeat(4000, 1)
    xtc = XTCLogitsProcessor(0.1, 0.3, generator=torch.Generator().manual_seed(1))
    excluded = (xtc(None, scores)[:, 0] == -INF).double().mean()
    assert float(excluded) == pytest.approx(0.3, abs=0.03)
    several = XTCLogitsProcessor([0.1, 0.6], [1.0, 1.0])
    assert several(None, scores[:4])[:, 0].isinf().tolist() == [True, True, False, False]
    own = [torch.Generator().manual_seed(n) for n in range(6)]
    together = XTCLogitsProcessor(0.1, 0.5, generator=own)(None, scores[:6])
    for n in range(6):
        alone = XTCLogitsProcessor(0.1, 0.5, generator=torch.Generator().manual_seed(n))(None, scores[:1])
        assert torch.equal(alone[0], together[n])


def naive_dry(ids: list[int], breakers: set[int]) -> dict[int, int]:
    """The longest repetition that each token would go on with."""
    longest: dict[int, int] = {}
    for place in range(len(ids) - 1):
        length = 0
        while length < 50 and length <= place and length < len(ids) - 1:
            token = ids[place - length]
            if token != ids[-1 - length] or token in breakers:
                break
            length += 1
        if length and ids[place + 1] not in breakers:
            longest[ids[place + 1]] = max(longest.get(ids[place + 1], 0), length)
    return longest


def test_dry_is_its_definition():
    generator = random.Random(0)
    for _ in range(400):
        ids = [generator.randrange(generator.choice([2, 4, 30])) for _ in range(generator.randrange(1, 90))]
        breakers = set(generator.sample(range(4), generator.randrange(3)))
        expected = naive_dry(ids, breakers)
        assert repetitions(np.array(ids), tuple(breakers)) == expected
        scores = torch.randn(1, 31)
        dry = DRYLogitsProcessor(0.8, 1.75, 2, sequence_breakers=list(breakers))
        by_hand = scores.clone()
        for token, length in expected.items():
            if length >= 2:
                by_hand[0, token] -= 0.8 * 1.75 ** (length - 2)
        torch.testing.assert_close(dry(torch.tensor([ids]), scores), by_hand)


def test_dry_looks_at_its_window_and_each_row_has_its_own_multiplier():
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6]])
    scores = torch.zeros(1, 12)
    assert DRYLogitsProcessor(1.0, 2.0)(ids, scores)[0, 7] == -1
    assert not DRYLogitsProcessor(1.0, 2.0, window=6)(ids, scores).any()
    twice = DRYLogitsProcessor([0.0, 3.0])(ids.repeat(4, 1), scores.repeat(4, 1))
    assert twice[:, 7].tolist() == [0, 0, -3, -3]
    with pytest.raises(ValueError, match="2 multipliers, one a row, do not fit 3 rows"):
        DRYLogitsProcessor([0.0, 3.0])(ids.repeat(3, 1), scores.repeat(3, 1))
    with pytest.raises(ValueError, match="continuous batching"):
        DRYLogitsProcessor()(ids[0], scores)


def test_dry_takes_no_rows_and_ids_that_the_scores_do_not_reach():
    """A text may hold placeholders of images, whose ids lie behind the logits."""
    assert DRYLogitsProcessor()(torch.ones(0, 4, dtype=torch.long), torch.zeros(0, 9)).shape == (0, 9)
    ids = torch.tensor([[5, 6, 70, 5, 6, 7, 5, 6]])
    assert DRYLogitsProcessor(1.0)(ids, torch.zeros(1, 9))[0].tolist() == [0.0] * 7 + [-1.0, 0.0]
    with pytest.raises(ValueError, match=r"scores must be \[1, V\], a row a text, got shape \(9,\)"):
        DRYLogitsProcessor()(ids, torch.zeros(9))
    with pytest.raises(TypeError, match="floating-point"):
        DRYLogitsProcessor()(ids, torch.zeros(1, 9, dtype=torch.long))


def test_a_long_repetition_is_finite():
    ids = torch.tensor([[1, 2] * 400])
    assert DRYLogitsProcessor(5.0, 100.0)(ids, torch.zeros(1, 4)).isfinite().all()


def test_dry_ends_a_loop(tiny_model):
    """A text that says one phrase again and again goes on otherwise."""
    prompt = torch.tensor([[4, 8, 15, 16, 23] * 4])
    dry = DRYLogitsProcessor(50.0)
    for options in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        result = tiny_model.generate(prompt, do_sample=False, max_new_tokens=6, logits_processor=[dry], **options)
        assert result[0, 20] != 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopHLogitsProcessor(0), "top_h must be a number above 0"),
        (lambda: TopHLogitsProcessor(1.1), "of at most 1"),
        (lambda: MinKLogitsProcessor(-1), "tau must be a number of at least 0"),
        (lambda: XTCLogitsProcessor(1.0), "threshold must be a number above 0"),
        (lambda: XTCLogitsProcessor(0.1, 2), "probability must be a number of at least 0"),
        (lambda: DRYLogitsProcessor(-1), "multiplier must be"),
        (lambda: DRYLogitsProcessor(1, 0.5), "base must be"),
        (lambda: DRYLogitsProcessor(1, 2, 0), "allowed_length must be"),
        (lambda: DRYLogitsProcessor(sequence_breakers=[-1]), "sequence_breakers must be"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [TopHLogitsProcessor, MinKLogitsProcessor, lambda: XTCLogitsProcessor(0.1, 1.0)])
def test_rows_that_are_no_distribution_come_back_unchanged(make):
    rows = torch.randn(4, 300)
    rows[0, 3], rows[1], rows[2, 5] = torch.nan, -INF, INF
    result = make()(None, rows)
    assert torch.equal(result[:3].nan_to_num(7), rows[:3].nan_to_num(7))
    flat = torch.zeros(2, 300)
    if make is not TopHLogitsProcessor:
        assert torch.equal(make()(None, flat), flat)
    assert make()(None, rows[:0]).shape == (0, 300)
    assert make()(None, torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]


def test_a_bar_of_nan_cuts_nothing():
    """What a request that asks for nothing is given among requests that do."""
    rows = softmax_rows(torch.randn(2, 300) * 3)
    assert isinstance(rows, Softmax)
    for name, cutoff in cutoffs.CUTOFFS.items():
        threshold = cutoff.threshold(rows, torch.tensor([[math.nan], [1.0]]))
        assert not below(rows.z, rows, threshold)[0].any(), name
        assert threshold[0].isnan(), name


def test_samplers_by_name_are_the_processors_and_know_every_cutoff():
    """One list: requests' names to engines, the command line's and exported folders' are read by the same function."""
    assert {name.replace("_", "-") for name in cutoffs.CUTOFFS} <= set(sampler_names())
    assert {"xtc", "dry"} <= set(sampler_names())
    scores = spread_rows(40, 199, 0)
    for name in cutoffs.CUTOFFS:
        cut = truncate(scores, [parse_request({name: 1 if "p_less" in name else 0.4})] * len(scores))
        processor = sampler_by_name(name) if "p_less" in name else sampler_by_name(name, 0.4)
        assert torch.equal(processor(None, scores), cut), name
    assert isinstance(sampler_by_name(" XTC "), XTCLogitsProcessor)
    assert sampler_by_name("min-k", 0).tau == 0
    for name, value, message in [
        ("etta", None, "name must be one of eta, epsilon.*got 'etta'"),
        (3, None, "got 3"),
        ("p-less", 0.5, "p-less takes no value, got 0.5"),
        ("eta", 0.0, "epsilon must be a number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler_by_name(name, value)


@pytest.mark.parametrize("size", [50, 8191, 8192, 8200, 20_001])
def test_the_largest_of_a_row_are_those_of_a_sort(size):
    """By columns or by a sort; with ties, -inf and a rest that fills no column."""
    z = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    z[0] = z[0].mul(2).round()
    z[1, ::2], z[2, -1] = -INF, 9
    z[2, :128] += 20  # each in a column of its own
    for count in (1, 40, 128):
        count = min(count, size)
        assert torch.equal(cutoffs._largest(z, count), z.sort(-1, descending=True).values[:, :count])
