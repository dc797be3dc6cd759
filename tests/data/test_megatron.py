"""Megatron's .bin and .idx, read by a reader written from the format's description, and by megatron-core's own."""

from __future__ import annotations

import io
import struct
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from hf_longtrunc import BestFitPackingCollator, pack, read_megatron, write_megatron
from tests.data.corpora import token_lists
from tests.data.test_dataset import SEQ_LENGTH, Tokenizer, arrow, documents_of, expected

SIZES = {1: ("B", 1), 2: ("b", 1), 3: ("h", 2), 4: ("i", 4), 5: ("q", 8), 8: ("H", 2)}


def naive_read(prefix):
    """Documents as lists of sequences, field by field and token by token."""
    index = io.BytesIO(Path(f"{prefix}.idx").read_bytes())
    assert index.read(9) == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", index.read(8))
    (code,) = struct.unpack("<B", index.read(1))
    (sequences,) = struct.unpack("<Q", index.read(8))
    (bounds,) = struct.unpack("<Q", index.read(8))
    lengths = [struct.unpack("<i", index.read(4))[0] for _ in range(sequences)]
    pointers = [struct.unpack("<q", index.read(8))[0] for _ in range(sequences)]
    firsts = [struct.unpack("<q", index.read(8))[0] for _ in range(bounds)]
    assert (version, index.read()) == (1, b"")
    kind, size = SIZES[code]
    found = []
    with open(f"{prefix}.bin", "rb") as tokens:
        for length, pointer in zip(lengths, pointers, strict=True):
            tokens.seek(pointer)
            found.append(list(struct.unpack(f"<{length}{kind}", tokens.read(length * size))))
    return [found[first:last] for first, last in pairwise(firsts)], code


def joined(lists):
    return list(chain.from_iterable(lists))


def naive_write(prefix, documents, code=4):
    sequences = [sequence for document in documents for sequence in document]
    kind, size = SIZES[code]
    with open(f"{prefix}.bin", "wb") as file:
        file.writelines(struct.pack(f"<{len(sequence)}{kind}", *sequence) for sequence in sequences)
    pointers = np.cumsum([0, *(size * len(sequence) for sequence in sequences)])[:-1]
    firsts = np.cumsum([0, *map(len, documents)])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts)))
        file.writelines(struct.pack("<i", len(sequence)) for sequence in sequences)
        file.writelines(struct.pack("<q", value) for value in [*pointers.tolist(), *firsts.tolist()])


def with_eos(lengths, highest=97, **options):
    ids = [[*tokens, highest] for tokens in token_lists(lengths)]
    return pack(datasets.Dataset.from_dict({"input_ids": ids}), SEQ_LENGTH, Tokenizer(), **options)


@pytest.mark.parametrize(
    ("highest", "pad", "code"),
    [(97, 0, 8), (97, -1, 4), (65_499, 0, 8), (65_500, 0, 4), (97, 65_500, 4), (2**31 - 1, 0, 4)],
)
def test_rows_are_sequences_filled_up(tmp_path, highest, pad, code, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.data.writing._TOKENS", 2 * SEQ_LENGTH)  # gathered at once
    packed = with_eos([5, 90, 30, 30, 12], highest, row_multiple=4)
    write_megatron(packed, tmp_path / "deep" / "rows", pad_token_id=pad)
    found, found_code = naive_read(tmp_path / "deep" / "rows")
    batch = BestFitPackingCollator(SEQ_LENGTH)([packed[i] for i in range(len(packed))])
    is_padding = batch["position_ids"].eq(0).logical_and(batch["input_ids"].eq(0)).cumsum(-1) > 0
    assert found == [[row] for row in batch["input_ids"].masked_fill(is_padding, pad).tolist()]
    assert found_code == code
    assert read_megatron(tmp_path / "deep" / "rows")["input_ids"] == joined(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.transformers_own_deprecation("")
@pytest.mark.parametrize("pad", [-1, 1])
@pytest.mark.parametrize("epochs", [1, 3])
def test_megatrons_own_data_set_returns_every_row(tmp_path, pad, epochs):
    """Tokens, positions, attention and targets of each row are those of our collator, in every epoch."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.utils import Split

    class MegatronsTokenizer:
        vocab_size, eod, unique_identifiers = 100, Tokenizer.eos_token_id, {}

    MegatronsTokenizer.pad = pad if pad >= 0 else MegatronsTokenizer.eod  # Megatron takes -1 for the ambiguous one
    packed = with_eos(np.random.default_rng(7).integers(2, 150, 90).tolist(), row_multiple=4)
    write_megatron(packed, tmp_path / "rows", pad_token_id=pad)
    config = gpt.GPTDatasetConfig(
        random_seed=1, sequence_length=SEQ_LENGTH, split="1", tokenizer=MegatronsTokenizer(), mmap_bin_files=False,
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=True, reset_attention_mask=True,
        eod_mask_loss=True, add_extra_token_to_sequence=False,
    )  # fmt: skip
    low = gpt.GPTDataset.build_low_level_dataset(str(tmp_path / "rows"), config)
    indices = np.arange(len(packed), dtype=np.int32)
    samples = gpt.GPTDataset(low, str(tmp_path / "rows"), indices, len(packed) * epochs, Split.train, config)
    assert len(samples) == len(packed) * epochs
    collator = BestFitPackingCollator(SEQ_LENGTH)
    wanted = Counter()
    for row in range(len(packed)):
        batch = collator([packed[row]])
        ids, positions, labels = (batch[name][0] for name in ("input_ids", "position_ids", "labels"))
        document = (positions == 0).cumsum(0)
        sees = (document[:, None] == document) & (torch.arange(SEQ_LENGTH)[:, None] >= torch.arange(SEQ_LENGTH))
        targets = torch.cat([labels[1:], torch.tensor([-100])])
        wanted[tuple(tuple(values.flatten().tolist()) for values in (ids, positions, sees, targets))] += epochs
    found = Counter()
    for index in range(len(samples)):
        sample = samples[index]
        targets = sample["labels"].masked_fill(sample["loss_mask"] == 0, -100)
        sees = ~sample["attention_mask"][0]
        parts = (sample["tokens"], sample["position_ids"], sees, targets)
        found[tuple(tuple(values.flatten().tolist()) for values in parts)] += 1
    assert found == wanted


def test_what_megatron_would_read_as_other_documents(tmp_path):
    with pytest.raises(ValueError, match=r"a document that another follows ends with .*give pack\(\) the tokenizer"):
        write_megatron(pack(arrow([5, 9]), SEQ_LENGTH), tmp_path / "rows")
    write_megatron(pack(arrow([60, 50]), SEQ_LENGTH), tmp_path / "alone")  # nothing follows
    chat = datasets.Dataset.from_dict({"input_ids": [[5, 2, 7, 2], [2, 8, 2], [9, 9, 2]]})
    with pytest.warns(UserWarning, match="EOS .2. lies 2 times inside a document"):
        write_megatron(pack(chat, SEQ_LENGTH, Tokenizer()), tmp_path / "chat")
    for pad in (2, 9):
        with pytest.raises(ValueError, match=f"pad_token_id must be no token of the documents.*got {pad}"):
            write_megatron(pack(chat, SEQ_LENGTH, Tokenizer()), tmp_path / "rows", pad_token_id=pad)


@pytest.mark.parametrize("code", SIZES)
def test_documents_are_read_and_packed(tmp_path, code):
    lists = token_lists([5, 90, 1, 30, 64])
    naive_write(tmp_path / "corpus", [[tokens] for tokens in lists], code)
    documents = read_megatron(tmp_path / "corpus")
    assert documents["input_ids"] == lists
    assert documents_of(pack(documents, SEQ_LENGTH, min_piece=1)) == expected([5, 90, 1, 30, 64])
    naive_write(tmp_path / "corpus", [lists[:2], [], lists[2:]], code)
    assert read_megatron(tmp_path / "corpus")["input_ids"] == [joined(lists[:2]), [], joined(lists[2:])]


def test_no_rows_of_labels(tmp_path):
    packed = pack(arrow([5], labels=[[1, 2, 3, 4, 5]]), SEQ_LENGTH)
    with pytest.raises(ValueError, match="holds tokens only, and the documents have labels"):
        write_megatron(packed, tmp_path / "rows")
    large = pack(datasets.Dataset.from_dict({"input_ids": [[5, 2**31]]}), 4)
    with pytest.raises(ValueError, match="token 2147483648 is more than int32 holds"):
        write_megatron(large, tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def sized(data, first, second):
    """An index of two sequences, with other sizes and offsets that agree with them: reading it ended in a bus error."""
    return data[:34] + struct.pack("<iiqq", first, second, 0, 4 * first) + data[58:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"no" + data[2:], "is no index of Megatron's"),
        (lambda data: data[:20], "is no index of Megatron's"),
        (lambda data: data[:9] + b"\x02" + data[10:], "has version 2"),
        (lambda data: data[:17] + b"\x07" + data[18:], "type 7, expected version 1 and integer tokens"),
        (lambda data: data[:-9], "is too short for 2 sequences"),
        (lambda data: data[:-8] + struct.pack("<q", 5), "do not cover its 2 sequences"),
        (lambda data: data[:34] + struct.pack("<i", 400) + data[38:], "do not lie one after another"),
        (lambda data: sized(data, 4_000_000, -3_999_997), "do not lie one after another"),
        (lambda data: sized(data, -400, 403), "do not lie one after another"),
    ],
)
def test_damaged_indices(tmp_path, damage, message):
    naive_write(tmp_path / "corpus", [[[1, 2]], [[3]]])
    path = tmp_path / "corpus.idx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_megatron(tmp_path / "corpus")


def test_the_tokens_are_not_hashed_to_name_the_data_set(tmp_path, monkeypatch):
    """For datasets' own fingerprint all of them would be copied."""
    naive_write(tmp_path / "corpus", [[[1, 2]], [[3]]])
    monkeypatch.setattr("datasets.arrow_dataset.generate_fingerprint", lambda dataset: pytest.fail("hashed"))
    names = {read_megatron(tmp_path / "corpus")._fingerprint for _ in range(2)}
    naive_write(tmp_path / "corpus", [[[1, 2]], [[3]], [[4]]])
    assert len(names | {read_megatron(tmp_path / "corpus")._fingerprint}) == 2


def test_half_a_token_behind_the_tokens(tmp_path):
    naive_write(tmp_path / "corpus", [[[1, 2]], [[3]]])
    with (tmp_path / "corpus.bin").open("ab") as file:
        file.write(b"1")
    with pytest.raises(ValueError, match=r"corpus\.bin is damaged: its \d+ bytes are no whole number of \w+ tokens"):
        read_megatron(tmp_path / "corpus")


def test_nothing_is_overwritten(tmp_path):
    """Two files cannot be replaced at once, and tokens without an index may be somebody's."""
    write_megatron(with_eos([5, 9]), tmp_path / "rows")
    kept = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for name in ("rows.idx", "rows.bin"):
        with pytest.raises(FileExistsError, match=rf"{name} exists: write to another path, or delete it first"):
            write_megatron(pack(arrow([7]), SEQ_LENGTH), tmp_path / "rows")
        assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == kept
        (tmp_path / name).unlink()
        kept.pop()
    write_megatron(pack(arrow([7]), SEQ_LENGTH), tmp_path / "rows")
    assert len(read_megatron(tmp_path / "rows")) == 1


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus.idx is missing"):
        read_megatron(tmp_path / "corpus")
