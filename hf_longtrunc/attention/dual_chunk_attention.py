"""Dual chunk attention for transformers models: `with DualChunkAttention()(model): model.generate(...)`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial, update_wrapper
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from hf_longtrunc.arguments import check_int
from hf_longtrunc.attention.block_scores import Selection, select_keys
from hf_longtrunc.attention.cache_law import guarded
from hf_longtrunc.attention.context import PASSTHROUGH, ForwardContext, full_context, get_context
from hf_longtrunc.attention.dual_chunk import ChunkLaw, chunk_block_scores, dual_chunk_attention
from hf_longtrunc.attention.key_retrieval import TopBlocks
from hf_longtrunc.attention.lm_infinite import trained_length
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.attention.rope import exact_forward
from hf_longtrunc.attention.technique import Technique
from hf_longtrunc.errors import CacheLawError, UnsupportedModelError
from hf_longtrunc.models import parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from typing_extensions import Self

    from hf_longtrunc.attention.block_scores import BlockScores
    from hf_longtrunc.attention.cache_law import CacheLaw
    from hf_longtrunc.attention.context import AttentionCall, AttentionLayer, DecoderCall, MaskPlaceholder
    from hf_longtrunc.attention.probe import ProbeResult
    from hf_longtrunc.handles import Handle


@dataclass(frozen=True, kw_only=True)
class DualChunkAttention(Technique):
    """The whole text at distances that the model was trained on, without training.

    The text is cut into chunks of `chunk_length` tokens. Keys of a query's own chunk are seen at their true
    distance, those of the chunk before too as long as it is a trained one, and all earlier ones in their order at the
    largest trained distances. Nothing is left out: memory and time are those of full attention, and so is the cache.
    Texts of at most `chunk_length` tokens are computed by the unmodified model itself (Falcon: equal up to rounding).

    Examples:
        >>> with DualChunkAttention(chunk_length=48)(model):
        ...     answer = model.generate(ids, max_new_tokens=4, do_sample=False)

    Layers that were trained with a sliding window keep their own attention and positions; full-attention layers
    without rotary positions see all keys.

    Args:
        chunk_length: s; None takes that of the config's `dual_chunk_attention_config` (Qwen2.5-1M), or three quarters
            of the trained length, as the authors do.
        trained_length: c, more than s; None takes it from the config.
        retrieval: `TopBlocks(...)` counts the keys of the blocks that a question points at several times, in all layers
            that read, at any length. It needs a cache that grows (`DynamicCache`). None: every key counts once.

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with DualChunkAttention(...)(model):` patches for the block; `handle = DualChunkAttention(...).attach(model)` until
    `handle.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models", arXiv 2402.17463. Deviations:
    positions are counted from each row's first real token.
    """

    cache_implementations: ClassVar[tuple[str | None, ...]] = (None, "dynamic", "offloaded", "quantized")
    restarts_positions: ClassVar[bool] = True
    num_sink_tokens = 16  # that every token attends to, whatever is asked

    chunk_length: int | None = None
    trained_length: int | None = None
    retrieval: TopBlocks | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_length", 1), ("trained_length", 2)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_int(name, value, minimum=least))
        if self.chunk_length is not None and self.trained_length is not None:
            check_int("chunk_length", self.chunk_length, maximum=self.trained_length - 1)
        if self.retrieval is not None and not isinstance(self.retrieval, TopBlocks):
            raise TypeError(f"retrieval must be TopBlocks(...) or None: all keys are seen; got {self.retrieval!r}")
        if self.retrieval is not None and (self.retrieval.distance is not None or self.retrieval.store != "device"):
            raise ValueError(
                "retrieval: all keys stay in the cache, at the distances of their chunks, so TopBlocks(distance=..., "
                f"store=...) say nothing here: leave them out, got {self.retrieval.distance}, {self.retrieval.store!r}"
            )

    # -- settings ------------------------------------------------------------------------------------------------------

    def for_model(self, model: Any) -> Self:
        """Return the technique with chunk and trained length of one model."""
        config = model.config.get_text_config(decoder=True)
        own = getattr(config, "dual_chunk_attention_config", None) or {}  # as Qwen2.5-1M has it
        trained = self.trained_length or own.get("chunk_size") or trained_length(model.config)
        chunk = self.chunk_length
        if chunk is None and own and self.trained_length is None:
            chunk = own["chunk_size"] - own["local_size"]
        chunk = max(1, 3 * trained // 4) if chunk is None else chunk
        if chunk >= trained:
            raise ValueError(
                f"chunk_length must be less than the {trained} tokens that the model was trained on, got {chunk}; "
                "leave it out to take three quarters of them"
            )
        return replace(self, chunk_length=chunk, trained_length=trained)

    @cached_property
    def distance_law(self) -> ChunkLaw:
        """The law of distances."""
        assert self.chunk_length is not None
        assert self.trained_length is not None
        return ChunkLaw(self.chunk_length, self.trained_length)

    @property
    def max_drafts(self) -> int | None:
        """Any number; with retrieval one fewer than the rows that read."""
        return None if self.retrieval is None else self.retrieval.rows - 1

    @property
    def rope_length(self) -> int:
        """The trained length."""
        return self.distance_law.trained_length

    @property
    def retrieval_length(self) -> int:
        """The shortest text with a block before the rows that read."""
        retrieval = self.retrieval
        return (
            0 if retrieval is None else self.num_sink_tokens + retrieval.block_size + retrieval.margin + retrieval.rows
        )

    def check(self, found: ProbeResult) -> Self:
        """Refuse a model without rotary positions; return the technique with the retrieval's defaults."""
        if not found.rotations:
            raise UnsupportedModelError("none of its layers has rotary positions, so there is no distance to limit")
        if self.retrieval is None:
            return self
        can_crop = not found.has_states and not found.windowed
        retrieval: Any = found.check_retrieval(self.retrieval, can_crop)
        return replace(self, retrieval=retrieval)

    def tiny(self) -> Sequence[Self]:
        """Return the technique at chunks of three tokens."""
        beyond = min(2, self.distance_law.trained_length - self.distance_law.chunk_length)
        return [replace(self, chunk_length=3, trained_length=3 + beyond, retrieval=None)]

    def prepare(self, handle: Handle, decoder: Any, found: ProbeResult) -> None:
        """Freeze frequencies that depend on the length; let windowed layers rotate by true positions."""
        if "position_ids" not in parameters_of(decoder):
            raise UnsupportedModelError(
                "its decoder takes no position_ids, so its keys cannot start again at every chunk"
            )
        if found.frequencies or _is_dynamic(decoder.config):
            for module, rotaries in found.exact.items():
                handle.set(module, "forward", exact_forward(rotaries))
        for module in found.windowed:
            own = _with_true_positions(module, decoder, found)
            handle.set(module, "forward", update_wrapper(own, module.forward))

    # -- caches --------------------------------------------------------------------------------------------------------

    def check_cache_layer(self, layer: Any) -> None:
        """Refuse caches that do not grow."""
        if isinstance(layer, RingCacheLayer):
            raise CacheLawError(
                f"this cache was built for {layer.law.technique if layer.law else 'a ring'}, which keeps a window of "
                "the text, and DualChunkAttention reads all of it: start anew with a new cache"
            )
        if isinstance(layer, StaticLayer):
            raise ValueError(
                "DualChunkAttention needs a cache that grows, got a StaticCache: take DynamicCache or leave the "
                "cache to generate()"
            )

    def cache_layer(self, ordinary: Any, layer: AttentionLayer, law: CacheLaw, shares_keys: bool) -> CacheLayerMixin:
        """Return the ordinary layer, which knows its law from now on."""
        result: CacheLayerMixin = guarded(ordinary) or ordinary
        result.law = law  # type: ignore[attr-defined]
        return result

    def selection_layers(self, call: DecoderCall) -> Sequence[Any]:
        """Return the cache's layers, if all of them grow."""
        layers: Any = call.cache_layers
        grow = [isinstance(layer, DynamicLayer) and "Quantized" not in type(layer).__name__ for layer in layers]
        if not layers or not all(grow):
            got = ", ".join(sorted({type(layer).__name__.removeprefix("Guarded") for layer in layers})) or "none"
            raise ValueError(
                "DualChunkAttention(retrieval=TopBlocks(...)) keeps what it selected with an ordinary cache that "
                f"grows, DynamicCache(config=model.config), got {got}: leave the cache to generate(), or leave "
                "retrieval out"
            )
        layers[:] = [guarded(layer) for layer in layers]
        return list(layers)

    # -- one forward, one layer ----------------------------------------------------------------------------------------

    def context(
        self, call: DecoderCall, found: ProbeResult, block_scores: BlockScores | None, passthrough: bool
    ) -> tuple[MaskPlaceholder, Tensor | None]:
        """Return positions that start again at every chunk; PASSTHROUGH for a text within the first."""
        context, positions = full_context(call)
        found.check_gaps(context)
        if passthrough and call.past + call.new <= self.distance_law.chunk_length and context.key_order is None:
            needs_positions = context.is_padded and call.inputs.get("position_ids") is None
            return PASSTHROUGH, positions.clamp_min(0) if needs_positions else None
        layers = {index: layer for index, layer in enumerate(call.cache_layers) if hasattr(layer, "selection")}
        context = replace(
            context,
            cache_layers=layers,
            block_scores=block_scores,
            true_positions=positions.clamp_min(0) if found.windowed else None,
        )
        return context, self.distance_law.key_position(positions.clamp_min(0))

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to all keys so far; queries and keys are rotated at their positions mod s, in column order."""
        scoring, context = call.scoring, call.context
        if scoring.slopes is not None or scoring.dropout:
            raise UnsupportedModelError(
                "DualChunkAttention merges attention calls, and this layer has ALiBi slopes or attention dropout: set "
                "its attention dropout to 0, or take LMInfinite"
            )
        call.check_keys(type(self).__name__)
        text = call.in_text_order()
        query, key, value = text.query, text.key, text.value
        if not query.dtype == key.dtype == value.dtype:  # under autocast, which rotates queries and keys in fp32
            query, key = query.to(value.dtype), key.to(value.dtype)
        law, retrieval = self.distance_law, self.retrieval
        padding = None
        if context.is_padded:
            padding = (context.num_keys - 1 - context.last_position[:, 0]).expand(len(query))
        attend = partial(dual_chunk_attention, padding=padding, law=law, scoring=scoring)
        if retrieval is None:
            return call.in_call_order(attend(query, key, value))
        if context.block_scores is not None:
            self._collect_scores(retrieval, call, query, key, padding)
        selected = self._select_keys(retrieval, call)
        if selected is None:
            return call.in_call_order(attend(query, key, value))
        plain, end = max(0, query.shape[2] - retrieval.rows), key.shape[2] - retrieval.rows
        output = attend(query[:, :, plain:], key, value, selection=selected)
        if plain:
            before = attend(query[:, :, :plain], key[:, :, :end], value[:, :, :end])
            output = torch.cat([before, output], dim=2)
        return call.in_call_order(output)

    def _select_keys(self, retrieval: TopBlocks, call: AttentionCall) -> Selection | None:
        """Return which keys count for several in this layer; None: none, or this is a scoring pass."""
        index, context = call.layer.index, call.context
        selection = getattr(context.cache_layers.get(index), "selection", None)
        if selection is None or context.block_scores is not None or not retrieval.reads(index, is_scoring=False):
            return None
        return select_keys(selection, retrieval.block_size, retrieval.margin, self.num_sink_tokens)

    def _collect_scores(
        self, retrieval: TopBlocks, call: AttentionCall, query: Tensor, key: Tensor, padding: Tensor | None
    ) -> None:
        """Collect the weight that scoring rows, and those before, give to each block."""
        index, context = call.layer.index, call.context
        if context.block_scores is None or not retrieval.reads(index, is_scoring=True):
            return
        rows = retrieval.query_rows(query.shape[2], is_scoring=True)
        positions = context.query_positions[:, -rows:].to(query.device)
        groups = retrieval.groups(positions, context.last_position.to(query.device), context.block_scores)
        last = retrieval.rows + retrieval.margin  # rows that read come after what they read
        scores = chunk_block_scores(
            query[:, :, -rows:],
            key,
            padding,
            self.distance_law,
            call.scoring,
            groups,
            self.num_sink_tokens,
            retrieval.block_size,
            last,
        )
        retrieval.collect(context.block_scores, index, scores, groups)


def _is_dynamic(config: Any) -> bool:
    """Return whether some rotary frequencies depend on the running length."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(each.get("rope_type") for each in rope.values() if isinstance(each, dict))}
    return bool(kinds & {"dynamic", "longrope"})


def _with_true_positions(module: nn.Module, decoder: Any, found: ProbeResult) -> Callable[..., Any]:
    """Return a windowed attention module's forward that rotates by true positions, not by those within chunks.

    Its decoder computes cosines and sines once, at the positions that full-attention layers need.
    """
    types = getattr(decoder.config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    layer_type = types[index] if types is not None and index is not None else None
    run = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        context = get_context()
        given = kwargs.get("position_embeddings")
        if isinstance(context, ForwardContext) and context.true_positions is not None:
            if given is None:
                raise UnsupportedModelError(
                    f"{type(module).__name__}, a layer with a sliding window, takes its rotary positions in a way that "
                    "is not reproduced here"
                )
            rotary, sets = next(iter(found.exact.items()))
            sample = given if isinstance(given, torch.Tensor) else given[0]
            which = {"layer_type": layer_type} if layer_type in sets else {}
            kwargs["position_embeddings"] = rotary(sample, context.true_positions.to(sample.device), **which)
        return run(*args, **kwargs)

    return partial(forward)
