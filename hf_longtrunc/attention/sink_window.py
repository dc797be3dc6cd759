"""Base of LM-Infinite and StreamingLLM, sinks and a window, which differ in the distance of the sinks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer, StaticLayer

from hf_longtrunc.arguments import check_choice, check_int
from hf_longtrunc.attention.block_scores import DistantKeys, UnrotatedKeys
from hf_longtrunc.attention.context import ForwardContext, full_context, positions_in_call_order
from hf_longtrunc.attention.full_store import FullStoreCacheLayer, FullStoreStateCacheLayer, RingStateCacheLayer
from hf_longtrunc.attention.kernels import alibi_bias, eager_attention, sdpa_attention
from hf_longtrunc.attention.lambda_attention import PATHS, LambdaAttention, SinkWindowLaw
from hf_longtrunc.attention.padding import RowShift, first_real, positions_of
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.attention.rope import exact_forward
from hf_longtrunc.attention.technique import Technique
from hf_longtrunc.errors import CacheLawError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from hf_longtrunc.attention.block_scores import BlockScores
    from hf_longtrunc.attention.cache_law import CacheLaw
    from hf_longtrunc.attention.context import AttentionCall, AttentionLayer, DecoderCall, MaskPlaceholder
    from hf_longtrunc.attention.kernels import ExtraKeys
    from hf_longtrunc.attention.probe import ProbeResult
    from hf_longtrunc.handles import Handle


class SinkWindowTechnique(Technique):
    """Queries see a row's first tokens and its last ones.

    A subclass is a frozen dataclass with `num_sink_tokens` and `window_length`, and says its `distances`.
    """

    compiles_decode: ClassVar[bool] = True
    prefill_chunk: ClassVar[int | None] = 1024

    window_length: int | None
    path: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_sink_tokens", check_int("num_sink_tokens", self.num_sink_tokens, minimum=0))
        if self.window_length is not None:
            object.__setattr__(self, "window_length", check_int("window_length", self.window_length, minimum=1))
        check_choice("path", self.path, PATHS)

    @property
    def distance_law(self) -> SinkWindowLaw:
        """The law of visibility and distance, resolved."""
        raise NotImplementedError

    @property
    def max_drafts(self) -> int:
        """As many as the ring can take back; with retrieval, one fewer than the rows that read at most."""
        most = RingCacheLayer.ROLLBACK + 1
        return most if self.retrieval is None else min(most, self.retrieval.query_rows(most + 1, False) - 1)

    @property
    def rope_length(self) -> int:
        """The window's length."""
        return self.distance_law.window_length

    @property
    def retrieval_length(self) -> int:
        """The shortest text with keys outside sinks and window."""
        return self.distance_law.window_length + self.num_sink_tokens + 1

    def check(self, found: ProbeResult) -> Self:
        """Return the technique with the retrieval's defaults for so many layers."""
        if self.retrieval is None:
            return self
        retrieval = found.check_retrieval(self.retrieval, can_crop=not found.has_states)
        return replace(self, retrieval=retrieval)  # type: ignore[type-var]

    def tiny(self, **settings: Any) -> Sequence[Self]:
        """Return the technique at a window of four tokens and with `settings`, once for each path of a prompt."""
        paths = [path for path in PATHS[1:] if path != "flex" or torch.cuda.is_available()]
        settings |= {"num_sink_tokens": min(2, self.num_sink_tokens), "window_length": 4}
        return [replace(self, path=path, **settings) for path in paths]  # type: ignore[type-var]

    def prepare(self, handle: Handle, decoder: Any, found: ProbeResult) -> None:
        """Let the rotary modules answer with exact angles."""
        for module, rotaries in found.exact.items():
            handle.set(module, "forward", exact_forward(rotaries))

    def check_cache_layer(self, layer: Any) -> None:
        """Refuse caches of constant shape, rings of other lengths or without a store, and rings that are not whole."""
        if isinstance(layer, StaticLayer):
            raise ValueError(
                f"a StaticCache cannot be used on a model patched by {type(self).__name__}: take DynamicCache, or "
                "leave the cache to generate(), whose size is constant too"
            )
        if not isinstance(layer, RingCacheLayer):
            return
        theirs, ours = (layer.num_sink_tokens, layer.window_length), (self.num_sink_tokens, self.window_length)
        if theirs != ours:
            raise CacheLawError(
                f"this cache was built for (num_sink_tokens, window_length) = {theirs}, and the model is patched "
                f"with {ours}: start anew, or patch with the same numbers"
            )
        if self.retrieval is not None and not isinstance(layer, FullStoreCacheLayer):
            raise CacheLawError(
                "this cache was built without retrieval, so the keys between sinks and window are gone: start anew, or "
                "patch with retrieval=None"
            )
        if layer.is_partial:
            raise ValueError(
                "a forward was interrupted while this cache stored its tokens, so its layers no longer hold the "
                "same text: start anew with a new cache"
            )

    def cache_layer(self, ordinary: Any, layer: AttentionLayer, law: CacheLaw, shares_keys: bool) -> CacheLayerMixin:
        """Return a ring; with retrieval one that stores the text, or the ordinary layer where it holds no own keys."""
        state = (ordinary.number_of_states,) if isinstance(ordinary, LinearAttentionLayer) else ()
        lengths = self.num_sink_tokens, self.distance_law.window_length
        ring: RingCacheLayer
        if self.retrieval is None:
            kind: Any = RingStateCacheLayer if state else RingCacheLayer
            ring = kind(*state, *lengths, layer.rotation if layer.caches_keys else None)
        elif shares_keys or not layer.caches_keys:
            kept: CacheLayerMixin = ordinary
            return kept
        else:
            kind = FullStoreStateCacheLayer if state else FullStoreCacheLayer
            ring = kind(*state, *lengths, layer.rotation, self.retrieval.store)
        ring.law = law
        return ring

    def selection_layers(self, call: DecoderCall) -> Sequence[Any]:
        """Return the cache's layers; all must store the whole text."""
        layers = call.cache_layers
        if not layers or not all(isinstance(layer, FullStoreCacheLayer) for layer in layers):
            kinds = ", ".join(sorted({type(layer).__name__.removeprefix("Guarded") for layer in layers})) or "no cache"
            raise ValueError(
                "TopBlocks runs the end of a question twice, for which every layer needs the cache that generate() "
                f"builds; this text is longer than the window and has {kinds}: call generate(), or take TopK (also "
                "for models with windowed layers)"
            )
        return layers

    # -- one forward ---------------------------------------------------------------------------------------------------

    def context(
        self, call: DecoderCall, found: ProbeResult, block_scores: BlockScores | None, passthrough: bool
    ) -> tuple[MaskPlaceholder, Tensor | None]:
        """Plan a forward: positions, where each ring writes, and how it returns keys."""
        rings = [layer for layer in call.cache_layers if isinstance(layer, RingCacheLayer)]
        if not rings:
            context, positions = full_context(call)
            found.check_gaps(context)
            return replace(context, block_scores=block_scores), positions.clamp_min(0)
        past, new, device, ring, law = call.past, call.new, call.device, rings[0], self.distance_law
        columns = torch.arange(past, past + new, device=device)
        state, shift = ring.padding_state.append(call.real, past, new)
        if shift is not None:
            _refuse_crop(ring, past, shift)
        positions = queries = positions_of(columns, state.padding)
        query_order = None
        if call.real is not None and shift is not None and shift.order is not None:
            positions, query_order = positions_in_call_order(columns, state.padding, call.real[:, past:])
        sink_rotations: dict[int, tuple[Tensor, Tensor]] = {}
        slots = None
        if new == 1:
            j = ring.key_positions(state, device)
            distances = law.distance(queries, j)[:, 0]
            if past:
                slots = None if ring.all_visible(state) else self._visible_slots(queries, j), distances
            offsets = (queries - j - distances)[:, : self.num_sink_tokens].clamp_min(0)
            for rotation in {*found.rotations, *(each.rotation for each in rings)}:  # an earlier patch's rings
                if rotation is not None:
                    sink_rotations[id(rotation)] = rotation.cos_sin(offsets, call.like.dtype)
        plan = ring.write_plan(new, device, state, shift)
        for each in rings:
            each.prepare_update(plan._replace(sink_rotation=sink_rotations.get(id(each.rotation))))
        context = ForwardContext(
            query_positions=queries,
            last_position=positions_of(columns[-1:], state.padding),
            num_keys=new if past == 0 else ring.keys_for(new),
            leading_sinks=self.num_sink_tokens if past else 0,
            is_padded=state.padding is not None,
            query_order=query_order,
            key_order=query_order if past == 0 else None,
            is_shifted=shift is not None,
            sink_rotations=sink_rotations,
            ring_slots=slots,
            cache_layers={
                index: layer for index, layer in enumerate(call.cache_layers) if isinstance(layer, FullStoreCacheLayer)
            },
            block_scores=block_scores,
        )
        found.check_gaps(context)
        return context, positions.clamp_min(0)

    def _visible_slots(self, i: Tensor, j: Tensor) -> Tensor:
        """Return which of the slots at j [rows, S + L] a query at i [rows, 1] sees: old sinks, and its window."""
        sinks = self.num_sink_tokens
        local = replace(self.distance_law, num_sink_tokens=0).visible(i, j[:, sinks:]) | (i < 0)[..., None]
        return torch.cat([i - j[:, :sinks] >= self.distance_law.window_length, local[:, 0]], dim=-1)

    # -- one layer -----------------------------------------------------------------------------------------------------

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to sinks and window; keys come rotated at their own positions."""
        context, key = call.context, call.key
        call.check_keys(type(self).__name__)
        if context.ring_slots is None:
            return call.in_call_order(self._lambda_attention(call.in_text_order()).attend(self.path))
        query, layer, rotation, sinks = call.query, call.layer, call.scoring.rotation, slice(self.num_sink_tokens)
        seen, distances = context.ring_slots
        if not layer.caches_keys and rotation is not None and sinks.stop:
            cos, sin = (each.to(key.device) for each in context.sink_rotations[id(rotation)])
            key[:, :, sinks] = rotation.apply(key[:, :, sinks], cos, sin)
        seen, distances = None if seen is None else seen.to(query.device)[:, None], distances.to(query.device)[:, None]
        read, scoring = self._extra_keys(call, None), call.scoring
        if read is None and scoring.is_plain:
            grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # a group's heads, as queries
            return sdpa_attention(grouped, key, call.value, seen, scoring, None).reshape(*query.shape[:3], -1)
        bias = None if scoring.slopes is None else alibi_bias(scoring.slopes, distances, query)
        read = None if read is None else partial(read, query, context.query_positions.to(query.device))
        return eager_attention(query, key, call.value, seen, scoring, None, bias, read)

    def _lambda_attention(self, call: AttentionCall) -> LambdaAttention:
        """Return the attention to keys in the order of the text, or to the sinks and the end of the text after them."""
        law, context, query, key, value = self.distance_law, call.context, call.query, call.key, call.value
        sinks, leading = self.num_sink_tokens, context.leading_sinks
        i = context.query_positions.to(query.device)
        j = context.last_position.to(query.device)
        j = j - torch.arange(key.shape[2] - leading - 1, -1, -1, device=query.device)
        read = self._extra_keys(call, j)
        if leading:
            far = key[:, :, :sinks], value[:, :, :sinks]
            key, value = key[:, :, sinks:], value[:, :, sinks:]
        else:
            far = first_real(key, j, sinks, context.is_padded), first_real(value, j, sinks, context.is_padded)
        rows = 0
        if self.retrieval is not None:
            rows = self.retrieval.query_rows(query.shape[2], context.block_scores is not None)
        return LambdaAttention(
            query=query,
            key=key,
            value=value,
            query_positions=i,
            key_positions=j,
            sinks=far if sinks and (leading or key.shape[2] > law.window_length) else None,
            law=law,
            scoring=call.scoring,
            read=read,
            query_rows=rows,
            is_padded=context.is_padded,
        )

    def _extra_keys(
        self, call: AttentionCall, j: Tensor | None
    ) -> Callable[[Tensor, Tensor, Tensor], ExtraKeys | None] | None:
        """Return what finds the extra keys of this layer's queries; None if there are none.

        Without a store they are searched in the layer's own keys, at j [rows, m] in the order of the text.
        """
        retrieval, context, key = self.retrieval, call.context, call.key
        index, block_scores = call.layer.index, context.block_scores
        if retrieval is None or not retrieval.reads(index, block_scores is not None):
            return None
        window, store = self.distance_law.window_length, context.cache_layers.get(index)
        if (key.shape[2] if store is None else store.store_length) <= window + self.num_sink_tokens:
            return None
        if store is not None:
            text, selection = store.text(), store.selection
        else:
            assert j is not None
            text, selection = UnrotatedKeys(call.scoring.rotate(key, -j), call.value, j), None
        distant = DistantKeys(
            text,
            call.scoring,
            self.num_sink_tokens,
            window,
            layer=index,
            selection=selection,
            block_scores=block_scores,
        )
        return partial(retrieval.extra_keys, distant)


def _refuse_crop(ring: RingCacheLayer, past: int, shift: RowShift) -> None:
    longest = int(shift.truncated.max())
    if longest and past - longest < ring.crop_length():
        raise ValueError(
            f"attention_mask turns the last {longest} tokens of a row to 0, and this cache of constant size can go "
            f"back from {past} tokens to {ring.crop_length()}, no further: let answers of a batch differ by at most "
            f"{ring.ROLLBACK} tokens, continue rows one by one, or pass cache=DynamicCache(), which keeps everything"
        )
