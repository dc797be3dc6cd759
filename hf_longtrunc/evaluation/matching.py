"""Parameter matching: the epsilon at which every truncation sampler refuses the same share of a human text.

A token of the text has, for each sampler, one critical epsilon: the sampler keeps it at every smaller one. With p its
probability, H the entropy of the distribution it came from and tau* its basis-aware probability:

    epsilon-sampling: p        eta-sampling: max(p, p^2 exp(2H))
    BAT on epsilon: tau*       BAT on eta: max(tau*, tau*^2 exp(2H))

and 1 for the most probable token, which all of them keep. The share refused at epsilon is the share of critical
epsilons below it; matching is reading off a quantile (Finlayson et al. 2023, arXiv 2310.01693, section 6).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from hf_longtrunc import SoftmaxBasis, SupportChecker
from hf_longtrunc.evaluation.display import new_axes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import Console
    from torch import Tensor

METHODS = ("epsilon", "eta", "BAT on epsilon", "BAT on eta")
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)


def critical_epsilons(
    model: Any, input_ids: Tensor, basis: SoftmaxBasis, *, console: Console | None = None
) -> dict[str, list[float]]:
    """Return every method's critical epsilon of every token of `input_ids` [length] after the first.

    Cost: one forward pass, and some 5 to 10 basis-aware checks a token, at tens of milliseconds a token on a CPU.
    """
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids must be one row of at least 2 tokens, got shape {tuple(input_ids.shape)}")
    with torch.no_grad():
        logits = model(input_ids[None].to(model.device)).logits[0, :-1].float().cpu()
    checker = SupportChecker(basis)
    columns: dict[str, list[float]] = {method: [] for method in METHODS}
    steps = list(zip(logits, input_ids[1:].cpu(), strict=True))
    for scores, token in track(steps, "basis-aware probabilities", console=console, transient=True):
        for method, value in zip(METHODS, _of_token(checker, scores, token), strict=True):
            columns[method].append(value)
    return columns


def matched_epsilon(critical: Sequence[float], share: float) -> float:
    """Return the largest epsilon that refuses at most `share` of the tokens."""
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share!r}")
    return sorted(critical)[math.floor(share * len(critical))]


def match_table(columns: dict[str, list[float]], shares: Sequence[float] = SHARES) -> Table:
    """Return a table with a row for each share of refused tokens: the epsilon of each method."""
    table = Table(title="Epsilon that refuses the same share of the text", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("refused", *columns):
        table.add_column(heading, justify="right")
    for share in shares:
        table.add_row(f"{share:.1%}", *(f"{matched_epsilon(values, share):.3g}" for values in columns.values()))
    return table


def match_plot(columns: dict[str, list[float]], axes: Axes | None = None) -> Axes:
    """Draw the share of refused tokens over epsilon, a line a method."""
    axes = axes or new_axes(7, 4.5)
    for method, values in columns.items():
        ordered = sorted(values)
        axes.step(ordered, [n / len(ordered) for n in range(len(ordered))], where="pre", label=method, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="share of the text's tokens refused")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


def match_text(
    model: Any, tokenizer: Any, text: str, picture: Path, *, rank: int, max_tokens: int, console: Console
) -> None:
    """Print the table for `text` and save the plot: what `hf-longtrunc match` runs."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0, :max_tokens]
    basis = SoftmaxBasis.from_model(model, rank)
    columns = critical_epsilons(model, ids, basis, console=console)
    console.print(match_table(columns))
    console.print(f"[dim]{len(ids) - 1} tokens, rank {rank}; a text's share is known to 1 / tokens at best[/dim]")
    import matplotlib as mpl

    mpl.use("Agg")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure: Any = match_plot(columns).figure
    figure.savefig(picture, dpi=130)
    console.print(f"picture: [bold]{picture}[/bold]")


def _of_token(checker: SupportChecker, scores: Tensor, token: Tensor) -> tuple[float, float, float, float]:
    if int(scores.argmax()) == int(token):
        return 1.0, 1.0, 1.0, 1.0
    log_probs = scores.double().log_softmax(-1)
    p, entropy = float(log_probs[token].exp()), float(-(log_probs.exp() * log_probs).nan_to_num(0).sum())
    critical = float(checker.critical_threshold(scores, token[None]))
    return p, _eta_critical(p, entropy), critical, _eta_critical(critical, entropy)


def _eta_critical(p: float, entropy: float) -> float:
    """Largest epsilon with p >= min(epsilon, sqrt(epsilon) exp(-H))."""
    return min(1.0, max(p, p * p * math.exp(2 * entropy)))
