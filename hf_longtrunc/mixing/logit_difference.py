r"""Distributions combined from the scores of two or three models, in pure torch.

Every function takes log-probabilities of shared shape [..., V] (-inf is probability zero) and returns normalised
log-probabilities, as beam search needs them:

    logit difference   p / q^alpha               q knows the facts to forget       (Ji et al. 2024)
    contrast           p / q  on p's head        q is a weaker model               (Li et al. 2022)
    proxy              p (q+ / q-)^alpha         q+ is q- after tuning             (Liu et al. 2024)
    guidance           q (p / q)^scale           q sees another prompt             (Sanchez et al. 2023)

A token with probability zero under the target keeps it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

IGNORED = -100
UNIFORM = -1


def logit_difference(
    target: Float[Tensor, "*rows vocab"], auxiliary: Float[Tensor, "*rows vocab"], alpha: float
) -> Float[Tensor, "*rows vocab"]:
    """Return log of p / q^alpha, renormalised (Ji et al. 2024, section 3)."""
    return _renormalised(target, target - alpha * auxiliary)


def contrast(
    target: Float[Tensor, "*rows vocab"], amateur: Float[Tensor, "*rows vocab"], alpha: float
) -> Float[Tensor, "*rows vocab"]:
    """Return log of p / q over the tokens with p >= alpha max p, the others removed (Li et al. 2022, section 3)."""
    head = target >= target.amax(-1, keepdim=True) + math.log(alpha)
    return _renormalised(target, (target - amateur).masked_fill(~head, -math.inf))


def proxy(
    target: Float[Tensor, "*rows vocab"],
    expert: Float[Tensor, "*rows vocab"],
    anti_expert: Float[Tensor, "*rows vocab"],
    alpha: float,
) -> Float[Tensor, "*rows vocab"]:
    """Return log of p (q+ / q-)^alpha, renormalised (Liu et al. 2024, section 2)."""
    return _renormalised(target, target + alpha * (expert - anti_expert))


def guidance(
    target: Float[Tensor, "*rows vocab"], unconditional: Float[Tensor, "*rows vocab"], scale: float
) -> Float[Tensor, "*rows vocab"]:
    """Return log of q (p / q)^scale, renormalised (Sanchez et al. 2023, section 2)."""
    return _renormalised(target, unconditional + scale * (target - unconditional))


def likely_tokens(log_probs: Float[Tensor, "*rows vocab"], filter_rate: float) -> Bool[Tensor, "*rows vocab"]:
    """Mark the tokens with p >= min(filter_rate max p, k-th largest p), k = filter_rate V, at least 1; ties stay."""
    k = max(1, int(filter_rate * log_probs.shape[-1]))
    kth_largest = log_probs.topk(k, dim=-1).values[..., -1:]
    relative = log_probs.amax(-1, keepdim=True) + math.log(filter_rate)
    return log_probs >= torch.minimum(kth_largest, relative)


def exclude_tail(
    log_probs: Float[Tensor, "*rows vocab"], likely: Bool[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows vocab"]:
    """Remove the tokens that are not likely, for generation; the others share the whole probability."""
    return log_probs.masked_fill(~likely, -math.inf).log_softmax(-1)


def keep_tail(
    log_probs: Float[Tensor, "*rows vocab"],
    likely: Bool[Tensor, "*rows vocab"],
    target: Float[Tensor, "*rows vocab"],
) -> Float[Tensor, "*rows vocab"]:
    """Give the tokens that are not likely the target's probability, for scoring; the others share the rest."""
    head_mass = target.masked_fill(~likely, -math.inf).logsumexp(-1, keepdim=True)
    return torch.where(likely, exclude_tail(log_probs, likely) + head_mass, target)


def forget_retain_loss(
    logits: Float[Tensor, "rows length vocab"],
    labels: Int[Tensor, "rows length"],
    beta: float,
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Return the loss of ULD's assistant: cross-entropy on forget positions, towards uniform on retain positions.

        1 / N ( sum over forget positions of -log q(label)  +  beta sum over retain positions of CE(uniform, q) )

    A label, shifted here, is a token id at a forget position, `UNIFORM` (-1) at a retain position, else `IGNORED`.
    N is `num_items`, or the number of labels that are not ignored: one mean over both kinds, where the paper takes one
    for each, so that the loss of an accumulated batch is the sum of its parts.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    rows, targets = logits[:, :-1][supervised].float(), targets[supervised]  # [supervised, V], [supervised]
    log_total = rows.logsumexp(-1)
    retain = targets == UNIFORM
    learned = log_total - rows.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    uniform = log_total - rows.mean(-1)
    total = torch.where(retain, beta * uniform, learned).sum()
    return total / (supervised.sum().clamp_min(1) if num_items is None else num_items)


def _renormalised(
    target: Float[Tensor, "*rows vocab"], scores: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows vocab"]:
    return scores.masked_fill(target == -math.inf, -math.inf).log_softmax(-1)
