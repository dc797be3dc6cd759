"""The commands and the recipes of the evaluation room, on a tiny model in a folder."""

from __future__ import annotations

import io
import json
import runpy
import sys
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.evaluation import (
    PasskeyRecord,
    PerplexityRecord,
    RepetitionRecord,
    RetrievalRecord,
    TruncationScore,
    compare_losses,
    perplexity_by_position,
    python_reference,
    read_records,
)
from hf_longtrunc.evaluation.commands import _read_tokens, past_the_window, ppl

mpl.use("agg")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(ppl)

    def invoke(*args, **kwargs):
        return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False, **kwargs)

    return invoke


@pytest.fixture
def long_text(prose):
    return "".join(f"Chapter {number}. {prose}" for number in range(40))


def test_ppl_compares_both_arms_on_the_tokens_of_a_file(run, tiny_folder, long_text, tmp_path):
    (tmp_path / "text.txt").write_text(long_text, encoding="utf-8")
    options = ["--model", tiny_folder, "--tokens", 300, "--skip", 20, "--window", 48, "--sinks", 2, "--chunk", 50]
    result = run(tmp_path / "text.txt", *options, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "LM-Infinite" in result.output
    assert "300 tokens; the model was trained on windows of 64" in result.output.replace("\n", " ")

    model, tokenizer = load_pretrained(tiny_folder)
    ids = torch.tensor(tokenizer(long_text).input_ids[20:320])
    arms = {"unmodified": nullcontext, "LM-Infinite": LMInfinite(num_sink_tokens=2, window_length=48)}
    records = read_records(tmp_path / "out" / "perplexity.jsonl", PerplexityRecord)
    for name, losses in compare_losses(model, ids, arms).items():
        bins = perplexity_by_position(losses, [0, 32, 64, 80, 96, 128, 256, 512])
        recorded = {record.start: record.perplexity for record in records if record.arm == name}
        assert recorded == pytest.approx({point.start: point.perplexity for point in bins}, rel=1e-4)
    assert {record.settings for record in records} == {"nullcontext", repr(arms["LM-Infinite"])}
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 1000


def test_ppl_reads_standard_input(run, tiny_folder, long_text):
    result = run("-", "--model", tiny_folder, "--tokens", 70, input=long_text)
    assert result.exit_code == 0, result.output
    assert "70 tokens" in result.output


def test_ppl_says_when_there_is_no_text(run, tiny_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = run(tmp_path / "empty.txt", "--model", tiny_folder)
    assert result.exit_code == 2
    assert "at least 2 tokens" in result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["missing.txt"], "missing.txt"),
        (["-", "--window", 0], "--window"),
        (["-", "--sinks", -1], "--sinks"),
        (["-", "--model", "/no/such/folder"], "could not load"),
    ],
)
def test_ppl_says_what_is_wrong(run, tiny_folder, options, says):
    result = run("--model", tiny_folder, *options, input="some words of text", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert says in result.output


def test_ppl_refuses_a_model_that_cannot_be_patched_before_it_reads(run, tiny_gpt2, tokenizer, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = run("-", "--model", tmp_path, input="some words of text", env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "cannot patch" in result.output


def test_a_text_without_end_is_read_as_far_as_needed(tokenizer, prose):
    class Endless(io.TextIOBase):
        source, given = cycle(prose), 0

        def read(self, size=-1):
            assert size > 0
            self.given += size
            return "".join(next(self.source) for _ in range(size))

    stream = Endless()
    ids = _read_tokens(stream, tokenizer, 500)
    assert ids.tolist() == tokenizer(prose * 50, verbose=False).input_ids[:500]
    assert stream.given < 8000
    assert len(_read_tokens(io.StringIO("a few words"), tokenizer, 500)) == len(tokenizer("a few words").input_ids)


def test_the_demo_part_needs_no_text(tiny_folder, tmp_path):
    model, tokenizer = load_pretrained(tiny_folder)
    console = Console(file=io.StringIO(), width=120)
    past_the_window(model, tokenizer, tmp_path, tokens=150, console=console)
    assert "LM-Infinite" in console.file.getvalue()
    assert "128-256" in console.file.getvalue()
    assert len(read_records(tmp_path / "perplexity.jsonl", PerplexityRecord)) == 2 * 6
    assert (tmp_path / "perplexity.png").exists()


def test_the_reference_is_long_and_says_nothing_twice():
    text = python_reference()
    paragraphs = text.split("\n\n")
    assert len(text) > 300_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert text == python_reference()


def test_a_python_without_the_reference_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="name a text file"):
        python_reference()


def test_recipe_passkey(tiny_folder, tmp_path, capsys):
    main = runpy.run_path(str(RECIPES / "passkey.py"))["main"]
    settings = {"model": tiny_folder, "keys": 1, "window": 32, "text": None, "out": tmp_path, "sinks": 4, "seed": 0}
    with pytest.raises(typer.BadParameter, match="--arms takes unmodified, window, paper, top-k, blocks; got all"):
        main(lengths="400", depths="0", arms="window,all", **settings)
    main(lengths="400,500", depths="0,0.5", arms="unmodified,window", **settings)
    assert "passkey accuracy" in capsys.readouterr().out
    assert len(read_records(tmp_path / "passkey.jsonl", PasskeyRecord)) == 8
    assert (tmp_path / "passkey.png").exists()


@pytest.mark.parametrize("reads", [True, False])
def test_recipe_stream_forever(tiny_folder, tmp_path, prose, capsys, reads):
    (tmp_path / "text.txt").write_text(prose)
    main = runpy.run_path(str(RECIPES / "stream_forever.py"))["main"]
    text = tmp_path / "text.txt" if reads else None
    main(text=text, tokens=120, every=20, window=16, sinks=2, model=tiny_folder, quiet=False, seed=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokens seen" in line]
    assert len(lines) == 6
    assert len({line.split("cache")[1] for line in lines}) == 1


def test_recipe_lm_infinite(tiny_folder, tmp_path, long_text, capsys):
    (tmp_path / "text.txt").write_text(long_text)
    main = runpy.run_path(str(RECIPES / "lm_infinite.py"))["main"]
    where = {"text": tmp_path / "text.txt", "model": tiny_folder, "out": tmp_path}
    main(
        **where,
        parts="perplexity,streaming,prompt",
        starts="0,100",
        tokens=200,
        stops="100,400",
        prompts="900",
        windows="64,16",
        chunk=64,
    )
    shown = capsys.readouterr().out
    assert "S=0, L=64" in shown
    assert "streaming" in shown
    assert "prompt of 900 tokens" in shown
    assert len(read_records(tmp_path / "perplexity.jsonl", PerplexityRecord)) == 4 * 6


def test_recipe_benchmark(tiny_folder, tmp_path, capsys):
    recipe = runpy.run_path(str(RECIPES / "benchmarks" / "lm_infinite.py"))
    recipe["main"](device="cpu", largest=4096, repeats=1, model=str(tiny_folder), model_windows="8", out=tmp_path)
    shown = capsys.readouterr().out
    assert "prefill" in shown
    assert "decode" in shown
    assert "whole model" in shown
    assert len((tmp_path / "lm_infinite.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(("n", "window"), [(1024, 256), (1000, 300), (640, 128), (512, 1), (512, 5000), (1100, 255)])
def test_the_benchmarks_window_mask_is_the_windows(n, window):
    blocks = runpy.run_path(str(RECIPES / "benchmarks" / "lm_infinite.py"))["window_blocks"](n, window, "cpu")
    rows = -(-n // 128)
    i, j = torch.arange(rows * 128)[:, None], torch.arange(rows * 128)[None]
    seen = ((j <= i) & (i - j < window)).view(rows, 128, rows, 128)
    assert blocks.to_dense()[0, 0].bool().equal(seen.any(3).any(1))
    full = torch.zeros(rows, rows, dtype=torch.bool)
    for row in range(rows):
        full[row, blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].long()] = True
    assert full.equal(seen.all(3).all(1))


def test_recipe_retrieval(tiny_folder, tmp_path, capsys):
    main = runpy.run_path(str(RECIPES / "retrieval.py"))["main"]
    settings = {"model": tiny_folder, "window": 32, "text": None, "sinks": 4, "seed": 0}
    main(lengths="700", depths="0,0.5", prompts=1, out=tmp_path, **settings)
    assert "needle 4x1" in capsys.readouterr().out
    assert len(read_records(tmp_path / "retrieval.jsonl", RetrievalRecord)) == 2 * 5 * 2
    assert (tmp_path / "retrieval.png").exists()


def test_recipe_samplers(tiny_folder, tmp_path, long_text, capsys):
    (tmp_path / "text.txt").write_text(long_text)
    main = runpy.run_path(str(RECIPES / "samplers.py"))["main"]
    main(text=tmp_path / "text.txt", tokens=20, new_tokens=3, seeds="0", model=tiny_folder, out=tmp_path)
    shown = capsys.readouterr().out
    assert "samplers on a human text" in shown
    assert "continuing a repeated phrase" in shown
    assert len(read_records(tmp_path / "truncation.jsonl", TruncationScore)) == 12
    assert len(read_records(tmp_path / "repetition.jsonl", RepetitionRecord)) == 15
    assert (tmp_path / "truncation.png").exists()
    assert (tmp_path / "repetition.png").exists()


def test_recipe_constant_memory(tmp_path, capsys):
    recipe = runpy.run_path(str(RECIPES / "constant_memory.py"))
    recipe["main"](
        tokens=2000, every=1000, window=64, sinks=4, chunk=100, model=None, text=None, out=tmp_path / "memory"
    )
    first, last = read_records(tmp_path / "memory" / "memory.jsonl", recipe["MemoryRecord"])
    assert (first.tokens, last.tokens) == (1000, 2000)
    assert last.perplexity > 500
    assert last.peak_mib < 1.5 * first.peak_mib
    assert "2,000 tokens" in capsys.readouterr().out


def test_recipe_eta_flag(tiny_folder, tmp_path, capsys):
    main = runpy.run_path(str(RECIPES / "eta_flag.py"))["main"]
    main(epsilons="1e-3", model=tiny_folder, out=tmp_path)
    assert "eta_cutoff=" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "eta_flag.jsonl").read_text().splitlines()]
    kept = {(record["prompt"], record["way"]): record["tokens"] for record in records}
    assert len(kept) == 4
    flag, processor = (kept["My name is", way] for way in ("eta_cutoff=", "EtaLogitsProcessor"))
    assert flag <= 50 < processor  # the tiny model's distribution is flat
