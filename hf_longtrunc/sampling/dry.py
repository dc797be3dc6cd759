"""DRY: a penalty on the tokens that would go on repeating what the text said before.

p-e-w 2024, "Don't Repeat Yourself" (text-generation-webui, pull request 5677). The end of the text is looked for
earlier in it. Where its last n tokens stand there too, n as large as possible, the token that followed them there loses

    multiplier * base^(n - allowed_length)    if n >= allowed_length

A match never contains a sequence breaker, and a breaker is never penalised. A token that followed several matches is
penalised for the longest. n is counted up to 50, as the original does, so that the power stays finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_longtrunc.arguments import number, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int

LONGEST = 50


@dataclass(frozen=True, kw_only=True)
class Dry:
    """What one text's repetitions cost.

    Args:
        multiplier: at least 0, which penalises nothing.
        base: at least 1.
        allowed_length: so many tokens may be repeated for free; at least 1.
        window: so many of the last tokens are looked at; None takes all.
        sequence_breakers: token ids that end a match.
    """

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
            "multiplier": number("multiplier", self.multiplier, least=0),
            "base": number("base", self.base, least=1),
            "allowed_length": whole("allowed_length", self.allowed_length, least=1),
            "window": None if self.window is None else whole("window", self.window, least=1),
            "sequence_breakers": tuple(whole("sequence_breakers", each, least=0) for each in breakers),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def penalised(self, scores: Float[Tensor, " vocab"], ids: Int[Tensor, " length"]) -> Float[Tensor, " vocab"]:
        """Return the scores of the token after `ids`, each repetition's penalty subtracted.

        Cost: one pass over the text, and one over the places where its last token stood for each token of a match.
        """
        tokens, lengths = repetitions(ids[-self.window :] if self.window else ids, self.sequence_breakers)
        is_long = lengths >= self.allowed_length
        tokens, lengths = tokens[is_long], lengths[is_long]
        if not len(tokens) or not self.multiplier:
            return scores
        penalties = self.multiplier * self.base ** (lengths - self.allowed_length).double()
        most = torch.zeros_like(scores).scatter_reduce_(0, tokens.to(scores.device), penalties.to(scores), "amax")
        return scores - most.clamp_max_(torch.finfo(scores.dtype).max)


def repetitions(
    ids: Int[Tensor, " length"], breakers: Sequence[int] = ()
) -> tuple[Int[Tensor, " places"], Int[Tensor, " places"]]:
    """Return the tokens that followed earlier occurrences of the text's end, and how long each occurrence is.

    A token occurs once for each place where the last token of `ids` stood before. Lengths are 1 to 50.
    """
    none = ids[:0]
    is_breaker = torch.isin(ids, ids.new_tensor(list(breakers)))
    reach = int((~is_breaker[-LONGEST:]).flip(0).int().cumprod(0).sum())
    if len(ids) < 2 or not reach:
        return none, none
    places = ((ids[:-1] == ids[-1]) & ~is_breaker[1:]).nonzero()[:, 0]
    lengths, going = torch.ones_like(places), torch.arange(len(places), device=ids.device)
    for length in range(2, reach + 1):
        before = places[going] - (length - 1)
        going = going[(before >= 0) & (ids[before.clamp_min(0)] == ids[-length])]
        if not len(going):
            break
        lengths[going] = length
    return ids[places + 1], lengths
