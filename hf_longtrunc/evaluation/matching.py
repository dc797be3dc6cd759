"""Parameter matching: the epsilon at which every truncation sampler refuses the same share of a human text.

A token of the text has, for each sampler, one critical epsilon: the sampler keeps it at every smaller one. With p its
probability, H the entropy of the distribution it came from and tau* its basis-aware probability:

    epsilon-sampling: p        eta-sampling: max(p, p^2 exp(2H))
    BAT on epsilon: tau*       BAT on eta: max(tau*, tau*^2 exp(2H))

and 1 for the most probable token, which all of them keep. Top-n-sigma is matched by 1 / n, at which it grows stricter
as the others do by epsilon: sigma / (largest score - score), and infinity for the most probable token. The share
refused at epsilon is the share of critical epsilons below it; matching is reading off a quantile (Finlayson et al.
2023, arXiv 2310.01693, section 6).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_longtrunc import SoftmaxBasis, SupportChecker
from hf_longtrunc.arguments import number
from hf_longtrunc.evaluation.display import new_axes, new_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table
    from torch import Tensor

METHODS = ("epsilon", "eta", "BAT on epsilon", "BAT on eta", "top-n-sigma (1/n)")
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)


def critical_epsilons(
    model: Any, input_ids: Tensor, basis: SoftmaxBasis, *, progress: bool = False
) -> dict[str, list[float]]:
    """Return every method's critical epsilon of every token of `input_ids` [length] after the first.

    Args:
        model: a causal LM in eval mode.
        input_ids: one row of at least 2 token ids.
        basis: the softmax basis of the same model.
        progress: show a bar.

    Raises:
        ValueError: `input_ids` is no row of at least 2 tokens.

    Cost: one forward pass, and some 5 to 10 basis-aware checks a token, at tens of milliseconds a token on a CPU.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids must be one row of at least 2 tokens, got shape {tuple(input_ids.shape)}")
    with torch.no_grad():
        logits = model(input_ids[None].to(model.device)).logits[0, :-1].float().cpu()
    checker = SupportChecker(basis)
    columns: dict[str, list[float]] = {method: [] for method in METHODS}
    steps = list(zip(logits, input_ids[1:].cpu(), strict=True))
    for scores, token in tqdm(steps, desc="basis-aware probabilities", unit="tok", disable=not progress):
        for method, value in zip(METHODS, _of_token(checker, scores, token), strict=True):
            columns[method].append(value)
    return columns


def matched_epsilon(critical: Sequence[float], share: float) -> float:
    """Return the largest epsilon that refuses at most `share` of the tokens.

    Args:
        critical: the critical epsilons of the text's tokens.
        share: at least 1 / tokens and below 1: n tokens tell no smaller share from none.

    Raises:
        ValueError: another share.
    """
    share = number("share", share, least=1 / len(critical), below=1)
    return sorted(critical)[math.floor(share * len(critical))]


def matched_epsilons(
    columns: Mapping[str, Sequence[float]], shares: Sequence[float] = SHARES
) -> list[dict[str, float]]:
    """Return a row for each share of refused tokens, `{"refused": share, method: epsilon, ...}`.

    Args:
        columns: what `critical_epsilons` returned.
        shares: those below 1 / tokens are left out.

    Raises:
        ValueError: the text is too short for every share.
    """
    return [
        {"refused": share} | {method: matched_epsilon(values, share) for method, values in columns.items()}
        for share in known_shares(min(map(len, columns.values())), shares)
    ]


def known_shares(tokens: int, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the shares that `tokens` predicted tokens can tell from none: those of at least 1 / tokens.

    Raises:
        ValueError: not even the largest.
    """
    known = [share for share in shares if share * tokens >= 1]
    if not known:
        least = math.ceil(1 / max(shares))
        raise ValueError(f"a share of {max(shares):.0%} needs a text of at least {least + 1} tokens, got {tokens + 1}")
    return known


def match_table(columns: Mapping[str, Sequence[float]], shares: Sequence[float] = SHARES) -> Table:
    """Lay `matched_epsilons` out as a rich table: a row per share of refused tokens, a column per method."""
    table = new_table(title="epsilon that refuses the same share of the text")
    rows = matched_epsilons(columns, shares)
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(f"{row['refused']:.1%}", *(f"{row[method]:.3g}" for method in columns))
    return table


def plot_match(columns: Mapping[str, Sequence[float]], axes: Axes | None = None) -> Axes:
    """Draw the share of refused tokens over epsilon, a line a method."""
    axes = axes or new_axes(7, 4.5)
    for method, values in columns.items():
        ordered = sorted(values)
        axes.step(ordered, [n / len(ordered) for n in range(len(ordered))], where="pre", label=method, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="share of the text's tokens refused")
    axes.legend(frameon=False)
    return axes


def _of_token(checker: SupportChecker, scores: Tensor, token: Tensor) -> tuple[float, ...]:
    if int(scores.argmax()) == int(token):
        return 1.0, 1.0, 1.0, 1.0, math.inf
    log_probs = scores.double().log_softmax(-1)
    p, entropy = float(log_probs[token].exp()), float(-(log_probs.exp() * log_probs).nan_to_num(0).sum())
    critical = float(checker.critical_threshold(scores, token[None]))
    finite = scores[scores > -math.inf].double()
    distance = float(finite.max() - scores[token])
    inverse = float(finite.std(correction=0)) / distance if distance else math.inf
    return p, _eta_critical(p, entropy), critical, _eta_critical(critical, entropy), inverse


def _eta_critical(p: float, entropy: float) -> float:
    """Largest epsilon with p >= min(epsilon, sqrt(epsilon) exp(-H))."""
    return min(1.0, max(p, p * p * math.exp(2 * entropy)))
