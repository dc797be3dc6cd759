"""Recurrent and convolutional layers beside limited attention: what their states can do, and a ring that carries one.

A hybrid keeps a state of constant size in the layers that do not attend, and the state of a text is that of all its
tokens in order. So padding may stand before a row's first token alone, and no token is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from hf_longtrunc.attention.cache import ArchiveCacheLayer, LambdaCacheLayer, refuse_states
from hf_longtrunc.attention.probe import hidden_states
from hf_longtrunc.models import disagreement, few_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class States:
    """The states that a model's layers carry.

    Attributes:
        go_on: whether a forward of several tokens goes on from them. Jamba and Zamba start anew there, patched or not.
    """

    go_on: bool

    def check(self, real: Tensor | None, past: int, new: int) -> None:
        """Refuse a forward whose states would not be those of each row's tokens.

        Args:
            real: where there are tokens [batch, past + new]; None: everywhere.
            past: columns seen.
            new: columns to come.

        Raises:
            ValueError: the message says what to do.
        """
        if past and new > 1 and not self.go_on:
            raise ValueError(
                f"this model's recurrent layers forget their state in a forward of several tokens behind others, "
                f"patched or not, and this one brings {new} behind {past}: give the whole text at once (without "
                "prefill_chunk_size, and with a new cache), or go on token by token"
            )
        if real is None:
            return
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise ValueError(
                "attention_mask has zeros behind a row's first token, and this model has recurrent or convolutional "
                "layers, whose state runs on over them: pad on the left alone, and continue rows one by one"
            )
        if new == 1 and not bool(real[:, -1].all()):
            raise ValueError(
                "attention_mask says that this one token of a row is padding, and transformers shows no mask to "
                "recurrent layers in a forward of one token: give a row's padding together with its first token"
            )


def states_of(decoder: Any) -> States | None:
    """Return what the states of a decoder can do, by three short forwards and their repetition; None without any."""
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _cache(decoder).layers):
        return None
    as_they_are, changed = (_continued(decoder, factor) for factor in (1.0, 1e3))
    return States(go_on=disagreement(as_they_are, changed) is not None)


def _continued(decoder: Any, factor: float) -> Tensor:
    """Return hidden states of a few tokens behind others whose states are multiplied by `factor`."""
    ids, cache = few_tokens(decoder, 8), _cache(decoder)
    hidden_states(decoder, ids[:, :4], cache)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            recurrent = [state for state in layer.recurrent_states.values() if state is not None]
            for state in recurrent or [state for state in layer.conv_states.values() if state is not None]:
                state.mul_(factor)
    return hidden_states(decoder, ids[:, 4:], cache)


def _cache(decoder: Any) -> DynamicCache:
    return DynamicCache(config=decoder.config)


_State: Any = LinearAttentionLayer  # whose methods have no types


class _WithState(_State):  # type: ignore[misc]
    """A state in one cache layer with a ring, the class that stands behind this one in the order of inheritance."""

    is_compileable = False
    device: Any = None  # of the state; the ring's own is a property

    def __init__(self, number_of_states: int, *ring: Any):
        _State.__init__(self, number_of_states)
        self._ring.__init__(*ring)

    @property
    def _ring(self) -> Any:
        return super(LinearAttentionCacheLayerMixin, self)

    def lazy_initialization(self, *states: Any, **named: Any) -> None:
        """Allocate the ring for keys and values, or the state for what is named."""
        owner: Any = self._ring if states else super()
        owner.lazy_initialization(*states, **named)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back, if the state is of convolutions alone that have recorded them."""
        if tokens_to_remove:
            refuse_states([self])
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


class LambdaStateCacheLayer(_WithState, LambdaCacheLayer):  # type: ignore[no-untyped-call]
    """`LambdaCacheLayer` and a state, where one layer attends and recurs (Falcon-H1, Zamba)."""


class ArchiveStateCacheLayer(_WithState, ArchiveCacheLayer):  # type: ignore[no-untyped-call]
    """`ArchiveCacheLayer` and a state."""
