"""A model under LM-Infinite: what is put in place, what runs in a forward, and how all of it is taken back."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.masking_utils import causal_mask_function

from hf_longtrunc.attention.cache import Announcement, ArchiveCacheLayer, LambdaCacheLayer
from hf_longtrunc.attention.families import own_forward
from hf_longtrunc.attention.lambda_attention import (
    Scoring,
    distance,
    lambda_attention,
    single_query_attention,
    visible,
)
from hf_longtrunc.attention.probe import Probe, forward_quietly
from hf_longtrunc.attention.retrieval import Middle, Sight, block_mass, choose_blocks, read_blocks, top_k
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward, rotary_modules
from hf_longtrunc.attention.row_positions import (
    check_end,
    check_positions,
    checked_mask,
    first_real,
    from_first_token,
    left_padding,
)
from hf_longtrunc.attention.strategies import TopBlocks, TopK
from hf_longtrunc.changes import Changes, disagreement

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_longtrunc.attention.lambda_attention import Retrieved
    from hf_longtrunc.attention.rotary import ExactRotary, Rotation

    Read = Callable[[Tensor, Tensor, Tensor], Retrieved | None]

_serial = itertools.count()

# What kind of forward positions are carried through, as how many numbers are carried with each query.
_PLAIN = 2  # all keys in the order of the text
_SINKS_LEAD = 3  # the sinks, and behind them the window and the new tokens
_RING = 4  # one token over the ring's slots


class Patch:
    """A patched model: what `LMInfinite.attach` returns. `detach()` undoes it.

    Every change is an attribute of this model's own modules, a hook, or an entry under a name of this patch's own in
    transformers' two attention registries; each pushes its undoing when it is made.

    In a forward, a hook before the decoder learns from cache and padding the positions of queries and keys, the
    model's mask argument carries them to the layers (so they are right when gradient checkpointing runs a layer again
    much later), and the attention function uses them.
    """

    def __init__(
        self,
        model: Any,
        num_sink_tokens: int,
        window_length: int,
        max_distance: int,
        path: str,
        retrieval: TopK | TopBlocks | None = None,
    ):
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window_length
        self.max_distance = max_distance
        self.path = path
        self.retrieval = retrieval
        self._name = f"lm_infinite_{next(_serial)}"
        self._model = model
        decoder = model.get_decoder()
        self._decoder: Any = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
        self._original = model.config._attn_implementation
        self._parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._rotations: dict[nn.Module, Rotation | None] = {}
        self._probe: Probe | None = None
        self._carried: Tensor | None = None
        self._keys_announced = 0
        self._cached_otherwise: set[nn.Module] = set()  # layers that cache what their keys are made from
        # Of one decoded token: the slots that it sees, None if all, and their distances.
        self._ring_view: tuple[Tensor | None, Tensor] | None = None
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}  # of the sinks for it, by the rotation's id
        self._archives: weakref.WeakValueDictionary[int, ArchiveCacheLayer] = weakref.WeakValueDictionary()
        self._ballot: list[Tensor] | None = None  # each voter's mass [batch, blocks] while blocks are being chosen
        self._first_voter = 0  # the first layer that fills it
        self._first_hidden: Tensor | None = None  # of the rows before those that are run twice
        self._changes = Changes()
        try:
            self._attach()
        except BaseException as error:
            self._changes.close()
            if isinstance(error, CannotPatchError):
                raise ValueError(f"LMInfinite cannot patch {type(model).__name__}: {error}") from error
            raise

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        self._changes.close()
        self._rotations.clear()

    # -- putting in place ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        decoder, model = self._decoder, self._model
        self._refuse_at_sight()
        before = self._few_hidden_states()
        self._give_own_configs()
        for registry, function in ((AttentionInterface, self._attention), (AttentionMaskInterface, self._mask)):
            registry.register(self._name, function)
            self._changes.callback(registry._global_mapping.pop, self._name)
        self._changes.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        if isinstance(self.retrieval, TopBlocks):
            self._changes.callback(decoder.register_forward_hook(self._end).remove)
        self._changes.set(decoder, "_lm_infinite", self)
        self._learn_rotations(self._replace_rotary_modules())
        self._refuse_without_reading_layers()
        self._check_against(before)
        self._changes.set(model, "_prepare_cache_for_generation", self._prepare_cache)
        self._changes.set(model, "init_continuous_batching", _refuse_continuous_batching)
        for module in {model, decoder}:
            self._changes.set(module, "__deepcopy__", _refuse_deepcopy)

    def _refuse_at_sight(self) -> None:
        model = self._model
        if "_lm_infinite" in self._decoder.__dict__:
            raise ValueError(
                f"this {type(model).__name__} is patched by LMInfinite already: detach that patch first, they do not "
                "nest"
            )
        if model.config.is_encoder_decoder:
            raise CannotPatchError("it is an encoder-decoder, not a causal language model")
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        if model._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            raise CannotPatchError("it has recurrent or convolutional layers, whose state has no distance to limit")

    def _give_own_configs(self) -> None:
        """Let every module of the model hold a copy of its config that names this patch's attention.

        A config object may be shared with other models, and is saved with this one: neither must see the name.
        """
        copies: dict[int, Any] = {}
        for module in self._model.modules():
            for name, config in list(module.__dict__.items()):
                if isinstance(config, PreTrainedConfig):
                    self._changes.set(module, name, copy.deepcopy(config, copies))
        for config in copies.values():
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation_internal = self._name

    def _replace_rotary_modules(self) -> list[ExactRotary]:
        sources: list[ExactRotary] = []
        for module, rotaries in rotary_modules(self._decoder, self.window_length):
            self._changes.set(module, "forward", exact_forward(rotaries))
            sources.extend(rotaries.values())
        return sources

    def _learn_rotations(self, sources: list[ExactRotary]) -> None:
        for module in self._decoder.modules():
            build = own_forward(module)
            if build is not None:
                self._changes.set(module, "forward", build(module, partial(self._attend_own, module)))
        self._probe = Probe(self._decoder, sources)
        try:
            self._rotations = self._probe.rotations()
            self._cached_otherwise = self._probe.cached_otherwise()
        finally:
            self._probe = None

    def _refuse_without_reading_layers(self) -> None:
        retrieval = self.retrieval
        layers: list[Any] = [getattr(module, "layer_idx", None) for module in self._rotations]
        if retrieval is None:
            return
        if None in layers:
            raise CannotPatchError("its attention modules have no layer_idx, by which layers that read are told apart")
        if max(layers) < retrieval.first_layer:
            raise ValueError(
                f"{type(retrieval).__name__}: first_layer={retrieval.first_layer} leaves no layer that reads: the last "
                f"one of full attention is layer {max(layers)}"
            )
        if isinstance(retrieval, TopBlocks):
            if self._cached_otherwise:
                raise CannotPatchError(
                    "its cache holds what keys are made from (multi-head latent attention), and TopBlocks searches "
                    "keys that are cached: take TopK"
                )
            self._first_voter = retrieval.votes_from(max(layers) + 1)
            if max(layers) < self._first_voter:
                raise ValueError(
                    f"TopBlocks: first_voter={retrieval.first_voter} leaves no layer that chooses: the last one of "
                    f"full attention is layer {max(layers)}"
                )

    def _few_hidden_states(self) -> Tensor:
        """Return the hidden states of a few tokens that fit the window."""
        vocabulary = self._decoder.get_input_embeddings().weight.shape[0]
        # Not token 0, which is often padding and embedded as zero.
        return forward_quietly(self._decoder, [[(7 * i + 3) % vocabulary for i in range(min(8, self.window_length))]])

    def _check_against(self, before: Tensor) -> None:
        """Refuse a model that has changed within the window: the guard against what nobody has thought of."""
        difference = disagreement(before, self._few_hidden_states())
        if difference is not None:
            raise CannotPatchError(
                f"within the window its attention would give other results than the model's own (they differ by "
                f"{difference:.1e}), so it computes something that is not reproduced here"
            )

    # -- a forward: the hook knows the cache, the mask carries positions, the attention uses them ----------------------

    def _begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Find the positions of this forward's queries and keys, before the decoder runs."""
        if decoder.config._attn_implementation != self._name:
            raise ValueError(
                "set_attn_implementation was called on a model patched by LMInfinite, whose attention would no longer "
                "run: detach first"
            )
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if isinstance(self.retrieval, TopBlocks) and self._ballot is None:
            inputs = self._chosen_for(decoder, self.retrieval, inputs)
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        new, device, cache = tokens.shape[1], tokens.device, inputs.get("cache")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = checked_mask(inputs.get("attention_mask"), past + new)
        check_positions(inputs.get("position_ids"), mask, new)
        rings = self._rings(cache)
        has_begun = bool(rings) and past > rings[0].max_padding
        padding = rings[0].padding if has_begun else left_padding(mask, new)
        queries = from_first_token(torch.arange(past, past + new, device=device), padding)
        if rings:
            self._announce(rings, queries, padding, decoder.dtype)
        if self.retrieval is not None:
            layers = [] if cache is None else cache.layers
            archives = {index: layer for index, layer in enumerate(layers) if isinstance(layer, ArchiveCacheLayer)}
            self._archives = weakref.WeakValueDictionary(archives)
        kind = _PLAIN if not (rings and past) else _SINKS_LEAD if new > 1 else _RING
        carried = torch.stack([queries, queries[:, -1:].expand_as(queries)], dim=-1)
        self._carried = F.pad(carried, (0, kind - _PLAIN))[:, None, :, None]
        self._keys_announced = past + new if kind == _PLAIN else rings[0].keys_returned(new)
        if kind == _RING:
            self._look_at_ring(rings[0], queries)
        if "position_ids" in self._parameters:
            inputs["position_ids"] = queries.clamp_min(0)
        return (), inputs

    def _chosen_for(self, decoder: Any, retrieval: TopBlocks, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the decoder, let its last rows choose blocks and take them back; return the inputs that are left to run.

        Nothing happens for a text without a middle, and for a forward that keeps the choice there is.
        """
        self._first_hidden = None
        cache: Any = inputs.get("cache")
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        new = tokens.shape[1]
        seen = new + (0 if cache is None else int(cache.get_seq_length()))
        if seen <= self.window_length + self.num_sink_tokens:
            return inputs
        layers = _archives_alone(cache)
        rows = min(retrieval.rows, new)
        if new < retrieval.voters and (layers[0].chosen is not None or new == 1):
            return inputs
        if inputs.get("output_hidden_states") or decoder.config.output_hidden_states:
            raise ValueError("output_hidden_states cannot be had with TopBlocks, which runs the last rows twice")
        self._ballot = []
        try:
            hidden = decoder(**inputs)[0]
            chosen = choose_blocks(torch.stack(self._ballot).sum(0), retrieval.blocks)
        finally:
            self._ballot = None
        cache.crop(-rows)
        for layer in layers:
            layer.chosen = chosen.to(hidden.device)
        self._first_hidden = hidden[:, :-rows]
        return {
            name: value[..., -rows:] if name in ("input_ids", "position_ids", "cache_position") and value is not None
            else value[:, -rows:] if name == "inputs_embeds" and value is not None
            else value
            for name, value in inputs.items()
        }  # fmt: skip

    def _end(self, decoder: Any, args: Any, output: Any) -> Any:
        """Put the hidden states of the rows before in front of those of the rows that were run twice."""
        if self._first_hidden is None or self._ballot is not None:
            return output
        hidden = torch.cat([self._first_hidden, output[0]], dim=1)
        self._first_hidden = None
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output["last_hidden_state"] = hidden
        return output

    def _rings(self, cache: Any) -> list[LambdaCacheLayer]:
        layers = [] if cache is None else cache.layers
        rings = [layer for layer in layers if isinstance(layer, LambdaCacheLayer)]
        for ring in rings:
            theirs, ours = (ring.num_sink_tokens, ring.window_length), (self.num_sink_tokens, self.window_length)
            if theirs != ours:
                raise ValueError(
                    f"this cache was built for (num_sink_tokens, window_length) = {theirs}, and the model is patched "
                    f"with {ours}: start anew, or patch with the same numbers"
                )
            if self.retrieval is not None and not isinstance(ring, ArchiveCacheLayer):
                raise ValueError(
                    "this cache was built without retrieval, so the middle of its text is gone: start anew, or patch "
                    "with retrieval=None"
                )
        return rings

    def _mask(self, *args: Any, local_size: int | None = None, mask_function: Any = None, **kwargs: Any) -> Any:
        """Carry positions in place of a mask: [rows, 1, n, 1, kind], of each query its own and that of the last key.

        A model may cut queries or keys out of it as out of a mask; the fifth dimension keeps it from being added to
        anything. There are `kind` numbers, so that nobody has to ask the device what kind of forward this is. Layers
        that were trained with a window of their own get their own mask.
        """
        if local_size is not None:
            native: Any = AttentionMaskInterface._global_mapping[self._original]
            return native(*args, local_size=local_size, mask_function=mask_function, **kwargs)
        if mask_function is not causal_mask_function:
            raise ValueError(
                "this call wants a mask that is more than causal (packed rows, or tokens that see ahead): LMInfinite "
                "makes its own and cannot add to it"
            )
        return self._carried

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Compute attention under this patch's name."""
        if not _is_carried(attention_mask):
            if self._probe is not None:
                return _nothing(query, value).transpose(1, 2).contiguous(), None
            native = self._native(module)
            output: tuple[Tensor, Any] = native(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
            return output
        scoring = Scoring(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            null_logits=kwargs.get("s_aux"),
            dropout=dropout,
        )
        return self._attend(module, query, key, value, attention_mask, scoring).transpose(1, 2).contiguous(), None

    def _native(self, module: nn.Module) -> Any:
        """Return what the model's own implementation would run for this layer."""
        if self._original == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return AttentionInterface._global_mapping[self._original]

    def _attend_own(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, carried: Any, scoring: Scoring
    ) -> Tensor:
        """Serve a module with a forward of ours; its model may have reshaped what the mask carried."""
        carried = carried if _is_carried(carried) else self._carried
        return self._attend(module, query, key, value, carried, scoring)

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, carried: Tensor, scoring: Scoring
    ) -> Tensor:
        """Return the Λ-attention of one layer [batch, heads, n, value_dim], given the positions that were carried."""
        if self._probe is not None:
            self._probe.record(module, query, key)
            return _nothing(query, value)
        # A layer that is run again for its gradients belongs to an earlier forward.
        is_rerun_possible = module.training and torch.is_grad_enabled()
        if key.shape[2] != self._keys_announced and not is_rerun_possible:
            raise ValueError(
                f"the cache hands out {key.shape[2]} keys where {self._keys_announced} were announced: this kind of "
                "cache cannot be used on a model patched by LMInfinite; take DynamicCache or leave it to generate()"
            )
        i, last, kind = carried[:, 0, :, 0, 0], carried[:, 0, :1, 0, 1], carried.shape[-1]
        rotation, sinks = self._rotations[module], self.num_sink_tokens
        rotate = None if rotation is None else rotation.rotate
        if kind == _RING:
            read = self._reader(module, key, value, None, scoring, rotate)
            return self._attend_ring(module, query, key, value, i, scoring, read)
        leading = 0 if kind == _PLAIN else sinks
        j = last - torch.arange(key.shape[2] - leading - 1, -1, -1, device=last.device)
        read = self._reader(module, key, value, j, scoring, rotate)
        if leading:
            far = key[:, :, :sinks], value[:, :, :sinks]
            key, value = key[:, :, sinks:], value[:, :, sinks:]
        else:
            far = first_real(key, j, sinks), first_real(value, j, sinks)
        return lambda_attention(
            query,
            key,
            value,
            i,
            j,
            sinks=far if sinks and (leading or key.shape[2] > self.window_length) else None,
            window=self.window_length,
            max_distance=self.max_distance,
            scoring=scoring,
            rotate=rotate,
            path=self.path,
            read=read,
            reading_rows=self._reading_rows(query.shape[2]),
        )

    def _reading_rows(self, new: int) -> int:
        """How many of the last rows look at the middle."""
        retrieval = self.retrieval
        if isinstance(retrieval, TopBlocks) and self._ballot is not None:
            return retrieval.voters
        return new if retrieval is None or retrieval.rows is None else retrieval.rows

    def _reader(
        self, module: Any, key: Tensor, value: Tensor, j: Tensor | None, scoring: Scoring, rotate: Any
    ) -> Read | None:
        """Return what queries [batch, heads, n, dim] at i [rows, n] of this layer read with; None if nothing.

        Where there is no archive they read the layer's own keys, at j [rows, m] in the order of the text.
        """
        retrieval, window, sinks = self.retrieval, self.window_length, self.num_sink_tokens
        if retrieval is None:
            return None
        if module.layer_idx < (retrieval.first_layer if self._ballot is None else self._first_voter):
            return None
        archive = self._archives.get(module.layer_idx)
        if (key.shape[2] if archive is None else archive.seen) <= window + sinks:
            return None
        if archive is not None:
            middle = archive.middle()
        else:
            assert j is not None
            middle = Middle(key if rotate is None else rotate(key, -j), value, j)
        away = retrieval.seen_at(window)
        sight = Sight(away, sinks, window, scoring)
        if isinstance(retrieval, TopBlocks):
            sight = Sight(away, sinks, min(away, window), scoring, window + sinks, retrieval.emphasis)

        def read(query: Tensor, i: Tensor, scores: Tensor) -> Retrieved | None:
            turned = query if rotate is None else rotate(query, away - i)
            if isinstance(retrieval, TopK):
                return top_k(turned, i, middle, retrieval.k, sight)
            assert archive is not None
            if self._ballot is not None:
                mass = block_mass(turned, i, middle, scores.logsumexp(-1), retrieval.block_size, sight)
                self._ballot.append(mass.cpu())
                return None
            if archive.chosen is None:
                return None
            return read_blocks(turned, i, middle, archive.chosen, retrieval.block_size, sight)

        return read

    def _attend_ring(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        i: Tensor,
        scoring: Scoring,
        read: Read | None,
    ) -> Tensor:
        """Decode over [sinks | ring], whose keys stand where the query is to see them."""
        assert self._ring_view is not None
        seen, distances = self._ring_view
        seen = None if seen is None else seen.to(query.device)
        rotation, sinks = self._rotations[module], slice(self.num_sink_tokens)
        if module in self._cached_otherwise and rotation is not None and self.num_sink_tokens:
            cos, sin = (weights.to(key.device) for weights in self._turns[id(rotation)])
            key[:, :, sinks] = rotation.apply(key[:, :, sinks], cos, sin)
        reads = None if read is None else partial(read, query, i)
        return single_query_attention(query, key, value, distances.to(query.device), seen, scoring, reads)

    def _announce(self, rings: list[LambdaCacheLayer], i: Tensor, padding: Tensor | None, dtype: torch.dtype) -> None:
        """Tell every layer's ring where the tokens at i [rows, n] are to lie, and one token how it sees the sinks.

        It sees those that have left its window turned on to distance D.
        """
        self._turns = {}
        if i.shape[1] == 1:
            steps = (i - self.max_distance - torch.arange(self.num_sink_tokens, device=i.device)).clamp_min(0)
            # A ring that an earlier patch filled has that patch's.
            rotations = {*self._rotations.values(), *(ring.rotation for ring in rings)}
            self._turns = {id(turn): turn.weights(steps, dtype) for turn in rotations if turn is not None}
        to_ring, to_log = rings[0].slots(i.shape[1], i.device)
        for ring in rings:
            ring.expect(Announcement(to_ring, to_log, padding, self._turns.get(id(ring.rotation))))

    def _look_at_ring(self, ring: LambdaCacheLayer, i: Tensor) -> None:
        """Find out, once for all layers, what a query at i [rows, 1] sees of the S + L slots, and from where.

        It sees the sinks that have left its window, and the window.
        """
        sinks, seen, j = self.num_sink_tokens, None, ring.key_positions(i.device)
        if not ring.sees_every_slot():
            local = visible(i, j[:, sinks:], 0, self.window_length)[:, 0]
            seen = torch.cat([i - j[:, :sinks] >= self.window_length, local], dim=-1)
        self._ring_view = seen, distance(i, j, self.max_distance)[:, 0]

    # -- generate() ----------------------------------------------------------------------------------------------------

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Build the cache that `generate` would, with ring layers in the place of those that grow."""
        if generation_config.cache_implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be used on a model patched "
                "by LMInfinite, whose own cache is of constant size already: leave it out"
            )
        check_end(model_kwargs.get("attention_mask"))
        given = model_kwargs.get("cache")
        prepare = type(self._model)._prepare_cache_for_generation
        result = prepare(self._model, generation_config, model_kwargs, *args, **kwargs)
        if given is None and "cache" in model_kwargs:
            layers = model_kwargs["cache"].layers
            for module, rotation in self._rotations.items():
                index = getattr(module, "layer_idx", len(layers))
                if index < len(layers) and type(layers[index]) is DynamicLayer:
                    layers[index] = self._cache_layer(layers[index], module, rotation)
        return result

    def _cache_layer(self, ordinary: DynamicLayer, module: nn.Module, rotation: Rotation | None) -> Any:
        """Return the cache of one layer. It stays an ordinary one where keys are searched that it does not hold."""
        if self.retrieval is None:
            turned = None if module in self._cached_otherwise else rotation
            return LambdaCacheLayer(self.num_sink_tokens, self.window_length, turned)
        are_keys_shared = bool(getattr(self._decoder.config, "num_kv_shared_layers", 0))
        if are_keys_shared or module in self._cached_otherwise:
            return ordinary
        return ArchiveCacheLayer(self.num_sink_tokens, self.window_length, rotation, self.retrieval.store)


def _archives_alone(cache: Any) -> list[ArchiveCacheLayer]:
    layers = [] if cache is None else cache.layers
    if not layers or not all(isinstance(layer, ArchiveCacheLayer) for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "no cache"
        raise ValueError(
            "TopBlocks runs the end of a question twice, for which every layer needs the cache that generate() builds; "
            f"this text has a middle and {kinds}: call generate(), or take TopK (also for models with windowed layers)"
        )
    return list(layers)


def _is_carried(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int64


def _nothing(query: Tensor, value: Tensor) -> Tensor:
    """Zeros in the place of an attention output [batch, heads, n, value_dim]."""
    return query.new_zeros(*query.shape[:3], value.shape[-1])


def _refuse_deepcopy(memo: Any) -> Any:
    raise TypeError("a model patched by LMInfinite cannot be copied: detach first, copy, and patch the copy")


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "continuous batching keeps a cache and an attention of its own: detach LMInfinite first, or use generate()"
    )
