"""The streaming pool: every token once, nearly as dense as packing everything, resumable, nothing waits forever."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_longtrunc import BestFitPackingCollator, PackedStream, best_fit_decreasing, pack
from hf_longtrunc.data import documents
from hf_longtrunc.data.sources import private_copy
from tests.data.corpora import raw_examples, token_lists
from tests.data.test_dataset import Tokenizer, documents_of, expected

SEQ_LENGTH = 64
LENGTHS = np.random.default_rng(5).integers(2, 100, 400).tolist()


class Source:
    """An iterable that can be read again, and fails at `failing` if told so."""

    def __init__(self, lengths=LENGTHS, failing=None):
        self.examples, self.failing = raw_examples(lengths), failing

    def __iter__(self):
        for index, example in enumerate(self.examples):
            if index == self.failing:
                raise OSError("the connection is gone")
            yield example


def stream(source=None, **options) -> PackedStream:
    return pack(source or Source(), SEQ_LENGTH, min_piece=1, pool_size=options.pop("pool_size", 50), **options)


def lists(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


@pytest.mark.parametrize("pool_size", [1, 7, 50, 10_000])
def test_every_token_once(pool_size):
    rows = list(stream(pool_size=pool_size))
    assert documents_of(rows) == expected(LENGTHS)
    assert all(len(row["input_ids"]) <= SEQ_LENGTH for row in rows)


def test_eos_and_generators():
    rows = list(pack((example for example in raw_examples(LENGTHS)), SEQ_LENGTH, Tokenizer(), min_piece=1))
    assert documents_of(rows) == expected(LENGTHS, eos=2)


def test_a_large_pool_comes_close_to_packing_everything():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.5, 1.0, 20_000), 2, 2000).astype(int).tolist()
    everything = len(best_fit_decreasing(lengths, 256, min_piece=1))
    packed = sum(1 for _ in PackedStream(Source(lengths), 256, min_piece=1, pool_size=4096))
    assert everything <= packed <= 1.001 * everything


def test_the_same_rows_every_time_and_another_order_by_another_seed():
    rows = stream()
    first = lists(rows)
    assert lists(rows) == first
    assert lists(stream(seed=1)) != first
    assert documents_of(stream(seed=1)) == documents_of(rows)


@pytest.mark.parametrize("taken", [0, 1, 37, 150, 10_000])
def test_resumed_anywhere_it_goes_on_as_if_uninterrupted(taken):
    whole = lists(stream())
    interrupted = stream()
    head = lists(islice(interrupted, taken))
    state = copy.deepcopy(interrupted.state_dict())
    resumed = stream()
    resumed.load_state_dict(state)
    assert head + lists(resumed) == whole
    assert lists(resumed) == whole  # the epoch after it starts over


@pytest.mark.parametrize(("worker", "workers"), [(0, 2), (1, 2), (2, 3)])
def test_a_worker_resumes_exactly_too(monkeypatch, worker, workers):
    """Each worker keeps a state of its own, as torchdata's StatefulDataLoader does: here one of them."""
    info = type("Worker", (), {"id": worker, "num_workers": workers})
    monkeypatch.setattr("hf_longtrunc.data.stream.get_worker_info", lambda: info)
    whole = lists(stream(sharding="documents"))
    assert sum(map(len, whole)) == sum(LENGTHS[worker::workers])
    for taken in (0, 1, 40, len(whole)):
        interrupted = stream(sharding="documents")
        head = lists(islice(interrupted, taken))
        resumed = stream(sharding="documents")
        resumed.load_state_dict(pickle.loads(pickle.dumps(interrupted.state_dict())))
        assert resumed.state_dict() == interrupted.state_dict()
        assert head + lists(resumed) == whole


def test_a_state_is_small_and_counts_what_was_dropped():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, 20_000), 1, 8000).astype(int).tolist()
    rows = PackedStream(Source(lengths), 2048, seed=0)
    sizes = []
    for number, _ in enumerate(islice(rows, 3000)):
        if number % 20 == 19:
            state = rows.state_dict()
            sizes.append(len(pickle.dumps(state)))
    assert max(sizes) < 2**16
    resumed = PackedStream(Source(lengths), 2048, seed=0)
    resumed.load_state_dict(state)
    list(resumed)
    assert resumed.dropped["documents"] == sum(length < 2 for length in lengths)


def test_a_state_can_be_saved_with_a_checkpoint(tmp_path):
    """torch reads states back without executing what a file says."""
    rows = stream()
    list(islice(rows, 40))
    torch.save(rows.state_dict(), tmp_path / "state.pt")
    resumed = stream()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert lists(resumed) == lists(stream())[40:]


def test_nothing_waits_forever():
    """A document of 40 fits with no other of 40: without a limit the odd one would stay to the end of the stream."""
    lengths = [33, *[64] * 500]
    rows = lists(PackedStream(Source(lengths), SEQ_LENGTH, pool_size=4, max_rounds=5, seed=None))
    assert [len(row) for row in rows].index(33) < 30
    assert len(rows) == 501


def test_long_documents():
    assert sorted(map(len, lists(stream(Source([150, 10]))))) == [32, 64, 64]
    shortened = stream(Source([150, 10]), long="truncate")
    assert sorted(map(len, lists(shortened))) == [10, 64]
    assert shortened.dropped == {"documents": 0, "tokens": 86}
    dropped = stream(Source([150, 10]), long="drop")
    assert lists(dropped) == token_lists([150, 10])[1:]
    assert dropped.dropped == {"documents": 1, "tokens": 150}
    with pytest.raises(ValueError, match="document 1 of the stream has 150 tokens"):
        list(stream(Source([10, 150]), long="error"))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_the_documents(workers):
    rows = stream(sharding="documents")
    loader = DataLoader(rows, 4, collate_fn=BestFitPackingCollator(SEQ_LENGTH), num_workers=workers)
    found = Counter()
    for batch in loader:
        for row in range(len(batch["input_ids"])):
            learned = batch["labels"][row] != -100
            found.update(batch["input_ids"][row][learned].tolist())
    assert found == Counter(token for piece in expected(LENGTHS).elements() for token in piece[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_streams_share_themselves_out(workers):
    source = datasets.Dataset.from_list(raw_examples(LENGTHS)).to_iterable_dataset(num_shards=4)
    loader = DataLoader(stream(source), None, num_workers=workers)
    assert documents_of(loader) == expected(LENGTHS)


def test_a_source_that_fails_is_heard():
    with pytest.raises(OSError, match="the connection is gone"):
        list(stream(Source(failing=200)))


def test_a_bad_document_is_named():
    with pytest.raises(TypeError, match="document 1 of the stream: column 'input_ids' must hold integers"):
        list(stream([{"input_ids": [1, 2]}, {"input_ids": [1.5]}].__iter__()))


def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match="the stream is empty"):
        list(stream(iter(())))


def test_the_epoch_is_handed_on():
    source = datasets.Dataset.from_list(raw_examples(LENGTHS)).to_iterable_dataset().shuffle(seed=0, buffer_size=100)
    rows = stream(source)
    first = lists(rows)
    rows.set_epoch(1)
    second = lists(rows)
    assert first != second
    assert documents_of(stream(source)) == expected(LENGTHS)
    stream().set_epoch(1)  # a source without epochs is left alone


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pool_size": 0}, "pool_size must be"),
        ({"max_rounds": 0}, "max_rounds must be"),
        ({"min_piece": 0}, "min_piece must"),
    ],
)
def test_bad_parameters(option, message):
    with pytest.raises(ValueError, match=message):
        PackedStream(Source(), SEQ_LENGTH, **option)


def test_a_stream_has_no_row_multiple():
    with pytest.raises(ValueError, match="row_multiple needs a dataset of known length"):
        stream(row_multiple=8)


def test_a_state_knows_the_epoch_that_its_source_is_shuffled_by():
    """Resumed in the order of another epoch, some documents would come twice and others never."""

    def stream():
        documents = datasets.Dataset.from_list(raw_examples([5, 9, 30, 7, 12] * 8)).to_iterable_dataset(num_shards=4)
        return pack(documents.shuffle(seed=3, buffer_size=20), 32, pool_size=6)

    whole = stream()
    whole.set_epoch(2)
    rows = iter(whole)
    head = [next(rows)["input_ids"].tolist() for _ in range(4)]
    resumed = stream()
    resumed.load_state_dict(whole.state_dict())
    tail = [row["input_ids"].tolist() for row in rows]
    assert [row["input_ids"].tolist() for row in resumed] == tail
    assert sum(len(row) for row in head + tail) == (5 + 9 + 30 + 7 + 12) * 8


def shuffled():
    documents = datasets.Dataset.from_list(raw_examples(LENGTHS)).to_iterable_dataset(num_shards=4)
    return documents.shuffle(seed=3, buffer_size=20)


@pytest.mark.parametrize("source", [Source, shuffled])
def test_a_state_between_two_epochs_is_the_beginning_of_the_next(source):
    """It said: the end of the epoch before, in the new epoch. Resumed, that gave no row at all."""
    rows = stream(source())
    first = lists(rows)
    assert lists(resumed_from(rows, source())) == []  # the rest of an epoch that is over
    rows.set_epoch(1)
    resumed = resumed_from(rows, source())
    assert rows.state_dict()["given"] == 0
    second = lists(rows)
    assert lists(resumed) == second
    assert (first == second) == (source is Source)
    rows.set_epoch(1)  # as Trainer says at the beginning of the epoch in which it resumes
    assert rows.state_dict()["number"] > 0


def test_a_state_keeps_its_place_when_its_epoch_is_said_again():
    rows = stream(shuffled())
    rows.set_epoch(1)
    head = lists(islice(rows, 20))
    resumed = resumed_from(rows, shuffled())
    resumed.set_epoch(1)
    tail = lists(resumed)
    resumed.set_epoch(1)
    assert head + tail == lists(resumed)
    resumed.load_state_dict(rows.state_dict())
    resumed.set_epoch(0)  # another epoch than that of the state: from its beginning
    assert lists(resumed) == lists(stream(shuffled()))


def resumed_from(rows, source):
    resumed = stream(source)
    resumed.load_state_dict(rows.state_dict())
    return resumed


def test_two_iterators_do_not_share_their_place():
    rows = stream()
    whole = lists(rows)
    one, other = iter(rows), iter(rows)
    found = [(next(one), next(other)) for _ in range(30)]
    tails = list(one), list(other)
    for way in (0, 1):
        assert lists([pair[way] for pair in found] + tails[way]) == whole
    early = iter(rows)
    state = rows.state_dict()
    assert state["given"] == state["number"] == 0  # before the first row is asked for
    assert lists(early) == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("when", ["at the end", "before the next epoch", "at its beginning"])
def test_torchdatas_loader_between_two_epochs(workers, when):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        rows = stream(shuffled())
        return rows, loaders.StatefulDataLoader(rows, 3, collate_fn=lists, num_workers=workers)

    rows, batches = loader()
    first = list(batches)
    state = batches.state_dict()
    rows.set_epoch(1)
    if when == "before the next epoch":
        state = batches.state_dict()
    if when == "at its beginning":
        iterator = iter(batches)
        state = batches.state_dict()
        del iterator
    rows, batches = loader()
    rows.set_epoch(1)
    second = list(batches)
    rows, batches = loader()
    batches.load_state_dict(state)
    rows.set_epoch(1)
    found = list(batches)
    assert found == second != first


def test_a_document_that_loses_every_target_is_told():
    masked = [{"input_ids": [5] * 100, "completion_mask": [0] * 90 + [1] * 10}] * 3
    with pytest.warns(UserWarning, match="document 0 of the stream loses every token that is to be learned") as told:
        list(PackedStream(masked, SEQ_LENGTH, long="truncate"))
    assert len(told) == 1
    list(PackedStream(masked, SEQ_LENGTH))  # split: kept


def known():
    """Return a stream of datasets that knows its place: two sources, mapped in batches and filtered."""
    parts = [datasets.Dataset.from_list(raw_examples(LENGTHS[i::2])).to_iterable_dataset(num_shards=4) for i in (0, 1)]
    mixed = datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    return mixed.map(lambda batch: batch, batched=True, batch_size=7).filter(lambda row: len(row["input_ids"]) != 9)


def test_a_source_that_knows_its_place_is_not_read_again(monkeypatch):
    """Resumed, a stream reads what its last round read, and not what came before."""
    whole = lists(stream(known()))
    read = []
    monkeypatch.setattr(
        "hf_longtrunc.data.stream.read_document",
        lambda row, where: read.append(where) or documents.read_document(row, where),
    )
    interrupted = stream(known())
    head = lists(islice(interrupted, 250))
    state = pickle.loads(pickle.dumps(interrupted.state_dict()))
    assert state["source"] is not None
    read.clear()
    resumed = resumed_from(interrupted, known())
    rows = iter(resumed)
    first = next(rows)["input_ids"].tolist()
    assert len(read) <= 50
    assert read[0] == f"document {state['read']} of the stream"
    assert [*head, first, *lists(rows)] == whole


def test_labels_of_waiting_pieces_come_back_from_a_state():
    def masked():
        rows = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in raw_examples(LENGTHS)]
        for row in rows:
            row["labels"][-1] = -100
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    rows = stream(masked())
    whole = [row["labels"].tolist() for row in rows]
    head = [row["labels"].tolist() for row in islice(rows, 150)]
    assert rows.state_dict()["source"]["sizes"]
    assert head + [row["labels"].tolist() for row in resumed_from(rows, masked())] == whole


def test_readers_of_the_same_data_do_not_move_a_streams_place():
    """datasets keeps the place of a stream in objects that all of its views share."""
    source = known()
    rows = stream(source)
    whole, place = lists(rows), iter(rows)
    other, peek = iter(stream(source)), iter(source.take(30))
    head = []
    for _ in range(150):
        head.append(next(place)["input_ids"].tolist())
        state = rows.state_dict()
        next(other), next(peek, None)
    resumed = stream(known())
    resumed.load_state_dict(state)
    assert head + lists(resumed) == whole
    assert lists(resumed) == whole
    assert len(list(source)) == sum(length != 9 for length in LENGTHS)


def tables():
    return known().with_format("arrow").map(lambda table: table, batched=True).with_format(None)


def concatenated():
    """A concatenation under epochs or workers: datasets 5.2 cannot load its state, or loads another order."""
    parts = [datasets.Dataset.from_list(raw_examples(LENGTHS[i::2])).to_iterable_dataset(num_shards=4) for i in (0, 1)]
    return datasets.concatenate_datasets(parts)


@pytest.mark.parametrize("inexact", [shuffled, tables, concatenated])
def test_a_state_that_is_not_exact_is_not_relied_on(inexact):
    rows = stream(inexact())
    whole = lists(rows)
    head = lists(islice(rows, 150))
    assert rows.state_dict()["source"] is None
    assert head + lists(resumed_from(rows, inexact())) == whole


def test_a_run_keeps_its_epoch_while_another_worker_sets_one():
    """Workers share the epoch of datasets' streams: one that resumed an old epoch moved the others back to it."""
    source = shuffled()
    source.set_epoch(1)
    wanted = [row["input_ids"] for row in source]
    mine = private_copy(source)
    source.set_epoch(0)
    assert [row["input_ids"] for row in mine] == wanted
    mine.set_epoch(5)
    assert source.epoch == 0


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_another_source_of_the_same_documents_is_read_again(num_shards):
    """datasets loads the state of other shards without a word, and goes on at another document."""
    documents = datasets.Dataset.from_list(raw_examples(LENGTHS))
    rows = stream(documents.to_iterable_dataset(num_shards=8))
    whole = lists(rows)
    head = lists(islice(rows, 150))
    assert head + lists(resumed_from(rows, documents.to_iterable_dataset(num_shards=num_shards))) == whole
    assert head + lists(resumed_from(rows, Source())) == whole


def test_a_pool_is_bounded_in_tokens():
    rng = np.random.default_rng(0)
    source = ({"input_ids": rng.integers(1, 99, 1000)} for _ in range(300))
    rows, budget = PackedStream(source, 1536, pool_tokens=100_000), 16 * 100_000
    tracemalloc.start()
    found = sum(len(row["input_ids"]) for row in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == 300_000
    assert peak <= 1.2 * budget
