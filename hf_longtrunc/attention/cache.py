"""A cache layer that holds the first S tokens of every row and the last L, and never grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_longtrunc.attention.retrieval import Middle
from hf_longtrunc.attention.row_positions import from_first_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.attention.rotary import Rotation


class Announcement(NamedTuple):
    """Where the tokens of one forward go, found out once for all layers.

    Attributes:
        ring: their slots of the buffers [n].
        log: their slots of the log [n].
        padding: columns before each row's first real token [batch]; None: none.
        turn: cosines and sines [rows, 1, S, 2f] that turn the sinks on to where one new token sees them; None where
            several come or nothing turns.
    """

    ring: Tensor
    log: Tensor
    padding: Tensor | None
    turn: tuple[Tensor, Tensor] | None


class LambdaCacheLayer(CacheLayerMixin):
    """Sinks and a ring, in place of a `DynamicLayer`, for a model patched by `LMInfinite`.

    Keys are stored as the model rotated them. `keys` and `values` are one buffer each, [batch, heads, S + L, dim]:
    S slots for the sinks and a ring of L slots in which column c lies at slot c mod L, so a token is stored by one
    indexed write. A row's sinks are its first S *real* tokens, whatever its left padding.

    For one new token `update` returns the buffers themselves, the sinks turned on to where the token sees them: once
    the ring is full, all that they hold is seen, and no mask is needed. For several it returns [sinks | window before |
    new tokens], the sinks at their own positions, once per call. For the first tokens of all it returns these alone.

    `get_seq_length` counts the tokens seen. What a token overwrites is kept in a log of `ROLLBACK` columns, so `crop`
    takes back up to `ROLLBACK` + 1 tokens exactly, any number before the ring has come round, and refuses more. Bytes
    are constant from the first token on: those of 2 (S + L + ROLLBACK) + S keys a head, row and layer, and S more in
    fp32.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.
    """

    ROLLBACK = 64
    _ROWS: tuple[str, ...] = (
        "keys",
        "values",
        "lost_keys",
        "lost_values",
        "sink_keys",
        "sink_quarter_turns",
        "padding",
    )
    is_croppable = True
    is_sliding = False

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window_length
        self.rotation = rotation
        self.seen = 0
        self.written = 0  # the most tokens ever seen: what the ring has overwritten, after a crop too
        self.padding: Tensor | None = None  # columns before each row's first real token [batch], None: none
        self.max_padding = 0
        self.keys: Any = None  # [batch, heads, S + L, dim]
        self.values: Any = None
        self.lost_keys: Any = None  # [batch, heads, ROLLBACK, dim]: at slot c mod ROLLBACK, what column c overwrote
        self.lost_values: Any = None
        self.sink_keys: Any = None  # [batch, heads, S, dim], at their own positions
        self.sink_quarter_turns: Any = None  # their rotated dimensions, a quarter turn on [batch, heads, S, 2f]
        self._announced: Announcement | None = None

    def expect(self, announcement: Announcement) -> None:
        """Prepare the next `update`, which is refused without: only a patched model calls this."""
        self._announced = announcement
        if self.seen <= self.max_padding:  # padding is read until every row has a real token
            self.padding = announcement.padding
            self.max_padding = 0 if self.padding is None else int(self.padding.max())

    def keys_returned(self, new_tokens: int) -> int:
        """Return how many keys the next `update` will return, of several tokens or of one that is not the first."""
        return self.num_sink_tokens + (self.window_length if new_tokens == 1 else self._kept() + new_tokens)

    def key_positions(self, device: torch.device) -> Tensor:
        """Positions [rows, S + L] of the slots' keys as one more token will see them, negative for what is empty."""
        sinks, slots = (torch.arange(n, device=device) for n in (self.num_sink_tokens, self.window_length))
        positions = from_first_token(self.seen - (self.seen - slots) % self.window_length, self.padding)
        return torch.cat([sinks.expand(positions.shape[0], -1), positions], dim=-1)

    def slots(self, new_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the slots [n] of the buffers and of the log in which the next n tokens are to lie."""
        return self._slots_of(torch.arange(self.seen, self.seen + new_tokens, device=device))

    def _slots_of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return where columns lie in the buffers, and where in the log what they overwrote."""
        return columns % self.window_length + self.num_sink_tokens, columns % self.ROLLBACK

    def sees_every_slot(self) -> bool:
        """Whether the next token, coming alone, sees all that the buffers then hold, whatever the row."""
        return self.seen - self.max_padding >= self.num_sink_tokens + self.window_length - 1

    def _kept(self) -> int:
        """How many columns before the new ones their first window reaches."""
        return min(self.seen, self.window_length - 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, once."""
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.num_sink_tokens + self.window_length
        self.keys, self.values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (key_states, value_states))
        self.lost_keys, self.lost_values = (
            x.new_zeros(*x.shape[:2], self.ROLLBACK, x.shape[3]) for x in (key_states, value_states)
        )
        self.sink_keys = self.keys[:, :, : self.num_sink_tokens].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim] and return what their queries may see."""
        new, announced = key_states.shape[2], self._announced
        if announced is None or len(announced.ring) != new:
            raise ValueError(
                "this cache was built for a model patched by LMInfinite and is being used by one that is not (or no "
                "longer is): its tokens outside sinks and window are gone. Generate inside the patch, or start anew "
                "with DynamicCache()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen < self.max_padding + self.num_sink_tokens:
            self._store_sinks(key_states, value_states)
        if self.seen and new > 1:
            sink_values = self.values[:, :, : self.num_sink_tokens]
            returned = (
                self._leading(self.keys, self.sink_keys, key_states),
                self._leading(self.values, sink_values, value_states),
            )
        else:
            returned = (key_states, value_states) if self.seen == 0 else (self.keys, self.values)
        self._store(key_states, value_states, announced)
        self._turn_sinks(announced.turn)
        self._announced = None
        return returned

    def _leading(self, ring: Tensor, sinks: Tensor, new: Tensor) -> Tensor:
        """Return [sinks | window before | new tokens], in the order of the text."""
        columns = torch.arange(self.seen - self._kept(), self.seen, device=ring.device)
        slots, _ = self._slots_of(columns)
        return torch.cat([sinks, ring.index_select(2, slots), new], dim=2)

    def _store(self, key_states: Tensor, value_states: Tensor, announced: Announcement) -> None:
        """Write the new tokens into the ring, and what the last of them overwrite into the log."""
        new = key_states.shape[2]
        key_states, value_states = key_states.detach(), value_states.detach()
        ring, log = announced.ring.to(key_states.device), announced.log.to(key_states.device)
        step = min(self.ROLLBACK, self.window_length)  # no slot twice in one write
        if new <= step:
            self._write(key_states, value_states, ring, log)
        else:
            logged = max(0, new - self.ROLLBACK)
            last = slice(max(0, logged - self.window_length), logged)
            self.keys.index_copy_(2, ring[last], key_states[:, :, last])
            self.values.index_copy_(2, ring[last], value_states[:, :, last])
            for start in range(logged, new, step):
                part = slice(start, start + step)
                self._write(key_states[:, :, part], value_states[:, :, part], ring[part], log[part])
        self.seen += new
        self.written = max(self.written, self.seen)

    def _write(self, key_states: Tensor, value_states: Tensor, ring: Tensor, log: Tensor) -> None:
        """Write a few tokens into the ring, and what they overwrite into the log."""
        self.lost_keys.index_copy_(2, log, self.keys.index_select(2, ring))
        self.lost_values.index_copy_(2, log, self.values.index_select(2, ring))
        self.keys.index_copy_(2, ring, key_states)
        self.values.index_copy_(2, ring, value_states)

    def _store_sinks(self, key_states: Tensor, value_states: Tensor) -> None:
        """Keep the new tokens that are among their row's first S real ones."""
        sinks = torch.arange(self.num_sink_tokens, device=key_states.device)
        columns = sinks[None] if self.padding is None else sinks + self.padding.to(key_states.device)[:, None]
        index = columns - self.seen  # [rows, S], into the new tokens
        is_new = ((index >= 0) & (index < key_states.shape[2]))[:, None, :, None]
        index = index.clamp(0, key_states.shape[2] - 1)[:, None, :, None]
        slots = slice(self.num_sink_tokens)
        for store, states in ((self.sink_keys, key_states), (self.values[:, :, slots], value_states)):
            there = index.expand(*states.shape[:2], -1, states.shape[3])
            store.copy_(torch.where(is_new, states.detach().gather(2, there), store))
        self.keys[:, :, slots].copy_(self.sink_keys)
        if self.rotation is not None:
            self.sink_quarter_turns = self.rotation.quarter_turn(self.sink_keys)

    def _turn_sinks(self, turn: tuple[Tensor, Tensor] | None) -> None:
        """Put the sinks' keys, turned on, into their slots."""
        if turn is None or self.rotation is None or not self.num_sink_tokens:
            return
        cos, sin = (weights.to(self.keys.device) for weights in turn)
        planes = self.rotation.planes
        turned = torch.addcmul(self.sink_keys[..., planes] * cos, self.sink_quarter_turns, sin)
        self.keys[:, :, : self.num_sink_tokens, planes].copy_(turned)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (tokens seen and coming, 0): transformers' own mask is made for these and then not used."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no end."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last |tokens_to_remove| tokens.

        Raises:
            ValueError: the ring has overwritten what the shorter text would see.
        """
        remove = min(abs(tokens_to_remove), self.seen)
        remaining = self.seen - remove
        oldest = self.written - self.ROLLBACK - 1
        if self.written > self.window_length + self.ROLLBACK and remaining < oldest:
            raise ValueError(
                f"cannot take back {remove} tokens: after {self.written} tokens the cache of LMInfinite can go back "
                f"to {oldest}, and no further; draft fewer tokens at a time, or pass "
                "cache=DynamicCache(), which keeps everything"
            )
        if self.is_initialized and self.written > self.window_length:
            # Where columns that go share a slot, the first of them overwrote what is to come back.
            last = min(remaining + self.window_length, self.seen)
            ring, log = self._slots_of(torch.arange(remaining, last, device=self.keys.device))
            self.keys.index_copy_(2, ring, self.lost_keys.index_select(2, log))
            self.values.index_copy_(2, ring, self.lost_values.index_select(2, log))
        self.seen = remaining

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        super().reset()
        self.seen = self.written = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put row beam_idx[b] in the place of row b."""
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in self._ROWS:
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, change(rows))


class ArchiveCacheLayer(LambdaCacheLayer):  # type: ignore[no-untyped-call]
    """Sinks and a ring, and behind them the keys and values of the whole text, for a model that reads its middle.

    The archive holds keys turned back to position 0, [batch, heads, capacity, dim], in the order of the text; it grows
    by half whenever it is full, so a token costs the same on average. Everything else is `LambdaCacheLayer`.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.
        store: "device" or "cpu": where the archive lives. On the CPU it is pinned if the model is on CUDA.
    """

    _ROWS = (*LambdaCacheLayer._ROWS, "archived_keys", "archived_values", "chosen")

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None, store: str):
        super().__init__(num_sink_tokens, window_length, rotation)
        self.store = store
        self.archived_keys: Any = None  # [batch, heads, capacity, dim]
        self.archived_values: Any = None
        self.chosen: Tensor | None = None  # blocks that `TopBlocks` reads [batch, blocks]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim] and return what window and sinks show their queries."""
        columns = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        returned = super().update(key_states, value_states, *args, **kwargs)
        positions = from_first_token(columns, self.padding)
        turned = key_states if self.rotation is None else self.rotation.rotate(key_states, -positions)
        self.archived_keys = self._archived(self.archived_keys, turned)
        self.archived_values = self._archived(self.archived_values, value_states)
        return returned

    def _archived(self, archive: Tensor | None, states: Tensor) -> Tensor:
        """Write the newest tokens' states into the archive, in a larger one if need be."""
        start = self.seen - states.shape[2]
        if archive is None or archive.shape[2] < self.seen:
            shape = *states.shape[:2], self.seen if archive is None else self.seen * 3 // 2, states.shape[3]
            on_cpu = self.store == "cpu"
            larger = torch.empty(
                shape,
                dtype=states.dtype,
                device="cpu" if on_cpu else states.device,
                pin_memory=on_cpu and states.is_cuda,
            )
            if archive is not None:
                larger[:, :, :start] = archive[:, :, :start]
            archive = larger
        archive[:, :, start : self.seen] = states.detach()
        return archive

    def middle(self) -> Middle:
        """Return all that was seen, un-rotated, where it is stored."""
        device = self.archived_keys.device
        positions = from_first_token(torch.arange(self.seen, device=device), self.padding)
        return Middle(self.archived_keys[:, :, : self.seen], self.archived_values[:, :, : self.seen], positions)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.archived_keys = self.archived_values = self.chosen = None
