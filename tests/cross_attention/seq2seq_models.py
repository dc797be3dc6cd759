"""A tiny encoder-decoder of every family that Unlimiformer is checked on, in double precision."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5GemmaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97
BART_LIKE = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "init_std": 0.3, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5_LIKE = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "initializer_factor": 1.0,
}  # fmt: skip
T5GEMMA_MODULE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sliding_window": 8,
    "attention_bias": True,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "bart": BART_LIKE,
    "mbart": BART_LIKE,
    "pegasus": BART_LIKE,
    "pegasus_x": BART_LIKE | {"block_size": 4, "num_global_tokens": 2, "stagger_local_blocks": True},
    "marian": BART_LIKE | {"decoder_start_token_id": 1},
    "m2m_100": BART_LIKE,
    "blenderbot": BART_LIKE,
    "plbart": BART_LIKE,
    "mvp": BART_LIKE,
    "blenderbot-small": BART_LIKE,
    "bigbird_pegasus": BART_LIKE | {"attention_type": "original_full"},
    "nllb-moe": BART_LIKE | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "led": {name: value for name, value in BART_LIKE.items() if name != "max_position_embeddings"}
    | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
    "t5": T5_LIKE | {"n_positions": 64},
    "mt5": T5_LIKE,
    "umt5": T5_LIKE,
    "longt5": T5_LIKE | {"local_radius": 3},
    "switch_transformers": T5_LIKE
    | {"n_positions": 64, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5gemma": {"encoder": T5GEMMA_MODULE, "decoder": T5GEMMA_MODULE, "vocab_size": VOCABULARY, "pad_token_id": 1},
}
FAMILIES = list(SETTINGS)
SETTINGS |= {  # refused
    "fsmt": {name: value for name, value in BART_LIKE.items() if name != "vocab_size"}
    | {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    "t5gemma2": {
        "encoder": {
            "text_config": T5GEMMA_MODULE,
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
        },
        "decoder": T5GEMMA_MODULE, "vocab_size": VOCABULARY,
    },
    "prophetnet": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    },
}  # fmt: skip


def tiny_seq2seq(family: str = "bart", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config_class = T5GemmaConfig if family == "t5gemma" else CONFIG_MAPPING[family]
    # T5Gemma's scores are capped, which sdpa leaves out; transformers before 5.24 takes it none the less.
    options = {"attn_implementation": "eager"} if family == "t5gemma" else {}
    model = AutoModelForSeq2SeqLM.from_config(config_class(**{**SETTINGS[family], **changes}), **options)
    for name, parameter in model.named_parameters():  # biases are not to be zero, where there are any
        if name.endswith("bias") and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.decoder_start_token_id = model.generation_config.decoder_start_token_id or 2
    model.generation_config.encoder_no_repeat_ngram_size = 0
    return model.double().eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)
