"""The ways to read the middle, as settings of `LMInfinite(retrieval=...)`."""

from __future__ import annotations

import math
from dataclasses import dataclass

STORES = ("device", "cpu")


@dataclass(frozen=True)
class TopK:
    """Each head of the last rows of a forward reads its `k` best keys of the middle.

    Args:
        k: keys a head and row; 5 in the paper.
        distance: D_k, at which every key of the middle is scored and seen; None takes half the window, as the paper.
        first_layer: the first layer that reads; 4 to 6 in the paper.
        rows: how many of the last rows of each forward read: of a whole prompt, of each chunk of a prompt that comes in
            chunks, of every decoded token its own. 1 is the paper's setting, None lets every row read.
        store: where the whole text's keys and values are kept: on the model's "device", or on the "cpu" (pinned memory
            for CUDA), where they are searched too, so that only what was chosen travels.

    Cost: O(n) memory; a reading row costs O(n) time in each layer.
    """

    k: int = 64
    distance: int | None = None
    first_layer: int = 4
    rows: int | None = 64
    store: str = "device"

    def __post_init__(self) -> None:
        check_settings(self, {"k": 1, "distance": 1, "first_layer": 0, "rows": 1}, may_be_none={"distance", "rows"})

    def seen_at(self, window: int) -> int:
        """Return D_k under a window of that length."""
        return max(1, window // 2) if self.distance is None else self.distance


@dataclass(frozen=True)
class TopBlocks:
    """All heads and layers read the same few blocks of the middle, those that the later layers attend to most.

    A forward of at least `voters` tokens (a prompt, a turn of a chat, a chunk of a prompt) lets its last `voters` rows
    choose, and runs its last `rows` a second time with what was chosen; what is decoded afterwards goes on reading that
    choice. Shorter forwards keep the choice there is. Needs the cache that `generate` builds.

    Args:
        blocks: how many.
        block_size: tokens a block, counted from the end of the sinks.
        distance: D_k; None takes a quarter of the window. What is farther away than that, in the window too, can be
            chosen, and is scored and seen as if it stood there.
        emphasis: how many keys each chosen key counts for in the softmax; 1 leaves it at its score.
        first_layer: the first layer that reads.
        first_voter: the first layer that has a say; None takes two fifths of the model's layers (12 of 30), and never
            less than `first_layer`. Layers below look at what is salient, not at what is asked.
        voters: how many of a forward's last rows choose; more of them find less.
        rows: how many of a forward's last rows read: `voters` to 64, as many as the ring can take back. The whole
            question should be among them.
        store: as for `TopK`.

    Cost: O(n) memory; `rows` rows more and O(n) time a choice; a decoded token costs blocks * block_size keys more.
    """

    blocks: int = 8
    block_size: int = 64
    distance: int | None = None
    emphasis: float = 4.0
    first_layer: int = 4
    first_voter: int | None = None
    voters: int = 8
    rows: int = 16
    store: str = "device"

    def __post_init__(self) -> None:
        least = {"blocks": 1, "block_size": 1, "distance": 1, "first_layer": 0, "voters": 1, "rows": 1}
        check_settings(self, least | {"first_voter": 0}, may_be_none={"distance", "first_voter"})
        if isinstance(self.emphasis, bool) or not isinstance(self.emphasis, (int, float)):
            raise TypeError(f"TopBlocks: emphasis must be a number, got {self.emphasis!r}")
        if not 0 < self.emphasis < math.inf:
            raise ValueError(f"TopBlocks: emphasis must be above 0 and finite, got {self.emphasis}")
        if not self.voters <= self.rows <= 64:
            raise ValueError(
                f"TopBlocks: rows must lie between voters and 64, as many as the cache can take back, got "
                f"rows={self.rows}, voters={self.voters}"
            )

    def seen_at(self, window: int) -> int:
        """Return D_k under a window of that length."""
        return max(1, window // 4) if self.distance is None else self.distance

    def votes_from(self, layers: int) -> int:
        """Return the first layer that has a say, in a model of that many."""
        return max(self.first_layer, 2 * layers // 5) if self.first_voter is None else self.first_voter


def check_settings(strategy: object, least: dict[str, int], may_be_none: set[str]) -> None:
    """Refuse a strategy whose counts are no whole numbers of at least `least`, or whose store is unknown."""
    owner = type(strategy).__name__
    for name, bound in least.items():
        value = getattr(strategy, name)
        if value is None and name in may_be_none:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{owner}: {name} must be a whole number, got {value!r} of type {type(value).__name__}")
        if value < bound:
            raise ValueError(f"{owner}: {name} must be at least {bound}, got {value}")
    store = getattr(strategy, "store")  # noqa: B009  every strategy has one
    if store not in STORES:
        raise ValueError(f"{owner}: store must be one of {', '.join(STORES)}, got {store!r}")
