"""Attention modules that do not ask transformers' attention interface: their forwards with an attention to be given.

Each function takes the attention module and `attend(query, key, value, carried, scoring)`, heads in the second
dimension, and returns a `forward` for that instance: the module's own projections, rotation and output, with `attend`
between them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_longtrunc.attention.lambda_attention import Scoring
from hf_longtrunc.attention.rotary import Rotation

if TYPE_CHECKING:
    from collections.abc import Callable

    Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Scoring], Tensor]


def gptj_rotation(module: Any) -> Rotation:
    """Return the rotation of GPT-J and CodeGen: neighbouring pairs, the first `rotary_dim` dimensions, base 10000."""
    dim = module.pos_embd_dim
    exponents = torch.arange(0, dim, 2, device=module.embed_positions.device, dtype=torch.float64) / dim
    return Rotation(10000**-exponents, "pairs")


def gptj_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `GPTJAttention`."""
    rotation = gptj_rotation(module)

    def projections(hidden_states: Tensor) -> tuple[Tensor, ...]:
        layers = module.q_proj, module.k_proj, module.v_proj
        return tuple(_heads(layer(hidden_states), module.num_attention_heads) for layer in layers)

    return _gptj_like_forward(module, attend, rotation, projections)


def codegen_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `CodeGenAttention`."""
    rotation = gptj_rotation(module)

    def projections(hidden_states: Tensor) -> tuple[Tensor, ...]:
        fused = module.qkv_proj(hidden_states)
        parts = fused.view(*fused.shape[:2], 4, -1).chunk(
            3, dim=-1
        )  # trained on four cores, each with its share of heads
        query, value, key = (_heads(part.flatten(-2), module.num_attention_heads) for part in parts)
        return query, key, value

    return _gptj_like_forward(module, attend, rotation, projections)


def _gptj_like_forward(
    module: Any, attend: Attend, rotation: Rotation, projections: Callable[[Tensor], tuple[Tensor, ...]]
) -> Callable[..., Any]:
    def forward(
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = projections(hidden_states)
        query, key = rotation.rotate(query, position_ids), rotation.rotate(key, position_ids)
        if layer_past is not None:
            key, value = layer_past.update(key, value, module.layer_idx)
        scoring = Scoring(1 / module.scale_attn, dropout=module.attn_dropout.p if module.training else 0.0)
        output = attend(query, key, value, attention_mask, scoring)
        return module.resid_dropout(module.out_proj(_merged(output))), None

    return forward


def falcon_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of a `FalconAttention`, rotary or ALiBi (whose bias Falcon scales like its scores)."""
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
        return module.dense(_merged(output)), None

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
        output = module.dense(_merged(attend(query, key, value, attention_mask, scoring)))
        return residual + nn.functional.dropout(output, module.hidden_dropout, module.training), None

    return forward


def mpt_forward(module: Any, attend: Attend) -> Callable[..., Any]:
    """Build the forward of an `MptAttention`."""
    slopes = _slopes(module, "build_mpt_alibi_tensor")

    def forward(
        hidden_states: Tensor,
        position_bias: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        fused = module.Wqkv(hidden_states)
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv) if module.clip_qkv else fused
        query, key, value = (_heads(part, module.n_heads) for part in fused.chunk(3, dim=2))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, module.layer_idx)
        dropout = module.attn_dropout_p if module.training else 0.0
        scoring = Scoring(module.softmax_scale, slopes=slopes, dropout=dropout)
        return module.out_proj(_merged(attend(query, key, value, attention_mask, scoring))), None

    return forward


# By the name of the attention class, so that no model file is imported for it.
FORWARDS: dict[str, Callable[[Any, Attend], Callable[..., Any]]] = {
    "GPTJAttention": gptj_forward,
    "CodeGenAttention": codegen_forward,
    "FalconAttention": falcon_forward,
    "BloomAttention": bloom_forward,
    "MptAttention": mpt_forward,
}


def own_forward(module: nn.Module) -> Callable[[Any, Attend], Callable[..., Any]] | None:
    """Return the entry of `FORWARDS` for this module or a class that it derives from, None if there is none."""
    names = [cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("transformers.models.")]
    return next((FORWARDS[name] for name in names if name in FORWARDS), None)


def _slopes(module: Any, builder: str) -> Tensor:
    """ALiBi's slope of each head: what the model file's own bias changes by from one key to the next."""
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


def _heads(states: Tensor, heads: int) -> Tensor:
    """[batch, n, heads * dim] -> [batch, heads, n, dim]."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _merged(states: Tensor) -> Tensor:
    """[batch, heads, n, dim] -> [batch, n, heads * dim]."""
    return states.transpose(1, 2).flatten(2)
