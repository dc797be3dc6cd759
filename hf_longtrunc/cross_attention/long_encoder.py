"""An unmodified encoder run over a text of any length: in windows, several at a time, stitched into one tensor."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from hf_longtrunc.cross_attention.texts import real_spans
from hf_longtrunc.cross_attention.windows import Window, plan_windows
from hf_longtrunc.models import bound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A bar appears once an encode has taken so many seconds.
_SECONDS_BEFORE_PROGRESS = 5.0
# Of no use in windows: hidden states and attention weights of all layers would be many times the result.
_NOT_PASSED_ON = ("output_attentions", "output_hidden_states")


class _Piece(NamedTuple):
    """A window of one row's text, which begins at token `first` of that row."""

    row: int
    first: int
    window: Window

    @property
    def tokens(self) -> slice:
        return slice(self.first + self.window.start, self.first + self.window.stop)

    @property
    def kept(self) -> slice:
        start = self.first + self.window.start
        return slice(start + self.window.keep_start, start + self.window.keep_stop)


def long_encoder(encoder: Any, window: int, overlap: float, encode_batch: int) -> Callable[..., Any]:
    """Return a forward for `encoder` that reads inputs of more than `window` tokens in overlapping windows.

    Each row is encoded from its first to its last real token, whatever padding surrounds them; states of padding
    are zero. Every argument that has a number per token is cut into the same windows. Of a long input only
    `last_hidden_state` is returned. An input of up to `window` tokens goes to the encoder's own forward, as it came.
    """
    forward = encoder.forward

    @wraps(forward)
    def encode(*args: Any, **kwargs: Any) -> Any:
        inputs = bound(encoder, args, kwargs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        rows, length = tokens.shape[:2]
        if length <= window:
            return forward(*args, **kwargs)
        if inputs.get("output_router_logits"):
            raise ValueError(
                f"output_router_logits must be False for inputs of more than {window} tokens: windows overlap, and the "
                "loss of their routers would count tokens twice"
            )
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=tokens.device)
        per_token = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.shape[:2] == (rows, length)}
        rest = {n: x for n, x in inputs.items() if n not in per_token and n not in _NOT_PASSED_ON}
        pieces = [
            _Piece(row, span.start, part)
            for row, span in enumerate(real_spans(inputs["attention_mask"], length))
            for part in plan_windows(span.stop - span.start, window, overlap)
        ]
        stitched = _Stitched(rows, length)
        output: Any = None
        for batch in _batches(pieces, encode_batch):
            cut = {n: torch.stack([x[piece.row, piece.tokens] for piece in batch]) for n, x in per_token.items()}
            output = forward(**rest, **cut)
            stitched.add(batch, output[0])
        states = stitched.states()
        return (states,) if isinstance(output, tuple) else type(output)(last_hidden_state=states)

    return encode


def _batches(pieces: list[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Yield the pieces in batches of one length, so that nothing is padded, with a progress bar if they take long."""
    by_length: dict[int, list[_Piece]] = {}
    for piece in pieces:
        by_length.setdefault(piece.tokens.stop - piece.tokens.start, []).append(piece)
    with logging.tqdm(
        total=len(pieces), desc="encoding", unit="window", delay=_SECONDS_BEFORE_PROGRESS, leave=False
    ) as bar:
        for same_length in by_length.values():
            for start in range(0, len(same_length), size):
                batch = same_length[start : start + size]
                yield batch
                bar.update(len(batch))


class _Stitched:
    """States [rows, length, width] that come piece by piece.

    Without gradients every piece is copied to its place at once, so that nothing exists twice; with gradients all
    are put in place together at the end, because autograd would otherwise copy the whole for each piece.
    """

    def __init__(self, rows: int, length: int):
        self._shape = rows, length
        self._states: Tensor | None = None
        self._kept: list[tuple[_Piece, Tensor]] = []

    def add(self, batch: list[_Piece], hidden: Tensor) -> None:
        windows = [piece.window for piece in batch]
        kept = [h[window.keep_start : window.keep_stop] for window, h in zip(windows, hidden, strict=True)]
        if hidden.requires_grad:
            self._kept += zip(batch, kept, strict=True)
            return
        if self._states is None:
            self._states = hidden.new_zeros(*self._shape, hidden.shape[-1])
        for piece, states in zip(batch, kept, strict=True):
            self._states[piece.row, piece.kept] = states

    def states(self) -> Tensor:
        if self._states is not None:
            return self._states
        rows, length = self._shape
        states = torch.cat([states for _, states in self._kept])
        index = [
            torch.arange(piece.kept.start, piece.kept.stop, device=states.device) + piece.row * length
            for piece, _ in self._kept
        ]
        flat = states.new_zeros(rows * length, states.shape[-1])
        return flat.index_copy(0, torch.cat(index), states).view(rows, length, -1)
