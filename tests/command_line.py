"""The command line as a user runs it, and a tiny model saved in a folder for it."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_longtrunc.cli.app import app
from tests.conftest import tiny_config


def letter_tokenizer(special: list[str], letters: str) -> PreTrainedTokenizerFast:
    """A token a letter, the special tokens first."""
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = letter_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    return str(folder)


def invoke(*arguments: object, columns: int | None = 200, **options):
    """Run `hf-longtrunc` with these arguments; `columns=None` is a pipe."""
    environment = {"COLUMNS": None if columns is None else str(columns), "TERMINAL_WIDTH": None}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment, **options)
