"""`hf-longtrunc pack` on files of every kind."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command_line import invoke


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


def test_check_packed_takes_the_folder_that_pack_wrote(corpus, model_folder, tmp_path):
    packed = tmp_path / "packed"
    options = ("--seq-length", "64", "--output-dir", packed)
    assert invoke("pack", corpus["parquet"], *options).exit_code == 0
    found = [invoke("check-packed", model_folder, "--rows", rows, "--json") for rows in (packed, packed / "dataset")]
    assert [result.exit_code for result in found] == [0, 0], found[0].output
    assert found[0].stdout == found[1].stdout
    missing = invoke("check-packed", model_folder, "--rows", tmp_path / "pakced", columns=None)
    assert missing.exit_code == 2
    assert "no such file or folder: " in missing.stderr


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
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_pack_of_unlike_or_missing_files(corpus):
    result = invoke("pack", corpus["jsonl"], corpus["txt"])
    assert result.exit_code == 2
    assert "files must be of one kind out of .jsonl" in " ".join(result.output.split())
    assert invoke("pack", "nowhere.jsonl").exit_code == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pack_in_processes_with_few_columns_of_compressed_files_and_patterns(corpus, model_folder, tmp_path):
    texts = tmp_path / "corpus.jsonl"
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(texts.read_bytes()))
    options = ("--tokenizer", model_folder, "--seq-length", "64", "--min-piece", "1")
    small = ("--num-proc", "2", "--dtype", "int32", "--columns", "input_ids")

    def rows(name, *files):
        result = invoke("pack", *files, "--output-dir", str(tmp_path / name))
        assert result.exit_code == 0, result.output
        return datasets.load_from_disk(str(tmp_path / name / "dataset"))

    plain = rows("plain", str(texts), *options)
    packed = rows("compressed", str(tmp_path / "*.jsonl.gz"), *options, *small)
    assert packed["input_ids"] == plain["input_ids"]
    assert packed.column_names == ["input_ids", "position_ids", "seq_lengths"]
    assert packed.features["input_ids"].feature.dtype == "int32"
    many = pq.read_table(tmp_path / "corpus.parquet")
    for part in ("a", "b"):
        pq.write_table(many, tmp_path / f"{part}.parquet")
    assert sum(map(len, rows("parquet", str(tmp_path / "[ab].parquet"), *options)["input_ids"])) == 2 * 29 * 20
    assert "no such file" in invoke("pack", str(tmp_path / "none*.parquet")).output
