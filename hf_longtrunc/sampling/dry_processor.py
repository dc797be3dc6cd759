"""DRY as a transformers logits processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_longtrunc.sampling.dry import Dry
from hf_longtrunc.sampling.processors import checked_scores, one_or_a_row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_longtrunc.sampling.processors import Values


class DRYLogitsProcessor(LogitsProcessor):
    r"""DRY (don't repeat yourself): lower the scores of tokens that would continue a repetition of the text.

    >>> DRYLogitsProcessor(0.8)(torch.tensor([[5, 6, 7, 5, 6]]), torch.zeros(1, 8))[0, 5:]
    tensor([ 0.0000,  0.0000, -0.8000])

    If the last n tokens of the text occur earlier in it, n >= allowed_length, the token that followed them there loses
    multiplier * base^(n - allowed_length). Put it before truncation samplers, since it changes the distribution that
    they cut. It keeps no state, so every mode of `generate` works. Left padding is part of the text: pass its id among
    `sequence_breakers`.

    Args:
        multiplier: at least 0, which penalises nothing. Or one value a row, as for `EtaLogitsProcessor`.
        base: at least 1.
        allowed_length: at least 1; shorter repetitions cost nothing.
        window: read only this many of the last tokens; None reads all.
        sequence_breakers: ids of tokens that end a match, such as line breaks and quotation marks;
            `tokenizer.encode("a\n", add_special_tokens=False)[-1]` is that of a line break.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range; continuous batching
            (`generate_batch`), which hands over no text.

    Source: p-e-w 2024, text-generation-webui, pull request 5677. Deviations: none.
    """

    # Declared unsupported, it would be left out there with a line in the log; so it is called, and refuses.
    supports_continuous_batching = True

    def __init__(
        self,
        multiplier: Values = 0.8,
        base: float = 1.75,
        allowed_length: int = 2,
        *,
        window: int | None = None,
        sequence_breakers: Sequence[int] = (),
    ):
        self.multiplier = one_or_a_row("multiplier", multiplier, minimum=0)
        values = self.multiplier.tolist() if isinstance(self.multiplier, Tensor) else [self.multiplier]
        options = {"base": base, "allowed_length": allowed_length, "window": window}
        self.settings = [
            Dry(multiplier=value, sequence_breakers=tuple(sequence_breakers), **options)  # type: ignore[arg-type]
            for value in values
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [rows, V] of the tokens after `input_ids` [rows, length], penalties subtracted."""
        if input_ids.ndim == 1:
            raise ValueError(
                "DRYLogitsProcessor cannot be used in continuous batching (generate_batch()), whose calls do not hold "
                "the text: use generate()"
            )
        if checked_scores(scores).ndim != 2 or len(scores) != len(input_ids):
            raise ValueError(f"scores must be [{len(input_ids)}, V], a row a text, got shape {tuple(scores.shape)}")
        if len(scores) % len(self.settings):
            raise ValueError(f"{len(self.settings)} multipliers, one a row, do not fit {len(scores)} rows")
        if not len(scores):
            return scores
        each, ids = len(scores) // len(self.settings), input_ids.cpu().numpy()
        return torch.stack([self.settings[n // each].penalised(row, ids[n]) for n, row in enumerate(scores)])

    def __repr__(self) -> str:
        return f"DRYLogitsProcessor({self.settings[0] if len(self.settings) == 1 else self.settings})"
