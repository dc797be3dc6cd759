"""What is no document, no row, no number, no state: each is named, and nothing of it is lost or learned in silence."""

from __future__ import annotations

from functools import partial

import datasets
import jaxtyping
import numpy as np
import pandas
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaForCausalLM

from hf_longtrunc import (
    BestFitPackingCollator,
    PackedDataset,
    PackedStream,
    best_fit_decreasing,
    check_packed,
    pack,
    read_megatron,
    write_datatrove,
    write_megatron,
)
from hf_longtrunc.data.columns import ArrowDocuments
from hf_longtrunc.data.documents import FOREIGN_BOUNDARIES, IGNORE
from tests.conftest import tiny_config
from tests.data.corpora import raw_examples
from tests.data.test_dataset import Tokenizer, arrow

DOCUMENT = {"input_ids": [5, 6, 7]}
PLAN = best_fit_decreasing([5], 8)


def arrow_of(**columns):
    return datasets.Dataset.from_dict(columns)


# -- numbers -----------------------------------------------------------------------------------------------------------

WAYS = {
    "pack": lambda **options: pack(raw_examples([5, 3]), **{"seq_length": 8} | options),
    "a stream": lambda **options: PackedStream(raw_examples([5, 3]), **{"seq_length": 8} | options),
    "a plan": lambda **options: best_fit_decreasing([5, 3], **{"seq_length": 8} | options),
}
NO_NUMBERS = [True, 1.5, "a", [1], np.array([1]), torch.tensor([1, 2]), -1]


@pytest.fixture(autouse=True)
def no_second_checker(monkeypatch):
    """The tests' own checker of declared types would speak first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["seq_length", "min_piece", "seed"])
def test_numbers(way, name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be a whole number"):
        WAYS[way](**{name: value})


@pytest.mark.parametrize("way", WAYS)
def test_a_row_has_a_token_and_a_piece_too(way):
    for name in ("seq_length", "min_piece"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number .*got 0"):
            WAYS[way](**{name: 0})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("row_multiple", lambda value: pack(raw_examples([5]), 8, row_multiple=value)),
        ("pool_size", lambda value: PackedStream([DOCUMENT], 8, pool_size=value)),
        ("max_rounds", lambda value: PackedStream([DOCUMENT], 8, max_rounds=value)),
        ("eos_token_id", lambda value: PackedStream([DOCUMENT], 8, eos_token_id=value)),
        ("epoch", lambda value: PackedStream([DOCUMENT], 8).set_epoch(value)),
        ("pad_token_id", lambda value: BestFitPackingCollator(8, pad_token_id=value)),
        ("seq_length", lambda value: BestFitPackingCollator(value)),
    ],
)
def test_other_numbers(name, make, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be a whole number"):
        make(value)


@pytest.mark.filterwarnings("ignore:row_multiple = 4 adds 2 rows of padding only")
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_numpy_and_torch_are_numbers(kind):
    packed = pack(raw_examples([5, 3, 60]), kind(8), min_piece=kind(1), seed=kind(3), row_multiple=kind(4))
    assert [row["input_ids"].tolist() for row in packed] == [
        row["input_ids"].tolist() for row in pack(raw_examples([5, 3, 60]), 8, min_piece=1, seed=3, row_multiple=4)
    ]
    stream = PackedStream(raw_examples([5, 3]), kind(8), pool_size=kind(4), max_rounds=kind(2), eos_token_id=kind(2))
    assert len(list(stream)) == 2
    batch = BestFitPackingCollator(kind(3), pad_token_id=kind(1))([DOCUMENT])
    assert batch["input_ids"].tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("long", ["cut", None, True])
@pytest.mark.parametrize("way", WAYS)
def test_long_is_one_of_four_words(way, long):
    with pytest.raises(ValueError, match="long must be one of 'split', 'truncate', 'drop', 'error'"):
        WAYS[way](long=long)


def test_options_are_named():
    with pytest.raises(TypeError, match="positional"):
        BestFitPackingCollator(8, None, 0)


def test_lengths_beyond_64_bits():
    with pytest.raises(ValueError, match=r"lengths must be below 2\*\*63, got 9223372036854775808"):
        best_fit_decreasing(np.array([2**63], np.uint64), 8)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: "gpt2", lambda: LlamaForCausalLM(tiny_config()), tiny_config, lambda: 7])
@pytest.mark.parametrize(
    "use",
    [lambda tokenizer: pack(raw_examples([5]), 8, tokenizer), lambda tokenizer: BestFitPackingCollator(8, tokenizer)],
    ids=["pack", "collator"],
)
def test_a_tokenizer_is_a_tokenizer(make, use):
    tokenizer = make()
    with pytest.raises(TypeError, match=f"tokenizer must be a tokenizer .*got {type(tokenizer).__name__}; load one by"):
        use(tokenizer)


# -- documents ---------------------------------------------------------------------------------------------------------

EACH_DOCUMENT = [
    ({"input_ids": [True, False]}, TypeError, "must hold integers, got"),
    (
        {"input_ids": [2**63, 1]},
        (TypeError, ValueError),
        "more than a 64-bit integer can|integers, got (float64|object)",
    ),
    ({"input_ids": np.array([2**63, 1], np.uint64)}, ValueError, "holds 9223372036854775808, more than a 64-bit"),
    ({**DOCUMENT, "labels": [5, -1, 7]}, ValueError, "'labels' holds -1; a label is a token id, or -100"),
    ({**DOCUMENT, "labels": [1.0, 2.0, 3.0]}, TypeError, "column 'labels' must hold integers, got"),
    ({**DOCUMENT, "labels": [1]}, ValueError, "column 'labels' has 1 entries"),
    ({**DOCUMENT, "attention_mask": [1, 1, 2]}, ValueError, "'attention_mask' must hold 0 and 1, got 1 to 2"),
    ({**DOCUMENT, "attention_mask": [1, 1, -1]}, ValueError, "'attention_mask' must hold 0 and 1, got -1 to 1"),
    ({**DOCUMENT, "completion_mask": [0, 2, 2]}, ValueError, "'completion_mask' must hold 0 and 1, got 0 to 2"),
    ({**DOCUMENT, "assistant_masks": [0, 0, 5]}, ValueError, "'assistant_masks' must hold 0 and 1"),
    (None, TypeError, "must be a mapping of columns.*got NoneType"),
    (torch.tensor([5, 6, 7]), TypeError, "must be a mapping of columns.*got Tensor"),
    ([5, 6, 7], TypeError, "must be a mapping of columns.*got list"),
]
EACH_WAY = {
    "sized": lambda document: list(pack([document], 8)),
    "stream": lambda document: list(pack(iter([document]), 8)),
    "collator": lambda document: BestFitPackingCollator(8)([document]),
}


@pytest.mark.parametrize("way", EACH_WAY)
@pytest.mark.parametrize(("document", "error", "message"), EACH_DOCUMENT)
def test_documents(document, error, message, way):
    with pytest.raises(error, match=message):
        EACH_WAY[way](document)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"input_ids": [[True, False]]}, TypeError, "lists of integers, got lists of bool"),
        ({"input_ids": [[5, 6]], "labels": [[5, -1]]}, ValueError, "row 0: 'labels' holds -1"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 2]]}, ValueError, "row 0: 'attention_mask' must hold 0 and 1"),
        ({"input_ids": [[5, 6]], "completion_mask": [[1, 3]]}, ValueError, "row 0: 'completion_mask' must hold 0"),
    ],
)
def test_arrow_documents(columns, error, message):
    with pytest.raises(error, match=message):
        list(pack(arrow_of(**columns), 8))


def test_masks_of_bools_are_masks():
    dataset = arrow_of(
        input_ids=[[5, 6, 7]], attention_mask=[[True, True, False]], completion_mask=[[False, True, True]]
    )
    for documents in (dataset, dataset.to_list()):
        row = pack(documents, 8)[0]
        assert (row["input_ids"].tolist(), row["labels"].tolist()) == ([5, 6], [IGNORE, 6])


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ({}, ValueError, "holds no splits"),
        (datasets.DatasetDict(), ValueError, "holds no splits"),
        ({"input_ids": [[1, 2]]}, TypeError, r"mapping of splits, got one of columns \(input_ids\)"),
        ([None], TypeError, "row 0 of the dataset must be a mapping of columns, got NoneType"),
        (
            torch.ones(3, 4, dtype=torch.long),
            TypeError,
            "row 0 of the dataset must be a mapping of columns, got Tensor",
        ),
        (np.ones((3, 4)), TypeError, "row 0 of the dataset must be a mapping of columns, got ndarray"),
        (b"abc", TypeError, "iterable of them, got bytes"),
        (
            pandas.DataFrame({"input_ids": [[1, 2]]}),
            TypeError,
            "by number, and DataFrame knows no row 0; make a datasets.Dataset of it .Dataset.from_pandas",
        ),
    ],
)
def test_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        pack(dataset, 8)


@pytest.mark.parametrize("source", [7, None, "abc", {"input_ids": [1]}])
def test_sources(source):
    with pytest.raises(TypeError, match="source must be an iterable of tokenized documents"):
        PackedStream(source, 8)


def test_batches():
    with pytest.raises(ValueError, match="the batch holds no documents"):
        BestFitPackingCollator(8)([])


# -- rows that are packed already --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["position_ids", "seq_lengths", *FOREIGN_BOUNDARIES])
@pytest.mark.parametrize("kind", ["arrow", "sized", "stream", "collator"])
def test_packed_rows_are_not_packed_again(name, kind):
    boundaries = {"position_ids": [0, 1, 0], "seq_lengths": [2, 1], "seq_idx": [0, 0, 1]}.get(name, [0, 2, 3])
    rows = [{"input_ids": [5, 6, 7], name: boundaries}]
    if kind == "collator":
        if name in FOREIGN_BOUNDARIES:  # the others are read
            with pytest.raises(ValueError, match=rf"example 0 of the batch is packed already \(it has {name}\)"):
                BestFitPackingCollator(8)(rows)
        return
    with pytest.raises(ValueError, match=rf"packed already \(it has {name}\).*remove_columns\(\['{name}'\]\)"):
        list(pack({"arrow": datasets.Dataset.from_list(rows), "sized": rows, "stream": iter(rows)}[kind], 8))


def test_the_first_token_of_a_document_packed_by_others_is_no_target():
    """TRL leaves the labels to its collator: rows of it have tokens and lengths."""
    rows = [{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}, {"input_ids": [1, 2], "position_ids": [0, 0]}]
    rows = [rows[0], rows[0] | {"labels": [5, 6, 7, 8, 9]}, rows[1], rows[1] | {"labels": [1, 2]}]
    batch = BestFitPackingCollator(6)(rows)
    full = [IGNORE, 6, 7, IGNORE, 9, IGNORE]
    assert batch["labels"].tolist() == [full, full, [IGNORE] * 6, [IGNORE] * 6]
    flat = BestFitPackingCollator(6, layout="flat")(rows)
    assert flat["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 10, 11, 12, 13, 14]
    assert flat["labels"][flat["labels"] != IGNORE].tolist() == [6, 7, 9, 6, 7, 9]


@pytest.mark.parametrize("layout", ["rows", "flat"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1]}, "column 'labels' has 1 entries, 'input_ids' has 5"),
        ({"labels": [1, 2, 3, 4, -1]}, "'labels' holds -1"),
        ({"position_ids": [0, 1, 2]}, "column 'position_ids' has 3 entries, 'input_ids' has 5"),
        ({"position_ids": [1, 2, 3, 0, 1]}, "'position_ids' must begin at 0 and rise by one or restart at 0, got"),
        ({"position_ids": [0, 2, 3, 0, 1]}, "'position_ids' must begin at 0"),
        ({"position_ids": [0, 1, 2, 3, 4]}, "speak of different documents"),
        ({"position_ids": None, "seq_lengths": [3, 3]}, "lengths of at least 1 that sum up to the row's 5 tokens"),
        ({"position_ids": None, "seq_lengths": [5, 0]}, "lengths of at least 1"),
        ({"position_ids": None, "seq_lengths": [6, -1]}, "lengths of at least 1"),
        ({"attention_mask": [1, 1, 1, 1, 0]}, "a packed row holds no padding"),
        ({"input_ids": [1, 2, 3, 4, -5]}, "a token id is never negative"),
    ],
)
def test_packed_rows(changes, message, layout):
    row = {
        "input_ids": [5, 6, 7, 8, 9],
        "position_ids": [0, 1, 2, 0, 1],
        "seq_lengths": [3, 2],
        "labels": [5, 6, 7, 8, 9],
    }
    with pytest.raises(ValueError, match=message):
        BestFitPackingCollator(6, layout=layout)([row, {**row, **changes}])


# -- what a datasets.Dataset shows -------------------------------------------------------------------------------------


def test_a_transform_is_what_is_packed():
    dataset = arrow_of(input_ids=[[5, 6], [7, 8]])
    dataset.set_transform(lambda batch: {"input_ids": [[*ids, 9] for ids in batch["input_ids"]]})
    assert pack(dataset, 8, seed=None)[0]["input_ids"].tolist() == [5, 6, 9, 7, 8, 9]


def test_columns_that_the_format_leaves_out_are_left_out():
    dataset = arrow_of(input_ids=[[5, 6, 7]], labels=[[IGNORE, IGNORE, 7]])
    assert pack(dataset, 8)[0]["labels"].tolist() == [IGNORE, IGNORE, 7]
    shown = dataset.with_format(columns=["input_ids"])
    assert pack(shown, 8)[0]["labels"].tolist() == [IGNORE, 6, 7]
    everything = dataset.with_format("numpy", columns=["input_ids"], output_all_columns=True)
    assert pack(everything, 8)[0]["labels"].tolist() == [IGNORE, IGNORE, 7]
    with pytest.raises(ValueError, match=r"no column 'input_ids', only \['labels'\]"):
        pack(dataset.with_format(columns=["labels"]), 8)


def test_none_in_a_row_that_was_selected_away():
    dataset = arrow_of(input_ids=[[5, None], [6, 7], [8, 9], [None]])
    assert sorted(pack(dataset.select([2, 1]), 2)[i]["input_ids"].tolist() for i in range(2)) == [[6, 7], [8, 9]]
    with pytest.raises(TypeError, match="row 1: column 'input_ids' must hold integers, got None inside a list"):
        pack(dataset.select([2, 3]), 2)


def test_a_dataset_of_torch_that_is_iterable_and_has_a_length_is_a_stream():
    class Sized(IterableDataset):
        def __len__(self):
            return 2

        def __iter__(self):
            return iter(raw_examples([5, 3]))

    packed = pack(Sized(), 8)
    assert isinstance(packed, PackedStream)
    assert len(list(packed)) == 1


def test_one_zero_among_many_masks_does_not_cost_a_reading_of_all(monkeypatch):
    ids = arrow_of(input_ids=[[5, 6, 7]] * 300, attention_mask=[[1, 1, 1]] * 300)
    other = arrow_of(input_ids=[[5, 6, 7]], attention_mask=[[0, 1, 1]])
    read, original = [], ArrowDocuments.__getitem__
    monkeypatch.setattr(ArrowDocuments, "__getitem__", lambda self, row: read.append(row) or original(self, row))
    packed = pack(datasets.concatenate_datasets([ids, other]), 64, Tokenizer())
    assert (packed.stats()["tokens"], read) == (4 * 300 + 3, [300])


# -- plans, and what writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [[5, 6], [5, 6, 7, 8]])
def test_a_document_that_is_not_what_the_plan_counted_on(changed):
    """A longer one would lose what is too much."""
    documents = [dict(DOCUMENT), dict(DOCUMENT)]
    packed = pack(documents, 8)
    documents[1]["input_ids"] = changed
    with pytest.raises(ValueError, match=f"document 1 has {len(changed)} tokens and the plan counted on 3"):
        packed[0]


@pytest.mark.parametrize("what", [(arrow([5]), {}), (arrow([5]), pack(arrow([5]), 8)), (iter([]), PLAN), ("a", PLAN)])
def test_a_plan_and_a_dataset_with_a_length(what):
    with pytest.raises(TypeError, match="PackedDataset wants a dataset with a length and a plan for it"):
        PackedDataset(*what)


def test_columns_are_a_list_of_names_each_once(tmp_path):
    packed = pack(arrow([5, 3]), 8)
    written = packed.materialize(tmp_path, columns=["input_ids", "seq_lengths", "input_ids"])
    assert written.column_names == ["input_ids", "position_ids", "seq_lengths"]
    assert packed.materialize(tmp_path, columns="input_ids").column_names == written.column_names


@pytest.mark.parametrize("rows", [pack(iter([DOCUMENT]), 8), arrow([5]), [DOCUMENT], {"train": pack([DOCUMENT], 8)}])
def test_what_writes_takes_a_packed_dataset(rows, tmp_path):
    for write in (write_megatron, partial(write_datatrove, pad_token_id=0)):
        with pytest.raises(TypeError, match=f"rows must be what pack.. makes .*got {type(rows).__name__}"):
            write(rows, tmp_path / "rows")


@pytest.mark.parametrize(("prefix", "error"), [(None, TypeError), ("", ValueError), ("/", ValueError)])
def test_a_prefix_is_a_path(prefix, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (read_megatron, partial(write_megatron, pack([DOCUMENT], 8))):
        with pytest.raises(error):
            use(prefix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "batch"), [("a", {}), (LlamaForCausalLM, {}), (None, None)])
def test_a_model_and_a_batch(model, batch):
    with pytest.raises(TypeError, match="check_packed wants a causal language model and the batch"):
        check_packed(model, batch)
    if model != LlamaForCausalLM and model is not None:
        with pytest.raises(TypeError, match="model must be a transformers model or None, got str"):
            BestFitPackingCollator(8, model=model)


# -- workers -----------------------------------------------------------------------------------------------------------


class Sharing(IterableDataset):
    """Gives each worker its own documents."""

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(raw_examples([4] * 24)[first::step])


class Plain:
    """Gives each worker its own documents, and is no dataset of torch's."""

    __iter__ = Sharing.__iter__


class Same(IterableDataset):
    """Gives each worker all documents."""

    def __iter__(self):
        return iter(raw_examples([4] * 24))


def read_by(workers, source, **options):
    stream = PackedStream(source, 8, min_piece=1, pool_size=6, **options)
    rows = list(DataLoader(stream, None, num_workers=workers))
    return sorted(
        tuple(row["input_ids"][at : at + 4].tolist()) for row in rows for at in range(0, len(row["input_ids"]), 4)
    )


EVERY = sorted(tuple(example["input_ids"]) for example in raw_examples([4] * 24))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("source", "sharding"), [(Sharing, "source"), (Plain, "source"), (Same, "documents")])
def test_a_source_that_says_who_deals_the_documents_out_is_read_once(workers, source, sharding):
    assert read_by(workers, source(), sharding=sharding) == EVERY


@pytest.mark.parametrize("workers", [0, 1])
def test_one_reader_need_not_ask(workers):
    assert read_by(workers, Sharing()) == EVERY


@pytest.mark.parametrize("source", [Sharing(), Plain()])
def test_a_source_under_several_workers_must_say_who_deals_the_documents_out(source):
    with pytest.raises(
        ValueError, match=r'(?s)read by 2 workers: say whether.*sharding="source".*sharding="documents"'
    ):
        read_by(2, source)


def test_sharding_is_one_of_three():
    with pytest.raises(ValueError, match="sharding must be one of 'auto', 'source', 'documents'"):
        PackedStream(Same(), 8, sharding="worker")


# -- states ------------------------------------------------------------------------------------------------------------

STATE = PackedStream([DOCUMENT], 8).state_dict()


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, ValueError, "not what state_dict.. returned: it lacks settings, epoch, given, number"),
        (None, TypeError, "state must be what state_dict.. returned, got NoneType"),
        ({"read": 3, "rounds": 1, "pool": []}, ValueError, "it lacks settings"),
        ({**STATE, "settings": None}, ValueError, "its settings or the pieces that wait are damaged"),
        ({**STATE, "waiting": b"abc"}, ValueError, "its settings or the pieces that wait are damaged"),
        ({**STATE, "waiting": "abc"}, ValueError, "its settings or the pieces that wait are damaged"),
        ({**STATE, "source": {"sizes": b""}}, ValueError, "its settings or the pieces that wait are damaged"),
        ({**STATE, "given": -1}, ValueError, "'given'. must be a whole number of at least 0, got -1"),
        ({**STATE, "read": 1.5}, TypeError, "'read'. must be a whole number of at least 0, got 1.5"),
        ({**STATE, "number": "a"}, TypeError, "'number'. must be a whole number"),
        ({**STATE, "dropped_tokens": -1}, ValueError, "'dropped_tokens'. must be a whole number"),
        ({**STATE, "given": 9}, ValueError, "speaks of 9 rows of a round that has 1"),
        ({**STATE, "waiting": bytes(16)}, ValueError, "a piece waits of a document that had not been read"),
    ],
)
def test_states(state, error, message):
    stream = PackedStream([DOCUMENT], 8)
    with pytest.raises(error, match=message):
        assert [stream.load_state_dict(state), *stream]


@pytest.mark.parametrize("source", [[{"input_ids": []}] * 3, [{"input_ids": [5]}] * 3])
def test_a_stream_of_which_nothing_is_left_is_no_epoch(source):
    with pytest.raises(ValueError, match="nothing is left to pack: of 3 documents none has a piece of 2 to 8 tokens"):
        list(PackedStream(source, 8))
    assert len(list(PackedStream([*source, DOCUMENT], 8))) == 1


@pytest.mark.parametrize(
    "changes",
    [{"pool_size": 5}, {"seq_length": 16}, {"seed": 1}, {"max_rounds": 2}, {"min_piece": 1}, {"eos_token_id": 2},
     {"long": "drop"}],
)  # fmt: skip
def test_a_state_of_other_settings_is_refused(changes):
    settings = {"seq_length": 8, "pool_size": 4}
    state = PackedStream(raw_examples([5, 3]), **settings).state_dict()
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"the state was taken at {name} = .*this stream has"):
        PackedStream(raw_examples([5, 3]), **settings | changes).load_state_dict(state)


def test_a_state_of_a_longer_source_is_refused():
    stream = PackedStream(raw_examples([5] * 20), 8, pool_size=4)
    rows = iter(stream)
    for _ in range(9):
        next(rows)
    shorter = PackedStream(raw_examples([5]), 8, pool_size=4)
    shorter.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match=r"the source ended after 1 documents, and the state speaks of \d+"):
        list(shorter)


def test_the_kinds_of_what_pack_returns():
    assert isinstance(pack(arrow([5]), 8), PackedDataset)
    assert isinstance(pack(raw_examples([5]), 8), PackedDataset)
    assert isinstance(pack(iter(raw_examples([5])), 8), PackedStream)
