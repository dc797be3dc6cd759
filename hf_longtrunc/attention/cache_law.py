"""The law under which a cache was filled, checked by everything that continues it.

A patched model may cache keys at other positions than the unpatched model (dual chunk attention), or keep only some of
them (a ring). So each cache layer carries the `CacheLaw` under which it was filled. A cache of n tokens goes on under
the same law, or under another one if both read n tokens as the unpatched model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicLayer

from hf_longtrunc.attention.context import get_context
from hf_longtrunc.errors import CacheLawError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hf_longtrunc.attention.block_scores import Selection


@dataclass(frozen=True)
class CacheLaw:
    """How cached keys were computed."""

    technique: str  # with its settings, as messages name it
    exact_length: int  # the longest text with the same keys as in the unpatched model
    frequencies: int = 0  # fingerprint of the rotary frequencies; 0 for the model's own


def check_law(layer: Any, law: CacheLaw | None) -> None:
    """Let a cache layer be continued under a law, None for the unpatched model.

    Raises:
        CacheLawError: it was filled under another one, and both differ for a text of its length.
    """
    held = getattr(layer, "law", None)
    if held == law:
        layer.law = law  # the caller's own object, which it recognises next time
        return
    length = int(layer.get_seq_length())
    exact = min(each.exact_length for each in (held, law) if each is not None)
    if length > exact:
        before = "the unpatched model" if held is None else held.technique
        now = "the unpatched model" if law is None else law.technique
        again = "detach the patch first" if held is None else f"patch the model with {held.technique} again"
        raise CacheLawError(
            f"this cache holds {length} tokens that were read by {before}, and {now} reads texts of more than {exact} "
            f"tokens differently: start anew with a new cache, or {again}"
        )
    layer.law = law


class GuardedLayer:
    """Mixed into a cache layer that grows: the law that filled it, and the blocks that `TopBlocks` selected."""

    law: CacheLaw | None = None  # None for the unpatched model
    selection: Selection | None = None  # None before any selection

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Store new keys and values; refused to the unpatched model where its own keys would be others."""
        if self.law is not None and get_context() is None:
            check_law(self, None)
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget every token."""
        super().reset()  # type: ignore[misc]
        self.law = self.selection = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map_selection(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` alone."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map_selection(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put row beam_idx[b] in the place of row b."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map_selection(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def _map_selection(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.selection is not None:
            self.selection = self.selection.map(change)


def guarded(layer: Any) -> Any:
    """Return a `GuardedLayer` that shares everything with a cache layer that grows; None for other kinds of layer."""
    if isinstance(layer, GuardedLayer):
        return layer
    if not isinstance(layer, DynamicLayer) or layer.is_sliding:
        return None
    kind = _guarded_layer(type(layer))
    result = object.__new__(kind)
    result.__dict__ = layer.__dict__
    return result


@cache
def _guarded_layer(kind: Any) -> Any:
    name = f"Guarded{kind.__name__}"
    # transformers would register a subclass with a layer type of its own; pickle finds the class by its name here.
    result = type(kind)(name, (GuardedLayer, kind), {"__module__": __name__, "_layer_type": None})
    globals()[name] = result
    return result


_guarded_layer(DynamicLayer)  # a pickled cache loads in a new process
