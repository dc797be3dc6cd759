"""One forward pass as an immutable value: token positions, key layout, rotations to apply.

The context is built once before the decoder runs, from the cache and the padding mask. It travels to the layers in the
place of `attention_mask`. So a layer that is run again for its gradients gets the context of its own forward, and two
threads have one each.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from typing_extensions import Self

    from hf_longtrunc.attention.key_retrieval import BlockScores

_thread = threading.local()
_FULL = "full_attention"  # transformers' name for these layers, where a decoder has several kinds

MORE_THAN_CAUSAL = (
    "this call wants a mask that is more than causal (packed rows, or tokens that see ahead, as those of an image in "
    "some models): a patched model makes its own and cannot add to it"
)


class PlaceholderError(RuntimeError):
    """A mask placeholder was used as a tensor."""


class MaskPlaceholder:
    """Travels to the layers as `attention_mask`; implements the tensor methods that decoders call on a mask.

    Falcon tests for four dimensions, MPT converts to booleans, and Gemma 4 slices off queries without logits.
    """

    ndim = 0

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return itself: its tensors are moved where they are used."""
        return self

    def __getitem__(self, index: tuple[Any, ...]) -> Self:
        """Return the placeholder for some of the queries, as `mask[:, :, queries, :]` selects them."""
        return self

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be computed with.

        Raises:
            PlaceholderError: always. Layers of a detached model that gradient checkpointing runs again come here.
        """
        raise PlaceholderError(
            f"a layer used {cls.__name__} as an attention mask: the forward was made by a patched model, and its "
            "layers run again after the patch was detached. Call backward() before detach(), inside the with block"
        )


PASSTHROUGH = MaskPlaceholder()  # the forward runs as if the model were not patched


@dataclass(frozen=True, eq=False)
class DeferredMask(MaskPlaceholder):
    """A mask that a multimodal model requests before its text decoder runs; only the decoder's forward can build it.

    Attributes:
        padding: where there are tokens [batch, tokens]; None: everywhere.
        is_causal: returns whether the requested mask hides the future and nothing else.
        native: builds the mask of the unpatched model.
    """

    padding: Tensor | None
    is_causal: Callable[[], bool]
    native: Callable[[], Any]


def padding_of(mask: Any) -> Any:
    """Return the padding mask inside what a decoder is given as `attention_mask`: a tensor, a `DeferredMask`, a dict.

    Raises:
        ValueError: its full-attention layers are to see more than the past.
    """
    full = mask.get(_FULL) if isinstance(mask, dict) else mask
    if not isinstance(full, DeferredMask):
        return full
    if not full.is_causal():
        raise ValueError(MORE_THAN_CAUSAL)
    return full.padding


def resolve_mask(mask: Any, padding: Any, context: MaskPlaceholder) -> Any:
    """Return what the decoder gets in place of `mask`, from which `padding_of` read the padding."""
    if not isinstance(mask, dict):
        return padding  # the decoder builds its masks from it
    is_ours = context is not PASSTHROUGH
    return {
        kind: context if is_ours and kind == _FULL else each.native() if isinstance(each, DeferredMask) else each
        for kind, each in mask.items()
    }


class KeyLayout(Enum):
    """The order in which a cache returns keys to this forward's queries."""

    FULL = "all keys, in the order of the text"
    SINKS_AND_WINDOW = "the sinks, then the window and the new tokens"
    RING_BUFFER = "the slots of the ring, to one token"


@dataclass(frozen=True, eq=False)
class ForwardContext(MaskPlaceholder):
    """Immutable description of one forward.

    Attributes:
        query_positions: of the last n columns [rows, n], in the order of `query_order`; negative for padding.
        last_position: of the last key [rows, 1].
        layout: of the keys.
        num_keys: how many of them each layer's cache returns.
        is_padded: whether some row begins with padding.
        query_order: each row's new columns, masked ones first [batch, n]; None if they come in that order.
        key_order: likewise for the keys [batch, m], where the cache returns columns in the order of the call.
        is_shifted: whether some row's cached tokens moved over masked columns to its new ones.
        sink_rotations: for one token, cosines and sines that rotate the sinks to their distance, by id(rotation).
        ring_slots: for one token, the slots that it sees [rows, S + L], None for all, and the slots' distances.
        cache_layers: the cache's layers that can hold a block selection, by layer index.
        block_scores: collects each layer's scores during `TopBlocks`' scoring pass; None otherwise.
        true_positions: of the new columns [rows, n], for layers that keep their own attention while the decoder gets
            other position_ids; None where it gets the true ones.
    """

    query_positions: Tensor
    last_position: Tensor
    layout: KeyLayout
    num_keys: int
    is_padded: bool = False
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    is_shifted: bool = False
    sink_rotations: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ring_slots: tuple[Tensor | None, Tensor] | None = None
    cache_layers: Mapping[int, Any] = field(default_factory=dict)
    block_scores: BlockScores | None = None
    true_positions: Tensor | None = None

    def __getitem__(self, index: tuple[Any, ...]) -> ForwardContext:
        """Return the context of some of the queries."""
        return replace(self, query_positions=self.query_positions[:, index[2]])


def current_context() -> Any:
    """Return the context of the decoder that this thread is running; None outside."""
    return getattr(_thread, "context", None)


def set_context(context: Any) -> Any:
    """Make this the context of what runs next in this thread; return the one before."""
    before = current_context()
    _thread.context = context
    return before
