"""Rows written out: the same rows whatever writes them, whole or not at all; plans saved, and read by others."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import Subset

from hf_longtrunc import BestFitPackingCollator, PackedDataset, Packing, best_fit_decreasing, pack
from hf_longtrunc.data import writing
from hf_longtrunc.data.documents import IGNORE
from tests.data.corpora import raw_examples
from tests.data.test_dataset import KINDS, SEQ_LENGTH, Tokenizer, arrow, documents_of, expected

COLUMNS = ["input_ids", "position_ids", "labels", "seq_lengths"]


class BigEos(Tokenizer):
    eos_token_id = 70_000


def rows_of(dataset):
    return [{name: np.asarray(row[name]).tolist() for name in COLUMNS[:3]} for row in dataset]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [None, Tokenizer()], ids=["as they are", "eos"])
def test_rows_written_are_the_rows(kind, tokenizer, tmp_path):
    packed = pack(KINDS[kind](arrow()), SEQ_LENGTH, tokenizer, min_piece=1, row_multiple=8)
    written = packed.materialize(tmp_path)
    assert written.column_names == COLUMNS
    assert rows_of(written) == rows_of(packed)
    assert [sum(row) for row in written["seq_lengths"]] == [len(row["input_ids"]) for row in packed]
    assert rows_of(datasets.load_from_disk(tmp_path)) == rows_of(packed)


def test_labels_and_masks_are_written(tmp_path):
    documents = arrow([5, 60, 9], completion_mask=[[0, 1, 1, 1, 0], [1] * 60, [0] * 9])
    packed = pack(documents, SEQ_LENGTH, Tokenizer())
    assert rows_of(packed.materialize(tmp_path)) == rows_of(packed)
    with pytest.raises(ValueError, match="columns must have labels: the documents have completion_mask"):
        packed.materialize(tmp_path, columns=["input_ids", "seq_lengths"])


def test_labels_that_only_later_rows_have_are_not_lost(tmp_path):
    packed = pack([{"input_ids": [5, 6]}, {"input_ids": [7, 8], "labels": [IGNORE, IGNORE]}], 4)
    assert rows_of(packed.materialize(tmp_path)) == rows_of(packed)
    with pytest.raises(ValueError, match="labels cannot be left out: some documents have labels or masks"):
        packed.materialize(tmp_path, columns=["input_ids", "seq_lengths"])


def test_an_empty_document_and_a_negative_token(tmp_path):
    dataset = datasets.Dataset.from_dict({"input_ids": [[], [5, 6], None, [7]]})
    packed = pack(dataset, 4, Tokenizer(), min_piece=1)
    assert rows_of(packed.materialize(tmp_path)) == rows_of(packed)
    bad = pack(datasets.Dataset.from_dict({"input_ids": [[5, 6], [5, -6]]}), 4)
    with pytest.raises(ValueError, match="row 1: 'input_ids' holds -6"):
        bad.materialize(tmp_path)
    assert rows_of(datasets.load_from_disk(tmp_path)) == rows_of(packed)  # the old rows, whole
    assert len(list(tmp_path.glob("*.arrow"))) == 1


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "uint32", "uint64", "int64"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_tokens_of_any_integers_and_an_eos_beyond_them(kind, dtype, tmp_path):
    """Chunks of the table, a view that reorders them, missing lists, and an EOS too large for the column."""
    rng = np.random.default_rng(0)
    parts = [
        [None if n % 7 == 3 else rng.integers(3, 120, n).tolist() for n in rng.integers(0, 30, size)]
        for size in (5, 40, 9)
    ]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value(kind))})
    documents = datasets.concatenate_datasets([datasets.Dataset.from_dict({"input_ids": p}, features) for p in parts])
    packed = pack(documents.shuffle(seed=1), 16, BigEos(), min_piece=1, row_multiple=8)
    assert rows_of(packed.materialize(tmp_path, dtype=dtype)) == rows_of(packed)


@pytest.mark.parametrize("num_proc", [2, 3])
def test_processes_write_the_same_rows(num_proc, tmp_path):
    packed = pack(arrow(), SEQ_LENGTH)
    written = packed.materialize(tmp_path, num_proc=num_proc)
    assert rows_of(written) == rows_of(packed)
    assert len(list(tmp_path.glob("data-*.arrow"))) == num_proc
    few = pack(arrow([5]), SEQ_LENGTH).materialize(tmp_path, num_proc=num_proc)
    assert len(few) == len(list(tmp_path.glob("data-*.arrow"))) == 1


def test_half_the_bytes_and_a_third(tmp_path):
    packed = pack(arrow([500] * 40), SEQ_LENGTH)
    small = packed.materialize(tmp_path / "small", dtype="int32", columns=["input_ids", "seq_lengths"])
    assert small.features["input_ids"].feature.dtype == "int32"
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.arrow"))
    assert size < 8.4 * packed.stats()["tokens"]
    collate = BestFitPackingCollator(SEQ_LENGTH)
    ours, theirs = collate([small[i] for i in range(5)]), collate([packed[i] for i in range(5)])
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    large = pack(datasets.Dataset.from_dict({"input_ids": [[5, 2**31]]}), 4)
    with pytest.raises(ValueError, match=r'token 2147483648 is more than int32 holds; pass dtype="int64"'):
        large.materialize(tmp_path / "large", dtype="int32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of 'int64', 'int32'"),
        ({"num_proc": 0}, "num_proc must be a whole number"),
        ({"columns": ["text"]}, "columns must be one of"),
        ({"columns": ["seq_lengths"]}, "columns must have input_ids, got seq_lengths"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pack(arrow(), SEQ_LENGTH).materialize(tmp_path, **options)


def test_interrupted_before_any_of_its_last_steps_the_old_rows_stay(tmp_path, monkeypatch):
    """Every rename, the writing of every small file: the one that fails leaves the rows of before."""
    old, new = pack(arrow([5, 60]), SEQ_LENGTH), pack(arrow([9, 50, 3]), SEQ_LENGTH)
    old.materialize(tmp_path)
    replace, write = os.replace, Path.write_text
    for step in range(6):
        count = iter(range(100))

        def failing(original, *arguments, count=count, step=step, **options):
            if next(count) == step:
                raise OSError("the disk is full")
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *a, **k: failing(replace, *a, **k))
            patch.setattr(Path, "write_text", lambda *a, **k: failing(write, *a, **k))
            if step < 5:
                with pytest.raises(OSError, match="the disk is full"):
                    new.materialize(tmp_path)
                assert rows_of(datasets.load_from_disk(tmp_path)) == rows_of(old)
            else:
                assert rows_of(new.materialize(tmp_path)) == rows_of(new)
            assert len(list(tmp_path.iterdir())) == 3


def test_of_two_who_write_at_once_the_rows_of_the_second_stay(tmp_path, monkeypatch):
    one, other = pack(arrow([5, 60]), SEQ_LENGTH), pack(arrow([9, 50, 3]), SEQ_LENGTH)
    one.materialize(tmp_path)
    run = writing._run

    def meanwhile(*arguments):
        monkeypatch.undo()
        assert rows_of(other.materialize(tmp_path)) == rows_of(other)
        return run(*arguments)

    monkeypatch.setattr(writing, "_run", meanwhile)
    assert rows_of(one.materialize(tmp_path)) == rows_of(one)
    assert len(list(tmp_path.iterdir())) == 3


def test_threads_that_write_into_one_folder_wait_for_one_another(tmp_path):
    packed = [pack(arrow([5 + n, 60]), SEQ_LENGTH) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda each: [rows_of(each.materialize(tmp_path)) for _ in range(5)], packed))
    assert written == [[rows_of(each)] * 5 for each in packed]
    assert rows_of(datasets.load_from_disk(tmp_path)) in [rows_of(each) for each in packed]
    assert len(list(tmp_path.iterdir())) == 3


def test_without_locks_rows_of_another_process_are_not_returned(tmp_path, monkeypatch):
    one, other = pack(arrow([5, 60]), SEQ_LENGTH), pack(arrow([9, 50, 3]), SEQ_LENGTH)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    load = datasets.load_from_disk

    def meanwhile(folder):
        monkeypatch.setattr(datasets, "load_from_disk", load)
        other.materialize(tmp_path)
        return load(folder)

    monkeypatch.setattr(datasets, "load_from_disk", meanwhile)
    with pytest.raises(FileExistsError, match=r"another process wrote its rows into .* meanwhile"):
        one.materialize(tmp_path)
    assert rows_of(load(tmp_path)) == rows_of(other)


def test_the_next_writing_removes_what_a_killed_process_left(tmp_path, monkeypatch):
    """A data file that was renamed but not named in state.json; one that has not got its name for a day."""
    packed = pack(arrow([5]), SEQ_LENGTH)
    (tmp_path / "data-0123abcd-00000-of-00001.arrow").write_text("begun")
    (tmp_path / "data-train.arrow").write_text("another's")
    for name in (".partial-killed", ".partial-running"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".partial-killed", (0, 0))
    packed.materialize(tmp_path)
    assert {path.name for path in tmp_path.glob(".*")} == {".partial-running"}
    assert len(list(tmp_path.glob("data-*"))) == 2  # the rows, another's
    monkeypatch.setattr(writing, "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed.materialize(tmp_path)
    assert rows_of(datasets.load_from_disk(tmp_path)) == rows_of(packed)
    assert len(list(tmp_path.iterdir())) == 5  # two json files, the rows, another's, the running one's


def test_rows_replace_a_dataset_that_datasets_saved(tmp_path):
    arrow().save_to_disk(tmp_path)
    packed = pack(arrow([5, 60]), SEQ_LENGTH)
    assert rows_of(packed.materialize(tmp_path)) == rows_of(packed)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", ["documents", "a view", "a transform", "a link", "a subset"])
def test_rows_do_not_take_the_place_of_their_own_documents(kind, tmp_path):
    arrow().save_to_disk(tmp_path / "corpus")
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    dataset = datasets.load_from_disk(tmp_path / ("link" if kind == "a link" else "corpus"))
    dataset = dataset.select([3, 1]) if kind == "a view" else dataset
    dataset = dataset.with_transform(dict) if kind == "a transform" else dataset
    packed = pack(Subset(dataset, [3, 1]) if kind == "a subset" else dataset, SEQ_LENGTH)
    for folder in ("corpus", "link"):
        with pytest.raises(ValueError, match="folder must not be that of the documents"):
            packed.materialize(tmp_path / folder)
    assert datasets.load_from_disk(tmp_path / "corpus")["input_ids"] == arrow()["input_ids"]
    assert rows_of(packed.materialize(tmp_path / "corpus" / "rows")) == rows_of(packed)


def test_rows_do_not_hide_splits(tmp_path):
    datasets.DatasetDict({"train": arrow(), "test": arrow([5])}).save_to_disk(tmp_path)
    packed = pack(datasets.load_from_disk(tmp_path), SEQ_LENGTH)
    with pytest.raises(ValueError, match="holds splits, which the rows would hide"):
        packed["train"].materialize(tmp_path)
    with pytest.raises(ValueError, match="folder must not be that of the documents"):
        packed["train"].materialize(tmp_path / "train")
    assert datasets.load_from_disk(tmp_path).num_rows == {"train": 83, "test": 1}


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_is_saved_and_read_by_another_process(tmp_path):
    dataset = arrow()
    packed = pack(dataset, SEQ_LENGTH, Tokenizer(), seed=3)
    packed.packing.save_pretrained(tmp_path)
    plan = Packing.from_pretrained(tmp_path)
    assert plan.seq_length == SEQ_LENGTH
    assert plan.stats() == packed.stats()
    again = PackedDataset(dataset, plan, tokenizer=Tokenizer(), seed=3)
    assert rows_of(again) == rows_of(packed)
    with pytest.raises(ValueError, match="read-only"):
        plan.items[0] = 1


def test_a_plan_of_best_fit_decreasing_is_a_plan():
    lengths = [len(ids) for ids in arrow()["input_ids"]]
    packed = PackedDataset(arrow(), best_fit_decreasing(lengths, SEQ_LENGTH, min_piece=1), row_multiple=8)
    assert len(packed) % 8 == 0
    assert documents_of(packed) == expected()


def test_a_damaged_plan_is_refused(tmp_path):
    pack(arrow(), SEQ_LENGTH).packing.save_pretrained(tmp_path)
    path = tmp_path / "packing_plan.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        Packing.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no saved packing_plan"):
        Packing.from_pretrained(tmp_path / "elsewhere")


def test_a_plan_for_other_documents_is_refused():
    plan = pack(arrow(), SEQ_LENGTH).packing
    with pytest.raises(ValueError, match=r"made for 83 documents, the dataset has 2"):
        PackedDataset(arrow([4, 5]), plan)
    with pytest.raises(ValueError, match=r"made for other documents: 83 have another length.*Were the EOS"):
        PackedDataset(arrow(), plan, tokenizer=Tokenizer())
    others = PackedDataset(raw_examples([5] * 83), plan)
    with pytest.raises(ValueError, match=r"document \d+ has 5 tokens and the plan counted on \d+"):
        list(others)
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer"):
        PackedDataset(arrow(), plan, tokenizer="gpt2")


def test_shards():
    packed = pack(arrow(), SEQ_LENGTH, min_piece=1)
    shards = [packed.shard(np.int64(index), 3) for index in range(3)]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert sum((documents_of(shard) for shard in shards), start=documents_of([])) == expected()
    assert rows_of(shards[1]) == rows_of(packed)[1::3]
    for index, count in ((3, 3), (-1, 3), (0, 0), (True, 2), (0, 1.5)):
        with pytest.raises((TypeError, ValueError), match="must be a whole number"):
            packed.shard(index, count)


def test_labels_of_written_rows_begin_no_document(tmp_path):
    written = pack(arrow(), SEQ_LENGTH).materialize(tmp_path)
    for row in written:
        firsts = np.cumsum([0, *row["seq_lengths"][:-1]])
        assert [row["labels"][first] for first in firsts] == [IGNORE] * len(firsts)
