"""Sampling masks and truncated log-probabilities against softmax over a masked row, finite differences, enumeration."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from hf_longtrunc import SamplingMask, truncated_log_probs, truncated_scores

SHARES = torch.tensor([0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0, 0.3])[:, None]


def random_case(vocab, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(8, vocab, generator=generator, dtype=torch.float64) * 4).to(dtype)
    kept = torch.rand(8, vocab, generator=generator) < SHARES
    labels = torch.randint(vocab, (8,), generator=generator)
    kept[torch.arange(8), labels] = True
    labels[7] = -100
    return logits, kept, labels


def naive(logits, kept, labels, temperature=1.0):
    """Log-probabilities, log kept mass and entropy, a row at a time in double precision."""
    found = []
    for row, keep, label in zip(logits.double() / temperature, kept, labels.tolist(), strict=True):
        q = row[keep].softmax(0)
        mass = row.softmax(0)[keep].sum()
        place = keep[:label].sum() if label >= 0 else None
        found.append([q[place].log(), mass.log(), -(q * q.log()).sum()] if label >= 0 else [row.sum() * 0] * 3)
    return [torch.stack(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("vocab", [1, 7, 8, 1003, 5003, 70_001])
def test_a_mask_returns_what_it_was_made_of(vocab):
    _, kept, _ = random_case(vocab)
    mask = SamplingMask.from_kept(kept)
    assert torch.equal(mask.kept(), kept)
    assert torch.equal(mask.counts, kept.sum(1))
    assert len(mask) == 8
    assert torch.equal(mask[2:5].kept(), kept[2:5])
    assert torch.equal(SamplingMask.cat([mask[:3], mask[3:]]).kept(), kept)
    assert torch.equal(pickle.loads(pickle.dumps(mask)).kept(), kept)
    from_ids = SamplingMask.from_ids([row.nonzero()[:, 0].tolist() for row in kept], vocab)
    assert np.array_equal(from_ids.data, mask.data)
    width = 2 if vocab <= 2**16 else 4
    expected = [min(width * count, (vocab + 7) // 8) for count in kept.sum(1).tolist()]
    assert np.diff(mask.offsets).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [9, 5003])  # more than one part of the vocabulary
def test_scores_and_gradients_against_a_naive_reference(vocab, dtype):
    logits, kept, labels = random_case(vocab, dtype)
    weights, slopes = torch.randn(2, 8, dtype=torch.float64)
    own, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    scores = truncated_scores(own, labels, SamplingMask.from_kept(kept), temperature=0.7)
    expected = naive(reference, kept, labels, 0.7)
    (scores.log_probs * weights + scores.entropy * slopes).sum().backward()
    (expected[0] * weights + expected[2] * slopes).sum().backward()
    close = 1e-12 if dtype == torch.float64 else 2e-5
    for found, wanted in zip(scores, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=0, atol=close)
    close = 1e-2 if dtype == torch.bfloat16 else close  # of the gradient's own dtype
    torch.testing.assert_close(own.grad.double(), reference.grad, rtol=close, atol=close)
    assert not own.grad[~kept].any()
    assert not own.grad[7].any()


def test_more_rows_than_a_part_holds():
    logits = torch.randn(2051, 11)
    kept = torch.rand(2051, 11) < 0.5
    kept[:, 3] = True
    labels = torch.full((2051,), 3)
    expected = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)[:, 3]
    torch.testing.assert_close(truncated_log_probs(logits, labels, SamplingMask.from_kept(kept)), expected)


def test_kept_tokens_far_below_the_row():
    """After an update the tokens that were kept may all be improbable: their sum is taken from their own maximum."""
    logits = torch.tensor([[0.0, -150.0, -151.0]])
    mask = SamplingMask.from_ids([[1, 2]], 3)
    scores = truncated_scores(logits, torch.tensor([1]), mask)
    torch.testing.assert_close(scores.log_probs, torch.tensor([-(1 + torch.tensor(-1.0).exp()).log()]))
    torch.testing.assert_close(scores.log_kept_mass, torch.tensor([-150 + (1 + torch.tensor(-1.0).exp()).log()]))


def test_a_batch_takes_a_mask_a_row():
    """Rows of different lengths, one mask with a step more than it needs."""
    logits, labels = (100 * torch.randn(2, 4, 33)).requires_grad_(), torch.randint(33, (2, 4))
    kept = torch.rand(2, 5, 33) < 0.4
    kept[:, :4].scatter_(2, labels[..., None], True)
    labels[0, 3] = -100
    masks = [SamplingMask.from_kept(kept[0, :3]), SamplingMask.from_kept(kept[1])]
    found = truncated_log_probs(logits, labels, masks)
    expected = logits.masked_fill(~kept[:, :4], -torch.inf).log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])
    expected = expected[..., 0].masked_fill(labels < 0, 0)
    torch.testing.assert_close(found, expected)
    scores = truncated_scores(logits, labels, masks)
    (gradient,) = torch.autograd.grad((scores.log_probs + scores.entropy).sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[0, 3].any()
    flat = SamplingMask.cat([masks[0], SamplingMask.from_ids([[]], 33), masks[1][:4]])
    assert torch.equal(truncated_log_probs(logits.flatten(0, 1), labels.flatten(), flat), found.flatten())


def test_what_does_not_fit_is_refused():
    logits, kept, labels = random_case(9)
    mask = SamplingMask.from_kept(kept)
    kept[4] = False
    with pytest.raises(ValueError, match=r"token \d+ at step 4 .*its mask does not keep"):
        truncated_log_probs(logits, labels, SamplingMask.from_kept(kept))
    with pytest.raises(ValueError, match=r"labels must have the shape of logits without the vocabulary, \[8\], got"):
        truncated_log_probs(logits, labels[:3], mask)
    with pytest.raises(ValueError, match="one step for each of 8 labels, got 3"):
        truncated_log_probs(logits, labels, mask[:3])
    with pytest.raises(ValueError, match="mask is of 9 tokens and logits are of 8"):
        truncated_log_probs(logits[:, :8], labels, mask)
    with pytest.raises(ValueError, match="one SamplingMask for each row of labels"):
        truncated_log_probs(logits, labels, [mask])
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        truncated_log_probs(logits, labels, mask, temperature=0)
    with pytest.raises(ValueError, match=r"ids\[1\] must lie in \[0, 9\), got 2 to 9"):
        SamplingMask.from_ids([[1], [2, 9]], 9)
    with pytest.raises(ValueError, match="at least one, all of one vocabulary"):
        SamplingMask.cat([])
    for label in (8, -5):
        with pytest.raises(ValueError, match=rf"token {label} at step 0 .*its mask does not keep"):
            truncated_log_probs(torch.randn(1, 8), torch.tensor([label]), SamplingMask.from_kept(torch.ones(1, 8) > 0))
    with pytest.raises(TypeError, match="labels must be int64"):
        truncated_log_probs(torch.randn(1, 8), torch.zeros(1).int(), SamplingMask.from_kept(torch.ones(1, 8) > 0))
    with pytest.raises(TypeError, match="mask must be a SamplingMask, or one for each row, got str"):
        truncated_log_probs(torch.randn(1, 8), torch.zeros(1, dtype=torch.long), "mask")
    with pytest.raises(TypeError, match="indexed by a slice of steps"):
        mask[0]


def test_no_copy_of_the_logits_is_kept_for_the_gradient():
    logits = torch.randn(4, 5000).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        truncated_log_probs(logits, torch.zeros(4, dtype=torch.long), SamplingMask.from_ids([[0]] * 4, 5000))
    others = [each for each in saved if each.data_ptr() != logits.data_ptr()]
    assert sum(each.nbytes for each in others) < 4 * 5000


# A policy on a tiny vocabulary: two steps, the second step's logits depend on the first token.
VOCAB = 5


def expected_reward(table, rewards, cutoff):
    """Over truncated sampling, in plain tensor algebra."""
    probs = table.softmax(-1)
    q = probs * (probs >= cutoff)
    q = q / q.sum(-1, keepdim=True)
    return (q[0][:, None] * q[1:] * rewards).sum()


def average_of_estimators(table, rewards, cutoff):
    """Sum probability of being drawn x reward x log-probability over all sequences, truncated and full.

    Their gradients are what two REINFORCE estimators come to on average.
    """
    pairs = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    scores = torch.stack([table[0].expand(len(pairs), -1), table[1:][pairs[:, 0]]], 1)
    kept = scores.detach().softmax(-1) >= cutoff
    is_drawn = kept.gather(2, pairs[..., None]).all(1)[:, 0]
    pairs, scores, kept = pairs[is_drawn], scores[is_drawn], kept[is_drawn]
    masks = [SamplingMask.from_kept(each) for each in kept]
    truncated = truncated_log_probs(scores, pairs, masks).sum(1)
    full = scores.log_softmax(-1).gather(2, pairs[..., None]).sum((1, 2))
    q = scores.detach().softmax(-1) * kept
    q = (q / q.sum(-1, keepdim=True)).gather(2, pairs[..., None]).prod(1)[:, 0]
    weights = q * rewards[pairs[:, 0], pairs[:, 1]]
    return (weights * truncated).sum(), (weights * full).sum()


@pytest.mark.parametrize("seed", range(4))
def test_the_policy_gradient_by_exact_enumeration(seed):
    """Every sequence counted: the estimator is the gradient of the expected reward; the full vocabulary's is not."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(1 + VOCAB, VOCAB, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    (exact,) = torch.autograd.grad(expected_reward(table, rewards, 0.15), table)
    estimate, full = (
        torch.autograd.grad(each, table, retain_graph=True)[0] for each in average_of_estimators(table, rewards, 0.15)
    )
    # The gradient of the objective itself, by central differences: nothing but values of the expected reward.
    differences = torch.zeros_like(table)
    step = 1e-5
    with torch.no_grad():
        for place in itertools.product(*map(range, table.shape)):
            up, down = table.clone(), table.clone()
            up[place] += step
            down[place] -= step
            rise = expected_reward(up, rewards, 0.15) - expected_reward(down, rewards, 0.15)
            differences[place] = rise / (2 * step)
    assert (estimate - exact).abs().max() < 1e-12
    assert (estimate - differences).abs().max() < 1e-6
    assert (full - differences).abs().max() > 1e-2
