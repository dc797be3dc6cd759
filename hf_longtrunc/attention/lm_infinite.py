"""LM-Infinite for transformers models: `with LMInfinite()(model): model.generate(...)`."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_longtrunc.attention.cache import LambdaCacheLayer
from hf_longtrunc.attention.families import gptj_rotation, own_forward
from hf_longtrunc.attention.lambda_attention import (
    PATHS,
    Scoring,
    distance,
    lambda_attention,
    single_query_attention,
    visible,
)
from hf_longtrunc.attention.rotary import ExactRotary, Rotation, exact_forward, find_rotation, rotary_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

_serial = itertools.count()


@dataclass(frozen=True)
class LMInfinite:
    """Λ-shaped attention with a distance ceiling: a pretrained model on texts of any length, without training.

    Every query sees the `num_sink_tokens` first tokens of its row and the last `window_length`, itself included; no
    key ever seems farther away than `max_distance`. On texts of up to `window_length` tokens the model computes what
    it always did. Cost: time O(n (S + L)) for n tokens; `generate` builds a cache of constant size. What lies outside
    sinks and window cannot be read: perplexity stays flat at any length, recall of the middle does not.

    Args:
        num_sink_tokens: S; 10 to 100 in the paper. 0 leaves a plain sliding window.
        window_length: L; None takes the length that the model was trained for, from its config.
        max_distance: D, at least L; None takes L.
        retrieval: reserved for reading the middle; None.
        path: how a prompt's attention is computed, see `lambda_attention`: "auto", "sdpa", "eager" or "flex".

    Raises:
        TypeError, ValueError: an argument of the wrong type or outside its range.

    `with LMInfinite(...)(model):` patches for the block; `patch = LMInfinite(...).attach(model)` until
    `patch.detach()`. Only that model instance is touched, and afterwards it is as it was.

    Source: Han et al. 2024, "LM-Infinite: Zero-Shot Extreme Length Generalization for Large Language Models", arXiv
    2308.16137. Deviations: positions are counted from each row's first real token, and rotary angles are computed in
    fp64, so padding changes nothing and a stream may be of any length.
    """

    num_sink_tokens: int = 16
    window_length: int | None = None
    max_distance: int | None = None
    retrieval: None = None
    path: str = "auto"

    def __post_init__(self) -> None:
        _check_count("num_sink_tokens", self.num_sink_tokens, 0)
        if self.window_length is not None:
            _check_count("window_length", self.window_length, 1)
        if self.max_distance is not None:
            _check_count("max_distance", self.max_distance, self.window_length or 1)
        if self.retrieval is not None:
            raise TypeError(f"retrieval must be None, got {self.retrieval!r}")
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)}, got {self.path!r}")

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Any]:
        """Patch `model` for the block and yield it."""
        patch = self.attach(model)
        try:
            yield model
        finally:
            patch.detach()

    def attach(self, model: Any) -> Patch:
        """Patch `model`, a transformers causal language model or a PEFT wrapper of one, until `detach()`.

        Runs a few forwards of four tokens to learn how each layer rotates its queries and keys.

        Raises:
            TypeError: it is no such model.
            ValueError: it is patched already, its architecture cannot be (the message says why), or `max_distance`
                is smaller than the window that its config implies.
        """
        owner = _language_model(model)
        window = trained_length(owner.config) if self.window_length is None else self.window_length
        max_distance = window if self.max_distance is None else self.max_distance
        if max_distance < window:
            raise ValueError(
                f"max_distance must be at least the window, got {max_distance} for window_length={window}"
                f"{' (the trained length)' if self.window_length is None else ''}; leave it out to take the window"
            )
        return Patch(owner, self.num_sink_tokens, window, max_distance, self.path)


def trained_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a model was trained for.

    That is `max_position_embeddings` (or what its config calls it), or the length that YaRN's factor stretches the
    original one to, if that is more.
    """
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            break
    else:
        raise ValueError(
            f"{type(config).__name__} does not say how long the texts were that it was trained on: pass "
            "window_length=..."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    stretched = [
        int(values["original_max_position_embeddings"] * values["factor"])
        for values in sets
        if values.get("original_max_position_embeddings") and values.get("factor") and values.get("rope_type") == "yarn"
    ]
    return max([length, *stretched])


class Patch:
    """A patched model: what `LMInfinite.attach` returns. `detach()` undoes it."""

    def __init__(self, model: PreTrainedModel, num_sink_tokens: int, window: int, max_distance: int, path: str):
        self.num_sink_tokens = num_sink_tokens
        self.window_length = window
        self.max_distance = max_distance
        self.path = path
        self._name = f"lm_infinite_{next(_serial)}"
        self._model = model
        decoder = model.get_decoder()
        self._decoder = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
        self._rotations: dict[nn.Module, Rotation | None] = {}
        self._original = model.config._attn_implementation
        self._parameters = list(inspect.signature(self._decoder.forward).parameters)
        self._carried: Tensor | None = None
        self._ring: LambdaCacheLayer | None = None
        self._undo = ExitStack()
        _refuse_unsupported(model, self._decoder)
        try:
            self._attach()
        except BaseException:
            self._undo.close()
            raise

    def detach(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        self._undo.close()
        self._rotations.clear()

    # -- attaching: each step pushes what undoes it -------------------------------------------------------------------

    def _attach(self) -> None:
        decoder, model = self._decoder, self._model
        before = self._reference_output()
        self._give_own_configs()
        AttentionInterface.register(self._name, self._attention)
        self._undo.callback(AttentionInterface._global_mapping.pop, self._name)
        AttentionMaskInterface.register(self._name, self._mask)
        self._undo.callback(AttentionMaskInterface._global_mapping.pop, self._name)
        hook = decoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._undo.callback(hook.remove)
        self._set(decoder, "_lm_infinite", self)
        sources = self._replace_rotary_modules()
        self._replace_own_forwards()
        self._find_rotations(sources)
        self._layer_rotations = {module.layer_idx: rotation for module, rotation in self._rotations.items()}
        self._check_against(before)
        self._set(model, "_prepare_cache_for_generation", self._prepare_cache)
        self._set(model, "init_continuous_batching", _refuse_continuous_batching)
        for module in {model, decoder}:
            self._set(module, "__deepcopy__", _refuse_deepcopy)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, and note how to take it back."""
        attributes = owner.__dict__
        if name in attributes:
            self._undo.callback(attributes.__setitem__, name, attributes[name])
        else:
            self._undo.callback(attributes.pop, name)
        attributes[name] = value

    def _give_own_configs(self) -> None:
        """Let every module of the model hold a copy of its config that names this patch's attention.

        A config object may be shared with other models, and is saved with this one: neither must see the name.
        """
        copies: dict[int, Any] = {}
        for module in self._model.modules():
            for name, config in list(module.__dict__.items()):
                if isinstance(config, PreTrainedConfig):
                    self._set(module, name, copy.deepcopy(config, copies))
        for config in copies.values():
            if isinstance(config, PreTrainedConfig):
                config._attn_implementation_internal = self._name

    def _replace_rotary_modules(self) -> list[ExactRotary]:
        sources: list[ExactRotary] = []
        try:
            for module, rotaries in rotary_modules(self._decoder, self.window_length):
                self._set(module, "forward", exact_forward(rotaries))
                sources.extend(rotaries.values())
        except ValueError as error:
            raise ValueError(f"LMInfinite cannot patch {type(self._model).__name__}: {error}") from None
        return sources

    def _replace_own_forwards(self) -> None:
        for module in self._decoder.modules():
            build = own_forward(module)
            if build is not None:
                self._set(module, "forward", build(module, partial(self._attend_own, module)))
                if hasattr(module, "embed_positions"):
                    self._rotations[module] = gptj_rotation(module)

    # -- learning how each layer rotates ------------------------------------------------------------------------------

    def _reference_output(self) -> Tensor:
        """Hidden states of a few tokens that fit the window."""
        tokens = torch.arange(min(8, self.window_length), device=_device(self._decoder))[None]
        return self._forward(
            (tokens * 7 + 3) % self._vocabulary()
        )  # not 0, which is often padding and embedded as zero

    def _check_against(self, before: Tensor) -> None:
        """Within the window nothing may have changed: the guard against architectures nobody has thought of."""
        difference = (self._reference_output() - before).double().norm()
        tolerance = 0.1 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not difference <= tolerance * before.double().norm():
            raise ValueError(
                f"LMInfinite cannot patch {type(self._model).__name__}: within the window its attention would give "
                f"other results than the model's own (they differ by {difference:.1e}), so it computes something "
                "that is not reproduced here"
            )

    def _vocabulary(self) -> int:
        return int(self._decoder.get_input_embeddings().weight.shape[0])

    def _forward(self, tokens: Tensor) -> Tensor:
        """Hidden states of a plain forward without cache, dropout or gradient; leaves no trace in the model."""
        training = {module: module.training for module in self._decoder.modules()}
        self._decoder.eval()
        try:
            with torch.no_grad():
                return self._decoder(input_ids=tokens, use_cache=False)[0]
        finally:
            for module, flag in training.items():
                module.training = flag

    def _find_rotations(self, sources: list[ExactRotary]) -> None:
        """Compare each layer's queries and keys at angle zero with those at known angles.

        Attention answers zero meanwhile, so both forwards hand every layer the same input; and four times the same
        token makes a layer that mixes tokens or adds absolute positions give itself away.
        """
        vocabulary = self._vocabulary()
        tokens = torch.tensor([[vocabulary // 3], [vocabulary // 2]], device=_device(self._decoder)).expand(2, 4)
        unrotated = self._captured(tokens, sources, 0.0)
        rotated = self._captured(tokens, sources, 1.0)
        if not unrotated:
            raise ValueError(
                self._refusal(
                    "each of its layers was trained with a sliding window of its own, or none takes its attention and "
                    "its mask from transformers' interfaces"
                )
            )
        for module, states in unrotated.items():
            if module in self._rotations:
                continue
            if not torch.allclose(states, states[:, :, :1].expand_as(states), rtol=1e-2, atol=1e-4):
                raise ValueError(
                    self._refusal(
                        "its queries depend on absolute positions (learned or sinusoidal position embeddings), or its "
                        "layers mix tokens outside attention (recurrence, convolution): there is no distance to limit"
                    )
                )
            try:
                self._rotations[module] = find_rotation(states, rotated[module], sources)
            except ValueError as error:
                raise ValueError(self._refusal(f"in {type(module).__name__} {error}")) from None

    def _captured(self, tokens: Tensor, sources: list[ExactRotary], factor: float) -> dict[nn.Module, Tensor]:
        """Queries and keys [batch, heads + kv_heads, n, dim] of each layer, turned by `factor` times the probe angles."""
        for source in sources:
            source.probing = factor
        self._captures: dict[nn.Module, Tensor] | None = {}
        try:
            self._forward(tokens)
            return self._captures
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                self._refusal(
                    f"its layers cannot be probed through transformers' attention and mask interfaces: {error}"
                )
            ) from error
        finally:
            self._captures = None
            for source in sources:
                source.probing = None

    def _refusal(self, reason: str) -> str:
        return f"LMInfinite cannot patch {type(self._model).__name__}: {reason}"

    _captures = None

    # -- a forward: the hook knows the cache, the mask carries positions, the attention uses them ----------------------

    def _begin(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Before the decoder's forward: positions of its queries and keys, counted from each row's first real token."""
        if decoder.config._attn_implementation != self._name:
            raise ValueError(
                "set_attn_implementation was called on a model patched by LMInfinite, whose attention would no longer "
                "run: detach first"
            )
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
        if tokens is None:
            return args, kwargs
        new, device = tokens.shape[1], tokens.device
        cache = inputs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = _checked_mask(inputs.get("attention_mask"), past + new)
        rings = self._rings(cache)
        padding = rings[0].padding if rings and past else _padding(mask, new)
        queries = past + torch.arange(new, device=device)[None]
        queries = queries if padding is None else queries - padding.to(device)[:, None]
        if new > 1:
            _check_positions(inputs.get("position_ids"), mask, new)
        if "position_ids" in self._parameters:
            inputs["position_ids"] = queries.clamp_min(0)
        for ring in rings:
            ring.expect(new, padding)
        if rings:
            keys = rings[0].key_positions(new, device)
        else:
            keys = torch.arange(past + new, device=device)[None]
            keys = keys if padding is None else keys - padding.to(device)[:, None]
        carried = torch.cat([queries, keys], dim=-1)
        self._carried = carried[:, None] if rings and past else carried
        return (), inputs

    def _rings(self, cache: Cache | None) -> list[LambdaCacheLayer]:
        rings = [layer for layer in cache.layers if isinstance(layer, LambdaCacheLayer)] if cache is not None else []
        for ring in rings:
            theirs, ours = (ring.num_sink_tokens, ring.window_length), (self.num_sink_tokens, self.window_length)
            if theirs != ours:
                raise ValueError(
                    f"this cache was built for (num_sink_tokens, window_length) = {theirs}, and the model is patched "
                    f"with {ours}: start anew, or patch with the same numbers"
                )
        return rings

    def _mask(self, *args: Any, local_size: int | None = None, **kwargs: Any) -> Any:
        """Carry positions [rows, n + m] of queries and keys in place of a mask, [rows, 1, n + m] if sinks lead the keys.

        Layers that were trained with a window of their own get their own mask.
        """
        if local_size is not None:
            return AttentionMaskInterface()[self._original](*args, local_size=local_size, **kwargs)
        return self._carried

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute attention under this patch's name."""
        is_native = attention_mask is None or attention_mask.dtype != torch.int64
        if is_native and self._captures is not None:
            return _nothing(query, value).transpose(1, 2).contiguous(), None
        if is_native:
            return self._native(module)(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
            )
        scoring = Scoring(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            null_logits=kwargs.get("s_aux"),
            dropout=dropout,
        )
        return self.attend(module, query, key, value, attention_mask, scoring).transpose(1, 2).contiguous(), None

    def _native(self, module: nn.Module) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return AttentionInterface().get_interface(self._original, eager)

    def _attend_own(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, carried: Any, scoring: Scoring
    ) -> Tensor:
        """Serve a module with a forward of ours; its model may have reshaped what the mask carried."""
        is_intact = isinstance(carried, Tensor) and carried.dtype == torch.int64
        return self.attend(module, query, key, value, carried if is_intact else self._carried, scoring)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, carried: Tensor, scoring: Scoring
    ) -> Tensor:
        """Return the Λ-attention of one layer, [batch, heads, n, value_dim], given the positions that the mask carries."""
        if self._captures is not None:
            if module in self._captures:
                raise ValueError("a layer runs several times in a forward")
            self._captures[module] = torch.cat([query, key], dim=1)
            return _nothing(query, value)
        new, sinks, window = query.shape[2], self.num_sink_tokens, self.window_length
        led_by_sinks = carried.ndim == 3
        if carried.shape[-1] != new + key.shape[2]:
            raise ValueError(
                f"the cache hands out {key.shape[2]} keys where {carried.shape[-1] - new} were announced: this kind of "
                "cache cannot be used on a model patched by LMInfinite; take DynamicCache or leave it to generate()"
            )
        i, j = carried.reshape(-1, carried.shape[-1]).split([new, key.shape[2]], dim=-1)
        rotation = self._rotations[module]
        if led_by_sinks and new == 1:
            if rotation is not None and sinks:
                steps = (i - self.max_distance - j[:, :sinks]).clamp_min(0)
                key[:, :, :sinks] = rotation.rotate(key[:, :, :sinks], steps)
            seen = torch.cat([i - j[:, :sinks] >= window, visible(i, j[:, sinks:], 0, window)[:, 0]], dim=-1)
            return single_query_attention(query, key, value, distance(i, j, self.max_distance)[:, 0], seen, scoring)
        if led_by_sinks:
            far = key[:, :, :sinks], value[:, :, :sinks]
            key, value, j = key[:, :, sinks:], value[:, :, sinks:], j[:, sinks:]
        else:
            far = _first_real(key, j, sinks), _first_real(value, j, sinks)
        return lambda_attention(
            query,
            key,
            value,
            i,
            j,
            sinks=far if sinks and (led_by_sinks or key.shape[2] > window) else None,
            window=window,
            max_distance=self.max_distance,
            scoring=scoring,
            rotate=None if rotation is None else rotation.rotate,
            path=self.path,
        )

    # -- generate() ---------------------------------------------------------------------------------------------------

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Build what `generate` would, with this patch's layers in the place of those that grow."""
        if generation_config.cache_implementation not in (None, "dynamic", "offloaded"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be used on a model patched "
                "by LMInfinite, whose own cache is of constant size already: leave it out"
            )
        given = model_kwargs.get("past_key_values")
        prepare = type(self._model)._prepare_cache_for_generation
        result = prepare(self._model, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if given is None and cache is not None:
            self._swap_layers(cache)
        return result

    def _swap_layers(self, cache: Cache) -> None:
        # Where layers read each other's keys, what one of them does to its sinks would reach the next.
        if getattr(self._decoder.config, "num_kv_shared_layers", 0):
            return
        for index in self._layer_rotations:
            if index < len(cache.layers) and type(cache.layers[index]) is DynamicLayer:
                cache.layers[index] = LambdaCacheLayer(self.num_sink_tokens, self.window_length)


def _nothing(query: Tensor, value: Tensor) -> Tensor:
    """Zeros in the place of an attention output [batch, heads, n, value_dim]."""
    return query.new_zeros(*query.shape[:3], value.shape[-1])


def _first_real(states: Tensor, positions: Tensor, count: int) -> Tensor:
    """Gather states [batch, heads, m, dim] at each row's positions 0..count-1, or as many as there are."""
    count = min(count, states.shape[2])
    if positions.shape[0] == 1:
        return states[:, :, :count]
    columns = torch.arange(count, device=states.device) - positions[:, :1]
    index = columns.clamp_max(states.shape[2] - 1)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))


def _checked_mask(mask: Any, length: int) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "attention_mask must be a tensor [batch, tokens] of ones and zeros on a model patched by LMInfinite, which "
            f"makes its own mask; got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    if mask.shape[1] != length:
        raise ValueError(
            f"attention_mask must cover the {length} tokens seen so far and now, got {mask.shape[1]} columns"
        )
    return mask


def _padding(mask: Tensor | None, new: int) -> Tensor | None:
    """Columns before each row's first real token [batch]; None where it is cheap to know that there are none."""
    if mask is None:
        return None
    mask = mask.bool()
    if new > 1:
        starts = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
        if bool((starts > 1).any()):
            raise ValueError(
                "attention_mask has zeros between real tokens: LMInfinite counts distances in columns from a row's "
                "first token, so pad on the left alone and drop what was padded in between"
            )
        if bool(mask[:, 0].all()):
            return None
    return mask.int().argmax(-1)


def _check_positions(position_ids: Any, mask: Tensor | None, new: int) -> None:
    if position_ids is None:
        return
    steps = (position_ids[..., 1:] - position_ids[..., :-1]) == 1
    if mask is not None:
        real = mask[:, -new:].bool()
        steps = steps | ~(real[:, 1:] & real[:, :-1])
    if not bool(steps.all()):
        raise ValueError(
            "position_ids must count up by one within a row on a model patched by LMInfinite, which counts distances "
            "in tokens: packed rows and position_ids that jump (CREAM) cannot be combined with it"
        )


def _device(decoder: nn.Module) -> torch.device:
    return decoder.get_input_embeddings().weight.device


def _language_model(model: Any) -> Any:
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers causal language model or a PEFT wrapper of one, got {type(model).__name__}"
        )
    return model


def _refuse_unsupported(model: PreTrainedModel, decoder: nn.Module) -> None:
    name = type(model).__name__
    if "_lm_infinite" in decoder.__dict__:
        raise ValueError(f"this {name} is patched by LMInfinite already: detach that patch first, they do not nest")
    if model.config.is_encoder_decoder:
        raise ValueError(f"LMInfinite cannot patch {name}: it is an encoder-decoder, not a causal language model")
    if model._is_stateful:
        raise ValueError(
            f"LMInfinite cannot patch {name}: it has recurrent layers, whose state has no distance to limit"
        )


def _refuse_deepcopy(memo: Any) -> Any:
    raise TypeError("a model patched by LMInfinite cannot be copied: detach first, copy, and patch the copy")


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "continuous batching keeps its own cache and attention: it cannot run on a model patched by LMInfinite"
    )


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < least:
        why = ": never smaller than window_length" if name == "max_distance" else ""
        raise ValueError(f"{name} must be at least {least}{why}, got {value}")
