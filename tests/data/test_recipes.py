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


@pytest.mark.filterwarnings("ignore")  # datatrove's, which runs the tasks where it is installed
def test_shards_know_what_they_were_made_of(monkeypatch, tmp_path):
    """With other files or settings the old rows stood there, with exit 0; datatrove made no deleted shard again."""
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text("\n\n".join("word " * (7 * n % 40 + index) for n in range(1, 30)))
    first, second = sorted(map(str, tmp_path.glob("*.txt")))
    out = tmp_path / "rows"

    def packed(files=(first,), seq_length="64", tasks="2"):
        options = ("--seq-length", seq_length, "--tasks", tasks, "--workers", "2", "--out", str(out))
        run(monkeypatch, "cluster/pack_shards.py", "--check", *options, "--files", *files)
        return {path.name: path.read_bytes() for path in out.glob("rows-*.arrow")}

    rows = packed()
    changes = {"files": {"files": (first, second)}, "seq_length": {"seq_length": "128"}, "tasks": {"tasks": "1"}}
    for name, change in changes.items():
        with pytest.raises((ValueError, RuntimeError), match=rf"of other {name}|Some tasks failed"):
            packed(**change)
    (out / "rows-00001.arrow").unlink()
    (out / "tokens-00000.bin").unlink()
    assert packed() == rows
    Path(first).write_text("another text")
    with pytest.raises((ValueError, RuntimeError), match=r"of other files|Some tasks failed"):
        packed()


def test_random_streams_are_resumed_after_every_row(monkeypatch, capsys):
    run(monkeypatch, "resumed_streams.py", "--streams", "3", "--seed", "7")
    assert capsys.readouterr().out.count("all equal") == 4  # setups, and all
