"""Numbers that users pass to measurements: NumPy integers are numbers and end up in records, booleans are none."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from hf_longtrunc import load_pretrained
from hf_longtrunc.evaluation import (
    append_records,
    default_edges,
    perplexity_by_position,
    read_records,
    scrolls,
    token_losses,
)
from instruments.passkey import PasskeyPrompts
from instruments.recall import Fact, fact_recall
from instruments.retrieval import NeedlePrompts, RetrievalRecord, VariablePrompts, retrieval_tasks, run_retrieval
from instruments.truncation import RepetitionRecord, run_repetition, truncation_scores

IDS = torch.arange(5, 25)
ONE, NO = np.int64(1), True
FACT = Fact("a", "b", "c")


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_pretrained(tiny_folder, device="cpu")


CALLS = {  # argument -> a call that takes a number for it
    "chunk": lambda model, tokenizer, n: token_losses(model, IDS, chunk=n),
    "chunk of scores": lambda model, tokenizer, n: truncation_scores(model, IDS, {}, chunk=n),
    "edges": lambda model, tokenizer, n: perplexity_by_position(torch.ones(9), [0, n, 5]),
    "length": lambda model, tokenizer, n: default_edges(8, n),
    "lengths": lambda model, tokenizer, n: retrieval_tasks([n], [0]),
    "prompts_per_cell": lambda model, tokenizer, n: retrieval_tasks([9], [0], prompts_per_cell=n),
    "keys": lambda model, tokenizer, n: NeedlePrompts(tokenizer, keys=n),
    "values": lambda model, tokenizer, n: NeedlePrompts(tokenizer, values=n),
    "hops": lambda model, tokenizer, n: VariablePrompts(tokenizer, hops=n),
    "batch_size": lambda model, tokenizer, n: fact_recall(model, tokenizer, [FACT], batch_size=n),
    "max_new_tokens": lambda model, tokenizer, n: fact_recall(model, tokenizer, [FACT], max_new_tokens=n),
    "repeats": lambda model, tokenizer, n: run_repetition(model, tokenizer, ["a"], {}, repeats=n),
    "max_tokens": lambda model, tokenizer, n: scrolls.run(model, tokenizer, "qasper", [], {}, max_tokens=n),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_may_be_numpys_and_no_boolean_or_fraction(name, loaded):
    CALLS[name](*loaded, ONE)
    for wrong in (NO, 1.5, "1"):
        with pytest.raises(TypeError, match=f"{name.split()[0]} must be a whole number"):
            CALLS[name](*loaded, wrong)
    with pytest.raises(ValueError, match=f"{name.split()[0]} must be a whole number"):
        CALLS[name](*loaded, np.int64(-1))


def test_numpys_numbers_are_written_and_read_as_numbers(loaded, tmp_path):
    model, tokenizer = loaded
    tasks = retrieval_tasks(np.array([400]), np.array([0.5]), prompts_per_cell=ONE, seed=np.int32(3))
    records = run_retrieval(model, [PasskeyPrompts(tokenizer)], tasks, {"a": nullcontext}, path=tmp_path / "r.jsonl")
    assert read_records(tmp_path / "r.jsonl", RetrievalRecord) == records
    options = {"seeds": np.arange(2), "repeats": ONE, "max_new_tokens": ONE}
    drawn = run_repetition(model, tokenizer, ["a"], {"plain": []}, path=tmp_path / "p.jsonl", **options)
    assert read_records(tmp_path / "p.jsonl", RepetitionRecord) == drawn
    append_records(tmp_path / "b.jsonl", perplexity_by_position(torch.ones(9), np.array([0, 4, 9])))
