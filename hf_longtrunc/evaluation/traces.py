"""What truncation samplers keep at each token of a text that is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc import TruncationTrace
from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation.streaming import stream_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    Samplers = Mapping[str, Sequence[Callable[[Tensor, Tensor], Tensor]]]


@torch.no_grad()
def read_traces(
    model: Any, input_ids: Tensor, samplers: Samplers, *, chunk: int = 512, candidates: int = 20
) -> dict[str, TruncationTrace]:
    """Return a trace per sampler of the tokens that it would have kept at each token of a text.

    Write a page that compares them with `trace.to_html(tokenizer, path, beside=other_traces)`.

    Args:
        model: a causal LM in eval mode.
        input_ids: the text's token ids [n], n >= 2, a human's or a generated one.
        samplers: name -> logits processors, ours or transformers', applied in this order. Tokens that they set to -inf
            count as cut.
        chunk: tokens a forward.
        candidates: as for `TruncationTrace`.

    Raises:
        ValueError: a model in training mode; a text of fewer than 2 tokens; a sampler that draws by itself.

    Cost: one reading of the text, and the cost of a trace for each token and sampler.

    Examples:
        >>> from hf_longtrunc import EtaLogitsProcessor
        >>> traces = read_traces(model, torch.arange(2, 12), {"eta": [EtaLogitsProcessor(2e-3)]})
        >>> len(traces["eta"].records)
        9
    """
    check_reading(model, input_ids)
    if drawing := [
        name for name, each in samplers.items() if any(getattr(one, "mode", "") == "sample" for one in each)
    ]:
        raise ValueError(
            f"sampler {drawing[0]!r} draws tokens by itself, and a text that is read has its own: mode='mask'"
        )
    traces = {name: TruncationTrace(list(each), candidates=candidates) for name, each in samplers.items()}
    ids = input_ids.to(model.device)
    for position, scores in enumerate(rows_of(model, ids, check_int("chunk", chunk, minimum=1)), 1):
        for trace in traces.values():
            trace(ids[None, :position], scores)
    return {name: trace.finish(ids[None]) for name, trace in traces.items()}


def check_reading(model: Any, input_ids: Tensor) -> None:
    """Raise ValueError for a model in training mode, and for token ids that are no text."""
    if model.training:
        raise ValueError("model is in training mode, where dropout changes the distributions: call model.eval() first")
    if input_ids.ndim != 1 or len(input_ids) < 2:
        raise ValueError(f"input_ids must be one row of at least 2 tokens, got shape {tuple(input_ids.shape)}")


def rows_of(model: Any, ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield the logits [1, V] that predict each token of ids [n] after the first."""
    for logits in stream_logits(model, ids, chunk):
        yield from torch.split(logits, 1)
