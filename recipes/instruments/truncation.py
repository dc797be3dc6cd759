"""Truncation samplers on a human text and after a repeated phrase, side by side.

On a text: how often a sampler keeps the token that the author wrote, and how much probability. With q the truncated and
p the model's distribution, the total variation distance of the two is 1 - kept mass; the entropy of q is the
remaining diversity. After a repeated phrase: whether the sampler escapes the repetition.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation.display import new_axes, new_table
from hf_longtrunc.evaluation.perplexity import token_losses
from hf_longtrunc.evaluation.records import Journal, ModelRecord, model_settings
from hf_longtrunc.evaluation.traces import check_reading, rows_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table
    from torch import Tensor

    Samplers = Mapping[str, Sequence[Callable[[Tensor, Tensor], Tensor]]]

REPETITIVE = 1.0  # nats a token: a continuation under it is repetitive (Hewitt et al. 2022)


@dataclass(frozen=True)
class TruncationScore(ModelRecord):
    """One sampler on one text, means over its tokens.

    Attributes:
        sampler: its name in the comparison.
        settings: its processors and their parameters.
        text: a digest of the token ids.
        tokens: tokens that were predicted: all but the first.
        accepted: share of the text's tokens that the sampler keeps.
        kept_mass: probability of the kept tokens before truncation.
        total_variation: 1 - kept_mass.
        kept: how many tokens are kept.
        entropy: of the model's distribution, in nats.
        kept_entropy: of the truncated and renormalised one.
    """

    sampler: str
    settings: str
    text: str
    tokens: int
    accepted: float
    kept_mass: float
    total_variation: float
    kept: float
    entropy: float
    kept_entropy: float


@dataclass(frozen=True)
class RepetitionRecord(ModelRecord):
    """One continuation of a repeated phrase: mean loss of its tokens under the model itself, in nats, and the text."""

    sampler: str
    settings: str
    phrase: str
    repeats: int
    seed: int
    max_new_tokens: int
    tokens: int
    loss: float
    repetitive: bool
    text: str


@torch.no_grad()
def truncation_scores(
    model: Any,
    input_ids: Tensor,
    samplers: Samplers,
    *,
    chunk: int = 512,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[TruncationScore]:
    """Hold every sampler against the same distributions: the model's at each token of a human text.

    Args:
        model: a causal LM in eval mode.
        input_ids: the text's token ids [n], n >= 2.
        samplers: name -> logits processors, ours or transformers', applied in this order to (ids so far [1, t], logits
            [1, V] in fp32). Tokens that they set to -inf are cut.
        chunk: tokens a forward.
        path: a JSON-lines file; samplers that it holds for the same text and model are not run again.
        progress: show a bar.

    Returns:
        One score per sampler, in their order.

    Raises:
        ValueError: a model in training mode; a text of fewer than 2 tokens; a sampler that cuts everything or raises a
            score from -inf.

    Cost: one reading of the text, and a softmax over the vocabulary per token and sampler.
    """
    check_reading(model, input_ids)
    chunk = check_int("chunk", chunk, minimum=1)
    journal = Journal(
        path, TruncationScore, ("accepted", "kept_mass", "total_variation", "kept", "entropy", "kept_entropy")
    )
    text = hashlib.sha256(input_ids.cpu().long().numpy().tobytes()).hexdigest()[:16]
    common = {**model_settings(model), "text": text, "tokens": len(input_ids) - 1}
    cells = {name: {"sampler": name, "settings": _settings(samplers[name]), **common} for name in samplers}
    known = {name: journal.get(**cell) for name, cell in cells.items()}
    missing = {name: samplers[name] for name, record in known.items() if record is None}
    for name, means in _means(model, input_ids, missing, chunk, progress).items():
        known[name] = TruncationScore(**cells[name], **means)  # type: ignore[arg-type]
        journal.add(known[name])  # type: ignore[arg-type]
    return [record for record in known.values() if record is not None]


def run_repetition(
    model: Any,
    tokenizer: Any,
    phrases: Sequence[str],
    samplers: Samplers,
    *,
    seeds: Sequence[int] = (0,),
    repeats: int = 5,
    max_new_tokens: int = 512,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[RepetitionRecord]:
    """Continue a phrase that was repeated, by every sampler, and see whether it goes on repeating.

    Args:
        model: a causal LM that generates.
        tokenizer: its tokenizer.
        phrases: each is written `repeats` times, a blank between.
        samplers: name -> logits processors; sampling is at temperature 1 from the kept tokens, without top-k.
        seeds: of the draws; the caller's generator is left as it was.
        repeats: how often the phrase stands in the prompt.
        max_new_tokens: of the continuation; an end-of-text token ends it sooner.
        path: a JSON-lines file; continuations that it holds are not drawn again.
        progress: show a bar per sampler.

    Returns:
        One record per sampler, phrase and seed; `repetitive` where the mean loss is under 1 nat (Hewitt et al. 2022,
        arXiv 2210.15191).

    Raises:
        TypeError, ValueError: a number that is not whole or below 1.
    """
    journal = Journal(path, RepetitionRecord, ("tokens", "loss", "repetitive", "text"))
    sizes: dict[str, Any] = {
        "repeats": check_int("repeats", repeats, minimum=1),
        "max_new_tokens": check_int("max_new_tokens", max_new_tokens, minimum=1),
        **model_settings(model),
    }
    draws = [check_int("seeds", seed) for seed in seeds]
    cells: list[dict[str, Any]] = [{"phrase": phrase, "seed": seed, **sizes} for phrase in phrases for seed in draws]
    records = []
    for name, processors in samplers.items():
        setting: dict[str, Any] = {"sampler": name, "settings": _settings(processors)}
        for cell in tqdm(cells, desc=name, unit="text", disable=not progress):
            records.append(journal.once(setting | cell, partial(_continued, model, tokenizer, processors, cell)))
    return records


def truncation_table(scores: Sequence[TruncationScore]) -> Table:
    """Lay scores out as a rich table, a row per sampler."""
    table = new_table(title="samplers on a human text")
    for heading in ("sampler", "human tokens kept", "kept mass", "total variation", "tokens kept", "entropy left"):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for score in scores:
        shares = (score.accepted, score.kept_mass, score.total_variation)
        entropy = f"{score.kept_entropy:.3f} of {score.entropy:.3f}"
        table.add_row(score.sampler, *(f"{share:.2%}" for share in shares), f"{score.kept:,.1f}", entropy)
    return table


def repetition_table(records: Sequence[RepetitionRecord]) -> Table:
    """Lay records out as a rich table, a row per sampler: share of repetitive texts, mean and smallest loss."""
    table = new_table(title="continuing a repeated phrase")
    for heading in ("sampler", "repetitive", "mean loss", "smallest", "texts"):
        table.add_column(heading, justify="left" if heading == "sampler" else "right")
    for name in dict.fromkeys(record.sampler for record in records):
        inside = [record for record in records if record.sampler == name]
        losses = [record.loss for record in inside]
        share = sum(record.repetitive for record in inside) / len(inside)
        table.add_row(name, f"{share:.0%}", f"{sum(losses) / len(losses):.2f}", f"{min(losses):.2f}", str(len(inside)))
    return table


def plot_truncation(scores: Sequence[TruncationScore], axes: Axes | None = None) -> Axes:
    """Draw entropy left over total variation; samplers with the same first word in their names are joined by a line.

    The legend names their parameters from left to right. Of two points the one higher and farther left is better.
    """
    axes = axes or new_axes(7, 4.5)
    families: dict[str, list[TruncationScore]] = {}
    for score in scores:
        families.setdefault(score.sampler.split()[0], []).append(score)
    for (family, members), marker in zip(families.items(), cycle("os^Dvp*")):
        members.sort(key=lambda score: score.total_variation)
        points = [[score.total_variation for score in members], [score.kept_entropy for score in members]]
        parameters = ", ".join(score.sampler.removeprefix(family).strip() for score in members)
        axes.plot(*points, marker=marker, markersize=5, linewidth=1.2, label=f"{family} {parameters}")
    axes.axhline(scores[0].entropy, color="grey", linestyle=":", linewidth=1, label="untruncated")
    axes.set(xlabel="total variation from the model's distribution (less is better)")
    axes.set_ylabel("entropy left, nats (more is better)")
    axes.legend(frameon=False)
    return axes


def plot_repetition(records: Sequence[RepetitionRecord], axes: Axes | None = None) -> Axes:
    """Draw each continuation's mean loss as a dot in its sampler's row, and the line under which it is repetitive."""
    axes = axes or new_axes(7, 4.5)
    names = list(dict.fromkeys(record.sampler for record in records))
    for row, name in enumerate(names):
        losses = [record.loss for record in records if record.sampler == name]
        axes.plot(losses, [row] * len(losses), "o", markersize=6, alpha=0.5)
    axes.axvline(REPETITIVE, color="grey", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="mean loss of the continuation (nats); left of the line: repetitive", ylim=(len(names) - 0.5, -0.5))
    axes.set_xlim(left=0)
    return axes


def _means(
    model: Any, input_ids: Tensor, samplers: Samplers, chunk: int, progress: bool
) -> dict[str, dict[str, float]]:
    """Return each sampler's mean values over the tokens of the text."""
    if not samplers:
        return {}
    ids = input_ids.to(model.device)
    sums = {name: torch.zeros(5, dtype=torch.float64) for name in samplers}
    steps = tqdm(rows_of(model, ids, chunk), total=len(ids) - 1, unit="tok", disable=not progress)
    for position, scores in enumerate(steps, 1):
        log_p = scores.double().log_softmax(-1)
        entropy = _entropy(log_p[~log_p.isneginf()])
        for name, processors in samplers.items():
            kept = _processed(name, processors, ids[None, :position], scores)
            sums[name] += _measured(log_p, entropy, kept, ids[position])
    columns = ("accepted", "kept_mass", "kept", "entropy", "kept_entropy")
    means = {name: dict(zip(columns, (total / (len(ids) - 1)).tolist(), strict=True)) for name, total in sums.items()}
    return {name: {**values, "total_variation": 1 - values["kept_mass"]} for name, values in means.items()}


def _processed(
    name: str, processors: Sequence[Callable[[Tensor, Tensor], Tensor]], ids: Tensor, scores: Tensor
) -> Tensor:
    """Return the scores [1, V] after all processors."""
    kept = scores.clone()
    for processor in processors:
        kept = processor(ids, kept)
    alive = ~kept.isneginf()
    if not alive.any() or (alive & scores.isneginf()).any():
        raise ValueError(f"sampler {name!r} cuts every token, or brings back one that the model rules out")
    return kept


def _measured(log_p: Tensor, entropy: Tensor, kept: Tensor, token: Tensor) -> Tensor:
    """Return accepted, kept mass, kept tokens, entropy before and after, in nats, of one row [1, V]."""
    alive = ~kept.isneginf()
    mass = log_p[alive].exp().sum().clamp_max(1)
    left = _entropy(kept[alive].double().log_softmax(-1))
    return torch.stack([alive[0, token].double(), mass, alive.sum().double(), entropy, left]).cpu()


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum()


def _continued(
    model: Any, tokenizer: Any, processors: Sequence[Callable[[Tensor, Tensor], Tensor]], cell: Mapping[str, Any]
) -> dict[str, Any]:
    prompt = tokenizer(" ".join([cell["phrase"]] * cell["repeats"]), return_tensors="pt").input_ids.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(cell["seed"])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=list(processors),
            max_new_tokens=cell["max_new_tokens"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )
    loss = token_losses(model, output)[0, prompt.shape[1] - 1 :].mean().item()
    made = output[0, prompt.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    return {"tokens": len(made), "loss": loss, "repetitive": loss < REPETITIVE, "text": text}


def _settings(processors: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> str:
    """Name processors and their plain parameters, the same in every process."""
    return ", ".join(map(_described, processors))


def _described(processor: Callable[[Tensor, Tensor], Tensor]) -> str:
    plain = (bool, int, float, str, type(None))
    named = {key: value for key, value in vars(processor).items() if not key.startswith("_")}
    parameters = {key: value for key, value in named.items() if isinstance(value, plain)}
    kind: Any = type(processor)
    name = repr(processor) if kind.__repr__ is not object.__repr__ else kind.__name__
    name = getattr(processor, "__qualname__", name)
    return f"{name} {parameters}"
