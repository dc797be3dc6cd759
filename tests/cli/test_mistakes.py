"""What users get wrong on the command line: one line on stderr that says what to do, exit code 2, no traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from tests.command_line import invoke, letter_tokenizer
from tests.cross_attention.seq2seq_models import tiny_seq2seq

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_folder):
    """Name -> path of everything that the table below speaks of; `{out}` is a folder that does not exist."""
    folder = tmp_path_factory.mktemp("places")
    files = {
        "text": b"the keeper had not spoken to anyone",
        "empty": b"",
        "blank": b" \n ",
        "letter": b"a",
        "latin": "the caf\xe9 by the harbour".encode("latin1"),
        "utf16": "the caf\xe9".encode("utf-16"),
        "utf16le": "the keeper".encode("utf-16-le"),
        "utf32": "the keeper".encode("utf-32"),
        "png": b"\x89PNG\r\n\x1a\n\0\0",
        "numbers.jsonl": b'{"text": 3}\n',
        "negative.jsonl": b'{"input_ids": [-1, 2]}\n',
        "null.jsonl": b'{"text": null}\n{"text": null}\n',
        "nulls.jsonl": b'{"text": "one"}\n{"text": null}\n',
        "prose.jsonl": b'{"text": "one two"}\n',
        "broken.jsonl": b'{"text": "one"}\n{"text": \n',
        "mixed.jsonl": b'{"text": "one"}\n{"text": 2}\n{"text": null}\n',
        "scalar.jsonl": b"1\n2\n",
        "empty.jsonl": b"",
        "latin.jsonl": '{"text": "caf\xe9"}\n'.encode("latin1"),
        "prose.csv": b"text\none\n",
        "file": b"",
        "scrolls.jsonl": b'{"id": "a", "input": "q\\n\\ntext", "output": "x"}\nno row\n',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "taken").mkdir()
    for name in ("perplexity.png", "sampling.png", "match.png", "packing.png", "qasper_unmodified_metrics.json"):
        (folder / "taken" / name).touch()
    (folder / "taken" / "qasper.jsonl").write_text('{"task": "qasper"')
    letter_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], LETTERS).save_pretrained(folder / "bart")
    tiny_seq2seq().float().save_pretrained(folder / "bart")
    (folder / "nothing").mkdir()
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    (folder / "garbage").mkdir()
    (folder / "garbage" / "config.json").write_text("{")
    return {"model": model_folder, "out": folder / "out", "folder": folder} | {
        path.name: path for path in folder.iterdir()
    }


MISTAKES = {  # command line -> a part of the line that is said; {name} is one of the places
    "nonsense": "No such command 'nonsense'",
    "--colour": "No such option: --colour",
    "ask {text}": "Missing argument 'questions'",
    "ask {folder}/missing.txt why?": "no such file: ",
    "ask {folder} why?": "is a folder, expected a text file",
    "ask {blank} why?": "the text is empty",
    "ask {latin} why?": "latin is no UTF-8 text",
    "ask {text} why? --count 0": "--count",
    "ask {text} why? --guidance inf": "--guidance",
    "ask {text} why? --max-new-tokens 99999999999999999999": "less than or equal to 2147483647",
    "ask {text} why? --prompt {folder}/missing": "--prompt: no such file: ",
    "ask {text} why? --index {file} --finder bm25 --model {model}": "--index: ",
    "ask {utf32} why?": "utf32 is no UTF-8 text (it is UTF-32); convert it, e.g. with iconv -f utf-32",
    "ask {png} why?": "png is no text but a binary file",
    "demo past-window --text {empty} --output-dir {out}": "--text: the text is empty",
    "check-packed {model} --rows {empty.jsonl}": "empty.jsonl is empty, or no json",
    "check-packed {model} --rows {latin.jsonl}": "latin.jsonl holds no packed rows",
    "scrolls qasper --data {latin} --output-dir {out}": "latin is no UTF-8 text: ",
    "match {text} --picture {out}.nope --model {model}": "expected a .png, .svg or .pdf file",
    "pack {numbers.jsonl} --tokenizer {model} --output-dir {out}": "numbers.jsonl, line 1: expected a JSON object",
    "ask {text} why? --dtype int8": "'int8' is not one of",
    "ask {text} why? --model ./missing": "there is no folder './missing'",
    "chat --model /no/such/folder": "there is no folder '/no/such/folder'",
    "export ./missing {out}": "there is no folder './missing'",
    "export {model} {out} --technique dual-chunk --window 9": "--window: goes with --technique lm-infinite",
    "export {model} {out} --technique streaming-llm --retrieval for-chat": "for-chat does not go with --technique",
    "export {model} {out} --finder bm25": "--finder: goes with --retrieval passages",
    "export {model} {taken}": "exists and is not empty",
    "verify {folder}": "is no exported folder",
    "serve {folder}": "is no exported folder",
    "check-packed {model} --seq-length 3": "--seq-length",
    "check-packed {model} --rows {text}": "rows are a folder, jsonl, json or parquet",
    "ppl {text} --model {model} --device warp": "--device: cannot be used here, got warp: ",
    "pack {prose.jsonl} --tokenizer {model} --columns colour": "'colour' is not one of",
    "ask {text} why? --model {model} --device warp": "--device: cannot be used here, got warp: ",
    "ask {text} why? --model {model} --device cuda:99": "--device: cannot be used here, got cuda:99: ",
    "ask {text} why? --finder magic": "--finder",
    "ask {text} why? --also {text}": "a text is named twice",
    "ask {text} why? --also {folder}/missing.txt": "no such file: ",
    "ask {text} why? --prompt {text}": "prompt must hold {passages} once, got it 0 times",
    "ask {text} why? --model {nothing}": "could not load",
    "ask {text} why? --model {bart}": "this command needs a causal LM, and this is an encoder-decoder",
    "chat --window 0": "--window",
    "chat --status-every 0": "--status-every",
    "chat --sampler etta": "name must be one of eta, ",
    "chat --model {nothing}": "could not load",
    "chat --model {bart}": "this command needs a causal LM, and this is an encoder-decoder",
    "ppl {text} --tokens 99999999999999999999999 --model {model}": "a number is too large: ",
    "ppl {text} --window 99999999999999999999999 --model {model}": "less than or equal to 2147483647",
    "ppl {folder}/missing.txt": "no such file: ",
    "ppl {folder}": "is a folder, expected a text file",
    "ppl {text} --window 0": "--window",
    "ppl {text} --sinks=-1": "--sinks",
    "ppl {text} --tokens many": "'--tokens': Input should be a valid integer",
    "ppl {empty} --model {model}": "at least 2 tokens are needed, the text has 0",
    "ppl {latin} --model {model}": "latin is no UTF-8 text",
    "ppl {utf16} --model {model}": "utf16 is no UTF-8 text (it is UTF-16); convert it, e.g. with iconv -f utf-16",
    "ppl {utf16le} --model {model}": "utf16le holds NUL characters, as UTF-16 does; convert it, e.g. with iconv",
    "ppl {text} --model {nothing}": "could not load",
    "ppl {text} --model {unknown}": "could not load",
    "ppl {text} --model {garbage}": "could not load",
    "ppl {text} --model {bart}": "this command needs a causal LM, and this is an encoder-decoder",
    "ppl {text} --output-dir {file}": "file is a file, expected a folder",
    "ppl {text} --output-dir {file}/deeper": "file is a file, expected a folder",
    "ppl {text} --output-dir {taken}": "would be overwritten: name another --output-dir, or pass --force",
    "ppl {text} --output-dir /proc/nowhere": "/proc cannot be written to: ",
    "match typo.txt": "no such file: typo.txt",
    "match": "name a file, or give the text itself by --string",
    "match {text} --string both": "name a file, or give the text itself by --string",
    "match {letter} --model {model}": "a share of 10% needs a text of at least 11 tokens, got 1",
    "match --string abcdefgh --rank 3 --picture {out}.png --model {model}": "a share of 10% needs a text of at least",
    "match {text} --rank=-1": "--rank",
    "match {text} --rank 400 --model {model} --picture {out}.png": "rank must",
    "match {latin} --picture {out}.png --model {model}": "latin is no UTF-8 text",
    "match {text} --picture {taken}/match.png": "would be overwritten: name another --picture, or pass --force",
    "match {text} --model {bart}": "this command needs a causal LM",
    "demo nothing": "'nothing' is not one of",
    "demo --epsilon 1.5": "must lie in (0, 1), got 1.5",
    "demo --top-p 0": "must lie in (0, 1], got 0.0",
    "demo --max-new-tokens 0": "--max-new-tokens",
    "demo sampling --output-dir {taken}": "sampling.png would be overwritten",
    "demo --prompt=": "--prompt",
    "demo past-window --text {folder}/missing.txt --output-dir {out}": "no such file: ",
    "demo --model {bart} --output-dir {out}": "this command needs a causal LM",
    "summarize {text}": "Missing option '--model'",
    "summarize {text} --model {model}": "this command needs an encoder-decoder, and this is a causal LM",
    "summarize {blank} --model {bart}": "the text is empty",
    "summarize {latin} --model {bart}": "latin is no UTF-8 text",
    "summarize {text} --model {bart} --window 65": "window must be at most 64",
    "summarize {text} --model {bart} --index Flat": "index must begin with 'faiss:'",
    "pack {folder}/missing.jsonl": "no such file: ",
    "pack {empty.jsonl} --tokenizer {model} --output-dir {out}": "empty.jsonl is empty",
    "pack {broken.jsonl} --tokenizer {model} --output-dir {out}": "broken.jsonl, line 2: expected a JSON object",
    "pack {scalar.jsonl} --tokenizer {model} --output-dir {out}": "scalar.jsonl, line 1: expected a JSON object",
    "pack {mixed.jsonl} --tokenizer {model} --output-dir {out}": "line 2: expected a JSON object with text in 'text'",
    "pack {null.jsonl} --tokenizer {model} --output-dir {out}": "null.jsonl, line 1: expected a JSON object with text",
    "pack {nulls.jsonl} --tokenizer {model} --output-dir {out}": "nulls.jsonl, line 2: expected a JSON object",
    "pack {latin.jsonl} --tokenizer {model} --output-dir {out}": "latin.jsonl is no UTF-8 text",
    "pack {prose.csv} --output-dir {out}": "files must be of one kind out of .jsonl",
    "pack {prose.jsonl} --output-dir {out}": "name a tokenizer with --tokenizer",
    "pack {prose.jsonl} --column body --output-dir {out}": "no column 'body'",
    "pack {prose.jsonl} --tokenizer {nothing} --output-dir {out}": "could not load",
    "pack {prose.jsonl} --output-dir {taken}": "packing.png would be overwritten",
    "pack {prose.jsonl} --long sometimes": "'sometimes' is not one of",
    "scrolls squad": "'squad' is not one of",
    "scrolls qasper --data {folder}/missing --output-dir {out}": "there is no ",
    "scrolls qasper --data {scrolls.jsonl} --output-dir {out}": "scrolls.jsonl, line 2: expected a JSON object",
    "scrolls qasper --data {empty} --output-dir {out}": "holds no example",
    "scrolls qasper --output-dir {taken}": "qasper_unmodified_metrics.json would be overwritten",
    "lm-eval": "Missing argument 'tasks'",
    "lm-eval niah_single_1 --lengths long": "expected whole numbers of at least 1 with commas between, got 'long'",
    "lm-eval niah_single_1 --output-dir {file}": "file is a file, expected a folder",
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(line, places):
    words = [word if "{" not in word else _filled(word, places) for word in line.split()]
    result = invoke(*words, columns=None)
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("hf-longtrunc")
    assert ": error: " in said[0]
    assert MISTAKES[line] in said[0]
    assert result.stdout == ""
    assert not places["out"].exists()


def _filled(word, places):
    name = word[word.index("{") + 1 : word.index("}")]
    return word.replace("{" + name + "}", str(places[name]))


def test_a_broken_journal_is_named_before_anything_is_predicted(places, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "input": "q\\n\\ntext", "output": "x"}\n')
    options = ["--model", places["model"], "--output-dir", places["taken"], "--force", "--max-new-tokens", 1]
    result = invoke("scrolls", "qasper", "--data", rows, *options, columns=None)
    assert result.exit_code == 2
    assert "qasper.jsonl, line 1: expected a JSON object" in result.stderr.splitlines()[-1]


def test_rows_that_cannot_be_written_leave_no_picture(places, tmp_path):
    result = invoke("pack", places["negative.jsonl"], "--output-dir", tmp_path / "packed", columns=None)
    assert result.exit_code == 2
    assert "a token id is never negative" in result.stderr
    assert not (tmp_path / "packed" / "packing.png").exists()


def test_traceback_shows_where_an_error_was_raised(places):
    result = invoke("--traceback", "pack", places["empty.jsonl"], "--output-dir", places["out"])
    assert isinstance(result.exception, ValueError)
    assert "empty.jsonl is empty" in str(result.exception)


def test_a_reader_that_leaves_ends_the_command_quietly(places, monkeypatch):
    """As `| head` does: the pipe's reader is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hf_longtrunc", "--version"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")

    def write_into_nothing(path):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("hf_longtrunc.cli.common.read_text", write_into_nothing)
    result = invoke("match", places["text"])
    assert (result.exit_code, result.stderr) == (1, "")
