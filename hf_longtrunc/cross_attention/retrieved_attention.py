r"""Cross-attention over one store of hidden states that all layers and heads share: no keys, no values are ever built.

A head scores a state h against the query q as (h W_k^T + b_k) . q = h . (q W_k) + b_k . q. The second term is the same
for every state and drops out of the softmax, so the head's search is one for q W_k among the states themselves. With
p = softmax of the k best scores and c = sum_j p_j h_j, the head's output is c W_v^T + (sum_j p_j) b_v. The states are
all that is kept: 1 / (2 * layers) of a cache of keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from hf_longtrunc.cross_attention.datastore import Store


class Heads(NamedTuple):
    """Weights and biases of the heads of one cross-attention layer."""

    key_weight: Float[Tensor, "heads head_dim width"]
    key_bias: Float[Tensor, "heads head_dim"]
    value_weight: Float[Tensor, "heads head_dim width"]
    value_bias: Float[Tensor, "heads head_dim"]
    scaling: float
    softcap: float | None = None
    dropout: float = 0.0


def retrieved_attention(
    query: Float[Tensor, "rows heads new head_dim"], stores: Sequence[Store], top_k: Sequence[int], heads: Heads
) -> Float[Tensor, "rows heads new head_dim"]:
    """Let every head of every query attend to its own best states.

    Args:
        query: of rows that share stores evenly: with r rows a store, row i asks store i // r (beams of one text).
        stores: one a text.
        top_k: how many states a head attends to, for each store; all of them if it has no more.
        heads: weights of the layer.

    With k = n this is ordinary attention over all states. Cost per query and head: n * width multiplications for the
    search, k * width for the sum. Source: Bertsch et al. 2023, "Unlimiformer", arXiv 2305.01625, section 2.3.
    """
    absorbed = torch.einsum("rhnd,hdw->rhnw", query, heads.key_weight) * heads.scaling
    constant = torch.einsum("rhnd,hd->rhn", query, heads.key_bias) * heads.scaling
    answers = [
        _attend(some.flatten(0, 2), offset.flatten(), store, k, heads)
        for some, offset, store, k in zip(
            absorbed.chunk(len(stores)), constant.chunk(len(stores)), stores, top_k, strict=True
        )
    ]
    context = torch.cat([sums for sums, _ in answers]).view_as(absorbed)
    mass = torch.cat([total for _, total in answers]).view_as(constant)
    output = torch.einsum("rhnw,hdw->rhnd", context, heads.value_weight)
    return output + mass[..., None] * heads.value_bias[None, :, None]


def _attend(queries: Tensor, constant: Tensor, store: Store, k: int, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return, for absorbed queries [q, width], the sums of retrieved states [q, width] and of their weights [q]."""
    scores, ids = store.search(queries, k)
    scores = scores + constant[:, None]  # matters under a cap only
    if heads.softcap is not None:
        scores = (heads.softcap * torch.tanh(scores / heads.softcap)).masked_fill(ids < 0, -torch.inf)
    accurate = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    weights = F.dropout(scores.softmax(-1, dtype=accurate).to(scores.dtype), heads.dropout)
    return store.weighted_sum(ids, weights), weights.sum(-1)
