"""A cache layer that holds the first S tokens of every row and the last L, and never grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_longtrunc.attention.retrieval import Middle
from hf_longtrunc.attention.row_positions import from_first_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.attention.rotary import Rotation


class LambdaCacheLayer(CacheLayerMixin):
    """Sinks and a ring, in place of a `DynamicLayer`, for a model patched by `LMInfinite`.

    Keys are stored as the model rotated them. `keys` and `values` are one buffer each, [batch, heads, S + R, dim]:
    S slots for the sinks and a ring of R = L + `ROLLBACK` slots in which column c lies at slot c mod R, so a token is
    stored by one indexed write. A row's sinks are its first S *real* tokens, whatever its left padding.

    For one new token `update` returns the buffers themselves; what becomes of the sinks' slots is up to the attention,
    since the next call fills them afresh. For several it returns [sinks | window before | new tokens], once per call.
    For the first tokens of all it returns these alone.

    `get_seq_length` counts the tokens seen. `crop` takes back up to `ROLLBACK` + 1 tokens exactly, any number before
    the ring has come round, and refuses more. Bytes are constant from the first token on:
    2 (2 S + R) heads dim a row and layer.
    """

    ROLLBACK = 64
    _ROWS: tuple[str, ...] = ("keys", "values", "sink_keys", "sink_values", "padding")
    is_croppable = True
    is_sliding = False

    def __init__(self, num_sink_tokens: int, window_length: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window_length
        self.ring_size = window_length + self.ROLLBACK
        self.seen = 0
        self.written = 0  # the most tokens ever seen: what the ring has overwritten, after a crop too
        self.padding: Tensor | None = None  # columns before each row's first real token [batch], None: none
        self.max_padding = 0
        self.keys: Any = None  # [batch, heads, S + R, dim]
        self.values: Any = None
        self.sink_keys: Any = None  # [batch, heads, S, dim], at their own positions
        self.sink_values: Any = None
        self._slots: Any = None  # of the tokens that are announced

    def expect(self, slots: Tensor, padding: Tensor | None) -> None:
        """Prepare the next `update`, which is refused without: only a patched model calls this.

        Args:
            slots: of the buffers, in which the tokens that are about to come are to lie, see `slots`; the same for
                every layer.
            padding: columns before each row's first real token [batch]; read until every row has one.
        """
        self._slots = slots
        if self.seen <= self.max_padding:
            self.padding = padding
            self.max_padding = 0 if padding is None else int(padding.max())

    def key_positions(self, new_tokens: int, device: torch.device) -> Tensor:
        """Positions [rows, m] of the keys that the next `update` will return, negative for padding and empty slots."""
        total, sinks = self.seen + new_tokens, torch.arange(self.num_sink_tokens, device=device)
        if self.seen == 0:
            return from_first_token(torch.arange(total, device=device), self.padding)
        if new_tokens == 1:
            slots = torch.arange(self.ring_size, device=device)
            columns = total - 1 - (total - 1 - slots) % self.ring_size
        else:
            columns = torch.arange(total - new_tokens - self._kept(), total, device=device)
        positions = from_first_token(columns, self.padding)
        return torch.cat([sinks.expand(positions.shape[0], -1), positions], dim=-1)

    def slots(self, new_tokens: int, device: torch.device) -> Tensor:
        """Return the slots [n] of the buffers in which the next n tokens are to lie."""
        return torch.arange(self.seen, self.seen + new_tokens, device=device) % self.ring_size + self.num_sink_tokens

    def _kept(self) -> int:
        """How many columns before the new ones their first window reaches."""
        return min(self.seen, self.window_length - 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, once."""
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = self.num_sink_tokens + self.ring_size
        self.keys = key_states.new_zeros(*key_states.shape[:2], slots, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], slots, value_states.shape[-1])
        self.sink_keys = self.keys[:, :, : self.num_sink_tokens].clone()
        self.sink_values = self.values[:, :, : self.num_sink_tokens].clone()
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim] and return what their queries may see."""
        new = key_states.shape[2]
        if self._slots is None or len(self._slots) != new:
            raise ValueError(
                "this cache was built for a model patched by LMInfinite and is being used by one that is not (or no "
                "longer is): its tokens outside sinks and window are gone. Generate inside the patch, or start anew "
                "with DynamicCache()"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.seen < self.max_padding + self.num_sink_tokens:
            self._store_sinks(self.sink_keys, key_states)
            self._store_sinks(self.sink_values, value_states)
            self.values[:, :, : self.num_sink_tokens].copy_(self.sink_values)
        if self.seen and new > 1:
            returned = (
                self._leading(self.keys, self.sink_keys, key_states),
                self._leading(self.values, self.sink_values, value_states),
            )
        else:
            returned = (key_states, value_states) if self.seen == 0 else (self.keys, self.values)
        self._store(key_states, value_states)
        self._slots = None
        return returned

    def _leading(self, ring: Tensor, sinks: Tensor, new: Tensor) -> Tensor:
        """Return [sinks | window before | new tokens], in the order of the text."""
        columns = torch.arange(self.seen - self._kept(), self.seen, device=ring.device)
        slots = columns % self.ring_size + self.num_sink_tokens
        return torch.cat([sinks, ring.index_select(2, slots), new], dim=2)

    def _store(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write the new tokens into the ring, and the sinks' keys, which decoding turns, afresh into their slots."""
        new = key_states.shape[2]
        kept = min(new, self.ring_size)
        slots = self._slots[new - kept :].to(key_states.device)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.index_copy_(2, slots, states[:, :, new - kept :].detach())
        self.keys[:, :, : self.num_sink_tokens].copy_(self.sink_keys)
        self.seen += new
        self.written = max(self.written, self.seen)

    def _store_sinks(self, store: Tensor, states: Tensor) -> None:
        """Copy the new tokens that are among their row's first S real ones."""
        sinks = torch.arange(self.num_sink_tokens, device=states.device)
        columns = sinks[None] if self.padding is None else sinks + self.padding.to(states.device)[:, None]
        index = columns - self.seen  # [rows, S], into the new tokens
        is_new = ((index >= 0) & (index < states.shape[2]))[:, None, :, None]
        index = index.clamp(0, states.shape[2] - 1)[:, None, :, None].expand(*states.shape[:2], -1, states.shape[3])
        store.copy_(torch.where(is_new, states.detach().gather(2, index), store))

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
        if self.written > self.ring_size and remaining < self.written - self.ROLLBACK - 1:
            raise ValueError(
                f"cannot take back {remove} tokens: after {self.written} tokens the cache of LMInfinite can go back "
                f"to {self.written - self.ROLLBACK - 1}, and no further; draft fewer tokens at a time, or pass "
                "cache=DynamicCache(), which keeps everything"
            )
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
        super().__init__(num_sink_tokens, window_length)
        self.rotation = rotation
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
