"""The command line, run as a user runs it, on a tiny model saved in a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_longtrunc import load_pretrained
from hf_longtrunc.cli import app
from hf_longtrunc.demo import bat_part
from tests.conftest import tiny_config


def letter_tokenizer(special: list[str], letters: str) -> PreTrainedTokenizerFast:
    """A token a letter, the special tokens first."""
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = letter_tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
    )
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    return str(folder)


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})


def test_demo_prints_three_texts_two_tables_and_writes_the_picture(model_folder, tmp_path):
    result = invoke("demo", "--model", model_folder, "--max-new-tokens", "15", "--output-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    for part in (
        "plain",
        "top-p 0.9",
        "eta 0.002",
        "The first 12 steps",
        "Over the whole text",
        "refused",
        "concatenation",
        "pieces: logits differ",
    ):
        assert part in result.output
    for picture in ("sampling.png", "packing.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_demo_of_one_step(model_folder, tmp_path):
    result = invoke("demo", "--model", model_folder, "--max-new-tokens", "1", "--output-dir", str(tmp_path))
    assert result.exit_code == 0, result.output


def test_demo_bat_shows_what_was_rescued_below_the_threshold(model_folder, tmp_path):
    console = Console(record=True, width=100)
    bat_part(*load_pretrained(model_folder), tmp_path, max_new_tokens=14, epsilon=0.03, console=console)
    output = console.export_text()
    assert re.search(r"[1-9][\d,]* tokens decided by proof, 0 undecided", output)
    rows = re.findall(r"(\d\.\de[+-]\d\d) +(\d\.\de[+-]\d\d) +(\d+) +(\d+) *$", output, re.MULTILINE)
    assert len(rows) == 12
    assert any(int(rescued) > 0 for *_, rescued in rows)
    for probability, threshold, kept, rescued in rows:
        assert int(kept) >= 1
        assert int(rescued) >= 1 or float(probability) >= float(threshold) * 0.95
    assert (tmp_path / "bat.png").read_bytes().startswith(b"\x89PNG")


def test_match_prints_the_table_and_writes_the_picture(model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the lighthouse keeper had not spoken to anyone")
    picture = tmp_path / "match.png"
    result = invoke("match", str(text), "--model", model_folder, "--rank", "3", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    for part in ("refused", "BAT on eta", "10.0%", "45 tokens, rank 3"):
        assert part in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_match_of_one_letter_is_refused(model_folder):
    result = invoke("match", "a", "--model", model_folder, "--rank", "3")
    assert result.exit_code == 2
    assert "at least 2 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--epsilon", "1.5", "must lie in (0, 1), got 1.5"),
        ("--epsilon", "zero", "--epsilon"),
        ("--top-p", "0", "must lie in (0, 1], got 0.0"),
        ("--max-new-tokens", "0", "--max-new-tokens"),
    ],
)
def test_bad_options_are_named(option, value, message):
    result = invoke("demo", option, value)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_model_that_is_not_there_is_a_sentence_not_a_traceback(tmp_path):
    result = invoke("demo", "--model", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "Could not load" in result.output
    assert "--model takes a hub id or a folder" in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["a stitch in time saves nine. " * n for n in (1, 2, 3, 5, 9)]
    files = {suffix: tmp_path / f"corpus.{suffix}" for suffix in ("jsonl", "parquet", "txt")}
    files["jsonl"].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"input_ids": [[5] * len(text) for text in texts]}), files["parquet"])
    files["txt"].write_text("\n".join(texts))
    return {suffix: str(file) for suffix, file in files.items()}


@pytest.mark.parametrize(("kind", "options"), [("jsonl", ()), ("parquet", ()), ("txt", ("--sample-by", "line"))])
def test_pack_writes_table_picture_and_dataset(corpus, model_folder, tmp_path, kind, options):
    options = (*options, "--seq-length", "64", "--output-dir", str(tmp_path / "out"))
    options += () if kind == "parquet" else ("--tokenizer", model_folder)
    result = invoke("pack", corpus[kind], *options)
    assert result.exit_code == 0, result.output
    for part in ("5 documents", "best fit", "concatenation", "documents cut"):
        assert part in result.output
    assert (tmp_path / "out" / "packing.png").read_bytes().startswith(b"\x89PNG")
    rows = datasets.load_from_disk(str(tmp_path / "out" / "dataset"))
    assert rows.column_names == ["input_ids", "position_ids", "labels", "seq_lengths"]
    assert max(len(row["input_ids"]) for row in rows) == 64


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("jsonl", (), "column 'text' is text: name a tokenizer with --tokenizer"),
        ("jsonl", ("--column", "body"), "no column 'body', only ['text']"),
        ("parquet", ("--long", "error", "--seq-length", "32"), "document 1 has 58 tokens, more than seq_length = 32"),
    ],
)
def test_pack_says_what_is_wrong(corpus, tmp_path, kind, options, message):
    result = invoke("pack", corpus[kind], *options, "--output-dir", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_pack_of_unlike_or_missing_files(corpus):
    result = invoke("pack", corpus["jsonl"], corpus["txt"])
    assert result.exit_code == 1
    assert "files must be of one kind out of .jsonl" in " ".join(result.output.split())
    assert invoke("pack", "nowhere.jsonl").exit_code == 2


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "pack" in result.output


def test_module_and_script_are_the_same_program():
    environment = os.environ | {"COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-m", "hf_longtrunc", "--help"], check=True, capture_output=True, text=True, env=environment
    )
    assert "demo" in result.stdout
