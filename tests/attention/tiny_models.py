"""A tiny model of every causal language model family that transformers can build from a configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# One value for each of the names that configurations give to the same thing.
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "word_embed_proj_dim": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "d_ff": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2,
    "head_dim": 8, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "seq_length": 256,
    "sliding_window": 8, "attention_chunk_size": 8,
    "initializer_range": 0.3,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

MIXED = ["sliding_attention", "full_attention"]

# Hybrids: a state of constant size in every other layer, full attention in the others.
LINEAR = 2 * ["linear_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}

# Latent attention whose keys an indexer chooses.
INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "sliding_window_size": 8,
    "d_rel": 4,
    "unpadded_vocab_size": 97,
}
INDEXED = {"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8}

# Two of six layers attend with the keys of the layers before.
SHARED: dict[str, Any] = {
    "num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": 3 * MIXED,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97,
}  # fmt: skip

# What some families need beside it: sizes that must agree, or a full-attention layer among windowed ones.
EXTRA: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": False},
    "mistral": {"sliding_window": None},
    "ministral": {"layer_types": MIXED},
    "gemma3_text": {"layer_types": MIXED},
    "cohere2": {"layer_types": MIXED},
    "cohere2_moe": {"layer_types": MIXED},
    "exaone4": {"layer_types": MIXED},
    "exaone_moe": {"layer_types": MIXED},
    "olmo3": {"layer_types": MIXED},
    "afmoe": {"layer_types": MIXED},
    "gemma3n_text": {**SHARED, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_text": SHARED,
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **MAMBA,
        "num_hidden_layers": 4,
        "layer_types": LINEAR,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 48,
        "attention_multiplier": 0.35,
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layer_types": LINEAR,
        "q_lora_rank": None,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "axk2": INDEXED,
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_types": LINEAR, "num_key_value_heads": 4, "q_lora_rank": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "inkling_text": INKLING,
    "inkling2_text": INKLING,
    "lara_mini": {
        **DELTA,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
    },
    "lfm3": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "sliding_attention", "conv"]},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "expert_ffn_hidden_size": 16,
        "head_dim": 4,
        "ffn_hidden_size": 48,
        "zero_expert_num": 2,
        "num_layers": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "qwen4_exp_text": {
        **DELTA,
        "num_hidden_layers": 4,
        "layer_types": 2 * ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "deepseek_v32": {**INDEXED, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "glm_moe_dsa": INDEXED,
    "lfm2": {"num_hidden_layers": 4, "layer_types": 2 * ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": 2 * ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "mlp", "linear_attention", "full_attention", "moe"],
        "num_hidden_layers": None,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
        "time_step_min": 1e-9,  # transformers limits the step by it in a prompt and not in a single token
    },
    "minimax": {"num_hidden_layers": 4, "layer_types": LINEAR, "block_size": 8},
    "olmo_hybrid": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR, "linear_num_key_heads": 4},
    "qwen3_5_text": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR},
    "qwen3_5_moe_text": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR},
    "qwen3_next": {**DELTA, "num_hidden_layers": 4, "layer_types": LINEAR},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": 2 * ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "use_mem_rope": True,
        "num_mem_blocks": 1,
        "time_step_min": 1e-9,  # as above
    },
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
}


def family_names() -> list[str]:
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def settings_for(config_class: type[PreTrainedConfig], values: dict[str, Any] = SMALL) -> dict[str, Any]:
    """Those of the values that a configuration knows."""
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= {name for cls in config_class.__mro__ for name in getattr(cls, "__annotations__", {})}
    known |= set(getattr(config_class, "attribute_map", {}).values())
    return {name: value for name, value in values.items() if name in known}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[family]
    settings = settings_for(config_class)
    if getattr(config_class(), "sliding_window", None) is None:
        settings.pop("sliding_window", None)
    return config_class(**{**settings, **EXTRA.get(family, {}), **changes})


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"{family} came out with {size} parameters: its configuration calls some size by another name")
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model
