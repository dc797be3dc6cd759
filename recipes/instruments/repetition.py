"""Repetition in sequences of tokens, by n-grams."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of token sequences."""
    grams = [tuple(tokens[at : at + n]) for tokens in texts for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


def repeated(tokens: Sequence[int], n: int) -> float:
    """Return the share of a sequence's n-grams that occur earlier in it."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams)
