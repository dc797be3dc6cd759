"""Tiny models and adapters for the tests of PEMA."""

from __future__ import annotations

import math

import torch
from torch import nn

from hf_longtrunc import (
    PEMAAdapter,
)
from tests.conftest import tiny_config

INF = math.inf
WIDTH, VOCAB = 32, 97
PROMPTS = [[7, 8, 9], [1, 5, 9, 13, 5, 9]]
PADDED = torch.tensor([[0, 0, 0, *PROMPTS[0]], PROMPTS[1]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def settings_of_a_tiny_model() -> dict:
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    names += " max_position_embeddings bos_token_id eos_token_id pad_token_id initializer_range"
    return {name: getattr(tiny_config(), name) for name in names.split()}


def tiny(config_class, model_class, **changes):
    torch.manual_seed(3)
    return model_class(config_class(**{**settings_of_a_tiny_model(), **changes})).eval()


def random_adapter(rank=6, seed=7) -> PEMAAdapter:
    adapter = PEMAAdapter(WIDTH, rank, VOCAB, generator=torch.Generator().manual_seed(seed)).eval()
    nn.init.normal_(adapter.B_pd, std=0.3, generator=torch.Generator().manual_seed(seed + 1))
    return adapter


def identity_adapter() -> PEMAAdapter:
    adapter = PEMAAdapter(WIDTH, WIDTH, VOCAB).eval()
    with torch.no_grad():
        adapter.B_pd.copy_(torch.linalg.inv(adapter.A))
    return adapter


def examples_of(generator) -> list[dict]:
    rows = []
    for length in (5, 9, 2, 7, 12):
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    rows[1]["labels"][-1] = -100
    rows.append({"input_ids": [1, 2, 3], "labels": [1, -100, -100]})  # its only target has no context
    return rows


@torch.no_grad()
def last_hidden_states(model, ids, **inputs):
    return model(input_ids=ids, output_hidden_states=True, use_cache=False, **inputs).hidden_states[-1]


def generate(model, processors, ids=PADDED, mask=MASK, **options):
    torch.manual_seed(11)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        logits_processor=processors,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
