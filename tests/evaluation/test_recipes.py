"""The recipes of the evaluation room, on a tiny model in a folder, and the text that they need no file for."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import typer
from transformers import AutoTokenizer, BertConfig, BertModel

from hf_longtrunc import EtaLogitsProcessor
from hf_longtrunc.evaluation import PerplexityRecord, python_reference, read_records
from instruments.passkey import PasskeyRecord
from instruments.retrieval import RetrievalRecord
from instruments.truncation import RepetitionRecord, TruncationScore

mpl.use("agg")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def long_text(prose):
    return "".join(f"Chapter {number}. {prose}" for number in range(40))


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
    assert "expected strings found, by depth" in capsys.readouterr().out
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
    assert len((tmp_path / "lm_infinite.jsonl").read_text().splitlines()) == 9


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


@pytest.mark.parametrize("variants", [False, True])
def test_recipe_retrieval(tiny_folder, tmp_path, long_text, capsys, monkeypatch, variants):
    monkeypatch.setenv("COLUMNS", "120")
    main = runpy.run_path(str(RECIPES / "retrieval.py"))["main"]
    (tmp_path / "text.txt").write_text(long_text)
    text = tmp_path / "text.txt" if variants else None
    settings = {"model": tiny_folder, "window": 32, "text": text, "sinks": 4, "seed": 0, "chat": False}
    main(lengths="700", depths="0,0.5", prompts=1, out=tmp_path, variants=variants, **settings)
    shown = capsys.readouterr().out
    assert "needle 4x1" in shown
    assert ("187-699" in shown) == variants
    assert len(read_records(tmp_path / "retrieval.jsonl", RetrievalRecord)) == 2 * (7 if variants else 5) * 2
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
    recipe["main"](window=64, sinks=4, prompts="3000,100", out=tmp_path / "memory")
    prompts = read_records(tmp_path / "memory" / "prompts.jsonl", recipe["PromptRecord"])
    assert [(record.tokens, record.read) for record in prompts] == [
        *((100, "in chunks"), (3000, "in chunks")),
        *((100, "whole"), (3000, "whole")),
    ]


def tiny_encoder(tokenizer_folder, folder) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, pad_token="<|start|>", model_max_length=32)
    tokenizer.save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(folder)
    return str(folder)


def test_recipe_sampler_battery(tiny_folder, tmp_path, capsys, prose):
    """A second run measures nothing anew and prints the same; half of what shards did is there for the whole."""
    recipe = runpy.run_path(str(RECIPES / "sampler_battery.py"))["main"].__globals__
    recipe |= {"CONTEXT": 4, "SCORED": 64, "PROMPT": 4, "CONTINUATION": 5, "TOGETHER": 32}
    recipe["samplers"] = lambda row, basis: {"none": None, "eta": EtaLogitsProcessor(row["eta"])}
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "b", "c"):
        (texts / f"{name}.txt").write_text(f"{name} {prose}" * 12)
    sizes = {"chosen_windows": 2, "windows": 3, "continuations": "1:3,0.5:2", "bat_tokens": 10, "model": tiny_folder}
    where = {"texts": texts, "out": tmp_path, "encoder": tiny_encoder(tiny_folder, tmp_path / "encoder")}
    defaults = {"parts": "critical,text,generation", "shard": "1/1"}
    recipe["main"](**where, **sizes, **defaults | {"parts": "critical", "shard": "2/2"})
    recipe["main"](**where, **sizes, **defaults)
    first = capsys.readouterr().out
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("critical", "windows")}
    assert {name: len(rows) for name, rows in lines.items()} == {"critical": 2, "windows": 3}
    assert len((tmp_path / "continuations.jsonl").read_text().splitlines()) == 3 * (3 + 2)
    measured = [json.loads(line) for line in (tmp_path / "measures.jsonl").read_text().splitlines()]
    assert [(each["sampler"], each["temperature"], each["continuations"]) for each in measured] == [
        (name, temperature, count) for temperature, count in ((1, 3), (0.5, 2)) for name in ("human", "none", "eta")
    ]
    assert all(0 <= each["figures"]["frontier"][0] <= 1 for each in measured)
    assert (tmp_path / "continuations.png").stat().st_size
    recipe["main"](**where, **sizes, **defaults)
    assert capsys.readouterr().out == first
    for part in ("BAT on eta", "192 tokens, 3 windows", "3 of each", "whatever"):
        assert part in first


def test_recipe_eta_flag(tiny_folder, tmp_path, capsys):
    main = runpy.run_path(str(RECIPES / "eta_flag.py"))["main"]
    main(epsilons="1e-3", model=tiny_folder, out=tmp_path)
    assert "eta_cutoff=" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "eta_flag.jsonl").read_text().splitlines()]
    kept = {(record["prompt"], record["way"]): record["tokens"] for record in records}
    assert len(kept) == 4
    flag, processor = (kept["My name is", way] for way in ("eta_cutoff=", "EtaLogitsProcessor"))
    assert flag <= 50 < processor  # the tiny model's distribution is flat
