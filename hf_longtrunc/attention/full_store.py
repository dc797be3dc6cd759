"""Ring caches that keep more: the whole text's keys and values for retrieval, or a state for hybrid layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from hf_longtrunc.attention.block_scores import UnrotatedKeys
from hf_longtrunc.attention.padding import RowShift, gather_columns, positions_of
from hf_longtrunc.attention.ring_cache import RingCacheLayer, refuse_crop_of_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.attention.rope import Rotation


class FullStoreCacheLayer(RingCacheLayer):  # type: ignore[no-untyped-call]
    """Sinks and a ring, and the un-rotated keys and values of the whole text, for a model that reads distant keys.

    Examples:
        >>> with LMInfinite(num_sink_tokens=4, window_length=16, retrieval=TopK(k=2, first_layer=0))(model):
        ...     output = model.generate(ids, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        >>> cache_of(output).layers[0].text().key.shape[2]
        101

    The store grows by half whenever it is full, so a token costs the same on average. Everything else is
    `RingCacheLayer`.

    Args:
        num_sink_tokens: S.
        window_length: L.
        rotation: of this layer's keys; None where it has none.
        store: "device" or "cpu": where the text is kept. On the CPU it is pinned if the model is on CUDA.

    Attributes:
        store_keys: rotated back to position 0 [batch, heads, capacity, dim], in the order of the text.
        store_values: [batch, heads, capacity, value_dim].
    """

    def __init__(self, num_sink_tokens: int, window_length: int, rotation: Rotation | None, store: str):
        super().__init__(num_sink_tokens, window_length, rotation)
        self.store = store
        self.store_keys: Tensor | None = None
        self.store_values: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, heads, n, dim] and return what window and sinks show their queries."""
        past, new = self.seen, key_states.shape[2]
        shift = None if self._plan is None else self._plan.shift
        returned = super().update(key_states, value_states, *args, **kwargs)
        if shift is not None:
            if shift.order is not None:
                key_states, value_states = (gather_columns(x, shift.order) for x in (key_states, value_states))
            self._shift_store(shift)
        columns = torch.arange(past, past + new, device=key_states.device)
        positions = positions_of(columns, self.padding_state.padding)
        unrotated = key_states if self.rotation is None else self.rotation.rotate(key_states, -positions)
        self.store_keys = self._store_for(self.store_keys, unrotated)
        self.store_values = self._store_for(self.store_values, value_states)
        for store, states in ((self.store_keys, unrotated), (self.store_values, value_states)):
            states = states.detach()
            if shift is not None:  # tokens that moved into the new columns stay
                is_old = torch.arange(new, device=states.device) < shift.leading.to(states.device)[:, None]
                states = torch.where(is_old[:, None, :, None], store[:, :, past : past + new].to(states.device), states)
            store[:, :, past : past + new] = states
        return returned

    def _shift_store(self, shift: RowShift) -> None:
        """Move each row's old tokens up to its new ones."""
        if self.store_keys is None or self.store_values is None:
            return
        self.store_keys, self.store_values = (
            self._store_for(x, x[:, :, :0]) for x in (self.store_keys, self.store_values)
        )
        for store in (self.store_keys, self.store_values):
            columns = torch.arange(self.store_length, device=store.device) - shift.shift.to(store.device)[:, None]
            store[:, :, : self.store_length] = gather_columns(store, columns.clamp_min(0))

    def _store_for(self, store: Tensor | None, states: Tensor) -> Tensor:
        """Return a store with room for all tokens seen: this one, or a larger one with its contents."""
        if store is not None and store.shape[2] >= self.store_length:
            return store
        like = states if store is None else store
        shape = *like.shape[:2], self.store_length if store is None else self.store_length * 3 // 2, like.shape[3]
        on_cpu, pinned = self.store == "cpu", states.is_cuda if store is None else store.is_pinned()
        larger = torch.zeros(
            shape, dtype=like.dtype, device="cpu" if on_cpu else like.device, pin_memory=on_cpu and pinned
        )
        if store is not None:
            larger[:, :, : store.shape[2]] = store
        return larger

    def text(self) -> UnrotatedKeys:
        """Return all that was seen, un-rotated, where it is stored."""
        keys, values = self.store_keys, self.store_values
        assert keys is not None
        assert values is not None
        positions = positions_of(torch.arange(self.store_length, device=keys.device), self.padding_state.padding)
        return UnrotatedKeys(keys[:, :, : self.store_length], values[:, :, : self.store_length], positions)

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        self.store_keys = self.store_values = None

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        self.store_keys, self.store_values = (
            None if kept is None else change(kept) for kept in (self.store_keys, self.store_values)
        )


ArchiveCacheLayer = FullStoreCacheLayer  # its public name since 0.1


_State: Any = LinearAttentionLayer  # its methods have no types


class _WithState(_State):  # type: ignore[misc]
    """A state in one cache layer with a ring, the next class in the order of inheritance."""

    is_compileable = False
    device: Any = None  # of the state; the ring's own is a property

    def __init__(self, number_of_states: int, *ring: Any):
        _State.__init__(self, number_of_states)
        self._ring.__init__(*ring)

    @property
    def _ring(self) -> Any:
        return super(LinearAttentionCacheLayerMixin, self)

    def lazy_initialization(self, *states: Any, **named: Any) -> None:
        """Allocate the ring for keys and values, or the state for named tensors."""
        owner: Any = self._ring if states else super()
        owner.lazy_initialization(*states, **named)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, if the state is of convolutions alone that have recorded them."""
        if tokens_to_remove:
            refuse_crop_of_states([self])
        self._ring.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget every token and keep the memory."""
        super().reset()
        self._ring.reset()

    def offload(self) -> None:
        """Move ring and state to the CPU."""
        super().offload()
        self._ring.offload()

    def prefetch(self) -> None:
        """Move them back."""
        super().prefetch()
        self._ring.prefetch()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put row beam_idx[b] in the place of row b."""
        self._ring.reorder_cache(beam_idx)

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self._ring._map_rows(change)
        for states in (self.conv_states, self.recurrent_states):
            states.update({index: change(state) for index, state in states.items() if state is not None})


class RingStateCacheLayer(_WithState, RingCacheLayer):  # type: ignore[no-untyped-call]
    """`RingCacheLayer` and a state, where one layer attends and recurs (Falcon-H1, Zamba)."""


class FullStoreStateCacheLayer(_WithState, FullStoreCacheLayer):  # type: ignore[no-untyped-call]
    """`FullStoreCacheLayer` and a state."""
