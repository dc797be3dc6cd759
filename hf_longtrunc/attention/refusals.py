"""Models that are refused before any forward: what their class, config and modules say."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicIndexedLayer

from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.models import CACHE, parameters_of

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
