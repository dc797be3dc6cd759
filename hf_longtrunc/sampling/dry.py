"""DRY: a penalty on tokens that would continue a repetition of the text.

p-e-w 2024, "Don't Repeat Yourself" (text-generation-webui, pull request 5677). If the last n tokens of the text occur
earlier in it, the token that followed them there loses

    multiplier * base^(n - allowed_length)    if n >= allowed_length

for the largest such n, at most 50. A match never contains a sequence breaker, and a breaker is never penalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_longtrunc.arguments import check_float, check_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray

LONGEST = 50


@dataclass(frozen=True, kw_only=True)
class Dry:
    """The settings of DRY, checked; `DRYLogitsProcessor` documents them."""

    multiplier: float = 0.8
    base: float = 1.75
    allowed_length: int = 2
    window: int | None = None
    sequence_breakers: Sequence[int] = ()

    def __post_init__(self) -> None:
        breakers = self.sequence_breakers
        if not isinstance(breakers, (list, tuple)):
            raise TypeError(f"sequence_breakers must be a list of token ids, got {breakers!r}")
        checked = {
            "multiplier": check_float("multiplier", self.multiplier, minimum=0),
            "base": check_float("base", self.base, minimum=1),
            "allowed_length": check_int("allowed_length", self.allowed_length, minimum=1),
            "window": None if self.window is None else check_int("window", self.window, minimum=1),
            "sequence_breakers": tuple(check_int("sequence_breakers", each, minimum=0) for each in breakers),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def penalised(self, scores: Float[Tensor, " vocab"], ids: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Return the scores of the token after `ids`, penalties subtracted.

        Cost: one pass over the text, and for each token of a match one over the places of the text's last token.
        """
        text = np.asarray(ids, dtype=np.int64)
        longest = repetitions(text[-self.window :] if self.window else text, self.sequence_breakers)
        costs = {
            token: min(self.multiplier * self.base ** (length - self.allowed_length), torch.finfo(scores.dtype).max)
            for token, length in longest.items()
            if length >= self.allowed_length and token < len(scores)
        }
        if costs:
            scores = scores.clone()
            scores[list(costs)] -= torch.tensor(list(costs.values()), dtype=scores.dtype, device=scores.device)
        return scores


def repetitions(ids: NDArray[np.int64], breakers: Sequence[int] = ()) -> dict[int, int]:
    """Return the longest match, 1 to 50 tokens, before each token that has followed the last one of `ids` [length]."""
    if not len(ids) or ids[-1] in breakers:
        return {}
    is_breaker = np.isin(ids, np.asarray(breakers, dtype=np.int64))
    ends = np.flatnonzero(is_breaker[-LONGEST:][::-1])
    reach = int(ends[0]) if len(ends) else min(LONGEST, len(ids))
    places = np.flatnonzero((ids[:-1] == ids[-1]) & ~is_breaker[1:])
    longest = dict.fromkeys(ids[places + 1].tolist(), 1)
    for length in range(2, reach + 1):
        places = places[places >= length - 1]
        places = places[ids[places - (length - 1)] == ids[-length]]
        if not len(places):
            break
        longest |= dict.fromkeys(ids[places + 1].tolist(), length)
    return longest
