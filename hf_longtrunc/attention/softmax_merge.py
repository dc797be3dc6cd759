r"""One softmax over keys that are attended to in several kernel calls.

Each part is an ordinary attention call over keys of its own, with queries that may be rotated differently for each, and
returns an output o_p and the log-sum-exp l_p of its logits. Then, in fp32 or better,

    l = log sum_p exp(l_p)        o = sum_p exp(l_p - l) o_p

is attention over all keys together. A kernel's log-sum-exp carries no gradient, so the sum must not be left to
autograd: the backward pass of each part is called with the merged o and l instead of its own, which makes its
attention weights those of the one softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.kernels import grouped_matmul, grouped_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

    from hf_longtrunc.attention.kernels import Scoring

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# In torch 2.7 this kernel reads past grouped keys without an error, and gives NaN for some shapes; 2.13 is held to the
# definition by the tests, and no release between them was tried.
_KERNEL_IS_TRIED = torch.__version__ >= "2.13"
ROWS_SCORED = 256  # queries of a part that are scored together where no kernel returns the log-sum-exp


MaskKind = Literal["full", "causal", "anticausal"]
_Kind = tuple[MaskKind, "Tensor | None"]  # mask and bias of a part


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
    tensors = [tensor for part in parts for tensor in (part.query, part.key, part.value)]
    null_logits = scoring.null_logits
    learned = tensors if null_logits is None else [*tensors, null_logits]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned)):
        return _merge(parts, scoring)[0]
    kinds = [(part.mask, part.bias) for part in parts]
    output: Tensor = _Merge.apply(scoring, kinds, null_logits, *tensors)  # type: ignore[no-untyped-call]
    return output


def _merge(parts: Sequence[AttentionPart], scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Return the output over the keys of all parts, and each part's log-sum-exp [parts, batch, heads, n].

    The null logits, where there are any, are the last of the log-sum-exps.
    """
    outputs, each = [], []
    for part in parts:
        output, lse = _attend_part(part, scoring)
        outputs.append(output)
        each.append(lse)
    if scoring.null_logits is not None:
        each.append(scoring.null_logits.to(each[0].dtype)[None, :, None].expand_as(each[0]))
    sums = torch.stack(each)
    if len(each) == 1:
        return outputs[0], sums
    merged = torch.zeros_like(outputs[0], dtype=sums.dtype)
    for output, weight in zip(outputs, sums.softmax(0)[: len(outputs), ..., None], strict=True):
        merged.addcmul_(output.to(sums.dtype), weight)
    return merged.to(parts[0].query.dtype), sums


class _Merge(torch.autograd.Function):
    """Forward and backward of `merge_attention`; tensors come as query, key, value of one part after another."""

    @staticmethod
    def forward(
        ctx: Any, scoring: Scoring, kinds: Sequence[_Kind], null_logits: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        output, sums = _merge(_parts(tensors, kinds), scoring)
        ctx.save_for_backward(null_logits, *tensors, output, sums.logsumexp(0))
        ctx.scoring, ctx.kinds = scoring._replace(null_logits=None), kinds
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        null_logits, *tensors, output, total = ctx.saved_tensors
        gradients: list[Tensor] = []
        to_null = None
        if null_logits is not None:
            delta = (grads[0].to(total.dtype) * output.to(total.dtype)).sum(-1)
            to_null = -((null_logits.to(total.dtype)[:, None] - total).exp() * delta).sum((0, 2)).to(null_logits.dtype)
        for part in _parts(tensors, ctx.kinds):
            gradients.extend(_backward(part, ctx.scoring, grads[0], output, total))
        return None, None, to_null, *gradients


def _parts(tensors: Sequence[Tensor], kinds: Sequence[_Kind]) -> list[AttentionPart]:
    each = zip(tensors[::3], tensors[1::3], tensors[2::3], kinds, strict=True)
    return [AttentionPart(query, key, value, *kind) for query, key, value, kind in each]


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
        scores = scores_of(part, start, scoring)
        value = part.value.to(scores.dtype)
        lse = scores.logsumexp(-1)
        outputs.append(grouped_matmul((scores - lse[..., None]).exp(), value).to(part.query.dtype))
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _backward(
    part: AttentionPart, scoring: Scoring, grad: Tensor, output: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one part's gradients of query, key and value, given the merged output and log-sum-exp."""
    if _has_kernel(part, scoring):
        backwards = part.mask == "anticausal"
        grad, output, total = (x.flip(2) if backwards else x for x in (grad, output, total))
        answer = _FLASH_BACKWARD(
            grad.contiguous(), *_in_order(part), output, total, 0.0, part.mask != "full", scale=scoring.scaling
        )
        query, key, value = (x.flip(2) if backwards else x for x in answer)
        return query, key, value
    wide = total.dtype
    delta = (grad.to(wide) * output.to(wide)).sum(-1, keepdim=True)
    key, value = part.key.to(wide), part.value.to(wide)
    to_query, to_key, to_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for start in range(0, part.query.shape[2], ROWS_SCORED):
        rows = slice(start, start + ROWS_SCORED)
        scores = scores_of(part, start, scoring)
        weights = (scores - total[:, :, rows, None]).exp()
        upstream = grad[:, :, rows].to(wide)
        inner = weights * (grouped_matmul(upstream, value.transpose(-1, -2)) - delta[:, :, rows]) * scoring.scaling
        if scoring.softcap is not None:  # the derivative of c * tanh(s / c)
            capped = scores if part.bias is None else scores - part.bias[:, None, None]
            inner = inner * (1 - (capped.masked_fill(weights == 0, 0) / scoring.softcap).square())
        to_query.append(grouped_matmul(inner, key))
        to_key += _grouped_backward(inner, part.query[:, :, rows].to(wide), key.shape[1])
        to_value += _grouped_backward(weights, upstream, key.shape[1])
    return torch.cat(to_query, dim=2).to(part.query.dtype), to_key.to(part.key.dtype), to_value.to(part.value.dtype)


def _in_order(part: AttentionPart) -> tuple[Tensor, ...]:
    """Return queries, keys and values for a causal kernel: "anticausal" is "causal" backwards."""
    if part.mask == "anticausal":
        return part.query.flip(2), part.key.flip(2), part.value.flip(2)
    return part.query, part.key, part.value


def scores_of(part: AttentionPart, start: int, scoring: Scoring) -> Float[Tensor, "batch heads n m"]:
    """Return the logits of up to 256 queries of a part from `start` on, in fp32 or better."""
    scores = scoring.scores(grouped_scores(part.query[:, :, start : start + ROWS_SCORED], part.key))
    if part.bias is not None:
        scores = scores + part.bias[:, None, None]
    if part.mask != "full":
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        ahead = start + part.key.shape[2] - part.query.shape[2]
        scores = scores.masked_fill(ones.triu(start + 1) if part.mask == "causal" else ones.tril(ahead - 1), -torch.inf)
    return scores


def _grouped_backward(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """x^T y [batch, kv_heads, m, d], summed over the queries and heads of a group; x [..., n, m], y [..., n, d]."""
    batch = x.shape[0]
    return x.reshape(batch, groups, -1, x.shape[-1]).transpose(-1, -2) @ y.reshape(batch, groups, -1, y.shape[-1])
