"""`hf-longtrunc summarize` on a tiny BART saved in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_longtrunc import Unlimiformer, load_pretrained
from hf_longtrunc.cli import common
from tests.command_line import invoke, letter_tokenizer
from tests.cross_attention.seq2seq_models import tiny_seq2seq


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart")
    letter_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz .").save_pretrained(folder)
    model = tiny_seq2seq()
    model.config.task_specific_params = {"summarization": {"prefix": "sum "}}
    model.float().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the keeper climbed the stairs and lit the lamp. " * 10)
    return str(file)


def test_a_long_text_is_read_whole(folder, text):
    result = invoke("summarize", text, "--model", folder, "--max-new-tokens", "9", "--compare")
    assert result.exit_code == 0, result.output
    assert "the whole text, top 64 states a head: 484 tokens" in result.output  # 480 and the config's prefix
    assert "its beginning, unmodified: 64 tokens" in result.output


def test_options_reach_the_method(folder, text):
    result = invoke(
        "summarize", text, "--model", folder, "--max-new-tokens", "5", "--top-k", "3", "--window", "16", "--prefix", ""
    )
    assert result.exit_code == 0, result.output
    assert "the whole text, top 3 states a head: 480 tokens" in result.output


def test_a_folder_of_another_family_a_dtype_and_a_device(folder, text, tmp_path, monkeypatch):
    tiny_seq2seq("t5").float().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    loaded, load = [], common.load
    monkeypatch.setattr(common, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    options = ("--max-new-tokens", "5", "--window", "16", "--dtype", "bfloat16", "--device", "cpu")
    result = invoke("summarize", text, "--model", tmp_path, *options)
    assert result.exit_code == 0, result.output
    ((model, _),) = loaded
    assert (type(model).__name__, model.dtype) == ("T5ForConditionalGeneration", torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "65"), "window must be at most 64"),
        (("--index", "Flat"), "index must begin with 'faiss:'"),
    ],
)
def test_settings_that_do_not_fit_are_a_sentence(folder, text, options, message):
    result = invoke("summarize", text, "--model", folder, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_decoder_only_or_missing_model_is_a_sentence(model_folder, text, tmp_path):
    for name in (model_folder, str(tmp_path / "nowhere")):
        result = invoke("summarize", text, "--model", name)
        assert result.exit_code == 2
        assert "error: " in result.stderr
        assert "Traceback" not in result.output


def test_an_empty_text_is_refused(folder, tmp_path):
    (tmp_path / "empty.txt").touch()
    result = invoke("summarize", str(tmp_path / "empty.txt"), "--model", folder, "--prefix", "")
    assert result.exit_code == 2
    assert "the text is empty" in result.output


def test_stdout_holds_the_summary_alone(folder, text):
    result = invoke("summarize", text, "--model", folder, "--max-new-tokens", "9", columns=None)
    model, tokenizer = load_pretrained(folder)
    with Unlimiformer()(model):
        inputs = tokenizer("sum " + Path(text).read_text(), return_tensors="pt")
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=9,
            num_beams=4,
            min_length=0,
        )
    assert result.stdout == tokenizer.decode(ids[0], skip_special_tokens=True).strip() + "\n"
    assert "the whole text" in result.stderr
