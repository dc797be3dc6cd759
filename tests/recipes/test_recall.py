"""Recall of facts: what counts as said, where the statement goes, and that the arms are run as given."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor

from hf_longtrunc.evaluation import append_records, read_records
from instruments.recall import Fact, RecallRecord, _says, fact_recall, recall_records


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" Paris.", True),
        ("It is paris, of course", True),
        (" Parisian", False),
        ("comparis", False),
        (" New\nParis", True),
        ("", False),
    ],
)
def test_an_answer_is_whole_words_in_any_case(text, said):
    assert _says(text, "Paris") is said


def test_an_answer_with_punctuation_is_taken_literally():
    assert _says("He said C++ (1998).", "C++ (1998)")
    assert not _says("He said Cxx", "C.x")


class Says(LogitsProcessor):
    """Makes the model say one token, and keeps the prompts that it saw."""

    def __init__(self, token):
        self.token, self.prompts = token, []

    def __call__(self, input_ids, scores):
        self.prompts.append(input_ids.clone())
        return torch.full_like(scores, -1e4).index_fill_(1, torch.tensor([self.token]), 0.0)


FACTS = [
    Fact("The capital of France is", "Paris", "Paris is the capital of France."),
    Fact("The capital of Italy is", "Rome", "Rome is the capital of Italy."),
]


@pytest.mark.real_model
@pytest.mark.parametrize("batch_size", [1, 2])
def test_arms_and_contexts(real_model, batch_size, tmp_path):
    model, tokenizer = real_model
    paris = tokenizer(" Paris").input_ids[0]
    says = Says(paris)
    options = {"batch_size": batch_size, "max_new_tokens": 2}
    assert fact_recall(model, tokenizer, FACTS, [says], **options) == [True, False]
    says.prompts.clear()
    assert fact_recall(model, tokenizer, FACTS, [says], in_context=True, **options) == [True, False]
    seen = tokenizer.decode(says.prompts[0][0], skip_special_tokens=True)
    assert seen == "Paris is the capital of France.\nThe capital of France is"
    records = recall_records(model, tokenizer, FACTS, {"plain": [], "Paris": [says]}, **options)
    assert [record.arm for record in records] == ["plain", "Paris"]
    assert records[1].recall == records[1].in_context == 0.5
    assert records[0].in_context == 1.0
    append_records(tmp_path / "recall.jsonl", records)
    assert read_records(tmp_path / "recall.jsonl", RecallRecord) == records


def test_no_facts():
    with pytest.raises(ValueError, match="facts is empty"):
        recall_records(None, None, [], {"plain": []})
