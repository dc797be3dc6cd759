"""A byte-level tokenizer made on the spot, which opens every text with a token of its own."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROSE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. "
    "It is a way I have of driving off the spleen!\n\nWhenever it is a damp November in my soul, I go to sea. "
    "What of it? There is nothing surprising in this. Almost all men cherish the same feelings towards the ocean. "
)


@pytest.fixture(scope="session")
def trained_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    return tokenizer


@pytest.fixture
def tokenizer(trained_tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer, model_max_length=100)


@pytest.fixture
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session")
def tiny_folder(trained_tokenizer, tmp_path_factory) -> str:
    """A folder that `load_pretrained` loads: a Llama of two layers, trained window 64, and its tokenizer."""
    vocab = trained_tokenizer.get_vocab_size()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=vocab, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, **sizes)
    config.eos_token_id = None
    folder = tmp_path_factory.mktemp("tiny model")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=trained_tokenizer, bos_token="<|start|>").save_pretrained(folder)
    return str(folder)
