"""The recipes of packing run as they stand, on little."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def run(monkeypatch, recipe, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [recipe, *arguments])
    runpy.run_path(str(RECIPES / recipe), run_name="__main__")


def test_pretrain_packed(monkeypatch, tmp_path, capsys):
    options = ("--steps", "2", "--batch", "2", "--seq-length", "64", "--output-dir", str(tmp_path))
    run(monkeypatch, "pretrain_packed.py", "--cpu", *options)
    printed = capsys.readouterr().out
    assert "'dropped_tokens': 0" in printed
    assert "train_loss" in printed


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_benchmark(monkeypatch, capsys):
    options = ("--documents", "3000", "--seq-length", "128", "--turns", "1", "--no-training")
    run(monkeypatch, "benchmarks/packing.py", *options)
    printed = capsys.readouterr().out
    assert "3,000 documents" in printed
    assert "bytes a document" in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_before_any_step_it_leaves_the_old_or_the_new(monkeypatch, capsys):
    """Random moments, and all that writes: `python recipes/killed.py`."""
    names = "materialize,write_megatron,write_datatrove,Packing.save_pretrained,append_records"
    run(monkeypatch, "killed.py", "--moments", "1", "--documents", "60", "--writers", names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names.split(","))


def test_four_processes_pack_what_one_packs(monkeypatch, tmp_path, capsys):
    """More tasks than sources: some have nothing to read. Rows are written in several blocks."""
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("\n\n".join("word " * (7 * n % 40 + index) for n in range(1, 90)))
    files = map(str, sorted(tmp_path.glob("*.txt")))
    sizes = ["--synthetic", "300", "--seq-length", "64", "--tasks", "5", "--block", "1000"]
    options = (*sizes, "--out", str(tmp_path / "rows"))
    run(monkeypatch, "cluster/pack_shards.py", "--check", *options, "--files", *files)
    assert "equal to one process" in capsys.readouterr().out
