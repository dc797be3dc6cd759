"""One forward of a patched decoder: its call, the context that travels to the layers, and one layer's attention.

The context is built once before the decoder runs, from the cache and the padding mask. It travels to the layers as
`attention_mask`. So a layer that is run again for its gradients gets the context of its own forward, and two threads
have one each.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_longtrunc.attention.padding import check_mask, check_positions, gather_columns, positions_of, text_order
from hf_longtrunc.models import CACHE, bound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Self

    from hf_longtrunc.attention.block_scores import BlockScores
    from hf_longtrunc.attention.kernels import Scoring
    from hf_longtrunc.attention.rope import Rotation

_thread = threading.local()
_FULL = "full_attention"  # transformers' name for these layers, where a decoder has several kinds
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "cache_position", "per_layer_inputs")
_DRAFTS = 64  # tokens that may follow a question in its own forward: as many as a ring can take back

MORE_THAN_CAUSAL = (
    "this call wants a mask that is more than causal (packed rows, or tokens that see ahead, as those of an image in "
    "some models): a patched model makes its own and cannot add to it"
)


# -- masks -------------------------------------------------------------------------------------------------------------


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
        """Raise RuntimeError: gradient checkpointing runs layers again, after a detach as well."""
        raise RuntimeError(
            f"a layer used {cls.__name__} as an attention mask: the forward was made by a patched model, and its "
            "layers run again after the patch was detached. Call backward() before detach(), inside the with block"
        )


PASSTHROUGH = MaskPlaceholder()  # the forward runs as if the model were not patched


@dataclass(frozen=True, eq=False)
class DeferredMask(MaskPlaceholder):
    """A mask that a multimodal model requests before its text decoder runs; only the decoder's forward can build it."""

    padding: Tensor | None  # where there are tokens [batch, tokens]; None: everywhere
    is_causal: Callable[[], bool]  # whether the requested mask hides the future and nothing else
    native: Callable[[], Any]  # builds the mask of the unpatched model


def padding_of(mask: Any) -> Any:
    """Return the padding mask inside a decoder's `attention_mask`: a tensor, a `DeferredMask` or a dict.

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
    """Return the decoder's new `attention_mask` in place of `mask`, from which `padding_of` read the padding."""
    if not isinstance(mask, dict):
        return padding  # the decoder builds its masks from it
    is_ours = context is not PASSTHROUGH
    return {
        kind: context if is_ours and kind == _FULL else each.native() if isinstance(each, DeferredMask) else each
        for kind, each in mask.items()
    }


# -- one forward -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DecoderCall:
    """One call of a patched decoder."""

    decoder: Any
    inputs: dict[str, Any]  # by the names of its forward
    new: int  # tokens that it brings
    past: int  # columns that its cache holds
    real: Tensor | None  # where there are tokens [batch, past + new]; None: everywhere
    like: Tensor  # empty, of the decoder's dtype, on the tokens' device

    @classmethod
    def of(cls, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DecoderCall:
        """Read a call's arguments, positional, renamed and deprecated ones too.

        Raises:
            ValueError: a patched model cannot take the mask or the positions; the message says what to do.
        """
        inputs = bound(decoder, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"] if tokens is None else tokens
        cache = inputs.get(CACHE)
        new, past = int(tokens.shape[1]), 0 if cache is None else int(cache.get_seq_length())
        positions = inputs.get("position_ids")
        if isinstance(positions, Tensor) and not positions.shape[-1]:  # of generate(inputs_embeds, prefill_chunk_size)
            inputs["position_ids"] = None
        if not new:
            raise ValueError(
                "this forward brings no token: transformers' generate() does so for inputs_embeds with an "
                "assistant. Pass input_ids, or leave the assistant out"
            )
        real = check_mask(padding_of(inputs.get("attention_mask")), past + new)
        check_positions(inputs.get("position_ids"), real, past, new)
        return cls(decoder, inputs, new, past, real, tokens.new_empty(0, dtype=decoder.dtype))

    @property
    def cache(self) -> Any:
        """The cache; None without one."""
        return self.inputs.get(CACHE)

    @property
    def cache_layers(self) -> Sequence[Any]:
        """The cache's layers; none without a cache."""
        return () if self.cache is None else self.cache.layers

    @property
    def batch(self) -> int:
        """The number of rows."""
        tokens = self.inputs.get("input_ids")
        return len(self.inputs["inputs_embeds"] if tokens is None else tokens)

    @property
    def device(self) -> torch.device:
        """The tokens' device."""
        return self.like.device

    def tokens_after(self, ids: Sequence[int], within: int = _DRAFTS) -> Tensor | None:
        """Return how many tokens follow each row's last occurrence of `ids` [batch], at most `within`; -1: none does.

        None where no ids are named. In a call that brings embeddings, those of `ids` are looked for.
        """
        if not ids:
            return None
        if self.new < len(ids):  # a decoded token: no device is waited for
            return torch.full((self.batch,), -1)
        tokens, wanted = self.inputs.get("input_ids"), torch.tensor(list(ids), device=self.device)
        if tokens is None:
            tokens, wanted = self.inputs["inputs_embeds"], self.decoder.get_input_embeddings()(wanted)
        windows = tokens[:, -len(ids) - within :].unfold(1, len(ids), 1)  # [batch, places, (dim,) ids]
        is_there = (windows == wanted.movedim(0, -1)).flatten(2).all(-1).flip(1)
        return torch.where(is_there.any(1), is_there.int().argmax(1), -1)

    def part(self, start: int, stop: int) -> DecoderCall:
        """Return the call of tokens start..stop alone, with the cache as it is now."""
        inputs = dict(self.inputs)
        for name in _BY_TOKEN:
            value = inputs.get(name)
            if isinstance(value, Tensor):
                by_row = name in ("inputs_embeds", "per_layer_inputs")
                inputs[name] = value[:, start:stop] if by_row else value[..., start:stop]
        if stop < self.new:
            mask = inputs.get("attention_mask")
            if mask is not None and not isinstance(mask, Tensor):
                raise ValueError(
                    "TopBlocks(ending_ids=...) cannot separate drafts from the question in a multimodal model: "
                    "generate without prompt_lookup_num_tokens and assistant_model"
                )
            inputs["attention_mask"] = None if mask is None else mask[:, : mask.shape[1] - (self.new - stop)]
        return DecoderCall.of(self.decoder, (), inputs)

    def refuse_hidden_states(self) -> None:
        """Refuse a call that wants hidden states of all layers, of rows that run twice."""
        if self.inputs.get("output_hidden_states") or self.decoder.config.output_hidden_states:
            raise ValueError("output_hidden_states cannot be had with TopBlocks, which runs the last rows twice")


@dataclass(frozen=True, eq=False)
class ForwardContext(MaskPlaceholder):
    """Immutable description of one forward: token positions, the keys that each cache returns, rotations to apply."""

    query_positions: Tensor  # of the last n columns [rows, n], in the order of `query_order`; negative for padding
    last_position: Tensor  # of the last key [rows, 1]
    num_keys: int  # that each layer's cache returns
    leading_sinks: int = 0  # sinks that it returns before the other keys, which are in the order of the text
    is_padded: bool = False  # whether some row begins with padding
    query_order: Tensor | None = None  # each row's new columns, masked ones first [batch, n]; None: they come so
    key_order: Tensor | None = None  # the same for the keys [batch, m], if the cache keeps the order of the call
    is_shifted: bool = False  # whether some row's cached tokens moved over masked columns to its new ones
    # For one token, cosines and sines that rotate the sinks to their distance, by id(rotation).
    sink_rotations: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # For one token and a ring: the slots that it sees [rows, S + L], None for all, and the slots' distances.
    ring_slots: tuple[Tensor | None, Tensor] | None = None
    cache_layers: Mapping[int, Any] = field(default_factory=dict)  # those that can hold a selection, by layer index
    block_scores: BlockScores | None = None  # collects each layer's scores in a scoring pass of `TopBlocks`
    # Of the new columns [rows, n], for layers that keep their own attention while the decoder gets other position_ids.
    true_positions: Tensor | None = None

    def __getitem__(self, index: tuple[Any, ...]) -> ForwardContext:
        """Return the context of some of the queries."""
        return replace(self, query_positions=self.query_positions[:, index[2]])


def get_context() -> Any:
    """Return the context of the decoder that this thread is running; None outside."""
    return getattr(_thread, "context", None)


def set_context(context: Any) -> Any:
    """Set the context of this thread; return the one before."""
    before = get_context()
    _thread.context = context
    return before


def full_context(call: DecoderCall) -> tuple[ForwardContext, Tensor]:
    """Return the context of a call with a cache that returns all keys in text order, and its queries' positions.

    The positions [rows, new] come in the order of the columns.
    """
    columns = torch.arange(call.past, call.past + call.new, device=call.device)
    padding, order = text_order(call.real)
    positions = queries = positions_of(columns, padding)
    query_order = None
    if call.real is not None and order is not None:
        positions, query_order = positions_in_call_order(columns, padding, call.real[:, call.past :])
    last = positions_of(columns[-1:], padding)
    is_padded = padding is not None
    context = ForwardContext(
        queries, last, call.past + call.new, is_padded=is_padded, query_order=query_order, key_order=order
    )
    return context, positions


def positions_in_call_order(columns: Tensor, padding: Tensor | None, now: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of new columns [batch, n], -1 where `now` says there is no token, and their order."""
    assert padding is not None
    before = columns[-1] + 1 - padding - now.sum(-1)
    positions = torch.where(now, before[:, None] + now.cumsum(-1) - 1, -1)
    return positions, now.int().argsort(dim=-1, stable=True)


# -- one layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention module of a model."""

    index: int  # its place among the decoder's layers; -1 where the module does not know it
    rotation: Rotation | None  # of its queries and keys; None where nothing rotates
    caches_keys: bool = True  # False where the cache holds latents that keys are made from (MLA)


class AttentionCall(NamedTuple):
    """One layer's attention in one forward."""

    layer: AttentionLayer
    query: Tensor  # [batch, heads, n, dim], rotated
    key: Tensor  # [batch, kv_heads, m, dim], as the layer's cache returns it
    value: Tensor  # [batch, kv_heads, m, value_dim]
    context: ForwardContext
    scoring: Scoring

    def check_keys(self, technique: str) -> None:
        """Refuse a cache that returns another number of keys than the context was built for."""
        if self.key.shape[2] != self.context.num_keys:
            raise ValueError(
                f"the cache returns {self.key.shape[2]} keys where {self.context.num_keys} were expected: this kind of "
                f"cache cannot be used on a model patched by {technique}; take DynamicCache or leave it to generate()"
            )

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
