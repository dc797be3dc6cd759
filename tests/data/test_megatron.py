"""Megatron's .bin and .idx, read back by a reader written from the format's description alone."""

from __future__ import annotations

import io
import struct
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_longtrunc import pack, read_megatron, write_megatron
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


@pytest.mark.parametrize("highest", [97, 65_499, 65_500, 2**31 - 1])
def test_rows_are_documents_and_pieces_are_their_sequences(tmp_path, highest):
    ids = [[*tokens, highest] for tokens in token_lists([5, 90, 30, 30, 12])]
    packed = pack(datasets.Dataset.from_dict({"input_ids": ids}), SEQ_LENGTH, Tokenizer(), row_multiple=4)
    write_megatron(packed, tmp_path / "deep" / "rows")
    found, code = naive_read(tmp_path / "deep" / "rows")
    wanted = []
    for row in packed:
        bounds = [*np.flatnonzero(row["position_ids"] == 0).tolist(), len(row["input_ids"])]
        pieces = pairwise(bounds)
        wanted.append([row["input_ids"][first:last].tolist() for first, last in pieces])
    assert found == wanted
    assert code == (8 if highest < 65_500 else 4)
    assert read_megatron(tmp_path / "deep" / "rows")["input_ids"] == [joined(row) for row in wanted]


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
    write_megatron(pack(arrow([5, 9]), SEQ_LENGTH), tmp_path / "rows")
    kept = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for name in ("rows.bin", "rows.idx"):
        with pytest.raises(FileExistsError, match=rf"{name} exists: write to another path, or delete it first"):
            write_megatron(pack(arrow([7]), SEQ_LENGTH), tmp_path / "rows")
        assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == kept
        (tmp_path / name).unlink()
        kept = kept[1:]
    write_megatron(pack(arrow([7]), SEQ_LENGTH), tmp_path / "rows")
    assert len(read_megatron(tmp_path / "rows")) == 1


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus.idx is missing"):
        read_megatron(tmp_path / "corpus")
