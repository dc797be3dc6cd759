from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.command_line import letter_tokenizer, model_folder  # noqa: F401

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?"


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A tiny sentence encoder with a token a letter."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = letter_tokenizer(["<pad>", "<unk>"], LETTERS)
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.4,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)
