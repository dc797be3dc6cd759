"""Attention modules that do not ask transformers' attention interface: their forwards with an attention to be given.

Each function takes the attention module and `attend(query, key, value, mask, scoring)`, heads in the second
dimension, and returns a `forward` for that instance: the module's own projections, rotation and output, with `attend`
between them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_longtrunc.attention.kernels import Scoring
from hf_longtrunc.models import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable

    Attend = Callable[[Tensor, Tensor, Tensor, Any, Scoring], Tensor]


def falcon_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `FalconAttention`, rotary or ALiBi; Falcon scales the bias like its scores."""
    rotate = sys.modules["transformers.models.falcon.modeling_falcon"].apply_rotary_pos_emb
    scaling = module.inv_norm_factor
    slopes = _slopes(module, "build_alibi_tensor") * scaling if module.config.alibi else None

    def forward(
        hidden_states: Tensor,
        alibi: Any = None,
        attention_mask: Any = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        fused = module._split_heads(module.query_key_value(hidden_states))
        query, key, value = (states.transpose(1, 2) for states in fused)
        if alibi is None:
            query, key = rotate(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        dropout = module.attention_dropout.p if module.training and alibi is not None else 0.0
        output = attend(query, key, value, attention_mask, Scoring(scaling, slopes=slopes, dropout=dropout))
        return module.dense(_merge_heads(output)), None

    return forward


def neox_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `GPTNeoXJapaneseAttention`, which returns its bias after its output."""
    rotate = sys.modules["transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese"].apply_rotary_pos_emb
    turned, scaling = module.rotary_ndims, 1 / module.norm_factor

    def forward(
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        query, key, value = _split_heads(module.query_key_value(hidden_states), module.num_attention_heads).chunk(
            3, dim=-1
        )
        rotated = rotate(query[..., :turned], key[..., :turned], *position_embeddings)
        query, key = (
            torch.cat([part, states[..., turned:]], dim=-1) for part, states in zip(rotated, (query, key), strict=True)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        dropout = module.attention_dropout.p if module.training else 0.0
        output = attend(query, key, value, attention_mask, Scoring(scaling, dropout=dropout))
        return module.dense(_merge_heads(output)), None, module.dense_bias

    return forward


def bloom_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `BloomAttention`."""
    slopes = _slopes(module, "build_alibi_tensor")

    def forward(
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Any = None,
        attention_mask: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        dropout = module.attention_dropout.p if module.training else 0.0
        scoring = Scoring(module.inv_norm_factor, slopes=slopes, dropout=dropout)
        output = module.dense(_merge_heads(attend(query, key, value, attention_mask, scoring)))
        return residual + nn.functional.dropout(output, module.hidden_dropout, module.training), None

    return forward


def mpt_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of an `MptAttention`."""
    slopes = _slopes(module, "build_mpt_alibi_tensor")

    def forward(
        hidden_states: Tensor,
        position_bias: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = kwargs.get(CACHE)
        fused = module.Wqkv(hidden_states)
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv) if module.clip_qkv else fused
        query, key, value = (_split_heads(part, module.n_heads) for part in fused.chunk(3, dim=2))
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        dropout = module.attn_dropout_p if module.training else 0.0
        scoring = Scoring(module.softmax_scale, slopes=slopes, dropout=dropout)
        return module.out_proj(_merge_heads(attend(query, key, value, attention_mask, scoring))), None

    return forward


# By the name of the attention class, so that no model file is imported for it.
FORWARDS: dict[str, Callable[[Any, Attend], Callable[..., Any]]] = {
    "FalconAttention": falcon_forward,
    "GPTNeoXJapaneseAttention": neox_forward,
    "BloomAttention": bloom_forward,
    "MptAttention": mpt_forward,
}


def own_forward(module: nn.Module) -> Callable[[Any, Attend], Callable[..., Any]] | None:
    """Return the entry of `FORWARDS` for this module or a class that it derives from, None if there is none."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")]
    return next((FORWARDS[name] for name in names if name in FORWARDS), None)


def _slopes(module: Any, builder: str) -> Tensor:
    """ALiBi's slope of each head: the step of the model file's own bias from one key to the next."""
    build = getattr(sys.modules[next(cls.__module__ for cls in type(module).__mro__)], builder)
    heads = getattr(module, "n_heads", None) or module.num_heads
    weight = next(module.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device  # "meta": offloaded by accelerate
    if builder == "build_mpt_alibi_tensor":
        bias = build(heads, 2, device=device)
    else:
        bias = build(torch.ones(1, 2, dtype=torch.long, device=device), heads, torch.float32)
    slopes: Tensor = (bias[..., 1] - bias[..., 0]).flatten()
    return slopes


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """[batch, n, heads * dim] -> [batch, heads, n, dim]."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    """[batch, heads, n, dim] -> [batch, n, heads * dim]."""
    return states.transpose(1, 2).flatten(2)
