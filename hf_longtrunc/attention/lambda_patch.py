"""LM-Infinite on a model: its layers, and what `generate` needs of them. How they are put in place is `patch.py`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_longtrunc.attention.cache import ArchiveCacheLayer, LambdaCacheLayer
from hf_longtrunc.attention.forward import PatchedForward
from hf_longtrunc.attention.layer import Layer, Settings
from hf_longtrunc.attention.patch import AttentionPatch, Learnt
from hf_longtrunc.attention.rotary import CannotPatchError, exact_forward
from hf_longtrunc.attention.row_positions import check_end
from hf_longtrunc.attention.states import ArchiveStateCacheLayer, LambdaStateCacheLayer
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFILL_CHUNK = 1024


class LambdaPatch(AttentionPatch):
    """A model under LM-Infinite: what `LMInfinite.attach` returns. `detach()` undoes it.

    Attributes:
        settings: what the user chose, defaults resolved.
        layers: the attention modules that are patched.
    """

    def __init__(self, technique: object, model: Any, settings: Settings):
        super().__init__(technique, model, "its attention, masks, rotary modules, and the cache of generate()")
        self.settings = settings
        self._has_windows = False
        self._install(settings.window_length)
        self.set(model, "_prepare_cache_for_generation", self._prepare_cache)
        self.set(model, "_get_candidate_generator", self._candidate_generator)

    def _layers(self, found: Learnt) -> dict[nn.Module, Any]:
        """Return the layers; a strategy that reads the middle learns how many there are."""
        for module, rotaries in found.exact.items():
            self.set(module, "forward", exact_forward(rotaries))
        self._has_windows, indices = found.has_windows, found.indices
        retrieval = self.settings.retrieval
        if retrieval is not None:
            if -1 in indices.values():
                raise CannotPatchError(
                    "its attention modules do not say which layer they are, by which layers that read are told apart"
                )
            retrieval.check(list(indices.values()), not found.cached_otherwise, self._states is None)
            retrieval = retrieval.for_layers(max(indices.values()) + 1)
            self.settings = replace(self.settings, retrieval=retrieval)
        return {
            module: Layer(indices[module], rotation, module not in found.cached_otherwise, self.settings)
            for module, rotation in found.rotations.items()
        }

    def compile(self, **options: Any) -> None:
        """Compile the decoding step: forwards of one token beside the cache that `generate` builds.

        All else, prompts of any length above all, runs as before. What changes with every token is planned outside the
        step, and reaches it as tensors: one graph serves all tokens once the cache is full.

        Args:
            options: of `torch.compile`, where `dynamic` is False unless it is given.

        Raises:
            ValueError: a strategy reads the middle, which grows.
        """
        if self.settings.retrieval is not None:
            raise ValueError(
                "compile() needs steps of one shape, and retrieval reads a middle that grows: leave it out"
            )
        run = self._run.original
        self._run.compiled = torch.compile(lambda **inputs: run(**inputs), **{"dynamic": False, **options})

    def _forward(self) -> Callable[..., Any]:
        rotations = {layer.rotation for layer in self.layers.values() if layer.rotation is not None}
        mesh = getattr(self.model, "_device_mesh", None)
        self._run = PatchedForward(
            self.decoder,
            self.decoder.forward,
            self.settings,
            rotations,
            self._name,
            self._has_windows,
            self._states,
            mesh,
        )
        return partial(self._run.once, None) if self.settings.retrieval is None else partial(self._run.reading)

    def traced_forward(self) -> Callable[..., Any]:
        """Return what runs while an `AttentionTrace` listens: the forward as it is, where no step of it is compiled."""
        forward = super().traced_forward()
        if self._run.compiled is not None:
            raise ValueError("a compiled step cannot be listened to: attach anew, and leave compile() out")
        return forward

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
        prepare = type(self.model)._prepare_cache_for_generation
        result = prepare(self.model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            return result
        if given is None:
            self._place_rings(cache.layers)
        self._read_in_chunks(generation_config, model_kwargs)
        return result

    def _place_rings(self, cached: list[Any]) -> None:
        """Put a ring in the place of every layer that would grow, and tell each which layers carry a state beside."""
        for layer in self.layers.values():
            is_held = 0 <= layer.index < len(cached)
            if is_held and type(cached[layer.index]) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
                cached[layer.index] = self._cache_layer(cached[layer.index], layer)
        rings = [each for each in cached if isinstance(each, LambdaCacheLayer)]
        others = [each for each in cached if not isinstance(each, LambdaCacheLayer)]
        for ring in rings:
            ring.states = [each for each in others if isinstance(each, LinearAttentionLayer)]

    def _cache_layer(self, ordinary: Any, layer: Layer) -> Any:
        """Return the cache of one layer. It stays an ordinary one where keys are searched that it does not hold."""
        settings = self.settings
        state = (ordinary.number_of_states,) if isinstance(ordinary, LinearAttentionLayer) else ()
        if settings.retrieval is None:
            turned = layer.rotation if layer.caches_keys else None
            kind: Any = LambdaStateCacheLayer if state else LambdaCacheLayer
            return kind(*state, settings.num_sink_tokens, settings.window_length, turned)
        are_keys_shared = bool(getattr(self.decoder.config, "num_kv_shared_layers", 0))
        if are_keys_shared or not layer.caches_keys:
            return ordinary
        store = settings.retrieval.store
        keeping: Any = ArchiveStateCacheLayer if state else ArchiveCacheLayer
        return keeping(*state, settings.num_sink_tokens, settings.window_length, layer.rotation, store)

    def _read_in_chunks(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Let a long prompt of ids be read in chunks, so that its activations too take constant memory.

        A strategy that reads the middle counts the rows of a forward, and some recurrent layers do not go on from a
        chunk to the next: there the prompt is left whole.
        """
        tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
        mask = model_kwargs.get("attention_mask")
        is_short = isinstance(mask, Tensor) and mask.shape[-1] <= _PREFILL_CHUNK
        has_ids_alone = tensors <= {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
        has_ids_alone &= not model_kwargs.get("mm_encoder_outputs")  # of images, which transformers encodes beforehand
        layers = model_kwargs[CACHE].layers
        # Before 5.21 transformers, reading in chunks, feeds what a cache holds already a second time; 5.24 was tried.
        goes_on_right = CACHE == "cache"
        if (
            goes_on_right
            and generation_config.prefill_chunk_size is None
            and self.settings.retrieval is None
            and has_ids_alone
            and not is_short
            and (self._states is None or self._states.go_on)
            and any(isinstance(layer, LambdaCacheLayer) for layer in layers)
        ):
            generation_config.prefill_chunk_size = _PREFILL_CHUNK

    def _candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """Build the drafter of assisted decoding, and refuse drafts that the cache could not take back."""
        generator = type(self.model)._get_candidate_generator(self.model, *args, **kwargs)
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
