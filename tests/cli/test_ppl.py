"""`hf-longtrunc ppl` on a tiny model."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from itertools import cycle

import pytest
import torch

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.cli.ppl import read_tokens
from hf_longtrunc.evaluation import PerplexityRecord, compare_losses, perplexity_by_position, read_records
from tests.command_line import invoke


@pytest.fixture
def long_text(prose):
    return "".join(f"Chapter {number}. {prose}" for number in range(40))


def test_ppl_compares_both_arms_on_the_tokens_of_a_file(tiny_folder, long_text, tmp_path):
    (tmp_path / "text.txt").write_text(long_text, encoding="utf-8")
    options = ["--model", tiny_folder, "--tokens", 300, "--skip", 20, "--window", 48, "--sinks", 2, "--chunk", 50]
    result = invoke("ppl", tmp_path / "text.txt", *options, "--output-dir", tmp_path / "out")
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


def test_ppl_reads_standard_input(tiny_folder, long_text):
    result = invoke("ppl", "-", "--model", tiny_folder, "--tokens", 70, input=long_text)
    assert result.exit_code == 0, result.output
    assert "70 tokens" in result.output


def test_ppl_says_when_there_is_no_text(tiny_folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    result = invoke("ppl", tmp_path / "empty.txt", "--model", tiny_folder)
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
def test_ppl_says_what_is_wrong(tiny_folder, options, says):
    result = invoke("ppl", "--model", tiny_folder, *options, input="some words of text")
    assert result.exit_code == 2
    assert says in result.output


def test_ppl_refuses_a_model_that_cannot_be_patched_before_it_reads(tiny_gpt2, tokenizer, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = invoke("ppl", "-", "--model", tmp_path, input="some words of text")
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
    ids = read_tokens(stream, tokenizer, 500)
    assert ids.tolist() == tokenizer(prose * 50, verbose=False).input_ids[:500]
    assert stream.given < 8000
    assert len(read_tokens(io.StringIO("a few words"), tokenizer, 500)) == len(tokenizer("a few words").input_ids)


def test_a_pipe_gets_the_table_alone_and_unwrapped(tiny_folder, long_text, tmp_path):
    (tmp_path / "text.txt").write_text(long_text, encoding="utf-8")
    options = ["--model", tiny_folder, "--tokens", 2000, "--output-dir", tmp_path / "out"]
    result = invoke("ppl", tmp_path / "text.txt", *options, columns=None)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if "unmodified" in line]
    assert len(rows) == 1
    assert len(rows[0]) > 80
    assert "perplexity.png" not in result.stdout
    assert "perplexity.png" in result.stderr


def test_json_holds_the_records(tiny_folder, long_text, tmp_path):
    (tmp_path / "text.txt").write_text(long_text, encoding="utf-8")
    result = invoke("ppl", tmp_path / "text.txt", "--model", tiny_folder, "--tokens", 100, "--json")
    records = [PerplexityRecord(**record) for record in json.loads(result.stdout)]
    assert [record.arm for record in records] == ["unmodified"] * 5 + ["LM-Infinite"] * 5
    assert [record.start for record in records[:5]] == [0, 32, 64, 80, 96]
