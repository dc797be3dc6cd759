"""The reading model chooses among the best units: the one after which it finds the question most likely.

A finder compares two vectors, or two sets of words. The model reads a unit and the question together, which costs a
forward a unit; so it reads only the few best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.arguments import check_float, check_int
from hf_longtrunc.asking.passages import UNITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NEIGHBOUR = 0.2  # nats a token by which a neighbour must make the question likelier; 0 answered less on two novels


@dataclass(frozen=True)
class Reranker:
    """Scores units by the mean log-probability of the question's tokens after each (Sachan et al. 2022, section 2.2).

    The result is added to the finder's scores, where the paper ranks by it alone. Each forward holds one unit and the
    question, without padding, so any causal LM will do. Cost: a forward of some hundred tokens a unit.

    Args:
        model: a causal LM.
        tokenizer: of it.
        units: at most so many of the finder's best units are compared; 1 takes the finder's best and costs nothing.
        weight: of the log-probability. From .1 to 1 nearly the same units came first on the texts that it was chosen
            on, with `Fused`.

    Raises:
        ValueError: units is below 1, or weight is negative.

    Examples:
        >>> from hf_longtrunc import load_pretrained
        >>> model, tokenizer = load_pretrained()  # doctest: +SKIP
        >>> Reranker(model, tokenizer)("Who was deaf?", ["It rained.", "She heard nothing."])  # doctest: +SKIP
    """

    model: Any
    tokenizer: Any
    units: int = UNITS
    weight: float = 0.3

    def __post_init__(self) -> None:
        check_int("units", self.units, minimum=1)
        check_float("weight", self.weight, minimum=0)

    @property
    def reach(self) -> float:
        """How far below the best score a unit may lie: mean log-probabilities rarely differ by more than half a nat."""
        return self.weight / 2

    def __call__(self, question: str, units: Sequence[str]) -> Tensor:
        """Return weight * mean log p(question | unit) [units]."""
        return self.weight * self.log_probs(question, units)

    @torch.no_grad()
    def log_probs(self, question: str, units: Sequence[str]) -> Tensor:
        """Return the mean log p(question | unit) of the question's tokens [units], in nats.

        Examples:
            >>> Reranker(model, tokenizer).log_probs("Who was deaf?", ["She heard nothing."])  # doctest: +SKIP
        """
        asked = self.tokenizer(f" {question}", add_special_tokens=False, return_tensors="pt").input_ids[0]
        gains = []
        for unit in units:
            read = self.tokenizer(f"Passage: {' '.join(unit.split())}\nQuestion:", return_tensors="pt").input_ids[0]
            ids = torch.cat([read, asked]).to(self.model.device)
            logits = self.model(ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]
            log_probs = logits[len(read) - 1 : -1].float().log_softmax(-1)  # [question tokens, vocabulary]
            gains.append(log_probs.gather(1, ids[len(read) :, None]).mean())
        return torch.stack(gains).cpu()
