"""Changes to `generate()` of a patched model: its cache, long prompts, drafts, and refusals."""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_longtrunc.attention.padding import check_padding
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.models import CACHE


def patch_generate(patch: Any) -> None:
    """Replace methods that `generate()` calls on the model of an `AttentionPatch`, until detach."""
    model = patch.model
    patch.set(model, "_get_stopping_criteria", partial(_prepare_criteria, model))
    patch.set(model, "init_continuous_batching", partial(_refuse_batch, patch))
    patch.set(model, "_prepare_cache_for_generation", partial(_prepare_cache, patch))
    prepare = type(model).prepare_inputs_for_generation
    patch.set(model, "prepare_inputs_for_generation", update_wrapper(partial(_prepare_inputs, model), prepare))
    patch.set(model, "_prepare_attention_mask_for_generation", partial(_prepare_mask, model))
    patch.set(model, "_get_candidate_generator", partial(_check_drafts, patch))


def _prepare_criteria(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the stopping criteria without the warning that a text exceeds the model's length: here it may."""
    criteria = type(model)._get_stopping_criteria(model, *args, **kwargs)
    for criterion in criteria:
        if hasattr(criterion, "max_position_embeddings"):
            criterion.max_position_embeddings = None
    return criteria


def _refuse_batch(patch: Any, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"continuous batching keeps a cache and an attention of its own: detach {type(patch.technique).__name__} "
        "first, or use generate()"
    )


def _prepare_cache(patch: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Build the cache that `generate` would, with the technique's layers in the place of those that grow."""
    named = type(patch.technique).__name__
    if generation_config.cache_implementation not in patch.resolved.cache_implementations:
        allowed = ", ".join(repr(each) for each in patch.resolved.cache_implementations if each)
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r} cannot be used on a model patched "
            f"by {named}: leave it out, or take one of {allowed}"
        )
    if getattr(generation_config, "use_mtp", None):
        raise ValueError(
            f"use_mtp drafts with layers that {named} does not patch: leave it out, or detach first. "
            "prompt_lookup_num_tokens and assistant_model work"
        )
    check_padding(model_kwargs.get("attention_mask"))
    given = model_kwargs.get(CACHE)
    prepare = type(patch.model)._prepare_cache_for_generation
    result = prepare(patch.model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get(CACHE)
    if cache is None:
        return result
    if given is None:
        prepare_layers(patch, cache.layers)
    for index in patch.layer_indices:
        if index < len(cache.layers):
            patch.resolved.check_cache_layer(cache.layers[index])
    chunk, retrieval = generation_config.prefill_chunk_size, patch.resolved.retrieval
    if chunk is None or retrieval is None:
        _set_prefill_chunk(patch, generation_config, model_kwargs)
    else:
        mask = model_kwargs.get("attention_mask")
        length = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[-1]
        if length > cache.get_seq_length():
            generation_config.prefill_chunk_size = retrieval.prefill_chunk(chunk, length - cache.get_seq_length())
    return result


def _prepare_mask(model: Any, tokens: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
    """Build the mask that `generate` infers where none is given; a drafter's text holds no padding.

    transformers would take a drafted token for padding that equals the pad token.
    """
    if getattr(generation_config, "is_assistant", False):
        return tokens.new_ones(tokens.shape[:2], dtype=torch.long)
    return type(model)._prepare_attention_mask_for_generation(model, tokens, generation_config, model_kwargs)


def _prepare_inputs(model: Any, *args: Any, **inputs: Any) -> dict[str, Any]:
    """Prepare the inputs of a forward with the cache that is given.

    Phi-3 drops it where a text outgrows its original length, as its rotary frequencies change there. Those of a patched
    model do not.
    """
    result: dict[str, Any] = type(model).prepare_inputs_for_generation(model, *args, **inputs)
    if inputs.get(CACHE) is not None and result.get(CACHE) is None:
        result = GenerationMixin.prepare_inputs_for_generation(model, *args, **inputs)
    return result


def prepare_layers(patch: Any, cached: list[Any]) -> None:
    """Put the technique's cache layer in the place of every one that would grow, and tell it of states."""
    shares_keys = bool(getattr(patch.decoder.config, "num_kv_shared_layers", 0))
    for layer in patch.layers.values():
        is_held = 0 <= layer.index < len(cached)
        if is_held and type(cached[layer.index]) in (DynamicLayer, LinearAttentionAndFullAttentionLayer):
            cached[layer.index] = patch.resolved.cache_layer(cached[layer.index], layer, patch.law, shares_keys)
    rings = [each for each in cached if isinstance(each, RingCacheLayer)]
    others = [each for each in cached if not isinstance(each, RingCacheLayer)]
    for ring in rings:
        ring.states = [each for each in others if isinstance(each, LinearAttentionLayer)]


def _set_prefill_chunk(patch: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Let a long prompt of ids be read in chunks, so that its activations too take constant memory.

    Retrieval counts the rows of a forward, and some recurrent layers do not go on from a chunk to the next: there
    the prompt is read at once.
    """
    chunk = patch.resolved.prefill_chunk
    tensors = {name for name, value in model_kwargs.items() if isinstance(value, Tensor)}
    mask = model_kwargs.get("attention_mask")
    is_short = isinstance(mask, Tensor) and mask.shape[-1] <= (chunk or 0)
    has_ids_alone = tensors <= {"attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
    has_ids_alone &= not model_kwargs.get("mm_encoder_outputs")  # of images, which transformers encodes beforehand
    # Before 5.21 transformers, reading in chunks, feeds what a cache holds already a second time; 5.24 was tried.
    goes_on_right = CACHE == "cache"
    if (
        goes_on_right
        and chunk is not None
        and generation_config.prefill_chunk_size is None
        and patch.resolved.retrieval is None
        and has_ids_alone
        and not is_short
        and patch.found.states_go_on
        and any(isinstance(layer, RingCacheLayer) for layer in model_kwargs[CACHE].layers)
    ):
        generation_config.prefill_chunk_size = chunk


def _check_drafts(patch: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the drafter of assisted decoding, and refuse drafts that the cache could not take back."""
    generator = type(patch.model)._get_candidate_generator(patch.model, *args, **kwargs)
    most = patch.resolved.max_drafts
    if most is None:
        return generator
    reason = (
        "whose cache can take back so many tokens"
        if patch.resolved.retrieval is None
        else "of whose forward so many rows read distant keys beside the first"
    )
    for name in ("num_assistant_tokens", "num_output_tokens"):
        drafted = getattr(generator, name, None)
        if drafted is not None and drafted > most:
            option = "prompt_lookup_num_tokens" if name == "num_output_tokens" else name
            raise ValueError(
                f"{option} must be at most {most} on a model patched by {type(patch.technique).__name__}, {reason}, "
                f"got {drafted}"
            )
    if getattr(generator, "num_assistant_tokens", None) is not None:
        update = generator.update_candidate_strategy

        def update_drafts(*args: Any, **kwargs: Any) -> None:  # the heuristic lets drafts grow
            update(*args, **kwargs)
            generator.num_assistant_tokens = min(generator.num_assistant_tokens, most)

        generator.update_candidate_strategy = update_drafts
    return generator
