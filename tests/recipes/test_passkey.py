from __future__ import annotations

import io
import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import pytest
import torch
from rich.console import Console

from hf_longtrunc.evaluation.records import read_records
from instruments.passkey import (
    PasskeyPrompts,
    PasskeyRecord,
    PasskeyTask,
    accuracy,
    passkey_table,
    passkey_tasks,
    plot_passkey,
    run_passkey,
)
from instruments.retrieval import NeedlePrompts, retrieval_tasks, run_retrieval

mpl.use("agg")


class Reader:
    """A `generate` that sees the prompt's last `sight` tokens and answers with the key if it stands there."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(name_or_path="reader", is_encoder_decoder=False)

    def __init__(self, tokenizer, sight=10**9):
        self.tokenizer, self.sight, self.prompts = tokenizer, sight, []

    def generate(self, input_ids, **kwargs):
        assert kwargs["attention_mask"].shape == input_ids.shape
        self.prompts.append(input_ids[0].tolist())
        seen = self.tokenizer.decode(input_ids[0, -self.sight :])
        key = seen.split("The pass key is ")[1][:5] if "The pass key is " in seen else "nowhere"
        answer = self.tokenizer(f" {key}. That is it, 1", add_special_tokens=False).input_ids
        return torch.cat([input_ids, torch.tensor([answer])], dim=1)


@pytest.mark.parametrize("filler", ["repeated", "text"])
def test_prompts_have_the_exact_length_and_every_part(tokenizer, prose, filler):
    prompts = PasskeyPrompts(tokenizer, None if filler == "repeated" else prose)
    for length in [*range(320, 340), 1500]:
        for task in passkey_tasks([length], [0, 0.3, 1], keys_per_cell=2):
            ids, (key,) = prompts(task)
            text = tokenizer.decode(ids)
            assert len(ids) == length
            assert len(key) == 5
            assert 10_000 <= int(key) < 100_000
            assert f" The pass key is {key}. Remember it. {key} is the pass key." in text
            assert text.startswith("<|start|>There is an important pass key")
            assert text.endswith(" What is the pass key? The pass key is")
            assert text.count("<|start|>") == 1
            assert text.count("What is the pass key?") == 1
            assert text.count("There is an important pass key") == 1
            assert ("sky is blue" in text) == (filler == "repeated")


def test_the_smallest_prompt_has_one_token_of_filler_and_a_smaller_one_is_refused(tokenizer):
    prompts = PasskeyPrompts(tokenizer)
    with pytest.raises(ValueError, match=r"length must be at least \d+ tokens") as refusal:
        prompts(PasskeyTask(20, 0.5, 0, 0))
    smallest = int(str(refusal.value).split("at least ")[1].split()[0])
    assert len(prompts(PasskeyTask(smallest, 0.5, 0, 0))[0]) == smallest
    with pytest.raises(ValueError, match=f"at least {smallest} "):
        prompts(PasskeyTask(smallest - 1, 0.5, 0, 0))


@pytest.mark.parametrize("filler", ["repeated", "text"])
def test_the_key_stands_at_its_depth_between_two_sentences(tokenizer, prose, filler):
    prompts = PasskeyPrompts(tokenizer, None if filler == "repeated" else prose)
    for task in passkey_tasks([3000], [0, 0.1, 0.5, 0.77, 1], keys_per_cell=3):
        ids, (key,) = prompts(task)
        text = tokenizer.decode(ids)
        before, after = text.split(f" The pass key is {key}. Remember it. {key} is the pass key.")
        filler_before = before.split("ask you about it.")[1]
        filler_after = after.split(" What is the pass key?")[0]
        sizes = [
            len(tokenizer(part, add_special_tokens=False, verbose=False).input_ids)
            for part in (filler_before, filler_after)
        ]
        assert sizes[0] / sum(sizes) == pytest.approx(task.depth, abs=0.03)
        assert filler_before == "" or filler_before[-1] in ".!?"
        assert task.depth not in (0, 1) or "" in (filler_before, filler_after)


def test_prompts_are_the_same_every_time_and_differ_by_trial_and_seed(tokenizer, prose):
    task = PasskeyTask(400, 0.5, 0, 0)
    assert PasskeyPrompts(tokenizer, prose)(task) == PasskeyPrompts(tokenizer, prose)(task)
    assert PasskeyPrompts(tokenizer)(PasskeyTask(400, 1, 0, 0)) == PasskeyPrompts(tokenizer)(
        PasskeyTask(400, 1.0, 0, 0)
    )
    keys = {
        PasskeyPrompts(tokenizer)(PasskeyTask(400, 0.5, trial, seed))[1][0] for trial in range(5) for seed in range(5)
    }
    assert len(keys) == 25


@pytest.mark.parametrize("depth", [-0.1, 1.1, math.nan])
def test_a_depth_outside_the_prompt_is_refused(tokenizer, depth):
    with pytest.raises(ValueError, match="depth must be a number of at least 0 and of at most 1"):
        PasskeyPrompts(tokenizer)(PasskeyTask(400, depth, 0, 0))


def test_a_text_without_words_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no sentence"):
        PasskeyPrompts(tokenizer, " \n\n ")


def test_an_answer_counts_by_its_first_number(tokenizer):
    tasks = passkey_tasks([600], [0.1, 0.95], keys_per_cell=2)
    records = run_passkey(Reader(tokenizer, sight=300), PasskeyPrompts(tokenizer), tasks, {"plain": nullcontext})
    assert [(record.depth, record.correct) for record in records] == [(0.1, False)] * 2 + [(0.95, True)] * 2
    assert records[2].answer == f" {records[2].key}. That is it, 1"
    assert accuracy(records) == 0.5
    assert math.isnan(accuracy([]))


def test_a_run_goes_on_where_it_was_cut_off(tokenizer, tmp_path):
    path = tmp_path / "passkey.jsonl"
    prompts, arms = PasskeyPrompts(tokenizer), {"plain": nullcontext}
    first = run_passkey(Reader(tokenizer), prompts, passkey_tasks([400], [0, 1], keys_per_cell=2), arms, path=path)
    reader = Reader(tokenizer)
    more = passkey_tasks([400, 500], [0, 1], keys_per_cell=2)
    second = run_passkey(reader, prompts, more, arms, path=path)
    assert [len(prompt) for prompt in reader.prompts] == [500] * 4
    assert second[:4] == first
    assert second == read_records(path, PasskeyRecord)
    assert len(json.loads(path.read_text().splitlines()[0])) == 15


@pytest.mark.parametrize("change", ["arm", "settings", "filler", "text", "seed", "model", "dtype"])
def test_what_was_asked_in_another_setting_is_asked_again(tokenizer, prose, tmp_path, change):
    path = tmp_path / "passkey.jsonl"
    tasks = passkey_tasks([500], [0.5], keys_per_cell=1)
    asked = PasskeyPrompts(tokenizer, prose[len(prose) // 2 :] if change == "text" else None)
    run_passkey(Reader(tokenizer), asked, tasks, {"plain": nullcontext}, path=path)
    reader, prompts, arms = Reader(tokenizer), PasskeyPrompts(tokenizer), {"plain": nullcontext}
    if change == "arm":
        arms = {"other": nullcontext}
    elif change == "settings":
        arms = {"plain": contextmanager(lambda model: iter([model]))}
    elif change in {"filler", "text"}:
        prompts = PasskeyPrompts(tokenizer, prose)
    elif change == "seed":
        tasks = passkey_tasks([500], [0.5], keys_per_cell=1, seed=1)
    elif change == "model":
        reader.config = SimpleNamespace(name_or_path="other", is_encoder_decoder=False)
    else:
        reader.dtype = torch.bfloat16
    run_passkey(reader, prompts, tasks, arms, path=path)
    assert len(reader.prompts) == 1
    assert len(read_records(path, PasskeyRecord)) == 2


def test_arms_see_the_same_prompts(tokenizer):
    reader = Reader(tokenizer)
    run_passkey(reader, PasskeyPrompts(tokenizer), passkey_tasks([400], [0, 1]), {"a": nullcontext, "b": nullcontext})
    assert reader.prompts[:20] == reader.prompts[20:]


def test_a_transformers_model_answers(trained_tokenizer, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=trained_tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.eos_token_id = config.bos_token_id = None
    model = LlamaForCausalLM(config).eval()
    model.generation_config.update(temperature=0.7, top_p=0.9, do_sample=True, pad_token_id=0)
    tasks = passkey_tasks([400], [0.5], keys_per_cell=1)
    (record,) = run_passkey(model, PasskeyPrompts(tokenizer), tasks, {"plain": nullcontext}, progress=True)
    assert not record.correct
    assert record.model == "LlamaForCausalLM"


def test_table_and_heat_map(tokenizer):
    tasks = passkey_tasks([400, 1600], [0.1, 0.95], keys_per_cell=2)
    records = run_passkey(
        Reader(tokenizer, 380), PasskeyPrompts(tokenizer), tasks, {"a": nullcontext, "b": nullcontext}
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(passkey_table(records))
    row = next(line for line in console.export_text().splitlines() if "1,600" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "a",
        "passkey",
        "repeated",
        "1,600",
        "0.00",
        "1.00",
        "0.50",
        "0.15-0.85",
        "2 x 2",
    ]
    left, right = plot_passkey(records)
    assert (left.get_title(), right.get_title()) == ("a\npasskey\nrepeated", "b\npasskey\nrepeated")
    assert left.images[0].get_array().tolist() == [[1, 0], [1, 1]]
    assert [text.get_text() for text in left.texts] == [f"{mean}.00\nn = 2" for mean in (1, 1, 0, 1)]
    (part,) = plot_passkey(
        [record for record in records if record.arm == "a" and (record.length, record.depth) != (400, 0.1)]
    )
    assert [text.get_text() for text in part.texts] == [f"{mean}.00\nn = 2" for mean in (1, 0, 1)], (
        "nothing stands where nothing was asked"
    )


def test_recorded_passkeys_of_earlier_versions_are_read_and_not_asked_again(tokenizer, tmp_path):
    """docs/evidence holds such lines: `key` and `correct` where there are `expected` and `score` today."""
    path, prompts, arms = tmp_path / "passkey.jsonl", PasskeyPrompts(tokenizer), {"plain": nullcontext}
    tasks = passkey_tasks([400], [0, 1], keys_per_cell=1)
    now = run_passkey(Reader(tokenizer, sight=200), prompts, tasks, arms)
    lines = [{**asdict(r), "key": r.expected[0], "correct": r.score == 1} for r in now]
    for line in lines:
        for name in ("battery", "tokens", "expected", "score"):
            del line[name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_records(path, PasskeyRecord) == now
    assert [(record.key, record.correct) for record in now] == [(line["key"], line["correct"]) for line in lines]
    reader = Reader(tokenizer)
    assert run_passkey(reader, prompts, tasks, arms, path=path) == now
    assert reader.prompts == []


EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("passkey*/passkey.jsonl")), ids=lambda path: path.parent.name)
def test_every_recorded_passkey_is_read_and_judged_as_it_was(path):
    records = read_records(path, PasskeyRecord)
    recorded = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [PasskeyPrompts.score(None, record.answer, record.expected) == 1 for record in records]
    assert [line["correct"] for line in recorded] == [record.correct for record in records] == judged
    assert {record.battery for record in records} == {"passkey"}


def test_a_number_that_holds_the_key_is_not_the_key():
    score = PasskeyPrompts.score
    assert score(None, " 12345. Remember", ["12345"]) == 1
    assert score(None, " 123456", ["12345"]) == 0
    assert score(None, " 1 12345", ["12345"]) == 0
    assert score(None, " none", ["12345"]) == 0


def test_a_passkey_is_one_battery_among_others(tokenizer):
    tasks = retrieval_tasks([400], [0.5], prompts_per_cell=1)
    batteries = [PasskeyPrompts(tokenizer), NeedlePrompts(tokenizer)]
    records = run_retrieval(Reader(tokenizer), batteries, tasks, {"plain": nullcontext})
    assert [(record.battery, record.score) for record in records] == [("passkey", 1), ("needle 1x1, 1 asked", 0)]
