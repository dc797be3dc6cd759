"""`hf-longtrunc demo` on a tiny model."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.cli.demo_long import past_the_window, read_and_answer
from hf_longtrunc.cli.demo_parts import bat_part, sampling_part
from hf_longtrunc.evaluation import PerplexityRecord, read_records
from tests.command_line import invoke


def test_demo_shows_samplers_packing_and_a_text_past_the_window(model_folder, tmp_path):
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
        "perplexity by position",
        "what the model answered",
        "cache, MiB",
    ):
        assert part in result.output
    for picture in ("sampling.png", "packing.png", "perplexity.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "sampling.html") in result.stderr
    assert "eta 0.002" in (tmp_path / "sampling.html").read_text(encoding="utf-8")
    last = result.output[result.output.index("What you saw") :]
    for said in ("Plain sampling drew", "Packing cut", "the unmodified model answered", "Next", "hf-longtrunc chat"):
        assert said in last


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
    assert "BAT 0.03" in (tmp_path / "bat.html").read_text(encoding="utf-8")


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


def test_the_long_part_needs_no_text(tiny_folder, tmp_path):
    """Losses and answers are those of one forward over the whole text, unmodified and patched; a ring is smaller."""
    model, tokenizer = load_pretrained(tiny_folder)
    console = Console(file=io.StringIO(), width=120)
    shown = past_the_window(model, tokenizer, tmp_path, tokens=150, console=console)
    assert "LM-Infinite" in console.file.getvalue()
    assert "128-256" in console.file.getvalue()
    assert len(read_records(tmp_path / "perplexity.jsonl", PerplexityRecord)) == len(shown["records"])
    assert (tmp_path / "perplexity.png").exists()
    assert shown["LM-Infinite"]["cache bytes"] < shown["unmodified"]["cache bytes"]


def test_what_is_read_by_chunks_is_what_is_read_at_once(tiny_folder):
    model, tokenizer = load_pretrained(tiny_folder)
    ids = torch.randint(5, 50, (70,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), LMInfinite(num_sink_tokens=2, window_length=16)(model):
        reading = read_and_answer(model, tokenizer, ids, "patched", chunk=13, most=5)
        logits = model(ids[None], use_cache=False).logits[0].float()
        answer = model.generate(ids[None], max_new_tokens=5, do_sample=False)[0, 70:]
    torch.testing.assert_close(
        reading.losses, torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    )
    assert tokenizer.decode(answer, skip_special_tokens=True).strip().startswith(reading.answer)


def test_the_demo_as_json(model_folder, tmp_path):
    options = ["--model", model_folder, "--max-new-tokens", "5", "--output-dir", tmp_path, "--json"]
    result = invoke("demo", "sampling", "packing", *options)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert list(shown) == ["sampling", "packing"]
    assert [run["sampler"] for run in shown["sampling"]] == ["plain", "top-p 0.9", "eta 0.002"]
    assert shown["packing"]["difference from alone"] < 1e-3


class Bracketing:
    """A tokenizer whose every token reads like the end of a style that rich knows nothing of."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def decode(self, ids, **kwargs):
        return "[/b]" * len(ids)


@pytest.mark.parametrize("part", [sampling_part, bat_part])
def test_texts_with_square_brackets_are_shown_as_they_are(model_folder, tmp_path, part):
    model, tokenizer = load_pretrained(model_folder)
    console = Console(record=True, width=200, file=io.StringIO())
    part(model, Bracketing(tokenizer), tmp_path / "[/i]", prompt="[/u] a", max_new_tokens=3, console=console)
    output = console.export_text()
    assert "[/b][/b][/b]" in output
    assert ("[/u] a" in output) == (part is sampling_part)
