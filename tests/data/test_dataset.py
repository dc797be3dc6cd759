"""The index view: every token of every kind of dataset once, nothing rewritten, nothing lost silently."""

from __future__ import annotations

import logging
import pickle
import sys
import warnings
from collections import Counter
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from hf_longtrunc import BestFitPackingCollator, PackedDataset, pack, packing_table, plot_packing
from tests.data.corpora import raw_examples, token_lists

LENGTHS = [*np.random.default_rng(3).integers(2, 60, 80).tolist(), 150, 64, 65]
SEQ_LENGTH = 64
EOS = 2


class Tokenizer:
    pad_token_id = 0
    eos_token_id = EOS
    model_max_length = 10**30


def arrow(lengths=LENGTHS, **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": token_lists(lengths), **columns})


def documents_of(rows) -> Counter:
    """Documents put together again from their pieces: those shorter than a row as they are, full pieces one by one."""
    found = Counter()
    for row in rows:
        starts = [*np.flatnonzero(np.asarray(row["position_ids"]) == 0), len(row["input_ids"])]
        for start, end in pairwise(starts):
            found[tuple(np.asarray(row["input_ids"][start:end]).tolist())] += 1
    return found


def expected(lengths=LENGTHS, eos=None) -> Counter:
    documents = [tokens + ([] if eos is None else [eos]) for tokens in token_lists(lengths)]
    return Counter(tuple(tokens[i : i + SEQ_LENGTH]) for tokens in documents for i in range(0, len(tokens), SEQ_LENGTH))


def chunked(dataset: datasets.Dataset) -> datasets.Dataset:
    return datasets.concatenate_datasets([dataset.select(range(30)), dataset.select(range(30, len(dataset)))])


KINDS = {
    "arrow": lambda d: d,
    "chunks": chunked,
    "shuffled": lambda d: d.shuffle(seed=1),
    "selected out of a larger one": lambda d: chunked(datasets.concatenate_datasets([d, d])).select(range(len(d))),
    "reversed by index": lambda d: d.select(range(len(d) - 1, -1, -1)),
    "torch format": lambda d: d.with_format("torch"),
    "numpy format": lambda d: d.with_format("numpy"),
    "large_list": lambda d: d.cast(datasets.Features(input_ids=datasets.LargeList(datasets.Value("int64")))),
    "int32": lambda d: d.cast(datasets.Features(input_ids=datasets.List(datasets.Value("int32")))),
    "uint16": lambda d: d.cast(datasets.Features(input_ids=datasets.List(datasets.Value("uint16")))),
    "list of rows": lambda d: d.to_list(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [None, Tokenizer()], ids=["as they are", "eos"])
def test_every_token_once_from_any_kind_of_dataset(kind, tokenizer):
    packed = pack(KINDS[kind](arrow()), SEQ_LENGTH, tokenizer, min_piece=1)
    assert documents_of(packed) == expected(eos=tokenizer and EOS)
    assert all(len(row["input_ids"]) <= SEQ_LENGTH for row in packed)


def test_a_dataset_on_disk_is_read_where_it_lies(tmp_path):
    arrow().save_to_disk(tmp_path, num_shards=3)
    packed = pack(datasets.load_from_disk(tmp_path), SEQ_LENGTH, min_piece=1)
    assert documents_of(packed) == expected()
    assert len(pickle.dumps(packed)) < 20_000  # indices and the path
    assert documents_of(pickle.loads(pickle.dumps(packed))) == expected()


def test_tokens_are_a_view_of_arrows_own_memory():
    dataset = arrow()
    table = dataset.data
    packed = pack(dataset, SEQ_LENGTH, min_piece=1)
    values = packed._documents._lists["input_ids"]._chunks[0][0]
    assert values.__array_interface__["data"][0] == table.column("input_ids").chunk(0).values.buffers()[1].address


def test_rows_come_in_an_order_of_the_seed():
    one, again, other, plain = (pack(arrow(), SEQ_LENGTH, seed=seed) for seed in (1, 1, 2, None))
    assert [r["input_ids"].tolist() for r in one] == [r["input_ids"].tolist() for r in again]
    assert [r["input_ids"].tolist() for r in one] != [r["input_ids"].tolist() for r in other]
    lengths = [len(row["input_ids"]) for row in plain]
    assert lengths[:3] == [64, 64, 64]
    assert sorted(len(row["input_ids"]) for row in one) == sorted(lengths)


def test_eos_is_not_doubled_and_not_given_to_empty_documents():
    dataset = datasets.Dataset.from_dict({"input_ids": [[5, EOS], [5, 6], []]})
    packed = pack(dataset, 5, Tokenizer(), seed=None)
    assert packed[0]["input_ids"].tolist() == [5, 6, EOS, 5, EOS]
    assert packed.stats()["dropped_documents"] == 1


def test_labels_and_masks():
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [[0, 5, 6, 7], [8, 9, 0, 0]],
            "attention_mask": [[0, 1, 1, 1], [1, 1, 0, 0]],
            "completion_mask": [[0, 0, 0, 1], [0, 1, 0, 0]],
            "labels": [[1, 15, 16, 17], [18, -100, 1, 1]],
        }
    )
    row = pack(dataset, 8, Tokenizer(), seed=None)[0]
    assert row["input_ids"].tolist() == [5, 6, 7, EOS, 8, 9, EOS]
    assert row["labels"].tolist() == [-100, -100, 17, EOS, -100, -100, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]


def test_unused_columns_are_named_in_one_line(caplog):
    with caplog.at_level(logging.INFO, "hf_longtrunc"):
        pack(arrow([3, 4], url=["a", "b"], date=[1, 2]), 8)
    assert [record.getMessage() for record in caplog.records] == ["packing leaves out the columns date, url"]


def test_splits_are_packed_each_for_itself():
    splits = pack(datasets.DatasetDict(train=arrow(), test=arrow([5, 3])), SEQ_LENGTH, min_piece=1)
    assert set(splits) == {"train", "test"}
    assert isinstance(splits["train"], PackedDataset)
    assert len(splits["test"]) == 1


@pytest.mark.parametrize("multiple", [2, 3, 7, 16, 24])
def test_added_rows_take_a_piece_of_a_row_of_several(multiple, tmp_path):
    """Rows of padding only had no target: the loss of an evaluation was NaN."""
    packed = pack(arrow(), SEQ_LENGTH, row_multiple=multiple, min_piece=1)
    assert len(packed) == -(-len(packed.packing) // multiple) * multiple
    assert documents_of(packed) == expected()
    assert all((row["labels"] != -100).any() for row in packed if len(row["labels"]) != 1)
    assert all(len(row["input_ids"]) for row in packed)
    shards = [row for index in range(3) for row in packed.shard(index, 3)]
    assert documents_of(shards) == expected()
    assert documents_of(packed.materialize(tmp_path).with_format("numpy")) == expected()
    again = PackedDataset(arrow(), packed.packing, row_multiple=multiple)
    assert [row["input_ids"].tolist() for row in again] == [row["input_ids"].tolist() for row in packed]


@pytest.mark.parametrize("seed", range(30))
def test_random_corpora_in_any_multiple_of_rows(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 90, int(rng.integers(1, 60))).tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "row_multiple = .* adds .* rows of padding only")
        packed = pack(arrow(lengths), SEQ_LENGTH, row_multiple=int(rng.integers(1, 40)), min_piece=1)
    assert documents_of(row for row in packed if len(row["input_ids"])) == expected(lengths)


def test_rows_of_padding_only_where_no_row_has_two_pieces():
    with pytest.warns(UserWarning, match="row_multiple = 16 adds 13 rows of padding only"):
        packed = pack(arrow([60, 61, 62]), SEQ_LENGTH, row_multiple=16)
    assert len(packed) == 16
    empty = next(row for row in packed if not len(row["input_ids"]))
    batch = BestFitPackingCollator(SEQ_LENGTH)([empty, packed[0]])
    assert batch["input_ids"].shape == (2, SEQ_LENGTH)
    assert (batch["labels"][0] == -100).all()


@pytest.mark.filterwarnings("ignore:packing within this batch")
@pytest.mark.parametrize("mask", ["completion_mask", "assistant_masks", "assistant_mask", "loss_mask"])
def test_every_name_of_a_mask_is_heeded(mask):
    documents = arrow([5, 9, 30], **{mask: [[0, 0, 1, 1, 1], [0] * 8 + [1], [0] * 30]})
    packed = pack(documents, SEQ_LENGTH)
    assert sum(int((row["labels"] != -100).sum()) for row in packed) == 4
    assert sum(int((row["labels"] != -100).sum()) for row in pack(documents.to_list(), SEQ_LENGTH)) == 4
    assert int((BestFitPackingCollator(SEQ_LENGTH)(documents.to_list())["labels"] != -100).sum()) == 4


def test_images_beside_the_tokens_are_refused():
    documents = [{"input_ids": [5, 6], "pixel_values": [[0.5]]}]
    for packed in (documents, datasets.Dataset.from_list(documents)):
        with pytest.raises(ValueError, match="has pixel_values beside its tokens, which packed rows would lose"):
            pack(packed, 8)
    with pytest.raises(ValueError, match="document 0 of the stream has pixel_values beside its tokens"):
        next(iter(pack(iter(documents), 8)))


@pytest.mark.parametrize("long", ["truncate", "drop"])
@pytest.mark.parametrize("kind", ["arrow", "list of rows"])
def test_documents_that_lose_every_target_are_counted(long, kind):
    """A prompt of 90 and a completion of 10 in rows of 64: nothing is learned, without a word."""
    masks = [[0] * 90 + [1] * 10] * 5 + [[0] * 10 + [1] * 10, [0] * 100, [1] * 100]
    documents = KINDS[kind](arrow([len(mask) for mask in masks], completion_mask=masks))
    lost = 5 + (long == "drop")  # the last one too
    with pytest.warns(UserWarning, match=f"{lost} of 8 documents lose every token that is to be learned"):
        pack(documents, SEQ_LENGTH, long=long)
    pack(documents, SEQ_LENGTH)  # split: targets are kept
    with pytest.warns(UserWarning, match="1 of 1 documents lose every token that is to be learned"):
        pack(arrow([65], labels=[[-100] * 64 + [7]]), SEQ_LENGTH, min_piece=1)  # the first one of a piece


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_dataloader(workers):
    packed = pack(arrow(), SEQ_LENGTH, min_piece=1)
    loader = DataLoader(packed, 4, collate_fn=BestFitPackingCollator(SEQ_LENGTH), num_workers=workers)
    learned = torch.cat([batch["labels"][batch["labels"] != -100] for batch in loader])
    assert sorted(learned.tolist()) == sorted(token for piece in expected().elements() for token in piece[1:])


def test_materialize_writes_the_rows_out_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    packed = pack(arrow(), SEQ_LENGTH)
    written = packed.materialize()
    assert written.column_names == ["input_ids", "position_ids", "labels", "seq_lengths"]
    assert [row["input_ids"] for row in written] == [row["input_ids"].tolist() for row in packed]
    assert [sum(row["seq_lengths"]) for row in written] == [len(row["input_ids"]) for row in packed]


def test_an_index_beyond_the_end_ends_iteration():
    packed = pack(arrow(), SEQ_LENGTH)
    assert len(list(packed)) == len(packed)
    assert packed[-1]["input_ids"].tolist() == packed[len(packed) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_long_documents_and_stats():
    packed = pack(arrow([150, 3, 60]), SEQ_LENGTH, long="truncate")
    assert packed.stats()["dropped_tokens"] == 86
    length = packed.packing.seq_length
    assert repr(packed) == f"<PackedDataset: {len(packed)} rows of up to {length} tokens, of 3 documents>"
    assert packed.stats()["truncated_documents"] == 1
    assert pack(arrow([150, 3, 60]), SEQ_LENGTH, long="drop").stats()["dropped_documents"] == 1
    with pytest.raises(ValueError, match="document 0 has 150 tokens"):
        pack(arrow([150, 3, 60]), SEQ_LENGTH, long="error")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (datasets.Dataset.from_dict({"input_ids": []}), ValueError, "dataset is empty"),
        ([], ValueError, "dataset is empty"),
        (datasets.Dataset.from_dict({"input_ids": [[], None, []]}), (TypeError, ValueError), "nothing is left|lists"),
        (datasets.Dataset.from_dict({"text": ["a"]}), ValueError, r"no column 'input_ids', only \['text'\]; tokenize"),
        (datasets.Dataset.from_dict({"input_ids": ["abc"]}), TypeError, "lists of integers, got (large_)?string"),
        (datasets.Dataset.from_dict({"input_ids": [[1.0]]}), TypeError, "lists of integers, got lists of double"),
        (datasets.Dataset.from_dict({"input_ids": [[[1]]]}), TypeError, "lists of integers, got lists of list"),
        (datasets.Dataset.from_dict({"input_ids": [[1, None]]}), TypeError, "got None inside a list"),
        (arrow([2, 3], labels=[[1, 2], [1]]), ValueError, "row 1: column 'labels' has 1 entries, 'input_ids' has 3"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}], ValueError, "row 1: column 'labels' has 1"),
        (arrow([3], attention_mask=[[1, 0, 1]]), ValueError, "row 0: 'attention_mask' has zeros between ones"),
        ([[1, 2, 3]], TypeError, "row 0 of the dataset must be a mapping of columns, got list"),
        ("corpus.txt", TypeError, "iterable of them, got str"),
        (7, TypeError, "iterable of them, got int"),
        (None, TypeError, "iterable of them, got NoneType"),
    ],
)
def test_bad_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        pack(dataset, 8)


def test_a_negative_token_is_named_when_its_row_is_gathered():
    packed = pack(datasets.Dataset.from_dict({"input_ids": [[5, 6], [5, -6]]}), 4)
    with pytest.raises(ValueError, match="row 1: 'input_ids' holds -6"):
        packed[0]


@pytest.mark.parametrize("bad", [0, -3, 2.0, True, "2048"])
def test_bad_seq_length(bad):
    with pytest.raises((TypeError, ValueError), match="seq_length must be"):
        pack(arrow(), bad)


@pytest.mark.parametrize("bad", [0, 1.5])
def test_bad_row_multiple(bad):
    with pytest.raises((TypeError, ValueError), match="row_multiple must be"):
        pack(arrow(), 8, row_multiple=bad)


def test_rows_beyond_the_tokenizers_maximum_are_warned_of():
    tokenizer = Tokenizer()
    tokenizer.model_max_length = 32
    with pytest.warns(UserWarning, match="seq_length = 64 is more than the tokenizer's maximum of 32"):
        pack(arrow(), 64, tokenizer)


def test_more_than_2_to_the_31_tokens_over_chunks_with_64_bit_offsets():
    """The same 2^20 tokens 2,100 times over: chunks share the memory, offsets are 64-bit throughout."""
    values = pa.array(np.arange(2**20) % 97, pa.int8())
    chunk = pa.LargeListArray.from_arrays(np.array([0, 2**20]), values)
    table = pa.table({"input_ids": pa.chunked_array([chunk] * 2100)})
    packed = pack(datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="many"), 2**16)
    assert packed.stats()["tokens"] == 2100 * 2**20 > 2**31
    assert packed[len(packed) - 1]["input_ids"].max() == 96


def test_the_legend_covers_no_line():
    axes = plot_packing(pack([{"input_ids": [5] * length} for length in (3, 9, 4, 2)], 4).packing)[1]
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1


@pytest.mark.parametrize(("package", "call"), [("matplotlib.pyplot", plot_packing), ("rich.box", packing_table)])
def test_tables_and_pictures_say_what_to_install(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf_longtrunc\[eval\]"'):
        call(pack(raw_examples([5, 3]), 8).packing)


def test_materialize_says_what_to_install(monkeypatch):
    packed = pack(raw_examples([5, 3]), 8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[train\]"'):
        packed.materialize()


class ChatTokenizer(Tokenizer):
    """A newline is token 90, as for SmolLM2, which writes one behind each turn's EOS."""

    def __call__(self, text, add_special_tokens):
        assert (text, add_special_tokens) == ("\n", False)
        return {"input_ids": [90]}


@pytest.mark.parametrize("kind", ["arrow", "list", "stream"])
def test_a_chat_that_ends_with_eos_and_a_newline_gets_no_second_eos(kind):
    chats = [[5, EOS, 90], [EOS, 90], [90], [EOS], [5, 90], [EOS, 90, 90], [5, EOS, 7], [6, EOS]]
    rows = [{"input_ids": tokens} for tokens in chats]
    source = {"arrow": datasets.Dataset.from_list(rows), "list": rows, "stream": iter(rows)}[kind]
    packed = pack(source, 8, ChatTokenizer(), min_piece=1)
    ended = [[90, EOS], [5, 90, EOS], [EOS, 90, 90, EOS], [5, EOS, 7, EOS], [5, EOS, 90], [EOS, 90], [EOS], [6, EOS]]
    assert documents_of(packed) == Counter(map(tuple, ended))


def test_the_packages_own_model_ends_a_chat_once(real_tokenizer):
    tokenizer = real_tokenizer
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenizer.decode(ids).endswith("Hi<|im_end|>\n")
    (row,) = pack([{"input_ids": ids}], 64, tokenizer)
    assert row["input_ids"].tolist() == ids
