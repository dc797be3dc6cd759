"""Truncation of rows whose requests ask for different things: what the engines share.

A request names its samplers by plain numbers, as they come over HTTP:

    {"eta": 2e-3}    {"epsilon": 9e-4}    {"top_n_sigma": 1.0}    {"p_less": true}    {"p_less_norm": true}

Several of them are applied in this order, each to the distribution that the one before left. For true and false 1 and 0
do as well: vLLM's server makes them of it. Other keys belong to others and are not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_longtrunc.arguments import number
from hf_longtrunc.sampling.cutoffs import (
    Softmax,
    below_threshold,
    epsilon_log_threshold,
    eta_log_threshold,
    p_less_log_threshold,
    softmax_rows,
    top_n_sigma_log_threshold,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMES = ("eta", "epsilon", "top_n_sigma", "p_less", "p_less_norm")


def wanted(parameters: Mapping[str, object] | None) -> dict[str, float]:
    """Return what a request asks of the samplers, checked: a number for each name, 1.0 for the two without a number.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """
    found: dict[str, float] = {}
    for name in NAMES:
        value = None if parameters is None else parameters.get(name)
        if value is None or value is False:
            continue
        if name in ("p_less", "p_less_norm"):
            if value not in (0, 1):
                raise TypeError(f"{name} must be true or false, got {value!r}")
            if value:
                found[name] = 1.0
        else:
            found[name] = number(name, value, above=0, below=None if name == "top_n_sigma" else 1)
    return found


def truncate(logits: Tensor, requests: Sequence[Mapping[str, float]]) -> Tensor:
    """Return a copy of `logits` [rows, V], -inf in place of the tokens that each row's request cuts.

    Args:
        logits: any floating dtype. Kept ones keep their bits.
        requests: what `wanted` returned, one a row. A row is what it would be alone, to the bit, and to the bit what
            the processor of the same name returns.
    """
    result = logits.clone()
    for name in NAMES:
        places = [row for row, request in enumerate(requests) if name in request]
        if places:
            part = result[places]
            rows = softmax_rows(part)
            values = torch.tensor([requests[row][name] for row in places], dtype=torch.float64)
            result[places] = part.masked_fill(below_threshold(part, rows, _bar(name, rows, values)), -torch.inf)
    return result


def _bar(name: str, rows: Softmax, values: Tensor) -> Tensor:
    if name in ("p_less", "p_less_norm"):
        return p_less_log_threshold(rows, name == "p_less_norm")
    bars = {"eta": eta_log_threshold, "epsilon": epsilon_log_threshold, "top_n_sigma": top_n_sigma_log_threshold}
    return bars[name](rows, values)
