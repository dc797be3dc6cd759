r"""One softmax over keys that are attended to in several kernel calls.

Each part is an ordinary attention call over keys of its own, with queries that may be turned differently for each, and
returns an output o_p and the log-sum-exp l_p of its logits. Then, in fp32 or better,

    l = log sum_p exp(l_p)        o = sum_p exp(l_p - l) o_p

is attention over all keys together. A kernel's log-sum-exp carries no gradient, so the sum must not be left to
autograd: the backward pass of each part is called with the joined o and l instead of its own, which makes its
attention weights those of the one softmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# In torch 2.7 this kernel reads past grouped keys without an error, and gives NaN for some shapes; 2.13 is held to the
# definition by the tests, and no release between them was tried.
_KERNEL_IS_TRIED = torch.__version__ >= "2.13"
SCORED_AT_ONCE = 256  # queries of a part that are scored together where no kernel returns the log-sum-exp


Sees = Literal["all", "up_to", "from"]


class Part(NamedTuple):
    """Queries [batch, heads, n, dim], and keys [batch, kv_heads, m, dim] with values [batch, kv_heads, m, value_dim].

    Query i sees "all" keys, those at j <= i ("up_to"), or those at j >= i - (n - m), "up_to" from the other end
    ("from"). Each must see one at least. `bias` [batch, m] joins the logits of all queries: the log of how many keys a
    key counts for. It is for few keys: they are scored without a kernel.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sees: Sees = "all"
    bias: Tensor | None = None


def joined_attention(parts: Sequence[Part], scaling: float) -> Float[Tensor, "batch heads n value_dim"]:
    """Attend over the keys of all parts in one softmax; the result has the queries' dtype.

    Args:
        parts: at least one, with equally many queries each. Every query must see a key in one of them.
        scaling: factor of the dot products.

    Cost: that of the parts' kernel calls. No tensor of n x m exists on a CPU, where a kernel returns the log-sum-exp;
    elsewhere 256 queries are scored at a time.
    """
    tensors = [tensor for part in parts for tensor in part[:3]]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _joined(parts, scaling)[0]
    output: Tensor = _Joined.apply(scaling, [part[3:] for part in parts], *tensors)  # type: ignore[no-untyped-call]
    return output


def _joined(parts: Sequence[Part], scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output over the keys of all parts, and each part's log-sum-exp [parts, batch, heads, n]."""
    answers = [_attended(part, scaling) for part in parts]
    sums = torch.stack([lse for _, lse in answers])
    if len(answers) == 1:
        return answers[0][0], sums
    output = torch.zeros_like(answers[0][0], dtype=sums.dtype)
    for (of_part, _), weight in zip(answers, sums.softmax(0)[..., None], strict=True):
        output.addcmul_(of_part.to(sums.dtype), weight)
    return output.to(parts[0].query.dtype), sums


class _Joined(torch.autograd.Function):
    """Forward and backward of `joined_attention`; tensors come as query, key, value of one part after another."""

    @staticmethod
    def forward(ctx: Any, scaling: float, how: Sequence[tuple[Sees, Tensor | None]], *tensors: Tensor) -> Tensor:
        output, sums = _joined(_parts(tensors, how), scaling)
        ctx.save_for_backward(*tensors, output, sums.logsumexp(0))
        ctx.scaling, ctx.how = scaling, how
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *tensors, output, total = ctx.saved_tensors
        gradients: list[Tensor] = []
        for part in _parts(tensors, ctx.how):
            gradients.extend(_gradients(part, ctx.scaling, grads[0], output, total))
        return None, None, *gradients


def _parts(tensors: Sequence[Tensor], how: Sequence[tuple[Sees, Tensor | None]]) -> list[Part]:
    return [Part(*part[:3], *part[3]) for part in zip(tensors[::3], tensors[1::3], tensors[2::3], how, strict=True)]


def _has_kernel(part: Part) -> bool:
    has_one_width = part.query.shape[-1] == part.value.shape[-1]
    return _KERNEL_IS_TRIED and part.query.device.type == "cpu" and has_one_width and part.bias is None


def _attended(part: Part, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output [batch, heads, n, value_dim] of one part and its log-sum-exp [batch, heads, n]."""
    if _has_kernel(part):
        output, lse = _FLASH(*_in_order(part), 0.0, part.sees != "all", scale=scaling)
        return (output.flip(2), lse.flip(2)) if part.sees == "from" else (output, lse)
    outputs, sums = [], []
    for start in range(0, part.query.shape[2], SCORED_AT_ONCE):
        scores = scored(part, start, scaling)
        value = part.value.to(scores.dtype)
        lse = scores.logsumexp(-1)
        outputs.append(per_group((scores - lse[..., None]).exp(), value).to(part.query.dtype))
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _gradients(
    part: Part, scaling: float, grad: Tensor, output: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one part's gradients of query, key and value, given the joined output and log-sum-exp."""
    if _has_kernel(part):
        backwards = part.sees == "from"
        grad, output, total = (x.flip(2) if backwards else x for x in (grad, output, total))
        answer = _FLASH_BACKWARD(
            grad.contiguous(), *_in_order(part), output, total, 0.0, part.sees != "all", scale=scaling
        )
        query, key, value = (x.flip(2) if backwards else x for x in answer)
        return query, key, value
    wide = total.dtype
    delta = (grad.to(wide) * output.to(wide)).sum(-1, keepdim=True)
    key, value = part.key.to(wide), part.value.to(wide)
    to_query, to_key, to_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for start in range(0, part.query.shape[2], SCORED_AT_ONCE):
        rows = slice(start, start + SCORED_AT_ONCE)
        weights = (scored(part, start, scaling) - total[:, :, rows, None]).exp()
        upstream = grad[:, :, rows].to(wide)
        inner = weights * (per_group(upstream, value.transpose(-1, -2)) - delta[:, :, rows]) * scaling
        to_query.append(per_group(inner, key))
        to_key += _over_group(inner, part.query[:, :, rows].to(wide), key.shape[1])
        to_value += _over_group(weights, upstream, key.shape[1])
    return torch.cat(to_query, dim=2).to(part.query.dtype), to_key.to(part.key.dtype), to_value.to(part.value.dtype)


def _in_order(part: Part) -> tuple[Tensor, ...]:
    """Return queries, keys and values so that a causal kernel hides what is not seen: "from" is "up_to" backwards."""
    return tuple(x.flip(2) for x in part[:3]) if part.sees == "from" else tuple(part[:3])


def scored(part: Part, start: int, scaling: float) -> Float[Tensor, "batch heads n m"]:
    """Return the logits of up to 256 queries of a part from `start` on, in fp32 or better."""
    wide = torch.promote_types(part.query.dtype, torch.float32)
    query = part.query[:, :, start : start + SCORED_AT_ONCE].to(wide)
    scores = per_group(query, part.key.to(wide).transpose(-1, -2)) * scaling
    if part.bias is not None:
        scores = scores + part.bias[:, None, None]
    if part.sees != "all":
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        ahead = start + part.key.shape[2] - part.query.shape[2]
        scores = scores.masked_fill(ones.triu(start + 1) if part.sees == "up_to" else ones.tril(ahead - 1), -torch.inf)
    return scores


def per_group(x: Float[Tensor, "batch heads n k"], y: Float[Tensor, "batch kv_heads k m"]) -> Tensor:
    """Return x times its group's y [batch, heads, n, m]."""
    batch, heads, n, k = x.shape
    return (x.reshape(batch, y.shape[1], -1, k) @ y).view(batch, heads, n, y.shape[-1])


def _over_group(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """x^T y [batch, kv_heads, m, d], summed over the queries and heads of a group; x [..., n, m], y [..., n, d]."""
    batch = x.shape[0]
    return x.reshape(batch, groups, -1, x.shape[-1]).transpose(-1, -2) @ y.reshape(batch, groups, -1, y.shape[-1])
