"""The loss of every token of a text, and perplexity by position.

A text is read in chunks through the model's own cache, and only one chunk's logits are held. So memory grows with the
cache: constant for a bounded cache, linear in the text for an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_longtrunc.arguments import check_int, check_kind, check_tensor
from hf_longtrunc.evaluation.display import new_axes, new_table
from hf_longtrunc.evaluation.records import ArmRecord, arm_fields
from hf_longtrunc.evaluation.streaming import start_stream
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from matplotlib.axes import Axes
    from rich.table import Table

    from hf_longtrunc.evaluation.records import Arm

_POINTS_OF_A_CURVE = 64


@dataclass(frozen=True)
class PositionBin:
    """Mean loss over the positions start <= position < end.

    Attributes:
        start: the first position.
        end: one past the last position.
        tokens: predicted tokens that went into the mean, all texts together.
        nll: mean negative log-likelihood in nats: over the texts at each position, then over the positions.
        perplexity: exp(nll).

    Examples:
        >>> perplexity_by_position(torch.zeros(4), [0, 4])
        [PositionBin(start=0, end=4, tokens=4, nll=0.0, perplexity=1.0)]
    """

    start: int
    end: int
    tokens: int
    nll: float
    perplexity: float


@dataclass(frozen=True)
class PerplexityRecord(ArmRecord, PositionBin):
    """A bin of positions with its arm, model and number of texts; from `perplexity_records`."""

    texts: int


@torch.no_grad()
def stream_losses(model: Any, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Read a stream of tokens, chunk by chunk, and yield the loss of each token given all tokens before it.

    Args:
        model: a causal LM in eval mode, patched or not. It is read through the cache that its `generate` builds.
        chunks: token ids [texts, any length >= 1], each the continuation of the one before.

    Yields:
        The negative log-likelihoods of each chunk [texts, length], fp32 nats on the model's device. The first chunk's
        are one column shorter: nothing predicts the first token.

    Raises:
        TypeError, ValueError: no integer token ids; a model in training mode, or one without a cache.

    Cost: one forward a chunk; the logits of one chunk [texts, length, V] in the model's dtype and once in fp32.

    Examples:
        >>> chunks = torch.arange(2, 12)[None].split(4, dim=1)
        >>> [losses.shape[1] for losses in stream_losses(model, chunks)]
        [3, 4, 2]
    """
    if model.training:
        raise ValueError("model is in training mode, where dropout changes the losses: call model.eval() first")
    cache, last = None, None
    for chunk in chunks:
        ids = _checked_ids(chunk).to(model.device)
        if last is None:
            cache, last = start_stream(model, ids[:, :1])
            ids = ids[:, 1:]
        if ids.shape[1] == 0:
            yield last.new_empty(ids.shape, dtype=torch.float32)
            continue
        logits = model(input_ids=ids, use_cache=True, **{CACHE: cache}).logits
        yield torch.cat([_losses(last, ids[:, :1]), _losses(logits[:, :-1], ids[:, 1:])], dim=1)
        last = logits[:, -1:].clone()


def token_losses(model: Any, input_ids: Tensor, *, chunk: int = 512, progress: bool | str = False) -> Tensor:
    """Return the negative log-likelihood of every token of a text; read in chunks, equal to one full forward.

    Args:
        model: see `stream_losses`.
        input_ids: token ids [texts, n] of texts of one length, or [n] for a single one; n >= 2.
        chunk: tokens a forward.
        progress: show a bar, under this name if it is a string.

    Returns:
        fp32 nats on the CPU, [texts, n - 1] (or [n - 1]): entry i is the loss of token i + 1.

    Raises:
        TypeError, ValueError: see `stream_losses`; another shape of input_ids; chunk < 1.

    Examples:
        >>> token_losses(model, torch.arange(2, 12), chunk=4).shape
        torch.Size([9])
    """
    check_tensor("input_ids", input_ids)
    rows = _checked_ids(input_ids if input_ids.ndim == 2 else input_ids[None])
    if rows.shape[1] < 2:
        raise ValueError(f"input_ids must hold at least 2 tokens a text, got {rows.shape[1]}: the first has no loss")
    chunk = check_int("chunk", chunk, minimum=1)
    name = progress if isinstance(progress, str) else None
    pieces = []
    with tqdm(total=rows.shape[1], desc=name, unit="tok", disable=not progress) as bar:
        for piece in stream_losses(model, torch.split(rows, chunk, dim=1)):
            pieces.append(piece.cpu())
            bar.update(piece.shape[1] + (len(pieces) == 1))
            bar.set_postfix(ppl=f"{piece.mean().exp().item():.1f}", refresh=False)
    losses = torch.cat(pieces, dim=1)
    return losses if input_ids.ndim == 2 else losses[0]


def compare_losses(
    model: Any, input_ids: Tensor, arms: Mapping[str, Arm], *, chunk: int = 512, progress: bool = False
) -> dict[str, Tensor]:
    """Run `token_losses` on the same tokens under each arm.

    `arms` maps names to callables (model) -> context manager under which the model is run; the other arguments are as
    for `token_losses`. Returns the losses by the arm's name, in the order of `arms`.

    Examples:
        >>> from contextlib import nullcontext
        >>> from hf_longtrunc import StreamingLLM
        >>> arms = {"unmodified": nullcontext, "StreamingLLM": StreamingLLM(num_sink_tokens=2, window_length=4)}
        >>> losses = compare_losses(model, torch.arange(2, 22), arms)
        >>> {name: len(loss) for name, loss in losses.items()}
        {'unmodified': 19, 'StreamingLLM': 19}
    """
    losses = {}
    check_kind("arms", arms, Mapping, "such as {'unmodified': nullcontext, 'ours': LMInfinite(window_length=512)}")
    for name, arm in arms.items():
        with arm(model):
            losses[name] = token_losses(model, input_ids, chunk=chunk, progress=name if progress else False)
    return losses


def perplexity_by_position(losses: Tensor, edges: Sequence[int]) -> list[PositionBin]:
    """Average losses over texts, then over the positions of each bin, then exponentiate.

    Args:
        losses: nats [texts, positions] or [positions].
        edges: increasing positions e0 < e1 < ...; bin i takes e_i <= position < e_(i+1). A bin without any token is
            left out of the list.

    Raises:
        ValueError: fewer than two edges, or edges that do not increase from 0 or more.

    Examples:
        >>> [round(each.perplexity, 2) for each in perplexity_by_position(torch.tensor([1.0, 1.0, 2.0]), [0, 2, 3])]
        [2.72, 7.39]
    """
    check_kind("losses", losses, Tensor, "token_losses(model, input_ids) makes one")
    rows = losses if losses.ndim == 2 else losses[None]
    bins = []
    for start, end in pairwise(_checked_edges(edges)):
        inside = rows[:, start:end].double()
        if inside.numel():
            nll = inside.mean(0).mean()
            bins.append(PositionBin(start, end, inside.numel(), nll.item(), nll.exp().item()))
    return bins


def default_edges(window_length: int, length: int) -> list[int]:
    """Return bin edges around a trained window L: 0, L/2, L, 1.25 L, 1.5 L, 2 L, 4 L, ... until `length` is inside.

    Raises:
        TypeError, ValueError: a window of less than 4 or a length of less than 1 token.

    Examples:
        >>> default_edges(1000, 1700)
        [0, 500, 1000, 1250, 1500, 2000]
    """
    window_length, length = check_int("window_length", window_length, minimum=4), check_int("length", length, minimum=1)
    edges = [0, window_length // 2, window_length, window_length * 5 // 4, window_length * 3 // 2, window_length * 2]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    needed = next(index for index, edge in enumerate(edges) if edge >= length)
    return edges[: needed + 1]


def perplexity_records(
    model: Any, losses: Mapping[str, Tensor], arms: Mapping[str, Arm], edges: Sequence[int]
) -> list[PerplexityRecord]:
    """Return the perplexity of each arm and bin from the losses that `compare_losses` returned.

    Examples:
        >>> from contextlib import nullcontext
        >>> (record,) = perplexity_records(model, {"plain": torch.ones(4)}, {"plain": nullcontext}, [0, 4])
        >>> record.arm, round(record.perplexity, 3)
        ('plain', 2.718)
    """
    return [
        PerplexityRecord(
            **vars(position_bin),
            texts=1 if loss.ndim == 1 else loss.shape[0],
            **arm_fields(name, arms[name], model),
        )
        for name, loss in losses.items()
        for position_bin in perplexity_by_position(loss, edges)
    ]


def perplexity_table(records: Sequence[PerplexityRecord]) -> Table:
    """Return records as a rich table: a row per arm, a column per bin of positions.

    Examples:
        >>> from contextlib import nullcontext
        >>> records = perplexity_records(model, {"plain": torch.ones(4)}, {"plain": nullcontext}, [0, 2, 4])
        >>> [column.header for column in perplexity_table(records).columns]
        ['arm', '0-2', '2-4']
    """
    bins = sorted({(record.start, record.end) for record in records})
    table = new_table("arm", title="perplexity by position")
    for start, end in bins:
        table.add_column(f"{start:,}-{end:,}", justify="right")
    for arm in dict.fromkeys(record.arm for record in records):
        values = {(record.start, record.end): record.perplexity for record in records if record.arm == arm}
        table.add_row(arm, *(f"{values[key]:,.1f}" if key in values else "" for key in bins))
    return table


def plot_perplexity(
    losses: Mapping[str, Tensor], *, trained_window: int | None = None, axes: Axes | None = None
) -> Axes:
    """Draw perplexity against position, a line per arm of `compare_losses`, each point the mean over 1/64 of the text.

    `trained_window` draws a vertical line there. `axes` are drawn into and returned; None makes new ones.

    Examples:
        >>> axes = plot_perplexity({"plain": torch.ones(100)}, trained_window=64)
        >>> axes.get_xlabel()
        'position (tokens)'
    """
    if not losses:
        raise ValueError("losses must map at least one name to its losses, as compare_losses returns them; got none")
    axes = axes or new_axes(9, 4.5)
    from matplotlib.ticker import LogFormatter

    for name, loss in losses.items():
        step = max(1, -(-loss.shape[-1] // _POINTS_OF_A_CURVE))
        bins = perplexity_by_position(loss, range(0, loss.shape[-1] + step, step))
        centres = [(point.start + min(point.end, loss.shape[-1])) / 2 for point in bins]
        # The first arm is thick, the others are thin dashes over it: where arms agree, each is seen.
        others = sum(line.get_label() != name for line in axes.lines)
        style = {"linewidth": 1.5, "linestyle": (0, (4, 1 + 2 * others))} if others else {"linewidth": 3.0}
        axes.plot(centres, [point.perplexity for point in bins], label=name, **style)
    if trained_window is not None:
        axes.axvline(trained_window, color="grey", linestyle=":", linewidth=1, label="trained window")
    axes.set(xlabel="position (tokens)", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)  # above: it covers no line
    return axes


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    # [texts, m, V], [texts, m] -> [texts, m]
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token ids must be integers (int64 or int32), got {ids.dtype}")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"token ids must be [texts, tokens] with at least one of each, got shape {tuple(ids.shape)}")
    return ids.long()


def _checked_edges(edges: Sequence[int]) -> Sequence[int]:
    positions = [check_int("edges", edge, minimum=0) for edge in edges]
    if len(positions) < 2 or any(left >= right for left, right in pairwise(positions)):
        raise ValueError(f"edges must be at least two positions that increase from 0 or more, got {positions}")
    return positions
