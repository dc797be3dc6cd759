"""A tiny model of each multimodal shell: a vision tower, and a decoder of text as `tiny_models` makes it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .tiny_models import MIXED, SHARED, settings_for

IMAGE_TOKEN, IMAGE_START = 90, 91

VISION: dict[str, Any] = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 32, "mlp_ratio": 2,
    "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "image_size": 8, "patch_size": 4, "in_channels": 3, "num_channels": 3,
    "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "window_size": 8, "pixel_shuffle_ratio": 1.0, "initializer_range": 0.3, "vision_output_dim": 32,
    "projector_input_dim": 32, "projector_output_dim": 32, "projection_dim": 32, "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# The family of the text decoder, what its config needs beside `SMALL`, and what the shell's own does.
SHELLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"layer_types": MIXED}, {"mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", SHARED, {}),
    "qwen2_vl": ("qwen2_vl_text", {"rope_parameters": MROPE}, {}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"rope_parameters": MROPE}, {}),
    "qwen3_vl": ("qwen3_vl_text", {"rope_parameters": MROPE}, {}),
    "qwen3_5": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}, {}),
    "paligemma": ("gemma", {}, {"projection_dim": 32}),
    "smolvlm": ("llama", {}, {"scale_factor": 1}),
    "llama4": ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}, {}),
    "mistral3": ("mistral", {"sliding_window": None}, {"spatial_merge_size": 1}),
    "llava": ("llama", {}, {}),
    "internvl": ("qwen2", {}, {"downsample_ratio": 1.0}),
}


def shell_config(family: str) -> PreTrainedConfig:
    text_family, text, own = SHELLS[family]
    config_class = CONFIG_MAPPING[family]
    vision = type(config_class().vision_config) if family != "gemma4" else CONFIG_MAPPING["gemma4_vision"]
    return config_class(
        text_config=CONFIG_MAPPING[text_family](**{**settings_for(CONFIG_MAPPING[text_family]), **text}),
        vision_config=vision(**settings_for(vision, VISION)),
        **{**settings_for(config_class, {
            "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN, "vision_start_token_id": IMAGE_START,
            "video_token_id": 92, "vision_end_token_id": 93, "pad_token_id": 0,
        }), **own},
    )  # fmt: skip


def tiny_shell(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(shell_config(family)).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt_with_image(family: str) -> dict[str, torch.Tensor]:
    """What the shell's processor hands out: 29 tokens, of which four are an image's, and the image."""
    ids = torch.randint(3, 80, (1, 29))
    ids[0, 4:8] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 8, 8)
    if family.startswith("qwen"):
        patches = torch.randn(16, 3 * 2 * 4 * 4)
        types = (ids == IMAGE_TOKEN).long()
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}
    elif family == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        image = {"pixel_values": torch.rand(1, 16, 3 * 4 * 4), "image_position_ids": places[None]}
    elif family == "mistral3":
        image = {"pixel_values": pixels, "image_sizes": torch.tensor([[8, 8]])}
    else:
        image = {"pixel_values": pixels[None] if family == "smolvlm" else pixels}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
