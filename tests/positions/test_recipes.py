"""The recipes of CREAM run as they stand, on little."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_longtrunc.evaluation import PerplexityRecord, read_records
from instruments.passkey import PasskeyRecord
from tests.command_line import model_folder  # noqa: F401

RECIPES = Path(__file__).parents[2] / "recipes"


def run(monkeypatch, recipe, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, arguments)])
    runpy.run_path(str(RECIPES / recipe), run_name="__main__")


@pytest.fixture
def texts(tmp_path):
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=5)) for _ in range(30)]
    files = [tmp_path / f"{name}.txt" for name in ("first", "second", "third")]
    for file in files:
        parts = [" ".join(letters.choices(words, k=letters.randint(3, 25))) + "." for _ in range(60)]
        file.write_text("\n\n".join(parts))
    return files


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated", "ignore:.is_gradient_checkpointing")
@pytest.mark.parametrize(
    "options",
    [(), ("--packed", "--arms", "cream"), ("--lora", 2, "--checkpointing", "--arms", "pose,cream", "--method", "ntk")],
)
def test_finetune_cream(monkeypatch, model_folder, tmp_path, texts, capsys, options):  # noqa: F811
    out = tmp_path / "out"
    options = ("--texts", *texts[:2], "--eval-text", texts[2], "--model", model_folder, "--out", out, "--cpu", *options)
    sizes = ("--window", 256, "--factor", 2, "--steps", 2, "--accumulate", 2, "--starts", "0,200", "--keys", 1)
    run(monkeypatch, "finetune_cream.py", *options, *sizes, "--depths", "0.5", "--lengths", "210,500")
    printed = capsys.readouterr().out
    arms = ["unmodified", "untrained", "contiguous", "pose", "cream"]
    if "--arms" in options:
        arms = options[options.index("--arms") + 1].split(",")
    records = read_records(out / "perplexity.jsonl", PerplexityRecord)
    assert list(dict.fromkeys(record.arm for record in records)) == arms
    assert max(record.end for record in records) == 512
    assert {record.length for record in read_records(out / "passkey.jsonl", PasskeyRecord)} == {210, 500}
    assert all(arm in printed for arm in arms)
    saved = AutoModelForCausalLM.from_pretrained(out / "cream").config
    assert saved.max_position_embeddings == 512
    assert saved.rope_parameters["rope_type"] == ("default" if "ntk" in options else "yarn")
    assert json.loads((out / "cream" / "tokenizer_config.json").read_text())["model_max_length"] == 512


def test_cream_tiny(monkeypatch, capsys):
    sizes = ("--pretraining", "2", "--steps", "2", "--batch", "2", "--scored", "4")
    run(monkeypatch, "cream_tiny.py", "--seeds", "0", *sizes)
    printed = capsys.readouterr().out
    for arm in ("pretrained", "ntk, no training", "cream", "pose", "contiguous", "trap"):
        assert arm in printed


def test_cream_coverage(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "cream_coverage.py", "--documents", 30, "--out", tmp_path)
    assert not end.value.code
    assert "official draw" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "coverage.jsonl").read_text().splitlines()]
    assert len(records) == 9
    assert all(0.2 < record["met"] <= 1 for record in records)
