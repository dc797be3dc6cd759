"""Learning, by experiment, how each layer of a model rotates its queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_longtrunc.attention.rotary import CannotPatchError, candidate_rotations, find_rotation
from hf_longtrunc.attention.step import Carried, carry
from hf_longtrunc.models import CACHE, evaluating, few_tokens, parameters_of

if TYPE_CHECKING:
    from hf_longtrunc.attention.rotary import ExactRotary, Rotation


class Probe(Carried):
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
        self.has_windows = False  # whether some layers were trained with a window of their own
        self.indices: dict[nn.Module, int] = {}  # of the layers; -1 where neither module nor cache says which it is
        self._captured: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._cache = _NotingCache()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scoring: Any) -> Tensor:
        """Keep what a layer's attention was called with, [batch, heads, n, dim] each, and return zeros.

        Layers whose mask is another one, for they have a window of their own, are not kept.
        """
        if isinstance(mask, Probe):
            seen = self._captured.get(module, (query, key))
            if seen[0] is not query or seen[1] is not key:  # with other values, as differential attention does, it may
                raise CannotPatchError("a layer runs several times in a forward")
            self._captured[module] = query, key
            index = getattr(module, "layer_idx", None)
            self.indices[module] = self._cache.latest if index is None or index < 0 else index
        return query.new_zeros(*query.shape[:3], value.shape[-1])

    def rotations(self) -> dict[nn.Module, Rotation | None]:
        """Return the rotation of each layer that was recorded, None for one that rotates nothing.

        Raises:
            CannotPatchError: no layer was, or one does what no rotation explains.
        """
        unrotated, rotated = self._states(0.0, 0), self._states(1.0, 5 if self.has_states else 0)
        if not unrotated:
            if self.has_windows:
                raise CannotPatchError(
                    "each of its attention layers was trained with a sliding window of its own: there is no distance "
                    "to limit"
                )
            raise CannotPatchError(
                "none of its layers takes both its attention and its mask from transformers' interfaces"
            )
        for states in unrotated.values():
            is_still = torch.allclose(states, states[:, :, :1].expand_as(states), rtol=1e-2, atol=1e-4)
            if not (is_still or self.has_states):
                raise CannotPatchError(
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
        before = carry(self)
        try:
            ids = few_tokens(self.decoder, 1).new_tensor([[vocabulary // 3] * 4, [vocabulary // 2] * 4])
            positions = {"position_ids": first + torch.arange(4, device=ids.device).expand(2, -1)}
            takes_positions = "position_ids" in parameters_of(self.decoder)
            hidden_states(self.decoder, ids, self._cache, **(positions if first and takes_positions else {}))
        except CannotPatchError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if "'Probe'" in str(error):  # what travels in the place of a mask was taken for a tensor
                raise CannotPatchError(
                    "its model file makes or changes attention masks by itself, so that of transformers' mask "
                    "interface does not reach its layers"
                ) from error
            raise CannotPatchError(
                f"its layers cannot be probed through transformers' attention and mask interfaces ({error})"
            ) from error
        finally:
            carry(before)
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
