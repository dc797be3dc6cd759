"""Caches of conversations between requests, found by the tokens that they begin with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from hf_longtrunc import LambdaCacheLayer
from hf_longtrunc.evaluation import cache_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor


@dataclass(frozen=True)
class State:
    """A cache that has read `ids` [n], under `address`: what else its contents depend on.

    Attributes:
        parent: number of the state that this one went on from; None: it was read from the beginning.
    """

    address: Hashable
    ids: Tensor
    cache: Any
    bytes: int
    parent: int | None


class States:
    """The caches of the last conversations, at most `limit` bytes of them; the least recently used go first.

    A conversation comes back whole with every request. Its tokens are the address: a request that begins as a kept
    text did goes on from there, whoever sends it. Of each conversation the last two states are kept, so that its last
    message can be edited. Caches are copied in and out: kept ones are never written to.

    Not safe under threads: the caller holds a lock.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._states: dict[int, State] = {}  # the least recently used first
        self._numbers = count()

    @property
    def bytes(self) -> int:
        """What all kept caches hold."""
        return sum(state.bytes for state in self._states.values())

    def find(self, address: Hashable, ids: Tensor, most: int) -> tuple[Any, int, int | None]:
        """Return a cache of the first tokens of `ids` [n], how many they are, and the number of its state.

        Args:
            address: everything except the tokens that a cache's contents depend on.
            ids: on the CPU.
            most: tokens that the cache may have read; later ones are taken back.

        Returns:
            (None, 0, None) where no kept text begins as `ids` do, or none can be taken back so far.
        """
        length = 0
        best: int | None = None
        for number, state in self._states.items():
            if state.address == address:
                shared = min(_common_prefix(state.ids, ids), most)
                if shared >= max(1, length) and _can_go_back_to(state.cache, shared, len(state.ids)):
                    length, best = shared, number
        if best is None:
            return None, 0, None
        state = self._states[best] = self._states.pop(best)
        cache = copy.deepcopy(state.cache)
        if length < len(state.ids):
            cache.crop(length - len(state.ids))
        return cache, length, best

    def keep(self, address: Hashable, ids: Tensor, cache: Any, parent: int | None) -> None:
        """Keep a copy of a cache that has read `ids` [n] and went on from the state `parent`."""
        origin = None if parent is None else self._states.get(parent)
        if origin is not None and torch.equal(origin.ids, ids):
            return
        size = cache_bytes(cache)
        if size > self.limit:
            return
        if origin is not None and origin.parent is not None:
            self._states.pop(origin.parent, None)
        while self.bytes + size > self.limit:
            self._states.pop(next(iter(self._states)))
        self._states[next(self._numbers)] = State(address, ids.clone(), copy.deepcopy(cache), size, parent)


def _common_prefix(left: Tensor, right: Tensor) -> int:
    shared = min(len(left), len(right))
    differ = (left[:shared] != right[:shared]).nonzero()
    return int(differ[0]) if len(differ) else shared


def _can_go_back_to(cache: Any, length: int, read: int) -> bool:
    """Whether a cache that has read so many tokens can be cropped to its first `length`."""
    return length == read or all(
        not layer.states and length >= layer.crop_length()
        if isinstance(layer, LambdaCacheLayer)
        else isinstance(layer, DynamicLayer) and not layer.is_sliding
        for layer in cache.layers
    )
