"""One forward as a value: where its tokens stand, what the cache hands out, and what is turned how.

It is made once before the decoder runs, from the cache and the padding mask, and travels to the layers as the mask
itself. So a layer that is run again for its gradients has the step of its own forward, and two threads have one each.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_longtrunc.attention.cache import ArchiveCacheLayer, LambdaCacheLayer
from hf_longtrunc.attention.lambda_attention import distance, visible
from hf_longtrunc.attention.row_positions import from_first_token, joined, text_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from typing_extensions import Self

    from hf_longtrunc.attention.layer import Settings
    from hf_longtrunc.attention.retrieval import Ballot
    from hf_longtrunc.attention.rotary import Rotation
    from hf_longtrunc.attention.row_positions import Moves

_running = threading.local()
_FULL = "full_attention"  # what transformers calls these layers, where a decoder has several kinds

MORE_THAN_CAUSAL = (
    "this call wants a mask that is more than causal (packed rows, or tokens that see ahead, as those of an image in "
    "some models): a patched model makes its own and cannot add to it"
)


class Layout(Enum):
    """What the cache hands out to this forward's queries."""

    TEXT = "all keys, in the order of the text"
    SINKS_FIRST = "the sinks, and behind them the window and the new tokens"
    RING = "the slots of the ring, to one token"


class Carried:
    """What travels to the layers in the place of a mask, with what decoders ask of a mask.

    Falcon adds a mask of four dimensions to its bias, MPT wants booleans, and Gemma 4 cuts off the queries whose logits
    are not kept.
    """

    ndim = 0

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return itself: it is moved, in part, where it is used."""
        return self

    def __getitem__(self, cut: tuple[Any, ...]) -> Self:
        """Return what is carried for some of the queries, as `mask[:, :, queries, :]` cuts them out."""
        return self


class Native(Carried):
    """Carried where a forward is to run as if the model were not patched."""


@dataclass(frozen=True, eq=False)
class Unmade(Carried):
    """A mask that a multimodal model asks for before its decoder runs, which alone knows the step.

    Attributes:
        padding: where there are tokens [batch, tokens]; None: everywhere.
        is_causal: tells whether it hides the future and nothing else.
        native: makes it as if the model were not patched.
    """

    padding: Tensor | None
    is_causal: Callable[[], bool]
    native: Callable[[], Any]


def padding_of(mask: Any) -> Any:
    """Return the padding mask in what a decoder is handed as `attention_mask`: that, an `Unmade`, or one for each kind.

    Raises:
        ValueError: its layers with full attention are to see more than what came before.
    """
    full = mask.get(_FULL) if isinstance(mask, dict) else mask
    if not isinstance(full, Unmade):
        return full
    if not full.is_causal():
        raise ValueError(MORE_THAN_CAUSAL)
    return full.padding


def made(mask: Any, padding: Any, carried: Carried) -> Any:
    """Return what the decoder is handed in place of `mask`, of which `padding_of` was read."""
    if not isinstance(mask, dict):
        return padding  # of which the decoder makes its own
    is_ours = not isinstance(carried, Native)
    return {
        kind: carried if is_ours and kind == _FULL else each.native() if isinstance(each, Unmade) else each
        for kind, each in mask.items()
    }


@dataclass(frozen=True, eq=False)
class Step(Carried):
    """One forward.

    Attributes:
        queries: positions [rows, n] of the last n columns, in the order of `query_order`; negative for padding.
        last: position of the last key [rows, 1].
        layout: of the keys.
        keys: how many of them every layer's cache hands out.
        is_padded: whether some row begins with padding.
        query_order: the new columns of each row, those without a token first [batch, n]; None if they are so already.
        has_moved: whether some row's old tokens moved up to its new ones, over masked columns between them.
        key_order: likewise of the keys [batch, m], where the cache hands out masked columns as they came.
        turns: for one token, the cosines and sines that turn the sinks to where it sees them, by the rotation's id.
        slots: for one token, which slots it sees [rows, S + L], None for all, and their distances [rows, S + L].
        archives: the caches of the layers in which a choice of blocks is kept, by their index.
        ballot: takes each layer's vote while `TopBlocks` lets rows choose; None otherwise.
    """

    queries: Tensor
    last: Tensor
    layout: Layout
    keys: int
    is_padded: bool = False
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    has_moved: bool = False
    turns: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    slots: tuple[Tensor | None, Tensor] | None = None
    archives: Mapping[int, Any] = field(default_factory=dict)
    ballot: Ballot | None = None

    def __getitem__(self, cut: tuple[Any, ...]) -> Step:
        """Return the step of some of the queries."""
        return replace(self, queries=self.queries[:, cut[2]])


def running() -> Any:
    """Return what the decoder that this thread is running carries as its mask; None outside."""
    return getattr(_running, "carried", None)


def carry(carried: Any) -> Any:
    """Let what runs next in this thread carry this as its mask; return what was carried before."""
    before = running()
    _running.carried = carried
    return before


def planned(
    settings: Settings,
    rotations: Collection[Rotation],
    layers: Sequence[Any],
    real: Tensor | None,
    past: int,
    new: int,
    like: Tensor,
    ballot: Ballot | None = None,
) -> tuple[Step, Tensor]:
    """Return the step of a forward, and its queries' positions [rows, new] in the order in which they come.

    The ring of every layer is told where the new tokens are to lie.

    Args:
        settings: of the patch.
        rotations: of the model's layers.
        layers: of the cache; none without a cache.
        real: where there are tokens [batch, past + new]; None: everywhere.
        past: columns seen.
        new: columns to come.
        like: any tensor of the model's dtype on the device of the tokens.
        ballot: see `Step`.
    """
    rings = [layer for layer in layers if isinstance(layer, LambdaCacheLayer)]
    archives = {index: layer for index, layer in enumerate(layers) if isinstance(layer, ArchiveCacheLayer)}
    columns = torch.arange(past, past + new, device=like.device)
    if not rings:
        step, came = text_step(real, past, new, like.device)
        return replace(step, ballot=ballot), came
    ring = rings[0]
    rows, moves = joined(ring.rows, real, past, new)
    if moves is not None:
        _refuse_lost(ring, past, moves)
    came = queries = from_first_token(columns, rows.padding)
    query_order = None
    if real is not None and moves is not None and moves.order is not None:
        came, query_order = _as_they_came(columns, rows.padding, real[:, past:])
    turns = {}
    if new == 1:
        steps = (
            queries - settings.max_distance - torch.arange(settings.num_sink_tokens, device=like.device)
        ).clamp_min(0)
        for turn in {*rotations, *(ring.rotation for ring in rings)}:  # a ring filled under an earlier patch has that's
            if turn is not None:
                turns[id(turn)] = turn.weights(steps, like.dtype)
    announcement = ring.announcement(new, like.device, rows, moves)
    for each in rings:
        each.expect(announcement._replace(turn=turns.get(id(each.rotation))))
    last, is_padded = from_first_token(columns[-1:], rows.padding), rows.padding is not None
    layout = Layout.TEXT if past == 0 else Layout.SINKS_FIRST if new > 1 else Layout.RING
    slots = None
    if layout is Layout.RING:
        j = ring.key_positions(rows, like.device)
        seen = None if ring.sees_every_slot(rows) else _slots_seen(settings, queries, j)
        slots = seen, distance(queries, j, settings.max_distance)[:, 0]
    step = Step(
        queries=queries,
        last=last,
        layout=layout,
        keys=new if past == 0 else ring.keys_returned(new),
        is_padded=is_padded,
        query_order=query_order,
        key_order=query_order if past == 0 else None,
        has_moved=moves is not None,
        turns=turns,
        slots=slots,
        archives=archives,
        ballot=ballot,
    )
    return step, came


def text_step(real: Tensor | None, past: int, new: int, device: torch.device) -> tuple[Step, Tensor]:
    """Return what `planned` does for a cache that hands out all keys in the order of the text."""
    columns = torch.arange(past, past + new, device=device)
    padding, order = text_order(real)
    came = queries = from_first_token(columns, padding)
    query_order = None
    if real is not None and order is not None:
        came, query_order = _as_they_came(columns, padding, real[:, past:])
    last = from_first_token(columns[-1:], padding)
    return Step(queries, last, Layout.TEXT, past + new, padding is not None, query_order, order), came


def _as_they_came(columns: Tensor, padding: Tensor | None, now: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of new columns [batch, n], -1 where `now` says there is no token, and their order."""
    assert padding is not None
    before = columns[-1] + 1 - padding - now.sum(-1)
    positions = torch.where(now, before[:, None] + now.cumsum(-1) - 1, -1)
    return positions, now.int().argsort(dim=-1, stable=True)


def _slots_seen(settings: Settings, i: Tensor, j: Tensor) -> Tensor:
    """Return which of the slots at j [rows, S + L] a query at i [rows, 1] sees: old sinks, and its window."""
    sinks, window = settings.num_sink_tokens, settings.window_length
    local = visible(i, j[:, sinks:], 0, window) | (i < 0)[..., None]
    return torch.cat([i - j[:, :sinks] >= window, local[:, 0]], dim=-1)


def _refuse_lost(ring: LambdaCacheLayer, past: int, moves: Moves) -> None:
    longest = int(moves.taken_back.max())
    if longest and past - longest < ring.oldest_length():
        raise ValueError(
            f"attention_mask turns the last {longest} tokens of a row to 0, and the cache of LMInfinite can go back "
            f"from {past} tokens to {ring.oldest_length()}, no further: let answers of a batch differ by at most "
            f"{ring.ROLLBACK} tokens, continue rows one by one, or pass cache=DynamicCache(), which keeps everything"
        )
