"""The attention weight of each key, from the code that attends.

An output is linear in the values, o = sum_j w_j v_j. With one number for the value of each key, its gradient by v_j is
w_j, summed over the heads that share the key. So no second attention has to be kept equal to the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int


def mass_of_keys(
    attend: Callable[..., Tensor], *values: Float[Tensor, "batch kv_heads _ _"], dtype: torch.dtype
) -> list[Float[Tensor, "batch _"]]:
    """Return the attention that each key is paid [batch, keys], summed over heads and queries.

    Args:
        attend: takes a tensor [batch, kv_heads, keys, 1] for each of `values`, and returns the output of attention
            over all of them [batch, heads, n, 1].
        values: of the keys.
        dtype: in which it is computed.

    Cost: the attention and its backward pass, with values of one number. Works under `torch.no_grad`, not under
    `torch.inference_mode`.
    """
    # A checkpoint around it, which runs the layer again without it, is not to count its tensors.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        ones = [value.new_ones(*value.shape[:3], 1, dtype=dtype).requires_grad_() for value in values]
        found = torch.autograd.grad(attend(*ones).sum(), ones, allow_unused=True)
    return [
        each.new_zeros(each.shape[0], each.shape[2]) if grad is None else grad[..., 0].sum(1)
        for each, grad in zip(ones, found, strict=True)
    ]


def by_stretch(
    mass: Float[Tensor, "batch keys"], positions: Int[Tensor, "rows keys"], stretch: int, count: int
) -> Float[Tensor, "batch count"]:
    """Return the sum of mass over each of `count` stretches of text of so many tokens.

    `positions` are those of the keys, `rows` the batch or 1; what lies before position 0 is padding and has no mass.
    """
    index = (positions.to(mass.device) // stretch).clamp(0, count - 1).expand(mass.shape)
    return mass.new_zeros(len(mass), count).scatter_add(1, index, mass)
