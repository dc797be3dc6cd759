"""Overlapping windows over a text of any length, and the states that are kept of each.

With W = `length`, margin m = int(W * overlap / 2) and stride W - 2 m: a window's first and last m states have seen too
little of the text on that side and are left to its neighbours. The first window keeps [0, W - m), those that follow
[m, W - m); the last is shifted left until it is full and keeps all that is left. Every state is kept exactly once.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_longtrunc.arguments import check_float, check_int


class Window(NamedTuple):
    """Tokens [start, stop) of a text; their states [keep_start, keep_stop), counted from `start`, are kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int


def plan_windows(tokens: int, length: int, overlap: float) -> list[Window]:
    """Return the windows of `length` tokens over a text of `tokens`, in order; one of all of it, if it is no longer.

    Args:
        tokens: N, at least 1.
        length: W, at least 1: the encoder's own.
        overlap: share of a window that its neighbours encode too, in [0, 1); 0.5 in the paper.

    Cost: about N / (W (1 - overlap)) windows.
    Source: Bertsch et al. 2023, "Unlimiformer", arXiv 2305.01625, section 2.1.
    """
    tokens, length = check_int("tokens", tokens, minimum=1), check_int("length", length, minimum=1)
    overlap = check_float("overlap", overlap, minimum=0, lt=1)
    if tokens <= length:
        return [Window(0, tokens, 0, tokens)]
    margin = int(length * overlap / 2)
    stride = length - 2 * margin
    windows = [Window(0, length, 0, length - margin)]
    for start in range(stride, tokens - length, stride):
        windows.append(Window(start, start + length, margin, length - margin))
    start, kept = tokens - length, windows[-1].start + windows[-1].keep_stop
    return [*windows, Window(start, tokens, kept - start, length)]
