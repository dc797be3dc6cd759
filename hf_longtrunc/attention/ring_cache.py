"""A cache layer that holds the first S tokens of every row and the last L, and never grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_longtrunc.attention.padding import PaddingState, RowShift, gather_columns, positions_of
from hf_longtrunc.errors import CacheLawError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hf_longtrunc.attention.block_scores import Selection
    from hf_longtrunc.attention.cache_law import CacheLaw
    from hf_longtrunc.attention.rope import Rotation


_BUFFERS = ("keys", "values", "rollback_keys", "rollback_values", "sink_keys")


class WritePlan(NamedTuple):
    """Slots for the tokens of one forward, computed once for all layers."""

    ring: Tensor  # their slots of the buffers [n]
    rollback: Tensor  # their slots of the rollback buffer [n]
    state: PaddingState  # once they are written
    shift: RowShift | None  # of cached tokens before they are written
    sinks: Tensor | None  # each sink's column among the new ones [rows, S]; None: no new token can be a sink
    is_first: bool  # whether no token came before
    past: Tensor  # tokens before, a scalar: a graph would be compiled again for each int
    # Cosines and sines [rows, 1, S, 2f] that rotate the sinks to their distance from one new token.
    sink_rotation: tuple[Tensor, Tensor] | None = None


class RingCacheLayer(CacheLayerMixin):
    """Sinks and a ring buffer, in place of a `DynamicLayer`, for a model patched by LMInfinite or StreamingLLM.

    Examples:
        >>> with LMInfinite(num_sink_tokens=4, window_length=16)(model):
        ...     output = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        >>> layer = cache_of(output).layers[0]
        >>> layer.get_seq_length(), layer.keys.shape[2]  # tokens seen, keys kept
        (101, 20)

    Keys are stored as the model rotated them. `keys` and `values` are one buffer each, [batch, heads, S + L, dim]:
    S slots for the sinks and a ring of L slots in which column c lies at slot c mod L, so a token is stored by one
    indexed write. A row's sinks are its first S *real* tokens, and its tokens are its last columns, whatever its
    padding: where a mask shows masked columns between tokens, the row's older tokens move up to the new ones.

    For one new token `update` returns the buffers themselves, with the sinks rotated to their distance from the token:
    once the ring is full, all that they hold is visible, and no mask is needed. For several it returns [sinks | window
    before | new tokens], the sinks at their own positions, once per call. For a first forward it returns its tokens.

    `get_seq_length` counts the tokens seen; `commit` counts those of a forward that has ended. For one token, every
    number that changes with the tokens seen is in the plan's tensors, so a compiled step is one graph for all tokens.
    Overwritten keys and values go to a rollback buffer of `ROLLBACK` columns: `crop` takes back up to `ROLLBACK` + 1
    tokens exactly, any number before the ring is full, and refuses more, and any if other layers of the cache carry a
    state that cannot go back. Bytes are constant from the first token on: those of 2 (S + L + ROLLBACK) + S keys a
    head, row and layer.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.

    Attributes:
        law: under which it is filled.
        selection: the blocks of the text that `TopBlocks` reads; None before any selection.
    """

    ROLLBACK = 64
    is_croppable = True
    is_sliding = False

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window_length
        self.rotation = rotation
        self.law: CacheLaw | None = None
        self.selection: Selection | None = None
        self.seen = 0
        self.written = 0  # the most tokens ever seen, before a crop too: the ring has overwritten older ones
        self.padding_state = PaddingState()
        self.keys: Any = None  # [batch, heads, S + L, dim]
        self.values: Any = None
        # [batch, heads, ROLLBACK, dim]: slot c mod ROLLBACK holds the key that column c overwrote.
        self.rollback_keys: Any = None
        self.rollback_values: Any = None
        self.sink_keys: Any = None  # at their own positions [batch, heads, S, dim]
        self.states: Sequence[Any] = ()  # the layers of the same cache that carry a state instead
        self._plan: WritePlan | None = None
        self._stored = 0  # by a forward that has not ended

    def write_plan(
        self, new: int, device: torch.device, state: PaddingState, shift: RowShift | None = None
    ) -> WritePlan:
        """Return where the next n tokens go, for this layer and for all that have seen as many."""
        new_columns = torch.arange(self.seen, self.seen + new, device=device)
        ring, rollback = self._slots_of(new_columns)
        sinks = None
        if self.seen < state.max_padding + self.num_sink_tokens:
            columns = torch.arange(self.num_sink_tokens, device=device)[None]
            sinks = (columns if state.padding is None else columns + state.padding.to(device)[:, None]) - self.seen
        return WritePlan(ring, rollback, state, shift, sinks, self.seen == 0, new_columns[0])

    def prepare_update(self, plan: WritePlan) -> None:
        """Prepare the next `update`, which is refused without: only a patched model calls this."""
        self._plan = plan

    def commit(self) -> None:
        """Count what `update` stored since: the forward has ended."""
        self.seen += self._stored
        self.written = max(self.written, self.seen)
        self._stored = 0

    @property
    def is_partial(self) -> bool:
        """Whether a forward that never ended stored tokens here."""
        return self._stored > 0

    @property
    def store_length(self) -> int:
        """How many tokens are stored, those of the running forward included."""
        return self.seen + self._stored

    def keys_for(self, new_tokens: int) -> int:
        """Return how many keys the next `update` will return, of several tokens or of one that is not the first."""
        before = min(self.seen, self.window_length - 1)
        return self.num_sink_tokens + (self.window_length if new_tokens == 1 else before + new_tokens)

    def key_positions(self, state: PaddingState, device: torch.device) -> Tensor:
        """Positions [rows, S + L] of the slots' keys as one more token will see them, negative for an empty slot."""
        sinks, slots = (torch.arange(n, device=device) for n in (self.num_sink_tokens, self.window_length))
        positions = positions_of(self.seen - (self.seen - slots) % self.window_length, state.padding)
        return torch.cat([sinks.expand(positions.shape[0], -1), positions], dim=-1)

    def _slots_of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns' slots of the buffers, and of the rollback buffer."""
        return columns % self.window_length + self.num_sink_tokens, columns % self.ROLLBACK

    def all_visible(self, state: PaddingState) -> bool:
        """Whether the next token, coming alone, sees every slot in every row."""
        return self.seen - state.max_padding >= self.num_sink_tokens + self.window_length - 1

    def crop_length(self) -> int:
        """Return the least number of tokens that `crop` can go back to."""
        has_overwritten = self.written > self.window_length + self.ROLLBACK
        return max(self.padding_state.floor, self.written - self.ROLLBACK - 1 if has_overwritten else 0)

    @property
    def nbytes(self) -> int:
        """The bytes of its buffers."""
        return sum(int(getattr(self, name).nbytes) for name in _BUFFERS)

    @property
    def device(self) -> torch.device:
        """Where the layer computes: `DynamicCache(offloading=True)` moves keys and values to the CPU and back."""
        device: torch.device = self.sink_keys.device
        return device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, once."""
        slots = self.num_sink_tokens + self.window_length
        states = key_states, value_states
        self.keys, self.values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in states)
        rollback = (x.new_zeros(*x.shape[:2], self.ROLLBACK, x.shape[3]) for x in states)
        self.rollback_keys, self.rollback_values = rollback
        self.sink_keys = self.keys[:, :, : self.num_sink_tokens].clone()
        if self.keys.is_cuda and not torch.compiler.is_compiling():  # a CUDA graph writes them where they lie
            for buffer in (self.keys, self.values, self.rollback_keys, self.rollback_values):
                torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim]; return those that their queries may see."""
        new, plan = key_states.shape[2], self._plan
        if plan is None or len(plan.ring) != new:
            raise CacheLawError(
                f"this cache was built for a model patched by {self.law.technique if self.law else 'LMInfinite'} and "
                "is being used by one that is not (or no longer is): its tokens outside sinks and window are gone. "
                "Generate inside the patch, or start anew with DynamicCache()"
            )
        self._plan = None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._prepare_states(key_states, value_states)
        self.padding_state = plan.state
        returned = key_states, value_states
        if plan.shift is not None:
            key_states, value_states = self._shift_rows(key_states, value_states, plan, plan.shift)
        if plan.sinks is not None:
            self._store_sink_keys(key_states, value_states, plan.sinks, plan.shift)
        if not plan.is_first and new > 1:
            sink_values = self.values[:, :, : self.num_sink_tokens]
            returned = (
                self._in_order(self.keys, self.sink_keys, key_states),
                self._in_order(self.values, sink_values, value_states),
            )
        elif not plan.is_first:
            returned = self.keys, self.values
        self._store(key_states, value_states, plan)
        self._stored = new
        if plan.sink_rotation is not None and self.rotation is not None and self.num_sink_tokens:
            self._rotate_sink_keys(self.rotation, *plan.sink_rotation)
        return returned

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether `update` stores states of this dtype in the buffers as they are."""
        is_locked = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        return bool(self.keys.dtype == self.values.dtype == dtype) and not is_locked

    def _prepare_states(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Make buffers and new states agree in dtype, the wider one winning, and the buffers writable here."""
        if torch.compiler.is_compiling():
            return key_states, value_states
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self._map_rows(torch.clone)
        if key_states.dtype == self.keys.dtype and value_states.dtype == self.values.dtype:
            return key_states, value_states
        wide = torch.promote_types(key_states.dtype, self.keys.dtype)
        wide_values = torch.promote_types(value_states.dtype, self.values.dtype)
        self.keys, self.values = self.keys.to(wide), self.values.to(wide_values)
        self.rollback_keys, self.rollback_values = self.rollback_keys.to(wide), self.rollback_values.to(wide_values)
        self.sink_keys = self.sink_keys.to(wide)
        return key_states.to(wide), value_states.to(wide_values)

    def _in_order(self, ring: Tensor, sinks: Tensor, new: Tensor) -> Tensor:
        """Return [sinks | window before | new tokens], in the order of the text."""
        columns = torch.arange(max(0, self.seen - self.window_length + 1), self.seen, device=ring.device)
        slots, _ = self._slots_of(columns)
        return torch.cat([sinks, ring.index_select(2, slots), new], dim=2)

    def _shift_rows(
        self, key_states: Tensor, value_states: Tensor, plan: WritePlan, shift: RowShift
    ) -> tuple[Tensor, Tensor]:
        """Move each row's old tokens up to its new ones; return the new columns' states with old ones at their head."""
        back, by = shift.truncated.to(self.keys.device), shift.shift.to(self.keys.device)
        slots = torch.arange(self.window_length, device=self.keys.device)
        source = (slots - by[:, None]) % self.window_length + self.num_sink_tokens
        is_old = torch.arange(key_states.shape[2], device=back.device) < shift.leading.to(back.device)[:, None]
        ring = plan.ring.to(back.device).expand(len(back), -1)
        result = []
        for buffer, rollback, states in (
            (self.keys, self.rollback_keys, key_states),
            (self.values, self.rollback_values, value_states),
        ):
            if bool(back.any()) and self.seen:
                self._restore(buffer, rollback, back)
            buffer[:, :, self.num_sink_tokens :] = gather_columns(buffer, source)
            states = states if shift.order is None else gather_columns(states, shift.order)
            result.append(torch.where(is_old[:, None, :, None], gather_columns(buffer, ring), states))
        return result[0], result[1]

    def _restore(self, buffer: Tensor, rollback: Tensor, back: Tensor) -> None:
        """Restore each row's slots that its last `back` columns [batch] overwrote.

        If several removed columns used one slot, the earliest one's old content is restored.
        """
        columns = torch.arange(max(0, self.seen - int(back.max())), self.seen, device=buffer.device)
        first = (self.seen - back)[:, None]
        is_first = (
            (columns >= first) & (columns < first + self.window_length) & (columns >= self.written - self.ROLLBACK)
        )
        for column in columns.tolist():
            slot, kept = column % self.window_length + self.num_sink_tokens, column % self.ROLLBACK
            mine = is_first[:, column - columns[0], None, None]
            buffer[:, :, slot] = torch.where(mine, rollback[:, :, kept], buffer[:, :, slot])

    def _store(self, key_states: Tensor, value_states: Tensor, plan: WritePlan) -> None:
        """Write the new tokens into the ring, and the slots that the last ones overwrite into the rollback buffer."""
        new = key_states.shape[2]
        key_states, value_states = key_states.detach(), value_states.detach()
        ring, rollback = plan.ring.to(key_states.device), plan.rollback.to(key_states.device)
        step = min(self.ROLLBACK, self.window_length)  # no slot twice in one write
        if new <= step:
            self._write(key_states, value_states, ring, rollback)
        else:
            recorded = max(0, new - self.ROLLBACK)
            last = slice(max(0, recorded - self.window_length), recorded)
            self.keys.index_copy_(2, ring[last], key_states[:, :, last])
            self.values.index_copy_(2, ring[last], value_states[:, :, last])
            for start in range(recorded, new, step):
                part = slice(start, start + step)
                self._write(key_states[:, :, part], value_states[:, :, part], ring[part], rollback[part])

    def _write(self, key_states: Tensor, value_states: Tensor, ring: Tensor, rollback: Tensor) -> None:
        """Write a few tokens into the ring, and the slots that they overwrite into the rollback buffer."""
        self.rollback_keys.index_copy_(2, rollback, self.keys.index_select(2, ring))
        self.rollback_values.index_copy_(2, rollback, self.values.index_select(2, ring))
        self.keys.index_copy_(2, ring, key_states)
        self.values.index_copy_(2, ring, value_states)

    def _store_sink_keys(self, key_states: Tensor, value_states: Tensor, index: Tensor, shift: RowShift | None) -> None:
        """Keep the new tokens that are among their row's first S real ones, by their columns [rows, S]."""
        index = index.to(key_states.device)
        first = 0 if shift is None else shift.leading.to(index.device)[:, None]
        is_new = ((index >= first) & (index < key_states.shape[2]))[:, None, :, None]
        index = index.clamp(0, key_states.shape[2] - 1)[:, None, :, None]
        slots = slice(self.num_sink_tokens)
        for store, states in ((self.sink_keys, key_states), (self.values[:, :, slots], value_states)):
            there = index.expand(*states.shape[:2], -1, states.shape[3])
            store.copy_(torch.where(is_new, states.detach().gather(2, there), store))
        self.keys[:, :, slots].copy_(self.sink_keys)

    def _rotate_sink_keys(self, rotation: Rotation, cos: Tensor, sin: Tensor) -> None:
        """Put the sinks' keys, rotated to their distance, into their slots."""
        rotated = rotation.apply(self.sink_keys, cos.to(self.keys.device), sin.to(self.keys.device))
        self.keys[:, :, : self.num_sink_tokens].copy_(rotated)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (new tokens, 0): transformers' own mask is made for these and then not used."""
        return query_length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Return the number of tokens seen, padding included; to a graph that runs a step, as a tensor."""
        if torch.compiler.is_compiling() and self._plan is not None:
            return self._plan.past
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no end."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive, which transformers refuses too, or the ring has overwritten keys that
                the shorter text would see.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, of tokens to take back, got {tokens_to_remove}: to keep the first m of "
                "n tokens, pass m - n"
            )
        remove = min(-tokens_to_remove, self.seen)
        remaining, oldest = self.seen - remove, self.crop_length()
        if remove and remaining < oldest:
            raise ValueError(
                f"cannot take back {remove} tokens: after {self.written} tokens this cache of constant size can go "
                f"back to {oldest}, and no further; draft fewer tokens at a time, or pass "
                "cache=DynamicCache(), which keeps everything"
            )
        if remove:
            refuse_crop_of_states(self.states)
        if self.is_initialized and self.written > self.window_length:
            # If several removed columns used one slot, the earliest one's old content is restored.
            last = min(remaining + self.window_length, self.seen)
            ring, rollback = self._slots_of(torch.arange(remaining, last, device=self.keys.device))
            self.keys.index_copy_(2, ring, self.rollback_keys.index_select(2, rollback))
            self.values.index_copy_(2, ring, self.rollback_values.index_select(2, rollback))
        self.seen = remaining
        state = self.padding_state
        if state.padding is not None and remaining < state.max_padding:
            padding = state.padding.clamp_max(remaining)
            self.padding_state = state._replace(padding=padding, max_padding=remaining)

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        super().reset()
        self.seen = self.written = self._stored = 0
        self.padding_state = PaddingState()
        self.selection = None

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
        self.padding_state = self.padding_state.map(change)
        if self.is_initialized:
            for name in _BUFFERS:
                setattr(self, name, change(getattr(self, name)))
        if self.selection is not None:
            self.selection = self.selection.map(change)


LambdaCacheLayer = RingCacheLayer  # its public name since 0.1


def refuse_crop_of_states(states: Iterable[Any]) -> None:
    """Raise ValueError if one of these cache layers, of a state each, cannot take tokens back."""
    for state in states:
        if any(state.is_recurrent_states_initialized.values()) or not state.record_past:
            raise ValueError(
                "cannot take tokens back: recurrent layers of this model carry a state of all that they have seen (of "
                "convolutions alone they can, after cache.activate_past_recording()). Start anew with the shorter "
                "text, or keep a copy.deepcopy of the cache from before"
            )
