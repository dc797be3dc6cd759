"""The losses of an unmodified model that reads its last window again: the baseline of long-context techniques."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_longtrunc.arguments import check_int
from hf_longtrunc.evaluation import token_losses

if TYPE_CHECKING:
    from torch import Tensor


def recomputed_losses(
    model: Any, input_ids: Tensor, window: int, *, chunk: int = 512, progress: bool | str = False
) -> Tensor:
    """Return the losses of an unmodified model that re-reads the last half window with each new half window.

    Each token past the first window has at least half a window of context, at true distances. If only a technique's
    loss rises along the text, the technique is the reason; if both rise, the text gets harder. `window` is the trained
    length; the other arguments and the result are those of `token_losses`.

    Cost: twice that of reading the text in windows, memory of one window. Source: the baseline "sliding window with
    re-computation" of Xiao et al. 2023, arXiv 2309.17453, figure 1. Deviation: they read a window for every token.
    """
    window = check_int("window", window, minimum=2)
    half, length = window // 2, input_ids.shape[-1]
    pieces = [token_losses(model, input_ids[..., :window], chunk=chunk, progress=progress)]
    for end in range(window + half, length + half, half):
        losses = token_losses(model, input_ids[..., end - window : end], chunk=chunk, progress=progress)
        pieces.append(losses[..., window - half - 1 :])
    return torch.cat(pieces, dim=-1)
