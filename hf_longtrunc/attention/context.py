"""Immutable values that travel to the layers: one forward's token positions, and one layer's queries, keys and values.

The context is built once before the decoder runs, from the cache and the padding mask. It travels to the layers in the
place of `attention_mask`. So a layer that is run again for its gradients gets the context of its own forward, and two
threads have one each.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_longtrunc.attention.padding import gather_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from typing_extensions import Self

    from hf_longtrunc.attention.kernels import Scoring
    from hf_longtrunc.attention.key_retrieval import BlockScores
    from hf_longtrunc.attention.rope import Rotation

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


@dataclass(frozen=True, eq=False)
class ForwardContext(MaskPlaceholder):
    """Immutable description of one forward.

    Attributes:
        query_positions: of the last n columns [rows, n], in the order of `query_order`; negative for padding.
        last_position: of the last key [rows, 1].
        num_keys: how many each layer's cache returns.
        leading_sinks: how many sinks it returns before the other keys, which are in the order of the text.
        is_padded: whether some row begins with padding.
        query_order: each row's new columns, masked ones first [batch, n]; None if they come in that order.
        key_order: the same for the keys [batch, m], where the cache returns columns in the order of the call.
        is_shifted: whether some row's cached tokens moved over masked columns to its new ones.
        sink_rotations: for one token, cosines and sines that rotate the sinks to their distance, by id(rotation).
        ring_slots: where the other keys are a ring's slots, for one token: the slots that it sees [rows, S + L], None
            for all, and the slots' distances.
        cache_layers: the cache's layers that can hold a block selection, by layer index.
        block_scores: collects each layer's scores during `TopBlocks`' scoring pass; None otherwise.
        true_positions: of the new columns [rows, n], for layers that keep their own attention while the decoder gets
            other position_ids; None where it gets the true ones.
    """

    query_positions: Tensor
    last_position: Tensor
    num_keys: int
    leading_sinks: int = 0
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


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """What is known of one attention module.

    Attributes:
        index: its place among the decoder's layers; -1 where the module does not know it.
        rotation: of its queries and keys; None where nothing rotates.
        caches_keys: False where the cache holds what keys are made from (multi-head latent attention).
    """

    index: int
    rotation: Rotation | None
    caches_keys: bool = True


class AttentionCall(NamedTuple):
    """One layer's attention in one forward.

    Attributes:
        layer: the module's record.
        query: [batch, heads, n, dim], rotated.
        key: [batch, kv_heads, m, dim], as the layer's cache returns it.
        value: [batch, kv_heads, m, value_dim].
        context: of the forward.
        scoring: of the module.
    """

    layer: AttentionLayer
    query: Tensor
    key: Tensor
    value: Tensor
    context: ForwardContext
    scoring: Scoring

    def in_text_order(self) -> AttentionCall:
        """Return the call with masked columns between tokens moved before each row's tokens."""
        query, key, value, context = self.query, self.key, self.value, self.context
        if context.key_order is not None:
            key, value = gather_columns(key, context.key_order), gather_columns(value, context.key_order)
        if context.query_order is not None:
            query = gather_columns(query, context.query_order)
        return self._replace(query=query, key=key, value=value)

    def in_call_order(self, output: Tensor) -> Tensor:
        """Return the output [batch, heads, n, value_dim] of `in_text_order` in the order of this call's queries."""
        order = self.context.query_order
        return output if order is None else gather_columns(output, order.argsort(dim=-1))


def current_context() -> Any:
    """Return the context of the decoder that this thread is running; None outside."""
    return getattr(_thread, "context", None)


def set_context(context: Any) -> Any:
    """Make this the context of what runs next in this thread; return the one before."""
    before = current_context()
    _thread.context = context
    return before
