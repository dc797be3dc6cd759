r"""Reading the middle: which of the keys that neither window nor sinks hold a query gets to see all the same.

For a query at position i the *middle* is S <= j <= i - L. Every key of it is scored as if it stood at one constant
distance D_k, <R(D_k) q, k> with k un-rotated, so that its place in the text says nothing, and the best ones join the
softmax of window and sinks with that score.

Source: Han et al. 2024, "LM-Infinite", arXiv 2308.16137, section 3.2 and appendix on passkeys: k = 5 keys a head, D_k
half the trained length, for the last row of a forward. Deviation: any number of rows may read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.lambda_attention import Retrieved, constant_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from hf_longtrunc.attention.lambda_attention import Scoring

STORES = ("device", "cpu")


@dataclass(frozen=True)
class TopK:
    """Each head of the last rows of a forward reads its `k` best keys of the middle.

    Args:
        k: keys a head and row; 5 in the paper.
        distance: D_k, at which every key of the middle is scored and seen; None takes half the window, as the paper.
        first_layer: the first layer that reads; 4 to 6 in the paper.
        rows: how many of the last rows of each forward read: of a whole prompt, of each chunk of a prompt that comes in
            chunks, of every decoded token its own. 1 is the paper's setting, None lets every row read.
        store: where the whole text's keys and values are kept: on the model's "device", or on the "cpu" (pinned memory
            for CUDA), where they are searched too, so that only what was chosen travels.

    Cost: O(n) memory; a reading row costs O(n) time in each layer.
    """

    k: int = 64
    distance: int | None = None
    first_layer: int = 4
    rows: int | None = 64
    store: str = "device"

    def __post_init__(self) -> None:
        check_settings(self, {"k": 1, "distance": 1, "first_layer": 0, "rows": 1}, may_be_none={"distance", "rows"})


def check_settings(strategy: object, least: dict[str, int], may_be_none: set[str]) -> None:
    """Refuse a strategy whose counts are no whole numbers of at least `least`, or whose store is unknown."""
    owner = type(strategy).__name__
    for name, bound in least.items():
        value = getattr(strategy, name)
        if value is None and name in may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {name} must be a whole number, got {value!r} of type {type(value).__name__}")
        if value < bound:
            raise ValueError(f"{owner}: {name} must be at least {bound}, got {value}")
    store = getattr(strategy, "store")  # noqa: B009  every strategy has one
    if store not in STORES:
        raise ValueError(f"{owner}: store must be one of {', '.join(STORES)}, got {store!r}")


class Middle(NamedTuple):
    """Everything that a text has said so far, un-rotated.

    Attributes:
        key: [batch, kv_heads, m, dim], every key as if it stood at position 0.
        value: [batch, kv_heads, m, value_dim].
        positions: of the keys [rows, m], counted from each row's first real token.
    """

    key: Tensor
    value: Tensor
    positions: Tensor


def in_middle(
    query_positions: Int[Tensor, "*#rows n"], key_positions: Int[Tensor, "*#rows m"], num_sink_tokens: int, window: int
) -> Bool[Tensor, "... n m"]:
    """Return whether a key is one that window and sinks have lost, S <= j <= i - L."""
    i, j = query_positions[..., :, None], key_positions[..., None, :]
    return (j >= num_sink_tokens) & (i - j >= window)


def top_k(
    query: Float[Tensor, "batch heads n dim"],
    query_positions: Int[Tensor, "rows n"],
    middle: Middle,
    *,
    k: int,
    distance: int,
    num_sink_tokens: int,
    window: int,
    scoring: Scoring,
) -> Retrieved:
    """Choose each head's and row's k best keys of the middle; all of them where there are fewer.

    Args:
        query: turned to the distance at which it is to see the middle.
        query_positions: counted from each row's first real token; `rows` is the batch or 1.
        middle: the text, on any device.
        k: keys a head and row.
        distance: what the query was turned to (ALiBi's bias needs it).
        num_sink_tokens: S.
        window: L.
        scoring: scale, cap, slopes.

    Returns:
        On the query's device; logits of -3e38 or so where a row found fewer.
    """
    device, batch, heads, n = middle.key.device, *query.shape[:3]
    scores = constant_scores(query.to(device), middle.key, distance, scoring)
    candidates = in_middle(query_positions.to(device), middle.positions, num_sink_tokens, window)
    scores = scores.masked_fill(~candidates[:, None], torch.finfo(scores.dtype).min)
    best, index = scores.topk(min(k, scores.shape[-1]), dim=-1)
    dim = middle.value.shape[-1]
    flat = index.reshape(batch, middle.value.shape[1], -1, 1).expand(-1, -1, -1, dim)  # a group's heads together
    value = middle.value.gather(2, flat).view(batch, heads, n, -1, dim)
    return Retrieved(best.to(query.device), value.to(query.device))
