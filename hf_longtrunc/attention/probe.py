"""Finding out, by experiment, how each layer of a model rotates queries and keys, and what its states can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_longtrunc.attention.context import MaskPlaceholder, PlaceholderError, set_context
from hf_longtrunc.attention.rope import candidate_rotations, find_rotation
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.models import CACHE, disagreement, evaluating, few_tokens, parameters_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Set as AbstractSet

    from hf_longtrunc.attention.rope import ExactRotary, Rotation


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a probe has found out about a decoder.

    Attributes:
        rotations: of each attention module with full attention; None where nothing rotates.
        indices: its place among the decoder's layers; -1 where that could not be told.
        cached_otherwise: the modules that cache what their keys are made from (multi-head latent attention).
        windowed: the modules that were trained with a sliding window.
        exact: the rotary modules, and what answers in their place with exact angles.
        states: what recurrent and convolutional layers carry; None where there are none.
        own_forwards: whether some module's whole forward is replaced by one of ours.
        frequencies: fingerprint of the rotary frequencies, where they are not those of a short text; 0 elsewhere.
    """

    rotations: Mapping[nn.Module, Rotation | None]
    indices: Mapping[nn.Module, int]
    cached_otherwise: AbstractSet[nn.Module]
    windowed: AbstractSet[nn.Module]
    exact: Mapping[nn.Module, dict[str | None, ExactRotary]]
    states: States | None
    own_forwards: bool
    frequencies: int

    @property
    def distinct_rotations(self) -> tuple[Rotation, ...]:
        """The rotations, each once."""
        return tuple({id(each): each for each in self.rotations.values() if each is not None}.values())


class ArchitectureProbe(MaskPlaceholder):
    """Two forwards of a decoder, at angle zero and at known angles, whose attention hands its queries and keys here.

    Attention answers zero meanwhile, so both forwards hand every layer the same input; and four times the same token
    makes a layer give itself away that mixes tokens outside attention or adds absolute positions. Where layers carry a
    state they do mix tokens, so there positions are shifted from one forward to the other instead.

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
        self.indices: dict[nn.Module, int] = {}  # of the layers; -1 where neither module nor cache says which it is
        self._captured: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._cache = _NotingCache()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scoring: Any) -> Tensor:
        """Keep what a layer's attention was called with, [batch, heads, n, dim] each, and return zeros.

        Layers with another mask were trained with a window; their calls are not kept.
        """
        if isinstance(mask, ArchitectureProbe):
            seen = self._captured.get(module, (query, key))
            if seen[0] is not query or seen[1] is not key:  # with other values, as differential attention does, it may
                raise UnsupportedModelError("a layer runs several times in a forward")
            self._captured[module] = query, key
            index = getattr(module, "layer_idx", None)
            self.indices[module] = self._cache.latest if index is None or index < 0 else index
        else:
            self.windowed.add(module)
        return query.new_zeros(*query.shape[:3], value.shape[-1])

    def rotations(self) -> dict[nn.Module, Rotation | None]:
        """Return the rotation of each layer that was recorded, None for one that rotates nothing.

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
        candidates = {kind: candidate_rotations(*kind, self.sources) for kind in kinds}
        return {
            module: find_rotation(states, rotated[module], candidates[states.shape[-1], states.device])
            for module, states in unrotated.items()
        }

    def cached_otherwise(self) -> set[nn.Module]:
        """Return the layers that cached something else than the keys that they attended with in the last forward.

        What these are made from: multi-head latent attention.
        """
        layers = self._cache.layers
        return {
            module for module, (_, key) in self._captured.items() if not _is_cached(key, layers, self.indices[module])
        }

    def _states(self, factor: float, first: int) -> dict[nn.Module, Tensor]:
        """Return each layer's queries and keys from position `first`, turned by `factor` times the probe angles."""
        vocabulary = self.decoder.get_input_embeddings().weight.shape[0]
        self._captured = {}
        self._cache = _NotingCache(config=self.decoder.config)
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
            if isinstance(error, PlaceholderError) or "'ArchitectureProbe'" in str(error):  # taken for a tensor
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


class _NotingCache(DynamicCache):
    """A cache that notes which layer stored its keys last."""

    latest = -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.latest = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _is_cached(key: Tensor, layers: list[Any], index: int) -> bool:
    cached = [layer.keys for layer in layers[index : index + 1] if index >= 0 and layer.keys is not None]
    return all(keys.shape == key.shape and torch.equal(keys, key) for keys in cached)


def hidden_states(decoder: Any, ids: Tensor, cache: Any = None, **inputs: Any) -> Tensor:
    """Return hidden states of tokens [batch, n] without dropout or gradient, leaving no trace but in `cache`."""
    with evaluating(decoder), torch.no_grad():
        hidden: Tensor = decoder(input_ids=ids, use_cache=cache is not None, **{CACHE: cache}, **inputs)[0]
    return hidden


@dataclass(frozen=True)
class States:
    """The states that a model's layers carry.

    Attributes:
        go_on: whether a forward of several tokens goes on from them. Jamba and Zamba start anew there, patched or not.
    """

    go_on: bool

    def check(self, real: Tensor | None, past: int, new: int) -> None:
        """Refuse a forward whose states would not be those of each row's tokens.

        Args:
            real: where there are tokens [batch, past + new]; None: everywhere.
            past: columns seen.
            new: columns to come.

        Raises:
            ValueError: the message says what to do.
        """
        if past and new > 1 and not self.go_on:
            raise ValueError(
                f"this model's recurrent layers forget their state in a forward of several tokens behind others, "
                f"patched or not, and this one brings {new} behind {past}: give the whole text at once (without "
                "prefill_chunk_size, and with a new cache), or go on token by token"
            )
        if real is None:
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


def states_of(decoder: Any) -> States | None:
    """Return what the states of a decoder can do, by three short forwards and their repetition; None without any."""
    if not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=decoder.config).layers
    ):
        return None
    as_they_are, changed = (_continued(decoder, factor) for factor in (1.0, 1e3))
    return States(go_on=disagreement(as_they_are, changed) is not None)


def _continued(decoder: Any, factor: float) -> Tensor:
    """Return hidden states of a few tokens behind others whose states are multiplied by `factor`."""
    ids, cache = few_tokens(decoder, 8), DynamicCache(config=decoder.config)
    hidden_states(decoder, ids[:, :4], cache)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            recurrent = [state for state in layer.recurrent_states.values() if state is not None]
            for state in recurrent or [state for state in layer.conv_states.values() if state is not None]:
                state.mul_(factor)
    return hidden_states(decoder, ids[:, 4:], cache)
