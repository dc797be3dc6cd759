"""Putting LM-Infinite in place of a model's attention, and taking it back. What runs in a forward is `forward.py`."""

from __future__ import annotations

import copy
import itertools
import sys
import weakref
from dataclasses import replace
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.masking_utils import causal_mask_function

from hf_longtrunc.attention.cache import ArchiveCacheLayer, LambdaCacheLayer
from hf_longtrunc.attention.families import own_forward
from hf_longtrunc.attention.forward import PatchedForward
from hf_longtrunc.attention.lambda_attention import Scoring
from hf_longtrunc.attention.layer import Layer, Settings
from hf_longtrunc.attention.probe import Probe, hidden_states
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward, rotary_modules
from hf_longtrunc.attention.row_positions import check_end
from hf_longtrunc.attention.step import Step, running
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import CACHE, decoder_of, disagreement, few_tokens

if TYPE_CHECKING:
    from hf_longtrunc.attention.rotary import ExactRotary

_serial = itertools.count()
_PREFILL_CHUNK = 1024
_REGISTRIES = (AttentionInterface, AttentionMaskInterface)


class Patch(Handle):
    """A patched model: what `LMInfinite.attach` returns. `detach()` undoes it.

    Every change is an attribute of this model's own modules, or an entry under a name of this patch's own in
    transformers' two attention registries, which knows neither patch nor model and goes with either.

    Attributes:
        settings: what the user chose, defaults resolved.
        layers: the attention modules that are patched.
    """

    def __init__(self, technique: object, model: Any, settings: Settings):
        super().__init__(technique, model, "its attention, masks, rotary modules, and the cache of generate()")
        self.settings = settings
        self.layers: dict[nn.Module, Layer] = {}
        self._name = f"lm_infinite_{next(_serial)}"
        self._model = model
        self._decoder: Any = decoder_of(model)
        with self.or_nothing():
            try:
                self._attach()
            except CannotPatchError as error:
                raise ValueError(f"LMInfinite cannot patch {type(model).__name__}: {error}") from error

    def _attach(self) -> None:
        decoder, model = self._decoder, self._model
        _refuse_at_sight(model, decoder)
        ids = few_tokens(decoder, self.settings.window_length)
        before = hidden_states(decoder, ids)
        original = model.config._attn_implementation
        self._give_own_configs()
        for registry, function in zip(_REGISTRIES, (_attention, _mask), strict=True):
            registry.register(self._name, partial(function, original))
        self.undo(_forget, self._name)
        weakref.finalize(model, _forget, self._name)
        self.set(decoder, "_lm_infinite", self)
        has_windows = self._learn(self._replace_rotary_modules())
        rotations = {layer.rotation for layer in self.layers.values() if layer.rotation is not None}
        mesh = getattr(model, "_device_mesh", None)
        forward = PatchedForward(decoder, decoder.forward, self.settings, rotations, self._name, has_windows, mesh)
        run = partial(forward.once, None) if self.settings.retrieval is None else partial(forward.reading)
        self.set(decoder, "forward", update_wrapper(run, decoder.forward))
        difference = disagreement(before, hidden_states(decoder, ids))
        if difference is not None:
            raise CannotPatchError(
                f"within the window its attention would give other results than the model's own (they differ by "
                f"{difference:.1e}), so it computes something that is not reproduced here"
            )
        self.set(model, "_prepare_cache_for_generation", self._prepare_cache)
        self.set(model, "_get_candidate_generator", self._candidate_generator)
        self.set(model, "_get_stopping_criteria", self._stopping_criteria)
        self.set(model, "init_continuous_batching", _refuse_continuous_batching)
        self.refuse_copies(model, decoder, advice="detach first, copy or save, and attach again")

    def _give_own_configs(self) -> None:
        """Let every module of the model hold a copy of its config that names this patch's attention.

        A config object may be shared with other models, and is saved with this one: neither must see the name. What
        is edited in the copy while it is in place is carried back.
        """
        memo: dict[int, Any] = {}
        originals: dict[int, PreTrainedConfig] = {}
        for module in self._model.modules():
            for name, config in list(module.__dict__.items()):
                if isinstance(config, PreTrainedConfig):
                    self.set(module, name, copy.deepcopy(config, memo))
                    _collect(config, originals)
        for key, original in originals.items():
            own = memo[key]
            own._attn_implementation_internal = self._name
            self.undo(_carry_back, original, own, copy.deepcopy(_fields(own)))

    def _replace_rotary_modules(self) -> list[ExactRotary]:
        sources: list[ExactRotary] = []
        for module, rotaries in rotary_modules(self._decoder, self.settings.window_length):
            self.set(module, "forward", exact_forward(rotaries))
            sources.extend(rotaries.values())
        return sources

    def _learn(self, sources: list[ExactRotary]) -> bool:
        """Find out what each layer's attention is, and give it a `Layer`; return whether there are windowed ones."""
        probe = Probe(self._decoder, sources)
        own = {module: build for module in self._decoder.modules() if (build := own_forward(module)) is not None}
        for module, build in own.items():
            self.set(module, "forward", build(module, partial(probe.attend, module)))
        rotations, otherwise = probe.rotations(), probe.cached_otherwise()
        indices = {module: _index(module) for module in rotations}
        retrieval = self.settings.retrieval
        if retrieval is not None:
            if -1 in indices.values():
                raise CannotPatchError(
                    "its attention modules have no layer_idx, by which layers that read are told apart"
                )
            retrieval.check(list(indices.values()), not otherwise)
            retrieval = retrieval.for_layers(max(indices.values()) + 1)
            self.settings = replace(self.settings, retrieval=retrieval)
        for module, rotation in rotations.items():
            self.layers[module] = layer = Layer(indices[module], rotation, module not in otherwise, self.settings)
            self.set(module, "_lambda_layer", layer)
            if module in own:
                self.set(module, "forward", own[module](module, layer.attend))
        return probe.has_windows

    # -- generate() ----------------------------------------------------------------------------------------------------

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Build the cache that `generate` would, with ring layers in the place of those that grow."""
        if generation_config.cache_implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be used on a model patched "
                "by LMInfinite, whose own cache is of constant size already: leave it out"
            )
        if getattr(generation_config, "use_mtp", None):
            raise ValueError(
                "use_mtp drafts with layers that LMInfinite does not patch: leave it out, or detach first. "
                "prompt_lookup_num_tokens and assistant_model work"
            )
        check_end(model_kwargs.get("attention_mask"))
        given = model_kwargs.get(CACHE)
        prepare = type(self._model)._prepare_cache_for_generation
        result = prepare(self._model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            return result
        if given is None:
            for layer in self.layers.values():
                is_held = 0 <= layer.index < len(cache.layers)
                if is_held and type(cache.layers[layer.index]) is DynamicLayer:
                    cache.layers[layer.index] = self._cache_layer(cache.layers[layer.index], layer)
        self._read_in_chunks(generation_config, model_kwargs)
        return result

    def _cache_layer(self, ordinary: DynamicLayer, layer: Layer) -> Any:
        """Return the cache of one layer. It stays an ordinary one where keys are searched that it does not hold."""
        settings = self.settings
        if settings.retrieval is None:
            turned = layer.rotation if layer.caches_keys else None
            return LambdaCacheLayer(settings.num_sink_tokens, settings.window_length, turned)
        are_keys_shared = bool(getattr(self._decoder.config, "num_kv_shared_layers", 0))
        if are_keys_shared or not layer.caches_keys:
            return ordinary
        store = settings.retrieval.store
        return ArchiveCacheLayer(settings.num_sink_tokens, settings.window_length, layer.rotation, store)

    def _read_in_chunks(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Let a long prompt of ids be read in chunks, so that its activations too take constant memory.

        A strategy that reads the middle counts the rows of a forward, so there the prompt is left whole.
        """
        tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
        mask = model_kwargs.get("attention_mask")
        is_short = isinstance(mask, Tensor) and mask.shape[-1] <= _PREFILL_CHUNK
        has_ids_alone = tensors <= {"attention_mask", "position_ids", "token_type_ids"}
        layers = model_kwargs[CACHE].layers
        if (
            generation_config.prefill_chunk_size is None
            and self.settings.retrieval is None
            and has_ids_alone
            and not is_short
            and any(isinstance(layer, LambdaCacheLayer) for layer in layers)
        ):
            generation_config.prefill_chunk_size = _PREFILL_CHUNK

    def _candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Build the drafter of assisted decoding, and refuse drafts that the cache could not take back."""
        generator = type(self._model)._get_candidate_generator(self._model, *args, **kwargs)
        most = LambdaCacheLayer.ROLLBACK + 1
        for name in ("num_assistant_tokens", "num_output_tokens"):
            drafted = getattr(generator, name, None)
            if drafted is not None and drafted > most:
                option = "prompt_lookup_num_tokens" if name == "num_output_tokens" else name
                raise ValueError(
                    f"{option} must be at most {most} on a model patched by LMInfinite, whose cache can take back so "
                    f"many tokens, got {drafted}"
                )
        if getattr(generator, "num_assistant_tokens", None) is not None:
            update = generator.update_candidate_strategy

            def within_reach(*args: Any, **kwargs: Any) -> None:  # the heuristic lets drafts grow
                update(*args, **kwargs)
                generator.num_assistant_tokens = min(generator.num_assistant_tokens, most)

            generator.update_candidate_strategy = within_reach
        return generator

    def _stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Build the stopping criteria without the warning that a text exceeds the model's length: here it may."""
        criteria = type(self._model)._get_stopping_criteria(self._model, *args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None
        return criteria


# What stands in transformers' registries holds no model, and takes what it needs from the module and the mask.


def _attention(
    original: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Compute attention as the step says that came as the mask; other layers get what they had."""
    if isinstance(attention_mask, Step):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scoring = Scoring(scale, kwargs.get("softcap"), None, kwargs.get("s_aux"), dropout)
        output = module._lambda_layer.attend(query, key, value, attention_mask, scoring)
        return output.transpose(1, 2).contiguous(), None
    probe = running()
    if isinstance(probe, Probe):
        output = probe.attend(module, query, key, value, attention_mask, None)
        return output.transpose(1, 2).contiguous(), None
    native: Any = AttentionInterface._global_mapping.get(original)
    if original == "eager":
        native = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[Tensor, Any] = native(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _mask(original: str, *args: Any, local_size: int | None = None, mask_function: Any = None, **kwargs: Any) -> Any:
    """Hand out what the running decoder carries; layers that were trained with a window get their own mask."""
    carried = running()
    if local_size is not None:
        if isinstance(carried, Probe):
            carried.has_windows = True
        native: Any = AttentionMaskInterface._global_mapping[original]
        return native(*args, local_size=local_size, mask_function=mask_function, **kwargs)
    if mask_function is not causal_mask_function:
        raise ValueError(
            "this call wants a mask that is more than causal (packed rows, or tokens that see ahead): LMInfinite "
            "makes its own and cannot add to it"
        )
    if carried is None:
        raise ValueError(
            "layers of a model patched by LMInfinite were run outside its decoder's forward, in which positions are "
            "found: detach first"
        )
    return carried


def _index(module: nn.Module) -> int:
    """Return a layer's place in the decoder, -1 where it does not say."""
    index = getattr(module, "layer_idx", None)
    return -1 if index is None else int(index)


def _refuse_at_sight(model: Any, decoder: Any) -> None:
    if "_lm_infinite" in decoder.__dict__:
        raise ValueError(
            f"this {type(model).__name__} is patched by LMInfinite already: detach that patch first, they do not nest"
        )
    if any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(
            "LMInfinite: this model was sharded by fully_shard, whose parameters cannot be probed: attach before "
            "fully_shard(model)"
        )
    if model.config.is_encoder_decoder:
        raise CannotPatchError("it is an encoder-decoder, not a causal language model")
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if model._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise CannotPatchError("it has recurrent or convolutional layers, whose state has no distance to limit")


def _collect(config: PreTrainedConfig, found: dict[int, PreTrainedConfig]) -> None:
    """Add a config and those inside it to `found`, by their ids."""
    if id(config) not in found:
        found[id(config)] = config
        for value in config.__dict__.values():
            if isinstance(value, PreTrainedConfig):
                _collect(value, found)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's own fields, without the configs inside it and the name of its attention."""
    fields = config.__dict__.items()
    return {
        name: value
        for name, value in fields
        if not isinstance(value, PreTrainedConfig) and name != "_attn_implementation_internal"
    }


def _carry_back(original: PreTrainedConfig, own: PreTrainedConfig, before: dict[str, Any]) -> None:
    """Make the changes in the original config that were made in its copy since it had the fields `before`."""
    now = _fields(own)
    for name, value in now.items():
        if name not in before or value != before[name]:
            original.__dict__[name] = value
    for name in before.keys() - now.keys():
        original.__dict__.pop(name, None)


def _forget(name: str) -> None:
    for registry in _REGISTRIES:
        registry._global_mapping.pop(name, None)


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "continuous batching keeps a cache and an attention of its own: detach LMInfinite first, or use generate()"
    )
