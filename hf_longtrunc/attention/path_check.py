"""Trying every path of a technique against its law of distances, on a few tokens and a window of a few.

The comparison with the unmodified model stays inside the window, where a path with another distance would not show.
This one leaves it: each path, with and without a cache, must equal attention computed pair by pair from
`DistanceLaw.visible` and `DistanceLaw.distance`.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from hf_longtrunc.attention.cache_law import CacheLaw
from hf_longtrunc.attention.context import AttentionCall, AttentionLayer, DecoderCall
from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.attention.probe import ProbeResult
from hf_longtrunc.attention.ring_cache import RingCacheLayer
from hf_longtrunc.attention.rope import Rotation
from hf_longtrunc.errors import UnsupportedModelError
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from hf_longtrunc.attention.technique import DistanceLaw, Technique

_TOKENS = 14
_PARTS = (_TOKENS,), (8, 1, 1, 3, 1), (2, 1, 1, 1, 7, 2)  # tokens of each forward
_SCALING = 0.5


def check_technique(technique: Technique, found: ProbeResult) -> None:
    """Refuse a technique if one of its paths computes something else than its law says.

    Raises:
        UnsupportedModelError: the message names path and error.
    """
    for rotation in found.rotations or (None,):
        kind = None if rotation is None else (rotation.layout, rotation.start, rotation.sign, len(rotation.frequencies))
        for tiny in technique.tiny():
            error = _error(tiny, kind)
            if not error < 1e-6:
                raise UnsupportedModelError(
                    f"{tiny} computes attention that differs by {error:.1e} from its own law of distances"
                )


@lru_cache
def _error(technique: Technique, kind: tuple[Any, ...] | None) -> float:
    """Return the largest difference to the definition, of one path under one kind of rotation."""
    rotation, dim = None, 8
    if kind is not None:
        layout, start, sign, count = kind
        rotation = Rotation(0.9 ** torch.arange(count, dtype=torch.float64), layout, start, sign)
        dim = start + 2 * count
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, _TOKENS, dim, generator=generator, dtype=torch.float64) for heads in (2, 1, 1)
    )
    scoring = Scoring(_SCALING, rotation=rotation)
    expected = pairwise_attention(query, key, value, technique.distance_law, scoring)
    worst = 0.0
    for parts in (*_PARTS, None):
        output = _attend(technique, scoring, (query, key, value), parts)
        worst = max(worst, float((output - expected).abs().max()))
    return worst


def pairwise_attention(query: Tensor, key: Tensor, value: Tensor, law: DistanceLaw, scoring: Scoring) -> Tensor:
    """Return attention by the definition: every pair rotated to its own distance, one softmax over visible keys.

    Queries [1, heads, n, dim] and keys [1, 1, n, dim] come un-rotated.
    """
    places = torch.arange(query.shape[2])
    distances, scores = law.distance(places, places), []
    for j in range(query.shape[2]):
        rotated = scoring.rotate(query, distances[:, j][None])
        scores.append((rotated * key[:, :, j : j + 1]).sum(-1) * scoring.scaling)
    masked = torch.stack(scores, dim=-1).masked_fill(~law.visible(places, places), -torch.inf)
    return masked.softmax(-1) @ value


def _attend(
    technique: Technique, scoring: Scoring, states: tuple[Tensor, Tensor, Tensor], parts: tuple[int, ...] | None
) -> Tensor:
    """Return the technique's outputs in forwards of so many tokens; None: in one, without a cache."""
    layer = AttentionLayer(0, scoring.rotation)
    found = ProbeResult({torch.nn.Identity(): layer}, frozenset(), {}, False, True, False, 0)
    cached = None
    if parts is not None:
        ordinary = DynamicLayer()  # type: ignore[no-untyped-call]
        cached = technique.cache_layer(ordinary, layer, CacheLaw(technique.title, 0), shares_keys=False)
    outputs, start = [], 0
    for new in parts or (_TOKENS,):
        stop = start + new
        at = technique.distance_law.key_position(torch.arange(start, stop))[None]
        q, k, v = (x[:, :, start:stop] for x in states)
        q, k = scoring.rotate(q, at), scoring.rotate(k, at)
        inputs = {} if cached is None else {CACHE: SimpleNamespace(layers=[cached])}
        call = DecoderCall(None, inputs, new, start, None, q.new_empty(0))
        context: Any = technique.context(call, found, None, passthrough=False)[0]
        if cached is not None:
            k, v = cached.update(k, v)
        outputs.append(technique.attend(AttentionCall(layer, q, k, v, context, scoring)))
        if isinstance(cached, RingCacheLayer):
            cached.commit()
        start = stop
    return torch.cat(outputs, dim=2)
