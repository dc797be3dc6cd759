"""Finding out by experiment how each layer of a model rotates queries and keys, and what its states can do.

`refuse_model` refuses models before any experiment: their class, config and modules say that they do not fit.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicIndexedLayer, LinearAttentionCacheLayerMixin

from hf_longtrunc.attention.context import AttentionLayer, MaskPlaceholder, set_context
from hf_longtrunc.attention.own_forwards import own_forward
from hf_longtrunc.attention.rope import exact_forward, find_rotary, find_rotation, rotations_of
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.handles import Handle
from hf_longtrunc.models import (
    CACHE,
    device_hooks,
    disagreement,
    evaluating,
    few_tokens,
    parameters_of,
    weights_version,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Set as AbstractSet

    from hf_longtrunc.attention.context import ForwardContext
    from hf_longtrunc.attention.key_retrieval import Retrieval
    from hf_longtrunc.attention.rope import ExactRotary, Rotation


# Reasons that no probe can find, by the name of the decoder's class.
_REFUSED: dict[str, str] = {
    "DogeModel": (
        "it adds to every score a bias that it makes from that key's value, and drops keys by it: visibility does not "
        "depend on distance"
    ),
    "GPTNeoModel": "it adds learned absolute positions to its tokens: there is no distance to limit",
    "MiniMaxModel": (
        "its cache is a class of its own that its forward makes: it has no place for a ring, and it counts tokens in "
        "the first layer, which in the released models is a linear one and counts none"
    ),
}


def refuse_model(model: Any, decoder: Any, technique: str) -> None:
    """Refuse a model that needs no probe to be seen as unfit.

    Raises:
        UnsupportedModelError, ValueError: the message says why.
    """
    earlier = decoder.__dict__.get("_hf_longtrunc_patch")
    if earlier is not None:
        raise ValueError(
            f"this {type(model).__name__} is patched by {type(earlier.technique).__name__} already: detach that patch "
            "first, they do not nest"
        )
    if any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__):
        raise ValueError(
            f"{technique}: this model was sharded by fully_shard, whose parameters cannot be probed: attach before "
            "fully_shard(model)"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("it is an encoder-decoder, not a causal language model")
    config = decoder.config
    sees_ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if sees_ahead or not getattr(config, "is_causal", True):
        raise UnsupportedModelError(
            "its prompts are read in both directions, and the mask that limits distances is causal"
        )
    reason = _REFUSED.get(type(decoder).__name__)
    if reason is not None:
        raise UnsupportedModelError(reason)
    layers = DynamicCache(config=config).layers
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        raise UnsupportedModelError(
            "an indexer of its own chooses from the whole text which keys each token sees: a window would hide keys "
            "from it, and its cache would grow all the same"
        )
    attends = any(isinstance(layer, CacheLayerMixin) for layer in layers)
    if not attends or (model._is_stateful and CACHE not in parameters_of(decoder)):
        raise UnsupportedModelError(
            "it has no attention layers: its states are of constant size already, and there is no distance to limit"
        )


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Findings about a decoder."""

    layers: Mapping[nn.Module, AttentionLayer]  # the modules with full attention
    windowed: AbstractSet[nn.Module]  # those that were trained with a sliding window
    exact: Mapping[nn.Module, dict[str | None, ExactRotary]]  # the rotary modules, by layer type
    has_states: bool  # whether recurrent or convolutional layers carry a state
    states_go_on: bool  # whether a forward of several tokens continues it; in Jamba and Zamba it starts again
    own_forwards: bool  # whether some module's whole forward is replaced by one of ours
    frequencies: int  # fingerprint of the rotary frequencies, if they are not those of a short text; else 0

    @cached_property
    def rotations(self) -> tuple[Rotation, ...]:
        """The rotations of the layers, each once."""
        rotations = (layer.rotation for layer in self.layers.values())
        return tuple({id(each): each for each in rotations if each is not None}.values())

    def check_retrieval(self, retrieval: Retrieval, can_crop: bool) -> Retrieval:
        """Return the retrieval with defaults for these layers; refuse one that they cannot serve."""
        indices = [layer.index for layer in self.layers.values()]
        retrieval = retrieval.for_layers(max(indices) + 1)
        retrieval.check(indices, all(layer.caches_keys for layer in self.layers.values()), can_crop)
        return retrieval

    def check_gaps(self, context: ForwardContext) -> None:
        """Refuse masked columns between tokens if some layers count them in a window of their own."""
        if self.windowed and (context.query_order is not None or context.is_shifted):
            raise ValueError(
                "attention_mask has zeros between real tokens, and this model has layers with a window of their own, "
                "which counts them: pad on the left alone"
            )

    def check_states(self, real: Tensor | None, past: int, new: int) -> None:
        """Raise ValueError for a forward after which the model's states would not be those of each row's tokens."""
        if past and new > 1 and not self.states_go_on:
            raise ValueError(
                f"this model's recurrent layers forget their state in a forward of several tokens behind others, "
                f"patched or not, and this one brings {new} behind {past}: give the whole text at once (without "
                "prefill_chunk_size, and with a new cache), or go on token by token"
            )
        if real is None or not self.has_states:
            return
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise ValueError(
                "attention_mask has zeros behind a row's first token, and this model has recurrent or convolutional "
                "layers, whose state runs on over them: pad on the left alone, and continue rows one by one"
            )
        if new == 1 and not bool(real[:, -1].all()):
            raise ValueError(
                "attention_mask says that this one token of a row is padding, and transformers shows no mask to "
                "recurrent layers in a forward of one token: give a row's padding together with its first token"
            )


# For each decoder, by technique: its identity and the findings. A value must not hold the decoder, to let it go.
_checked: WeakKeyDictionary[nn.Module, dict[object, tuple[object, ProbeResult]]] = WeakKeyDictionary()


def identity_of(decoder: Any) -> object:
    """Return a value that changes with weights, config, classes, devices and settings of a decoder.

    None if a module has a hook or a replaced forward, other than accelerate's own: it could change results unnoticed.
    """
    parts: list[object] = [str(decoder.config.to_dict()), decoder.config._attn_implementation]
    for module in decoder.modules():
        state = vars(module)
        hooks = device_hooks(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if "forward" in state and not _is_offload(state, hooks):
            return None
        settings = ((name, value) for name, value in state.items() if isinstance(value, (bool, int, float, str)))
        parts += [type(module).forward, repr(hooks), *(each for each in settings if each[0] != "training")]
    return (weights_version(decoder), *parts)


def _is_offload(state: dict[str, Any], hooks: list[Any]) -> bool:
    """Return whether a module's replaced forward is accelerate's, around its class's own and with these hooks alone."""
    hook, replaced, original = (state.get(name) for name in ("_hf_hook", "forward", "_old_forward"))
    is_accelerate = getattr(getattr(replaced, "func", None), "__module__", None) == "accelerate.hooks"
    is_own = original is not None and getattr(original, "__func__", None) is type(original.__self__).forward
    return is_accelerate and is_own and hooks == getattr(hook, "hooks", [hook])


def get_result(decoder: Any, technique: object, identity: object) -> ProbeResult | None:
    """Return the findings of the same technique about the same decoder; None if it may have changed since."""
    earlier, found = _checked.get(decoder, {}).get(technique, (None, None))
    return found if identity is not None and identity == earlier else None


def set_result(decoder: Any, technique: object, identity: object, found: ProbeResult) -> None:
    """Keep the findings for the next `get_result`, as long as the decoder lives."""
    if identity is not None:
        _checked.setdefault(decoder, {})[technique] = identity, found


class LayerProbe(MaskPlaceholder):
    """Two forwards of a decoder, at angle zero and at known angles, that record the queries and keys of each layer.

    Attention returns zero meanwhile, so every layer gets the same input in both forwards. The input is one token four
    times: a layer that mixes tokens outside attention or adds absolute positions makes their queries differ. Layers
    with a state do mix tokens, so there positions are shifted from one forward to the other instead.

    Args:
        decoder: the model that holds the layers.
        sources: its rotary modules, in place already.
        has_states: whether some of its layers carry a state.
    """

    def __init__(self, decoder: Any, sources: list[ExactRotary], has_states: bool):
        self.decoder = decoder
        self.has_states = has_states
        self.sources = sources
        self.windowed: set[nn.Module] = set()  # trained with a sliding window
        self._indices: dict[nn.Module, int] = {}  # of the layers; -1 where neither module nor cache says which it is
        self._captured: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._cache: Any = None
        self._stored_last = -1  # the layer that stored its keys last

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scoring: Any) -> Tensor:
        """Keep a layer's queries and keys [batch, heads, n, dim], and return zeros.

        Layers with another mask were trained with a window; their calls are not kept.
        """
        if isinstance(mask, LayerProbe):
            seen = self._captured.get(module, (query, key))
            if seen[0] is not query or seen[1] is not key:  # with other values, as differential attention does, it may
                raise UnsupportedModelError("a layer runs several times in a forward")
            self._captured[module] = query, key
            index = getattr(module, "layer_idx", None)
            self._indices[module] = self._stored_last if index is None or index < 0 else index
        else:
            self.windowed.add(module)
        return query.new_zeros(*query.shape[:3], value.shape[-1])

    def layers(self) -> dict[nn.Module, AttentionLayer]:
        """Return a record of each layer that was called.

        Raises:
            UnsupportedModelError: no layer was, or one does what no rotation explains.
        """
        unrotated, rotated = self._states(0.0, 0), self._states(1.0, 5 if self.has_states else 0)
        if not unrotated:
            if self.windowed:
                raise UnsupportedModelError(
                    "each of its attention layers was trained with a sliding window of its own: there is no distance "
                    "to limit"
                )
            raise UnsupportedModelError(
                "none of its layers takes both its attention and its mask from transformers' interfaces"
            )
        for states in unrotated.values():
            is_still = torch.allclose(states, states[:, :, :1].expand_as(states), rtol=1e-2, atol=1e-4)
            if not (is_still or self.has_states):
                raise UnsupportedModelError(
                    "its queries depend on absolute positions (learned or sinusoidal position embeddings), or its "
                    "layers mix tokens outside attention (recurrence, convolution): there is no distance to limit"
                )
        kinds = {(states.shape[-1], states.device) for states in unrotated.values()}
        candidates = {kind: rotations_of(*kind, self.sources) for kind in kinds}
        layers = {}
        for module, states in unrotated.items():
            rotation = find_rotation(states, rotated[module], candidates[states.shape[-1], states.device])
            index, (_, key) = self._indices[module], self._captured[module]
            layers[module] = AttentionLayer(index, rotation, self._caches(key, index))
        return layers

    def _caches(self, key: Tensor, index: int) -> bool:
        """Return whether the cache holds these keys of the last forward, and not latents."""
        cached = self._cache.layers[index : index + 1] if index >= 0 else []
        return all(layer.keys is None or torch.equal(layer.keys, key) for layer in cached)

    def _states(self, factor: float, first: int) -> dict[nn.Module, Tensor]:
        """Return each layer's queries and keys from position `first`, turned by `factor` times the probe angles."""
        vocabulary = self.decoder.get_input_embeddings().weight.shape[0]
        self._captured = {}
        self._cache = DynamicCache(config=self.decoder.config)
        store = self._cache.update

        def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self._stored_last = layer_idx
            return store(keys, values, layer_idx, *args, **kwargs)

        self._cache.update = update
        for source in self.sources:
            source.probing = factor
        before = set_context(self)
        try:
            ids = few_tokens(self.decoder, 1).new_tensor([[vocabulary // 3] * 4, [vocabulary // 2] * 4])
            positions = {"position_ids": first + torch.arange(4, device=ids.device).expand(2, -1)}
            takes_positions = "position_ids" in parameters_of(self.decoder)
            hidden_states(self.decoder, ids, self._cache, **(positions if first and takes_positions else {}))
        except UnsupportedModelError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if "LayerProbe" in str(error):  # taken for a tensor
                raise UnsupportedModelError(
                    "its model file makes or changes attention masks by itself, so that of transformers' mask "
                    "interface does not reach its layers"
                ) from error
            raise UnsupportedModelError(
                f"its layers cannot be probed through transformers' attention and mask interfaces ({error})"
            ) from error
        finally:
            set_context(before)
            for source in self.sources:
                source.probing = None
        return {module: torch.cat(states, dim=1) for module, states in self._captured.items()}


def probe(decoder: Any, rope_length: int, has_states: bool, states_go_on: bool) -> ProbeResult:
    """Find out how each layer's attention rotates and which layers cache their keys.

    The decoder calls the attention and the mask function of its patch. Frequencies that depend on the running length
    are taken at `rope_length`; the last two arguments are those of `states_of`.
    """
    with Handle("a probe", decoder, "rotary modules") as probing:
        exact = dict(find_rotary(decoder, rope_length))
        for module, rotaries in exact.items():
            probing.set(module, "forward", exact_forward(rotaries))
        sources = [source for rotaries in exact.values() for source in rotaries.values()]
        experiment = LayerProbe(decoder, sources, has_states)
        own = {module: build for module in decoder.modules() if (build := own_forward(module)) is not None}
        for module, build in own.items():
            probing.set(module, "forward", build(module, partial(experiment.attend, module)))
        layers = experiment.layers()
    short = dict(find_rotary(decoder, 1))
    windowed = frozenset(experiment.windowed)
    return ProbeResult(layers, windowed, exact, has_states, states_go_on, bool(own), _rope_identity(exact, short))


def _rope_identity(frozen: Any, short: Any) -> int:
    """Return a number for rotary frequencies that are not those of a short text; 0 where they are."""
    result = 0
    for module, rotaries in frozen.items():
        for layer_type, rotary in rotaries.items():
            if not torch.equal(rotary.frequencies, short[module][layer_type].frequencies):
                result = zlib.crc32(rotary.frequencies.cpu().numpy().tobytes(), result)
    return result


def hidden_states(decoder: Any, ids: Tensor, cache: Any = None, **inputs: Any) -> Tensor:
    """Return hidden states of tokens [batch, n] without dropout or gradient, leaving no trace but in `cache`."""
    with evaluating(decoder), torch.no_grad():
        hidden: Tensor = decoder(input_ids=ids, use_cache=cache is not None, **{CACHE: cache}, **inputs)[0]
    return hidden


def states_of(decoder: Any) -> tuple[bool, bool]:
    """Return whether layers of a decoder carry states, and whether a forward of several tokens goes on from them.

    Three short forwards and their repetition with other states find it out.
    """
    layers = DynamicCache(config=decoder.config).layers
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return False, True
    as_they_are, changed = (_states_after(decoder, factor) for factor in (1.0, 1e3))
    return True, disagreement(as_they_are, changed) is not None


def _states_after(decoder: Any, factor: float) -> Tensor:
    """Return hidden states of a few tokens after others, with the others' states multiplied by `factor`."""
    ids, cache = few_tokens(decoder, 8), DynamicCache(config=decoder.config)
    hidden_states(decoder, ids[:, :4], cache)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            recurrent = [state for state in layer.recurrent_states.values() if state is not None]
            for state in recurrent or [state for state in layer.conv_states.values() if state is not None]:
                state.mul_(factor)
    return hidden_states(decoder, ids[:, 4:], cache)
