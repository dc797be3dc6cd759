r"""One softmax over keys that are attended to in several kernel calls.

Each part is an ordinary attention call over keys of its own, with queries that may be rotated differently for each, and
returns an output o_p and the log-sum-exp l_p of its logits. Then, in fp32 or better,

    l = log sum_p exp(l_p)        o = sum_p exp(l_p - l) o_p

is attention over all keys together. A kernel's log-sum-exp carries no gradient: where one is needed, 256 queries at a
time are scored against the keys of all parts in one softmax, and scored again in the backward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_longtrunc.attention.kernels import grouped_matmul, grouped_scores, softmax_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from hf_longtrunc.attention.kernels import Scoring

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# In torch 2.7 this kernel reads past grouped keys without an error, and gives NaN for some shapes; 2.13 is held to the
# definition by the tests, and no release between them was tried.
_KERNEL_IS_TRIED = torch.__version__ >= "2.13"
ROWS_SCORED = 256  # queries of a part that are scored together where no kernel returns the log-sum-exp


MaskKind = Literal["full", "causal", "anticausal"]


class AttentionPart(NamedTuple):
    """One kernel call: the queries of all parts, rotated for this part, and keys of its own."""

    query: Tensor  # [batch, heads, n, dim]
    key: Tensor  # [batch, kv_heads, m, dim]
    value: Tensor  # [batch, kv_heads, m, value_dim]
    mask: MaskKind = "full"  # query i sees all keys, those at j <= i, or those at j >= i - (n - m); at least one
    # Of all queries' logits [batch, m]: the log of how many keys each key counts for. Scored without a kernel.
    bias: Tensor | None = None


def merge_attention(parts: Sequence[AttentionPart], scoring: Scoring) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend over the keys of all parts in one softmax; the result has the queries' dtype.

    Args:
        parts: at least one, with equally many queries each. Every query must see a key in one of them.
        scoring: scaling, soft cap and null logits of the layer.

    Cost: that of the parts' kernel calls. No tensor of n x m exists on a CPU, where a kernel returns the log-sum-exp;
    elsewhere, and for soft caps, 256 queries are scored at a time.
    """
    tensors = [scoring.null_logits, *(tensor for part in parts for tensor in (part.query, part.key, part.value))]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        starts = range(0, parts[0].query.shape[2], ROWS_SCORED)
        rows = [checkpoint(_attend_rows, parts, start, scoring, use_reentrant=False) for start in starts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
    return _merge(parts, scoring)


def weights_of(parts: Sequence[AttentionPart], start: int, scoring: Scoring) -> Float[Tensor, "batch heads n keys"]:
    """Return the attention weights of up to 256 queries from `start` on, for the keys of all parts in their order."""
    return softmax_weights(torch.cat([_scores(part, start, scoring) for part in parts], dim=-1), scoring)


def _attend_rows(parts: Sequence[AttentionPart], start: int, scoring: Scoring) -> Tensor:
    """Return the output of up to 256 queries from `start` on."""
    weights = weights_of(parts, start, scoring)
    value = torch.cat([part.value for part in parts], dim=2).to(weights.dtype)
    return grouped_matmul(weights, value).to(parts[0].query.dtype)


def _merge(parts: Sequence[AttentionPart], scoring: Scoring) -> Tensor:
    """Return the output over the keys of all parts, by the log-sum-exp of each and of the null logits."""
    outputs, each = [], []
    for part in parts:
        output, lse = _attend_part(part, scoring)
        outputs.append(output)
        each.append(lse)
    if scoring.null_logits is not None:
        each.append(scoring.null_logits.to(each[0].dtype)[None, :, None].expand_as(each[0]))
    if len(each) == 1:
        return outputs[0]
    sums = torch.stack(each)
    merged = torch.zeros_like(outputs[0], dtype=sums.dtype)
    for output, weight in zip(outputs, sums.softmax(0)[: len(outputs), ..., None], strict=True):
        merged.addcmul_(output.to(sums.dtype), weight)
    return merged.to(parts[0].query.dtype)


def _has_kernel(part: AttentionPart, scoring: Scoring) -> bool:
    has_one_width = part.query.shape[-1] == part.value.shape[-1]
    is_plain = part.bias is None and scoring.softcap is None
    return _KERNEL_IS_TRIED and part.query.device.type == "cpu" and has_one_width and is_plain


def _attend_part(part: AttentionPart, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Return the output [batch, heads, n, value_dim] of one part and its log-sum-exp [batch, heads, n]."""
    if _has_kernel(part, scoring):
        query, key, value = _in_order(part)
        if part.mask == "full" and query.shape[2] == 1:  # a group's heads are queries of one key head, read once
            query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        output, lse = _FLASH(query, key, value, 0.0, part.mask != "full", scale=scoring.scaling)
        output, lse = output.reshape(part.query.shape), lse.reshape(part.query.shape[:-1])
        return (output.flip(2), lse.flip(2)) if part.mask == "anticausal" else (output, lse)
    outputs, sums = [], []
    for start in range(0, part.query.shape[2], ROWS_SCORED):
        scores = _scores(part, start, scoring)
        value = part.value.to(scores.dtype)
        lse = scores.logsumexp(-1)
        outputs.append(grouped_matmul((scores - lse[..., None]).exp(), value).to(part.query.dtype))
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _in_order(part: AttentionPart) -> tuple[Tensor, ...]:
    """Return queries, keys and values for a causal kernel: "anticausal" is "causal" backwards."""
    if part.mask == "anticausal":
        return part.query.flip(2), part.key.flip(2), part.value.flip(2)
    return part.query, part.key, part.value


def _scores(part: AttentionPart, start: int, scoring: Scoring) -> Tensor:
    """Return the logits [batch, heads, n, m] of up to 256 queries of a part from `start` on, in fp32 or better."""
    scores = scoring.scores(grouped_scores(part.query[:, :, start : start + ROWS_SCORED], part.key))
    if part.bias is not None:
        scores = scores + part.bias[:, None, None]
    if part.mask != "full":
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        ahead = start + part.key.shape[2] - part.query.shape[2]
        scores = scores.masked_fill(ones.triu(start + 1) if part.mask == "causal" else ones.tril(ahead - 1), -torch.inf)
    return scores
