"""Other sides' own readers on packed rows, where they are installed: torchdata's loader, datatrove's reader."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch

from hf_longtrunc import BestFitPackingCollator, pack, write_datatrove
from tests.data.corpora import raw_examples
from tests.data.test_dataset import SEQ_LENGTH, Tokenizer, arrow

LENGTHS = np.random.default_rng(7).integers(2, 90, 300).tolist()
CUTS = sum(length > SEQ_LENGTH + 1 for length in LENGTHS)  # a lone token behind a cut is left out
LONE = sum(length == SEQ_LENGTH + 1 for length in LENGTHS)


class Source:
    """A stream that can be read again."""

    def __iter__(self):
        return iter(raw_examples(LENGTHS))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_resumes_a_stream(workers):
    """What torchtitan trains with: it keeps the stream's state in its own, a worker's in each worker's."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        rows = pack(Source(), SEQ_LENGTH, pool_size=20, sharding="documents")
        return loaders.StatefulDataLoader(rows, 3, collate_fn=BestFitPackingCollator(SEQ_LENGTH), num_workers=workers)

    whole = [batch["input_ids"].tolist() for batch in loader()]
    interrupted = loader()
    batches = iter(interrupted)
    head = [next(batches)["input_ids"].tolist() for _ in range(7)]
    state = interrupted.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert head + [batch["input_ids"].tolist() for batch in resumed] == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_torchtitans_loader_takes_rows_and_resumes(workers):
    """Its batches: inputs with positions that restart, and targets that are next tokens already."""
    titan = pytest.importorskip("torchtitan.components.dataloader")
    collator = BestFitPackingCollator(SEQ_LENGTH)

    def collate(rows):
        batch = collator(rows)
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return {"input": batch["input_ids"], "positions": batch["position_ids"]}, labels

    def loader():
        rows = pack(Source(), SEQ_LENGTH, pool_size=20, sharding="documents")
        return titan.ParallelAwareDataloader(rows, 0, 1, batch_size=3, collate_fn=collate, num_workers=workers)

    whole = list(loader())
    learned = [(batch["input"][:, 1:], labels[:, :-1]) for batch, labels in whole]
    assert all(torch.equal(inputs[labels != -100], labels[labels != -100]) for inputs, labels in learned)
    assert sum(int((labels != -100).sum()) for _, labels in learned) == sum(LENGTHS) - len(LENGTHS) - CUTS - LONE
    interrupted = loader()
    batches = iter(interrupted)
    head = [next(batches)[0]["input"].tolist() for _ in range(7)]
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert head + [batch["input"].tolist() for batch, _ in resumed] == [batch["input"].tolist() for batch, _ in whole]


def naive_rows(path, seq_length):
    """Rows of tokens, and of positions that restart where a document ends."""
    tokens = np.fromfile(path, "<u2").reshape(-1, seq_length).tolist()
    ends = set(np.fromfile(f"{path}.index", "<u8").tolist())
    positions, position = [], 0
    for index in range(seq_length * len(tokens)):
        position = 0 if index in ends else position
        positions.append(position)
        position += 1
    return tokens, np.array(positions).reshape(-1, seq_length).tolist()


def expected_rows(packed, pad):
    """The rows as the collator lays them out: padding is a document of its own."""
    batch = BestFitPackingCollator(SEQ_LENGTH, pad_token_id=pad)([packed[i] for i in range(len(packed))])
    return batch["input_ids"].tolist(), batch["position_ids"].tolist()


def test_datatroves_files(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_longtrunc.data.writing._TOKENS", 2 * SEQ_LENGTH)  # gathered at once
    packed = pack(arrow([5, 90, 30, 30, 12, 64]), SEQ_LENGTH, Tokenizer(), row_multiple=4)
    write_datatrove(packed, tmp_path / "deep" / "rows.ds", pad_token_id=7)
    tokens, positions = expected_rows(packed, 7)
    assert naive_rows(tmp_path / "deep" / "rows.ds", SEQ_LENGTH) == (tokens, positions)
    for name in ("rows.ds", "rows.ds.index"):
        with pytest.raises(FileExistsError, match=rf"{name} exists: write to another path, or delete it first"):
            write_datatrove(packed, tmp_path / "deep" / "rows.ds", pad_token_id=7)
        (tmp_path / "deep" / name).unlink()
    assert not list((tmp_path / "deep").iterdir())


def test_datatroves_reader_reads_them(tmp_path):
    reader = pytest.importorskip("datatrove.utils.dataset")
    packed = pack(datasets.Dataset.from_list(raw_examples(LENGTHS)), SEQ_LENGTH)
    write_datatrove(packed, tmp_path / "rows.ds", pad_token_id=7)
    # It reads one token more than it is told, for the labels.
    rows = reader.DatatroveFileDataset(str(tmp_path / "rows.ds"), SEQ_LENGTH - 1, return_positions=True)
    found = [rows[index] for index in range(len(rows))]
    tokens, positions = expected_rows(packed, 7)
    assert [row["input_ids"].tolist() for row in found] == tokens
    assert [row["positions"].tolist() for row in found] == positions


def test_what_datatroves_files_do_not_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds tokens only, and the documents have labels"):
        write_datatrove(pack(arrow([5], labels=[[1, 2, 3, 4, 5]]), SEQ_LENGTH), tmp_path / "rows.ds", pad_token_id=0)
    packed = pack(datasets.Dataset.from_dict({"input_ids": [[5, 65_536]]}), 4)
    with pytest.raises(ValueError, match='token 65536 is more than uint16 holds; dtype="uint32"'):
        write_datatrove(packed, tmp_path / "rows.ds", pad_token_id=0)
    write_datatrove(packed, tmp_path / "rows.ds", pad_token_id=0, dtype="uint32")
    assert np.fromfile(tmp_path / "rows.ds", "<u4").tolist() == [5, 65_536, 0, 0]
    assert np.fromfile(tmp_path / "rows.ds.index", "<u8").tolist() == [2, 4]
