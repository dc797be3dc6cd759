"""A cache layer that holds the first S tokens of every row and the last L, and never grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hf_longtrunc.attention.middle import Choice, Middle
from hf_longtrunc.attention.row_positions import Moves, Rows, from_first_token, taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from hf_longtrunc.attention.rotary import Rotation


class Announcement(NamedTuple):
    """Where the tokens of one forward go, found out once for all layers.

    Attributes:
        ring: their slots of the buffers [n].
        rollback: their slots of the rollback buffer [n].
        rows: the batch's rows once they are there.
        moves: what moves before; None: nothing.
        sinks: each sink's column among the new ones [rows, S], where it is one of them; None where none can be.
        is_first: whether no token came before.
        past: how many did, without dimensions: for a graph, which would be made anew for each number.
        turn: cosines and sines [rows, 1, S, 2f] that turn the sinks on to where one new token sees them; None where
            several come or nothing turns.
    """

    ring: Tensor
    rollback: Tensor
    rows: Rows
    moves: Moves | None
    sinks: Tensor | None
    is_first: bool
    past: Tensor
    turn: tuple[Tensor, Tensor] | None = None


class Beside(NamedTuple):
    """What a ring keeps beside its slots.

    Attributes:
        lost_keys: the rollback buffer [batch, heads, ROLLBACK, dim]: at c mod ROLLBACK, what column c overwrote.
        lost_values: likewise.
        sink_keys: at their own positions [batch, heads, S, dim].
        sink_quarter_turns: their rotated dimensions, a quarter turn on [batch, heads, S, 2f]; None: nothing turns.
    """

    lost_keys: Tensor
    lost_values: Tensor
    sink_keys: Tensor
    sink_quarter_turns: Tensor | None


class LambdaCacheLayer(CacheLayerMixin):
    """Sinks and a ring, in place of a `DynamicLayer`, for a model patched by `LMInfinite`.

    Keys are stored as the model rotated them. `keys` and `values` are one buffer each, [batch, heads, S + L, dim]:
    S slots for the sinks and a ring of L slots in which column c lies at slot c mod L, so a token is stored by one
    indexed write. A row's sinks are its first S *real* tokens, and its tokens are its last columns, whatever its
    padding: where a mask shows that columns between tokens hold none, the row's older tokens move up to the new ones.

    For one new token `update` returns the buffers themselves, the sinks turned on to where the token sees them: once
    the ring is full, all that they hold is seen, and no mask is needed. For several it returns [sinks | window before |
    new tokens], the sinks at their own positions, once per call. For the first tokens of all it returns these alone.

    `get_seq_length` counts the tokens seen; `settle` counts those of a forward that has ended. For one token `update`
    reads no number that changes with the tokens seen: all that does lies in the announcement's tensors, so that a
    compiled step is one graph for every token. What a token overwrites is kept in a rollback buffer of `ROLLBACK`
    columns, so `crop` takes back up to `ROLLBACK` + 1 tokens exactly, any number before the ring has come round, and
    refuses more, and any where other layers of the cache carry a state that cannot go back. Bytes are constant from the
    first token on: those of 2 (S + L + ROLLBACK) + S keys a head, row and layer, and S more in fp32.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.
    """

    ROLLBACK = 64
    is_croppable = True
    is_sliding = False

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window_length
        self.rotation = rotation
        self.seen = 0
        self.written = 0  # the most tokens ever seen: what the ring has overwritten, after a crop too
        self.rows = Rows()
        self.keys: Any = None  # [batch, heads, S + L, dim]
        self.values: Any = None
        self.beside: Any = None
        self.states: Sequence[Any] = ()  # the layers of the same cache that carry a state instead
        self._announced: Announcement | None = None
        self._stored = 0  # by a forward that has not ended

    def announcement(self, new: int, device: torch.device, rows: Rows, moves: Moves | None = None) -> Announcement:
        """Return where the next n tokens go, for this layer and for all that have seen as many."""
        new_columns = torch.arange(self.seen, self.seen + new, device=device)
        ring, rollback = self._slots_of(new_columns)
        sinks = None
        if self.seen < rows.max_padding + self.num_sink_tokens:
            columns = torch.arange(self.num_sink_tokens, device=device)[None]
            sinks = (columns if rows.padding is None else columns + rows.padding.to(device)[:, None]) - self.seen
        return Announcement(ring, rollback, rows, moves, sinks, self.seen == 0, new_columns[0])

    def expect(self, announcement: Announcement) -> None:
        """Prepare the next `update`, which is refused without: only a patched model calls this."""
        self._announced = announcement

    def settle(self) -> None:
        """Count what `update` stored since: the forward has ended."""
        self.seen += self._stored
        self.written = max(self.written, self.seen)
        self._stored = 0

    @property
    def is_torn(self) -> bool:
        """Whether a forward that never ended stored tokens here."""
        return self._stored > 0

    @property
    def held(self) -> int:
        """How many tokens are stored, those of the running forward included."""
        return self.seen + self._stored

    def keys_returned(self, new_tokens: int) -> int:
        """Return how many keys the next `update` will return, of several tokens or of one that is not the first."""
        return self.num_sink_tokens + (self.window_length if new_tokens == 1 else self._kept() + new_tokens)

    def key_positions(self, rows: Rows, device: torch.device) -> Tensor:
        """Positions [rows, S + L] of the slots' keys as one more token will see them, negative for what is empty."""
        sinks, slots = (torch.arange(n, device=device) for n in (self.num_sink_tokens, self.window_length))
        positions = from_first_token(self.seen - (self.seen - slots) % self.window_length, rows.padding)
        return torch.cat([sinks.expand(positions.shape[0], -1), positions], dim=-1)

    def _slots_of(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return where columns lie in the buffers, and where what they overwrote lies in the rollback buffer."""
        return columns % self.window_length + self.num_sink_tokens, columns % self.ROLLBACK

    def sees_every_slot(self, rows: Rows) -> bool:
        """Whether the next token, coming alone, sees all that the buffers then hold, whatever the row."""
        return self.seen - rows.max_padding >= self.num_sink_tokens + self.window_length - 1

    def oldest_length(self) -> int:
        """Return the least number of tokens that `crop` can go back to."""
        has_come_round = self.written > self.window_length + self.ROLLBACK
        return max(self.rows.floor, self.written - self.ROLLBACK - 1 if has_come_round else 0)

    def _kept(self) -> int:
        """How many columns before the new ones their first window reaches."""
        return min(self.seen, self.window_length - 1)

    @property
    def device(self) -> torch.device:
        """Where the layer computes: `DynamicCache(offloading=True)` moves keys and values to the CPU and back."""
        device: torch.device = self.beside.sink_keys.device
        return device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything, once."""
        slots, kept = self.num_sink_tokens + self.window_length, self.ROLLBACK
        self.keys, self.values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (key_states, value_states))
        lost_keys, lost_values = (x.new_zeros(*x.shape[:2], kept, x.shape[3]) for x in (key_states, value_states))
        sinks = self.keys[:, :, : self.num_sink_tokens].clone()
        turns = None if self.rotation is None else self.rotation.quarter_turn(sinks)
        self.beside = Beside(lost_keys, lost_values, sinks, turns)
        if self.keys.is_cuda and not torch.compiler.is_compiling():  # a CUDA graph writes them where they lie
            for buffer in (self.keys, self.values, lost_keys, lost_values):
                torch._dynamo.mark_static_address(buffer)
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
        self._announced = None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._fitted(key_states, value_states)
        self.rows = announced.rows
        handed_out = key_states, value_states
        if announced.moves is not None:
            key_states, value_states = self._moved(key_states, value_states, announced)
        if announced.sinks is not None:
            self._store_sinks(key_states, value_states, announced.sinks, announced.moves)
        if not announced.is_first and new > 1:
            sink_values = self.values[:, :, : self.num_sink_tokens]
            handed_out = (
                self._leading(self.keys, self.beside.sink_keys, key_states),
                self._leading(self.values, sink_values, value_states),
            )
        elif not announced.is_first:
            handed_out = self.keys, self.values
        self._store(key_states, value_states, announced)
        self._stored = new
        if announced.turn is not None and self.rotation is not None and self.num_sink_tokens:
            self._turn_sinks(*announced.turn, self.rotation.planes)
        return handed_out

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether `update` stores states of this dtype in the buffers as they are."""
        is_locked = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        return bool(self.keys.dtype == self.values.dtype == dtype) and not is_locked

    def _fitted(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
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
        lost_keys, lost_values, sinks, turns = self.beside
        self.beside = Beside(lost_keys.to(wide), lost_values.to(wide_values), sinks.to(wide), turns)
        return key_states.to(wide), value_states.to(wide_values)

    def _leading(self, ring: Tensor, sinks: Tensor, new: Tensor) -> Tensor:
        """Return [sinks | window before | new tokens], in the order of the text."""
        columns = torch.arange(self.seen - self._kept(), self.seen, device=ring.device)
        slots, _ = self._slots_of(columns)
        return torch.cat([sinks, ring.index_select(2, slots), new], dim=2)

    def _moved(self, key_states: Tensor, value_states: Tensor, announced: Announcement) -> tuple[Tensor, Tensor]:
        """Move each row's old tokens up to its new ones; return the new columns' states with old ones at their head."""
        moves = announced.moves
        assert moves is not None
        back, shift = moves.taken_back.to(self.keys.device), moves.shift.to(self.keys.device)
        slots = torch.arange(self.window_length, device=self.keys.device)
        source = (slots - shift[:, None]) % self.window_length + self.num_sink_tokens
        is_old = torch.arange(key_states.shape[2], device=back.device) < moves.leading.to(back.device)[:, None]
        ring = announced.ring.to(back.device).expand(len(back), -1)
        result = []
        for buffer, lost, states in (
            (self.keys, self.beside.lost_keys, key_states),
            (self.values, self.beside.lost_values, value_states),
        ):
            if bool(back.any()) and self.seen:
                self._take_back(buffer, lost, back)
            buffer[:, :, self.num_sink_tokens :] = taken(buffer, source)
            states = states if moves.order is None else taken(states, moves.order)
            result.append(torch.where(is_old[:, None, :, None], taken(buffer, ring), states))
        return result[0], result[1]

    def _take_back(self, buffer: Tensor, lost: Tensor, back: Tensor) -> None:
        """Put into each row's slots what its last `back` columns [batch] overwrote."""
        columns = torch.arange(max(0, self.seen - int(back.max())), self.seen, device=buffer.device)
        first = (self.seen - back)[:, None]
        # Where columns that go share a slot, the first of them overwrote what is to come back.
        is_first = (
            (columns >= first) & (columns < first + self.window_length) & (columns >= self.written - self.ROLLBACK)
        )
        for column in columns.tolist():
            slot, kept = column % self.window_length + self.num_sink_tokens, column % self.ROLLBACK
            chosen = is_first[:, column - columns[0], None, None]
            buffer[:, :, slot] = torch.where(chosen, lost[:, :, kept], buffer[:, :, slot])

    def _store(self, key_states: Tensor, value_states: Tensor, announced: Announcement) -> None:
        """Write the new tokens into the ring, and what the last of them overwrite into the rollback buffer."""
        new = key_states.shape[2]
        key_states, value_states = key_states.detach(), value_states.detach()
        ring, rollback = announced.ring.to(key_states.device), announced.rollback.to(key_states.device)
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
        """Write a few tokens into the ring, and what they overwrite into the rollback buffer."""
        self.beside.lost_keys.index_copy_(2, rollback, self.keys.index_select(2, ring))
        self.beside.lost_values.index_copy_(2, rollback, self.values.index_select(2, ring))
        self.keys.index_copy_(2, ring, key_states)
        self.values.index_copy_(2, ring, value_states)

    def _store_sinks(self, key_states: Tensor, value_states: Tensor, index: Tensor, moves: Moves | None) -> None:
        """Keep the new tokens that are among their row's first S real ones, by their columns [rows, S]."""
        index = index.to(key_states.device)
        first = 0 if moves is None else moves.leading.to(index.device)[:, None]
        is_new = ((index >= first) & (index < key_states.shape[2]))[:, None, :, None]
        index = index.clamp(0, key_states.shape[2] - 1)[:, None, :, None]
        slots = slice(self.num_sink_tokens)
        sink_keys = self.beside.sink_keys
        for store, states in ((sink_keys, key_states), (self.values[:, :, slots], value_states)):
            there = index.expand(*states.shape[:2], -1, states.shape[3])
            store.copy_(torch.where(is_new, states.detach().gather(2, there), store))
        self.keys[:, :, slots].copy_(sink_keys)
        if self.rotation is not None:
            self.beside = self.beside._replace(sink_quarter_turns=self.rotation.quarter_turn(sink_keys))

    def _turn_sinks(self, cos: Tensor, sin: Tensor, planes: slice) -> None:
        """Put the sinks' keys, turned on, into their slots."""
        cos, sin = cos.to(self.keys.device), sin.to(self.keys.device)
        _, _, sink_keys, quarter_turns = self.beside
        turned = torch.addcmul(sink_keys[..., planes] * cos, quarter_turns, sin)
        self.keys[:, :, : self.num_sink_tokens, planes].copy_(turned)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (new tokens, 0): transformers' own mask is made for these and then not used."""
        return query_length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]
        """Return the number of tokens seen, padding included; to a graph that runs a step, as a tensor."""
        if torch.compiler.is_compiling() and self._announced is not None:
            return self._announced.past
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no end."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: the number is positive, which transformers refuses too, or the ring has overwritten what the
                shorter text would see.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, of tokens to take back, got {tokens_to_remove}: to keep the first m of "
                "n tokens, pass m - n"
            )
        remove = min(-tokens_to_remove, self.seen)
        remaining, oldest = self.seen - remove, self.oldest_length()
        if remove and remaining < oldest:
            raise ValueError(
                f"cannot take back {remove} tokens: after {self.written} tokens the cache of LMInfinite can go back "
                f"to {oldest}, and no further; draft fewer tokens at a time, or pass "
                "cache=DynamicCache(), which keeps everything"
            )
        if remove:
            refuse_states(self.states)
        if self.is_initialized and self.written > self.window_length:
            # Where columns that go share a slot, the first of them overwrote what is to come back.
            last = min(remaining + self.window_length, self.seen)
            ring, rollback = self._slots_of(torch.arange(remaining, last, device=self.keys.device))
            self.keys.index_copy_(2, ring, self.beside.lost_keys.index_select(2, rollback))
            self.values.index_copy_(2, ring, self.beside.lost_values.index_select(2, rollback))
        self.seen = remaining
        if self.rows.padding is not None and remaining < self.rows.max_padding:
            padding = self.rows.padding.clamp_max(remaining)
            self.rows = self.rows._replace(padding=padding, max_padding=remaining)

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        super().reset()
        self.seen = self.written = self._stored = 0
        self.rows = Rows()

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
        self.rows = self.rows.map(change)
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            lost_keys, lost_values, sinks, turns = self.beside
            turns = None if turns is None else change(turns)
            self.beside = Beside(change(lost_keys), change(lost_values), change(sinks), turns)


def refuse_states(states: Iterable[Any]) -> None:
    """Raise ValueError if one of these cache layers, of a state each, cannot take tokens back."""
    for state in states:
        if any(state.is_recurrent_states_initialized.values()) or not state.record_past:
            raise ValueError(
                "cannot take tokens back: recurrent layers of this model carry a state of all that they have seen (of "
                "convolutions alone they can, after cache.activate_past_recording()). Start anew with the shorter "
                "text, or keep a copy.deepcopy of the cache from before"
            )


class Archive(NamedTuple):
    """Keys and values of a whole text, and what was chosen of it.

    Attributes:
        store: "device" or "cpu": where they live.
        keys: turned back to position 0, [batch, heads, capacity, dim], in the order of the text.
        values: [batch, heads, capacity, value_dim].
        chosen: blocks that `TopBlocks` reads [batch, blocks]; None: none were chosen yet.
        emphasis: of these [batch, blocks].
    """

    store: str
    keys: Tensor | None = None
    values: Tensor | None = None
    chosen: Tensor | None = None
    emphasis: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Archive:
        """Repeat, choose or reorder the rows."""
        return Archive(self.store, *(None if kept is None else change(kept) for kept in self[1:]))


class ArchiveCacheLayer(LambdaCacheLayer):  # type: ignore[no-untyped-call]
    """Sinks and a ring, and behind them the keys and values of the whole text, for a model that reads its middle.

    The archive grows by half whenever it is full, so a token costs the same on average. Everything else is
    `LambdaCacheLayer`.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.
        store: "device" or "cpu": where the archive lives. On the CPU it is pinned if the model is on CUDA.
    """

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None, store: str):
        super().__init__(num_sink_tokens, window_length, rotation)
        self.archive = Archive(store)

    @property
    def chosen(self) -> Choice | None:
        """What `TopBlocks` reads, None before any choice."""
        _, _, _, blocks, emphasis = self.archive
        return None if blocks is None or emphasis is None else Choice(blocks, emphasis)

    def choose(self, choice: Choice) -> None:
        """Let what follows read this."""
        self.archive = self.archive._replace(chosen=choice.blocks, emphasis=choice.emphasis)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim] and return what window and sinks show their queries."""
        past, new = self.seen, key_states.shape[2]
        moves = None if self._announced is None else self._announced.moves
        returned = super().update(key_states, value_states, *args, **kwargs)
        real = torch.arange(past, past + new, device=key_states.device)
        if moves is not None:
            if moves.order is not None:
                key_states, value_states = taken(key_states, moves.order), taken(value_states, moves.order)
            self._move_archive(moves, past)
        positions = from_first_token(real, self.rows.padding)
        turned = key_states if self.rotation is None else self.rotation.rotate(key_states, -positions)
        keys, values = self._grown(self.archive.keys, turned), self._grown(self.archive.values, value_states)
        for archive, states in ((keys, turned), (values, value_states)):
            states = states.detach()
            if moves is not None:  # what moved into the new columns stays
                is_old = (torch.arange(new, device=states.device) < moves.leading.to(states.device)[:, None])[
                    :, None, :, None
                ]
                states = torch.where(is_old, archive[:, :, past : past + new].to(states.device), states)
            archive[:, :, past : past + new] = states
        self.archive = self.archive._replace(keys=keys, values=values)
        return returned

    def _move_archive(self, moves: Moves, past: int) -> None:
        """Move each row's old tokens up to its new ones."""
        keys, values = (
            self._grown(archive, torch.empty(0)) if archive is not None else None
            for archive in (self.archive.keys, self.archive.values)
        )
        for archive in (keys, values):
            if archive is not None:
                columns = torch.arange(self.held, device=archive.device) - moves.shift.to(archive.device)[:, None]
                archive[:, :, : self.held] = taken(archive, columns.clamp_min(0))
        self.archive = self.archive._replace(keys=keys, values=values)

    def _grown(self, archive: Tensor | None, states: Tensor) -> Tensor:
        """Return an archive with room for all tokens seen: this one, or a larger one with its contents."""
        if archive is not None and archive.shape[2] >= self.held:
            return archive
        like = states if archive is None else archive
        shape = *like.shape[:2], self.held if archive is None else self.held * 3 // 2, like.shape[3]
        on_cpu, pinned = self.archive.store == "cpu", states.is_cuda if archive is None else archive.is_pinned()
        larger = torch.zeros(
            shape, dtype=like.dtype, device="cpu" if on_cpu else like.device, pin_memory=on_cpu and pinned
        )
        if archive is not None:
            larger[:, :, : archive.shape[2]] = archive
        return larger

    def middle(self) -> Middle:
        """Return all that was seen, un-rotated, where it is stored."""
        _, keys, values, *_ = self.archive
        assert keys is not None
        assert values is not None
        positions = from_first_token(torch.arange(self.held, device=keys.device), self.rows.padding)
        return Middle(keys[:, :, : self.held], values[:, :, : self.held], positions)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.archive = Archive(self.archive.store)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        self.archive = self.archive.map(change)


class ChosenLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache that grows, and what was chosen of the text that it holds.

    Attributes:
        chosen: blocks that count for several, None before any choice.
    """

    chosen: Choice | None = None

    @classmethod
    def of(cls, layer: DynamicLayer) -> ChosenLayer:
        """Return a layer that holds what `layer` does."""
        new = cls()
        vars(new).update(vars(layer))
        return new

    def choose(self, choice: Choice) -> None:
        """Let what follows read this."""
        self.chosen = choice

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.chosen = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put row beam_idx[b] in the place of row b."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.chosen is not None:
            self.chosen = type(self.chosen)(*map(change, self.chosen))
