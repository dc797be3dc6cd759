"""Models that PEMA is tried on."""

from __future__ import annotations

import pytest
from transformers import MistralConfig, MistralForCausalLM

from tests.mixing.pema_models import tiny


@pytest.fixture
def tiny_mistral():
    return tiny(MistralConfig, MistralForCausalLM, sliding_window=4)


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def model(request, tiny_model, tiny_gpt2):
    models = {"llama": tiny_model, "gpt2": tiny_gpt2}
    return models.get(request.param) or request.getfixturevalue("tiny_mistral")
