"""Decisions and certificates: verified independently, against exact small programs, and against each other."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linprog

from hf_longtrunc import SoftmaxBasis, SupportChecker, critical_threshold
from hf_longtrunc.sampling import support_proofs
from hf_longtrunc.sampling.interior_point import InteriorPoint
from hf_longtrunc.sampling.support_proofs import Certificate, Decision

REAL_TEXT = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the boat came. In the spring of 1872 the "
    "Royal Society sent an expedition to measure the depth of the southern oceans; my grandmother used to make soup "
    "from nettles, onions and whatever the garden offered, and she never once wrote a recipe down."
)


def random_basis(vocab: int, rank: int, seed: int) -> SoftmaxBasis:
    generator = torch.Generator().manual_seed(seed)
    width = max(rank, min(vocab, rank + 3))
    # Spectrum that falls like a real output embedding's, with a common direction.
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -1, width)
    return SoftmaxBasis.from_weight(weight + 0.3 * torch.randn(width, generator=generator), min(rank, width))


def random_scores(vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(vocab, generator=generator, dtype=torch.float64) * spread


def exact_minimum(basis: SoftmaxBasis, probs: np.ndarray, tau: float, token: int) -> float | None:
    """min p_i / p-hat_i under the paper's constraints, well scaled: x_j = p_j / p-hat_j, rows of unit norm."""
    weights = np.concatenate([np.ones((len(probs), 1)), basis.factors.numpy()], axis=1)
    used = probs > 0
    matrix = (weights * probs[:, None])[used].T
    matrix /= np.abs(matrix).sum(1, keepdims=True)
    cost = np.zeros(used.sum())
    place = int(used[:token].sum())
    cost[place] = 1
    bounds = [(0, 1 / (1 - tau))] * len(cost)
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    result = linprog(cost, A_eq=matrix, b_eq=matrix.sum(1), bounds=bounds, method="highs", options=options)
    return result.fun if result.status == 0 else None


class Judge:
    """Verifies certificates of one row by the definitions alone, in numpy."""

    def __init__(self, basis: SoftmaxBasis, scores: torch.Tensor, tau: float):
        z = scores.double().numpy()
        self.probs = np.exp(z - z.max())
        self.probs /= self.probs.sum()
        self.weights = np.concatenate([np.ones((len(z), 1)), basis.factors.numpy()], axis=1)
        self.size = np.abs(self.weights).T @ self.probs
        self.sigma, self.tau = 1 / (1 - tau), tau

    def verdict(self, proof: Certificate) -> Decision:
        if proof.decision is Decision.KEPT and proof.multipliers is not None:
            self.judge_keep(proof.token, proof.multipliers.numpy())
        elif proof.decision is Decision.KEPT:
            assert self.probs[proof.token] >= self.tau * (1 - 1e-12)
        elif proof.decision is Decision.CUT and proof.distribution is not None:
            self.judge_cut(proof.token, proof.distribution.numpy())
        elif proof.decision is Decision.CUT:
            assert self.probs[proof.token] == 0
        return proof.decision

    def judge_keep(self, token: int, multipliers: np.ndarray) -> None:
        f = self.weights @ multipliers
        total = self.probs @ ((self.sigma - 1) * f.clip(0) + (-f).clip(0))
        assert total < self.sigma * self.probs[token] * f[token] * (1 - 1e-9)

    def judge_cut(self, token: int, p: np.ndarray) -> None:
        assert p[token] == 0
        assert (p <= self.sigma * self.probs * (1 + 1e-9)).all()
        assert (p >= -1e-9 * self.probs).all()
        difference = np.abs(self.weights.T @ (p - self.probs))
        assert (difference <= 1e-9 * self.size).all()
        # Far stricter than the statement asks: relative to what was moved at all, down to p-hat's own rounding.
        moved = np.abs(self.weights).T @ np.abs(p - self.probs)
        assert (difference <= 1e-6 * moved + 1e-14 * self.size).all()


SHAPES = [(50, 1), (50, 8), (50, 40), (300, 3), (300, 20), (2000, 20), (2000, 64), (50000, 64)]


@pytest.mark.parametrize(("vocab", "rank"), SHAPES)
@pytest.mark.parametrize("tau", [1e-4, 3e-3, 0.05, 0.3])
def test_every_certificate_holds_on_synthetic_rows(vocab, rank, tau):
    checks = undecided = 0
    basis = random_basis(vocab, rank, vocab + rank)
    checker = SupportChecker(basis)
    for seed in [[1e-4, 3e-3, 0.05, 0.3].index(tau)] if vocab == 50000 else range(4):
        scores = random_scores(vocab, seed, spread=[1.0, 3.0, 6.0, 2.0][seed])
        p = scores.softmax(-1)
        below = (p < tau).nonzero()[:, 0]
        ordered = below[p[below].argsort(descending=True)]
        tokens = (
            ordered[torch.unique(torch.linspace(0, max(len(ordered) - 1, 0), 16).long())] if len(ordered) else below
        )
        judge = Judge(basis, scores, tau)
        for proof in checker.certify(scores, tau, tokens):
            undecided += judge.verdict(proof) is Decision.UNDECIDED
            checks += 1
    assert undecided == 0, f"{undecided} of {checks}"


@pytest.mark.real_model
def test_every_certificate_holds_on_real_logits(real_model, real_basis):
    """Hundreds of checks on SmolLM2; not one may stay undecided. Every row, 2,000 checks, pass too."""
    model, tokenizer = real_model
    with torch.no_grad():
        logits = model(**tokenizer(REAL_TEXT, return_tensors="pt")).logits[0]
    checker = SupportChecker(real_basis)
    counts = dict.fromkeys(Decision, 0)
    for n, scores in enumerate(logits[4::4]):
        tau = [2e-3, 1e-2, 5e-2, 3e-4][n % 4]
        p = scores.double().softmax(-1)
        drawn = torch.multinomial(p * (p < tau), 8, generator=torch.Generator().manual_seed(n))
        spread = p.argsort(descending=True)[torch.linspace(5, 800, 32).long()]
        tokens = torch.cat([drawn, spread])
        judge = Judge(real_basis, scores, tau)
        for proof in checker.certify(scores, tau, tokens):
            counts[judge.verdict(proof)] += 1
    assert sum(counts.values()) >= 500
    assert min(counts[Decision.KEPT], counts[Decision.CUT]) > 75
    assert counts[Decision.UNDECIDED] == 0


def test_decisions_are_those_of_an_exact_program_on_small_cases():
    """A thousand cases pass too."""
    cases = ties = 0
    for seed in range(50):
        generator = np.random.default_rng(seed)
        vocab, rank = int(generator.integers(20, 150)), int(generator.integers(1, 13))
        tau = float(np.exp(generator.uniform(np.log(1e-4), np.log(0.3))))
        basis, scores = random_basis(vocab, rank, seed), random_scores(vocab, seed, generator.uniform(0.5, 4))
        probs = scores.softmax(-1)
        tokens = torch.from_numpy(generator.choice(vocab, 8, replace=False))
        decisions = SupportChecker(basis).check(scores, tau, tokens)
        for token, decision in zip(tokens.tolist(), decisions.tolist(), strict=True):
            cases += 1
            if probs[token] >= tau:
                assert decision == Decision.KEPT
                continue
            minimum = exact_minimum(basis, probs.numpy(), tau, token)
            if minimum is None or 1e-9 < minimum < 1e-6:
                ties += 1
                continue
            assert decision == (Decision.KEPT if minimum >= 1e-6 else Decision.CUT), (seed, token, minimum)
    assert cases == 400
    assert ties <= 2


def solved(rows: list[list[Fraction]]) -> list[Fraction] | None:
    """Solve a square system [matrix | right side] exactly by Gauss and Jordan; None where it is singular."""
    rows, size = [row[:] for row in rows], len(rows)
    for n in range(size):
        pivot = next((m for m in range(n, size) if rows[m][n]), None)
        if pivot is None:
            return None
        rows[n], rows[pivot] = rows[pivot], rows[n]
        rows[n] = [value / rows[n][n] for value in rows[n]]
        for m in range(size):
            if m != n and rows[m][n]:
                rows[m] = [a - rows[m][n] * b for a, b in zip(rows[m], rows[n], strict=True)]
    return [row[-1] for row in rows]


def exact_bound(probs: list[Fraction], basis: list[list[Fraction]], s: Fraction, token: int) -> Fraction:
    """min T(l) over l . b_i = 1: T is linear between the planes f_j = 0, so one of their crossings attains it."""
    width, best = len(basis[0]), None
    others = [j for j in range(len(basis)) if j != token]
    for zeros in itertools.combinations(others, width - 1):
        multipliers = solved([[*basis[token], Fraction(1)], *([*basis[j], Fraction(0)] for j in zeros)])
        if multipliers is None:
            continue
        f = [sum(a * b for a, b in zip(row, multipliers, strict=True)) for row in basis]
        total = sum(p * (s * v if v > 0 else -v) for p, v in zip(probs, f, strict=True))
        best = total if best is None else min(best, total)
    assert best is not None
    return best


def test_decisions_are_those_of_rational_arithmetic():
    """No tolerance anywhere in the reference. Small whole numbers make exact ties, which must not be kept."""
    kept = cut = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        vocab, rank = int(generator.integers(8, 13)), int(generator.integers(1, 3))
        counts = generator.integers(1, 200, vocab)
        columns = generator.integers(-4, 5, (vocab, rank))
        s = Fraction(1, int(generator.choice([3, 7, 15, 31])))
        probs = [Fraction(int(count), int(counts.sum())) for count in counts]
        rows = [[Fraction(1), *(Fraction(int(x)) for x in row)] for row in columns]
        basis = SoftmaxBasis(torch.from_numpy(columns).double(), torch.ones(rank, dtype=torch.float64), "")
        scores = torch.from_numpy(counts).double().log()
        decisions = SupportChecker(basis).check(scores, float(s / (1 + s)), torch.arange(vocab)).tolist()
        for token, decision in enumerate(decisions):
            if probs[token] * (1 + s) < s:
                exact = exact_bound(probs, rows, s, token) < (1 + s) * probs[token]
                assert (decision == Decision.KEPT) == exact, (seed, token)
                kept, cut = kept + exact, cut + (not exact)
    assert min(kept, cut) >= 50


@pytest.mark.parametrize("tau", [1e-3, 1e-2, 0.1])
def test_rank_zero_is_the_plain_threshold(tau):
    full = random_basis(200, 5, 0)
    basis = SoftmaxBasis(full.factors[:, :0], full.singular_values[:0], full.weight_hash)
    scores = random_scores(200, 3)
    assert torch.equal(SupportChecker(basis).kept(scores, tau, floor=0.0), scores.softmax(-1) >= tau)


@given(seed=st.integers(0, 10_000), tau=st.floats(1e-3, 0.3))
@settings(max_examples=15)
def test_more_directions_only_add_tokens_and_the_plain_set_is_in_all(seed, tau):
    basis, scores = random_basis(150, 12, seed), random_scores(150, seed, 2.5)
    kept = scores.softmax(-1) >= tau
    for rank in (1, 4, 12):
        more = SupportChecker(basis.truncated(rank)).kept(scores, tau, floor=0.0)
        assert (more | ~kept).all(), rank
        kept = more


@given(seed=st.integers(0, 10_000), tau=st.floats(1e-4, 0.3), columns=st.sampled_from([8, 64, 512]))
@settings(max_examples=10)
def test_the_set_is_that_of_single_checks_whatever_the_columns(seed, tau, columns):
    basis, scores = random_basis(400, 6, seed), random_scores(400, seed, 2.5)
    kept = SupportChecker(basis, columns=columns).kept(scores, tau, floor=0.0)
    checker = SupportChecker(basis)
    alone = [checker.check(scores, tau, torch.tensor([token])).item() == 1 for token in range(0, 400, 19)]
    assert kept[::19].tolist() == alone
    assert checker.undecided == 0


def test_rows_are_decided_as_alone():
    basis = random_basis(500, 8, 1)
    scores = torch.stack([random_scores(500, seed) for seed in range(6)])
    tau = torch.logspace(-4, -1, 6)
    tokens = scores.argsort(descending=True)[:, 10:60]
    together = SupportChecker(basis).check(scores, tau, tokens)
    for row in range(6):
        assert torch.equal(together[row], SupportChecker(basis).check(scores[row], float(tau[row]), tokens[row]))


def test_results_are_ordinary_tensors():
    basis, scores = random_basis(50, 3, 0), random_scores(50, 0)
    checker = SupportChecker(basis)
    mask, decisions = checker.kept(scores, 0.01), checker.check(scores, 0.01, torch.arange(50))
    mask |= True
    decisions += 1
    for proof in checker.certify(scores, 0.01, torch.arange(50)):
        for part in (proof.multipliers, proof.distribution):
            assert part is None or not part.is_inference()


def test_tokens_that_are_out_already_are_cut_and_change_nothing_else():
    """Dropping tokens of probability zero leaves the same program over the others."""
    basis, scores = random_basis(120, 5, 2), random_scores(120, 2)
    out = torch.arange(0, 120, 3)
    scores[out] = -torch.inf
    kept = SupportChecker(basis).kept(scores, 0.02, floor=0.0)
    assert not kept[out].any()
    rest = torch.tensor([token for token in range(120) if token % 3])
    smaller = SoftmaxBasis(basis.factors[rest].contiguous(), basis.singular_values, "")
    assert torch.equal(kept[rest], SupportChecker(smaller).kept(scores[rest], 0.02, floor=0.0))


def test_critical_threshold_parts_kept_from_cut():
    basis, scores = random_basis(300, 6, 4), random_scores(300, 4, 2.5)
    tokens = scores.argsort(descending=True)[[3, 10, 30, 60, 120]]
    critical = critical_threshold(basis, scores, tokens)
    probs = scores.softmax(-1)[tokens]
    assert (critical >= probs * (1 - 1e-12)).all()
    checker = SupportChecker(basis)
    for token, value in zip(tokens, critical.tolist(), strict=True):
        assert checker.check(scores, value * (1 - 1e-6), token[None]).item() == Decision.KEPT
        if value < 0.99:
            assert checker.check(scores, value * (1 + 3e-4), token[None]).item() == Decision.CUT


def test_softcapped_logits_have_their_own_constraints():
    """Capped logits: the gradient is diag(1 - (z / c)^2) W, so the exact program on those columns must agree."""
    cap, basis = 5.0, random_basis(100, 6, 5)
    capped = SoftmaxBasis(basis.factors, basis.singular_values, "", softcap=cap)
    logits = cap * torch.tanh(random_scores(100, 5) / cap)
    slope = 1 - (logits / cap).square()
    scaled = SoftmaxBasis(basis.factors * slope[:, None], basis.singular_values, "")
    kept = SupportChecker(capped).kept(logits, 0.02, floor=0.0)
    assert torch.equal(kept, SupportChecker(scaled).kept(logits, 0.02, floor=0.0))
    assert not torch.equal(kept, SupportChecker(basis).kept(logits, 0.02, floor=0.0))
    with pytest.raises(ValueError, match="caps its logits at 5"):
        SupportChecker(capped).kept(logits.log_softmax(-1), 0.02)


def test_a_keep_that_the_whole_vocabulary_refuses_is_no_keep(monkeypatch):
    """With the verification switched off, wrong keeps appear: it is what the proofs hang on."""
    basis, scores = random_basis(3000, 12, 6), random_scores(3000, 6, 1.5)
    tokens = scores.argsort(descending=True)[:400]
    exact = SupportChecker(basis, columns=64).check(scores, 0.01, tokens)

    def believe(self, multipliers):
        own = (self.decisions == 0).nonzero()[: len(multipliers), 0]
        self.decisions[own] = 1
        return multipliers @ self.row.basis.T

    monkeypatch.setattr(support_proofs.TokenDecisions, "_verify", believe)
    assert (SupportChecker(basis, columns=64).check(scores, 0.01, tokens) != exact).any()


@pytest.mark.parametrize(("excess", "decision"), [(-1e-9, 0), (5e-9, 0), (3e-8, 1)])
def test_a_keep_needs_its_margin_over_the_whole_vocabulary(excess, decision):
    """Turn l until sigma p-hat_i f_i stands at (1 + excess) T(l): under the margin nothing is proved."""
    basis, scores = random_basis(2000, 1, 7), random_scores(2000, 7, 2.0)
    probs, tau = scores.softmax(-1), 0.01
    token = probs.masked_fill(probs >= tau, 0).argmax()
    weights = torch.cat([torch.ones(2000, 1, dtype=torch.float64), basis.factors], dim=1)

    def ratio(angle: float) -> float:
        f = weights @ torch.tensor([np.cos(angle), np.sin(angle)])
        bound = probs @ (tau / (1 - tau) * f.clamp_min(0) + (-f).clamp_min(0))
        return float(probs[token] * f[token] / (1 - tau) / bound)

    best = max(np.linspace(-1, 1, 201), key=ratio)
    low, high = 0.0, float(best)
    assert ratio(low) < 1 - 1e-6 < 1 + 1e-6 < ratio(high)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < 1 + excess else (low, middle)
    checker = SupportChecker(basis)
    work = support_proofs.TokenDecisions(checker.row(scores), tau, token[None])
    work._verify(torch.tensor([[np.cos(high), np.sin(high)]]))
    assert work.decisions.item() == decision


@pytest.fixture(scope="module")
def flat():
    """A row whose mass lies in hundreds of tokens: programs on a few columns prove little."""
    return random_basis(1200, 10, 5), random_scores(1200, 5, spread=0.7), 5e-3


def test_a_flat_rows_tokens_are_decided_together_as_each_is_alone(flat, monkeypatch):
    basis, scores, tau = flat
    programs = []
    widened = support_proofs.TokenDecisions._widened
    monkeypatch.setattr(support_proofs.TokenDecisions, "_widened", lambda *given: programs.append(1) or widened(*given))
    checker = SupportChecker(basis, columns=64)
    kept = checker.kept(scores, tau, floor=0)
    below = (scores.softmax(-1) < tau).nonzero()[:, 0]
    assert checker.checked == len(below)
    assert checker.undecided == 0
    assert 0 < len(programs) < len(below) / 50
    for token in below[scores[below].argsort(descending=True)][:200:8]:
        assert bool(kept[token]) == bool(checker.check(scores, tau, token[None]) == Decision.KEPT)


def test_a_limit_decides_the_most_probable_tokens_and_keeps_no_others_than_proofs_do(flat):
    basis, scores, tau = flat
    checker = SupportChecker(basis, columns=64)
    whole = checker.kept(scores, tau, floor=0)
    bounded = SupportChecker(basis, columns=64)
    kept = bounded.kept(scores, tau, floor=0, limit=100)
    assert bounded.checked <= 100
    assert not (kept & ~whole).any()
    first = scores.softmax(-1).argsort(descending=True)[: 100 + int((scores.softmax(-1) >= tau).sum())]
    bounded = checker.kept(scores, tau, floor=0, limit=100)
    assert torch.equal(bounded[first], whole[first])
    assert bounded.sum() < whole.sum()
    with pytest.raises(ValueError, match="limit must be"):
        checker.kept(scores, tau, limit=0)


def test_a_cut_that_leaves_the_box_is_no_cut():
    basis = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64)).Q * 40**0.5
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    solver = InteriorPoint(basis, weights, 0.1, 1)
    start = solver._start(torch.tensor([[1.0, 0.5, -0.5]]).double(), torch.ones(1, dtype=torch.float64))
    step = solver._predict(start)
    reach = step.primal_step * step.dt
    for threshold, proved in ((reach / 2, True), (reach * 2, False)):
        beyond = step._replace(primal_step=torch.full_like(reach, 1e9))
        _, accepted = solver._feasible(start._replace(threshold=threshold), step if proved else beyond)
        assert accepted.item() == proved


def test_bad_input_is_named():
    basis, scores = random_basis(50, 3, 0), torch.zeros(50)
    tokens = torch.tensor([1])
    checker = SupportChecker(basis)
    for tau in (0.0, 1.0, -0.1, 2.0):
        with pytest.raises(ValueError, match=r"tau must lie in \(0, 1\)"):
            checker.check(scores, tau, tokens)
    with pytest.raises(ValueError, match="the vocabulary of the basis"):
        checker.check(torch.zeros(51), 0.1, tokens)
    with pytest.raises(ValueError, match="tokens must lie in"):
        checker.check(scores, 0.1, torch.tensor([50]))
    with pytest.raises(ValueError, match="tokens must be an int64 tensor"):
        checker.check(scores, 0.1, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="one number or one a row"):
        checker.check(scores[None], torch.tensor([0.1, 0.2]), tokens[None])
    with pytest.raises(ValueError, match="finite or -inf"):
        checker.check(scores * torch.nan, 0.1, tokens)
    with pytest.raises(ValueError, match="floor must be"):
        checker.kept(scores, 0.1, floor=-1.0)
    with pytest.raises(ValueError, match="columns must be"):
        SupportChecker(basis, columns=0)
    with pytest.raises(TypeError, match="basis"):
        SupportChecker(basis.factors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_decides_as_the_cpu():
    basis = random_basis(5000, 20, 8)
    scores = torch.stack([random_scores(5000, seed, 2.5) for seed in range(4)])
    on_cpu = SupportChecker(basis).kept(scores, 0.005)
    assert torch.equal(SupportChecker(basis).kept(scores.cuda(), 0.005).cpu(), on_cpu)
