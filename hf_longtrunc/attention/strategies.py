"""The ways to read the middle, as settings of `LMInfinite(retrieval=...)`."""

from __future__ import annotations

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


@dataclass(frozen=True)
class TopBlocks:
    """All heads and layers read the same few blocks of the middle, those that together they attend to most.

    A forward of at least `voters` tokens (a prompt, a turn of a chat, a chunk of a prompt) lets its last `voters` rows
    choose, and runs its last `rows` a second time with what was chosen; what is decoded afterwards goes on reading that
    choice. Shorter forwards keep the choice there is. Needs the cache that `generate` builds.

    Args:
        blocks: how many.
        block_size: tokens a block, counted from the end of the sinks.
        distance: D_k, at which the middle is scored and seen; None takes half the window.
        first_layer: the first layer that has a say and reads.
        voters: how many of a forward's last rows choose; more of them find less.
        rows: how many of a forward's last rows read: `voters` to 64, as many as the ring can take back. The whole
            question should be among them.
        store: as for `TopK`.

    Cost: O(n) memory; `rows` rows more and O(n) time a choice; a decoded token costs blocks * block_size keys more.
    """

    blocks: int = 8
    block_size: int = 64
    distance: int | None = None
    first_layer: int = 4
    voters: int = 8
    rows: int = 16
    store: str = "device"

    def __post_init__(self) -> None:
        least = {"blocks": 1, "block_size": 1, "distance": 1, "first_layer": 0, "voters": 1, "rows": 1}
        check_settings(self, least, may_be_none={"distance"})
        if not self.voters <= self.rows <= 64:
            raise ValueError(
                f"TopBlocks: rows must lie between voters and 64, as many as the cache can take back, got "
                f"rows={self.rows}, voters={self.voters}"
            )


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
