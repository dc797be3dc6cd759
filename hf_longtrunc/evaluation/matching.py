"""The parameters at which each truncation sampler rejects the same share of a human text.

For each sampler with a parameter, a token of the text has a critical value: the parameter from which the sampler keeps
the token (`hf_longtrunc.evaluation.ranked`). With p the token's probability, H the entropy of the distribution and tau*
the token's basis-aware probability, for example:

    epsilon-sampling: p        eta-sampling: max(p, p^2 exp(2H))       top-k: 1 + how many tokens are more probable
    BAT on epsilon: tau*       BAT on eta: max(tau*, tau*^2 exp(2H))

The share rejected at a parameter is a quantile of the critical values (Finlayson et al. 2023, arXiv 2310.01693,
section 6). P-less has no parameter, so its share is fixed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_longtrunc import SoftmaxBasis, SupportChecker
from hf_longtrunc.arguments import check_choice, check_float, check_int, check_tensor
from hf_longtrunc.evaluation.display import new_axes, new_table
from hf_longtrunc.evaluation.ranked import METHODS as RANKED, rank_of, ranked
from hf_longtrunc.evaluation.streaming import stream_logits
from hf_longtrunc.models import check_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table
    from torch import Tensor

BASIS_AWARE = ("BAT on epsilon", "BAT on eta")
PARAMETERS = {name: method.parameter for name, method in RANKED.items()} | dict.fromkeys(BASIS_AWARE, "epsilon")
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)


def critical_parameters(
    model: Any,
    input_ids: Tensor,
    basis: SoftmaxBasis | None = None,
    *,
    bat_tokens: int = 256,
    chunk: int = 128,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Return the critical parameter of every token of a text after the first, for every sampler.

    It is infinity where a sampler never keeps the token; for one without a parameter 1 where it refuses the token.

    Args:
        model: a causal LM in eval mode.
        input_ids: one row of at least 2 token ids.
        basis: the softmax basis of the same model; None leaves BAT out.
        bat_tokens: BAT's values are found for this many tokens, evenly spread over the text.
        chunk: tokens a forward.
        progress: show a bar.

    Raises:
        TypeError, ValueError: `input_ids` is no row of at least 2 tokens; a bad number.

    Cost: one reading of the text and some 4 ms a token on one CPU thread; for BAT 5 to 10 basis-aware checks a token.

    Examples:
        >>> critical = critical_parameters(model, torch.tensor([5, 6, 7, 8]))
        >>> sorted(critical)[:3], len(critical["eta"])
        (['epsilon', 'eta', 'min-k'], 3)
    """
    check_model(model)
    check_tensor("input_ids", input_ids)
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids must be one row of at least 2 tokens, got shape {tuple(input_ids.shape)}")
    tokens, checker = len(input_ids) - 1, None if basis is None else SupportChecker(basis)
    wanted = min(tokens, check_int("bat_tokens", bat_tokens, minimum=1)) if checker else 0
    chosen = {place * tokens // wanted for place in range(wanted)}
    columns: dict[str, list[float]] = {name: [] for name in (PARAMETERS if checker else RANKED)}
    place = 0
    with tqdm(total=tokens, desc="critical parameters", unit="tok", disable=not progress) as bar:
        for logits in stream_logits(model, input_ids, check_int("chunk", chunk, minimum=1)):
            scores, targets = logits.cpu(), input_ids[place + 1 : place + 1 + len(logits)].cpu()
            rows, rank = ranked(scores), rank_of(scores, targets)
            for name, method in RANKED.items():
                columns[name] += method.critical(rows, rank).tolist()
            for row in (row for row in range(len(scores)) if place + row in chosen):
                found = _basis_aware(checker, scores[row], targets[row], float(rows.entropy[row, -1]))
                for name, value in zip(BASIS_AWARE, found, strict=True):
                    columns[name].append(value)
            place += len(logits)
            bar.update(len(logits))
    return columns


def matched_parameter(method: str, critical: Sequence[float], share: float) -> float:
    """Return the strictest parameter with which a sampler rejects at most `share` of the tokens; infinity if none does.

    Args:
        method: its name, a key of what `critical_parameters` returned. Not p-less, which has no parameter.
        critical: its critical values of the text's tokens.
        share: at least 1 / tokens and below 1: n tokens tell no smaller share from none.

    Raises:
        ValueError: another share, another method.

    Examples:
        >>> matched_parameter("epsilon", [0.3, 0.001, 0.02, 0.1], 0.25)
        0.02
    """
    check_choice("method", method, tuple(name for name, parameter in PARAMETERS.items() if parameter))
    share = check_float("share", share, minimum=1 / len(critical), lt=1)
    return sorted(critical, reverse=keeps_more(method))[math.floor(share * len(critical))]


def keeps_more(method: str) -> bool:
    """Return whether a larger parameter of the method keeps more tokens."""
    return method in RANKED and RANKED[method].keeps_more


def matched_parameters(
    columns: Mapping[str, Sequence[float]], shares: Sequence[float] = SHARES
) -> list[dict[str, float]]:
    """Return a row for each share of refused tokens, `{"refused": share, method: parameter, ...}`, without p-less.

    Args:
        columns: what `critical_parameters` returned.
        shares: those below 1 / tokens are left out, and for BAT those below 1 / its tokens are missing in their rows.

    Raises:
        ValueError: the text is too short for every share.

    Examples:
        >>> matched_parameters({"epsilon": [0.3, 0.001, 0.02, 0.1]}, [0.25, 0.5])
        [{'refused': 0.25, 'epsilon': 0.02}, {'refused': 0.5, 'epsilon': 0.1}]
    """
    return [
        {"refused": share}
        | {
            name: matched_parameter(name, values, share)
            for name, values in columns.items()
            if PARAMETERS[name] and share * len(values) >= 1
        }
        for share in known_shares(max(map(len, columns.values())), shares)
    ]


def refused_shares(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the share of the tokens that each method without a parameter refuses."""
    return {name: sum(values) / len(values) for name, values in columns.items() if not PARAMETERS[name]}


def known_shares(tokens: int, shares: Sequence[float] = SHARES) -> list[float]:
    """Return the shares of at least 1 / `tokens`, as smaller ones cannot be measured; ValueError if there is none."""
    known = [share for share in shares if share * tokens >= 1]
    if not known:
        least = math.ceil(1 / max(shares))
        raise ValueError(f"a share of {max(shares):.0%} needs a text of at least {least + 1} tokens, got {tokens + 1}")
    return known


def match_table(columns: Mapping[str, Sequence[float]], shares: Sequence[float] = SHARES) -> Table:
    """Return `matched_parameters` as a rich table: a row per method, a column per share of rejected tokens.

    Examples:
        >>> match_table({"epsilon": [0.3, 0.001, 0.02, 0.1]}, [0.25, 0.5]).row_count
        1
    """
    rows = matched_parameters(columns, shares)
    refused = [f"{row['refused']:.1%}" for row in rows]
    table = new_table("method", "parameter", "tokens", title="parameter at which a share of the text is refused")
    for heading in refused:
        table.add_column(heading, justify="right")
    for name, values in columns.items():
        if PARAMETERS[name]:
            table.add_row(name, PARAMETERS[name], f"{len(values):,}", *(_shown(row.get(name)) for row in rows))
    if fixed := refused_shares(columns):
        table.caption = "; ".join(f"{name} refuses {share:.1%}" for name, share in fixed.items())
    return table


def plot_match(columns: Mapping[str, Sequence[float]], axes: Axes | None = None) -> Axes:
    """Plot the share of rejected tokens over the parameter: a line per method with a probability as its parameter.

    Examples:
        >>> plot_match({"epsilon": [0.3, 0.001, 0.02, 0.1]}).get_xlabel()
        'epsilon or min_p'
    """
    axes = axes or new_axes(7, 4.5)
    for name, values in columns.items():
        if PARAMETERS[name] and not keeps_more(name):
            ordered = sorted(values)
            places = [n / len(ordered) for n in range(len(ordered))]
            axes.step(ordered, places, where="pre", label=name, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="epsilon or min_p", ylabel="share of the text's tokens refused")
    axes.legend(frameon=False)
    return axes


def _basis_aware(checker: SupportChecker | None, scores: Tensor, token: Tensor, entropy: float) -> tuple[float, float]:
    if checker is None or int(scores.argmax()) == int(token):
        return 1.0, 1.0
    critical = float(checker.critical_threshold(scores, token[None]))
    return critical, min(1.0, max(critical, critical**2 * math.exp(2 * entropy)))


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return "none" if math.isinf(value) else f"{value:.4g}"
