"""Kept sets written down in vLLM: each request's file holds what the processor left of its rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_longtrunc import SamplingMask, truncated_log_probs
from hf_longtrunc.serving.rows import parse_request, truncate
from instruments.vllm_masks import FOLDER, RecordingLogitsProcessor, read_mask

ASKED = [{"eta": 0.01}, {"epsilon": 0.02, "top_n_sigma": 2.0}, {"p_less": True}, {}, {"eta": 0.3}]
VOCAB = 211


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def params(asked, name=None, **others):
    extra = dict(asked) if name is None else {**asked, "sampling_mask": name}
    return SimpleNamespace(extra_args=extra, **others)


def update(added=(), removed=(), moved=()):
    return SimpleNamespace(batch_size=0, removed=removed, added=added, moved=moved)


def test_rows_that_come_go_and_change_places(folder):
    """A simulated engine of eight rows: chunked prompts, requests that end, rows that move, one step too many."""
    generator = torch.Generator().manual_seed(0)
    processor = RecordingLogitsProcessor(None, "cpu", False)
    rows: list[str] = []  # the request in each row
    outputs, kept, asked, length = {}, {}, {}, {}
    for step in range(90):
        removed, moved, added = [], [], []
        for row in reversed(range(len(rows))):
            if len(outputs[rows[row]]) > length[rows[row]]:  # one more than it needed
                removed.append(row)
                last = len(rows) - 1
                if row < last:
                    moved.append((last, row, SimpleNamespace(name="UNIDIRECTIONAL")))
                rows[row] = rows[last]
                rows.pop()
        while len(rows) < 8:
            name = f"request-{len(asked)}"
            asked[name], outputs[name], kept[name] = ASKED[len(asked) % len(ASKED)], [], []
            length[name] = 3 + len(asked) % 7
            named = name if asked[name] else None
            added.append((len(rows), params(asked[name], named), [1, 2], outputs[name]))
            rows.append(name)
        # vLLM removes first, adds, and moves last: what was added stands behind what moved.
        for one in (update(removed=removed, moved=moved), update(added=added)):
            processor.update_state(one)
        logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
        result = processor.apply(logits)
        assert torch.equal(result, truncate(logits, [parse_request(asked[name]) for name in rows]))
        for row, name in enumerate(rows):
            if step % 3 == 0 and not outputs[name]:
                continue  # a piece of a prompt: the engine drops what it drew
            kept[name].append(result[row] > -torch.inf)
            outputs[name].append(int(result[row].argmax()))
    compared = 0
    for name, sets in kept.items():
        if asked[name] and sets:
            count = min(len(sets), length[name])
            mask = read_mask(folder / name, count)
            assert torch.equal(mask.kept(), torch.stack(sets[:count]))
            truncated_log_probs(torch.randn(count, VOCAB), torch.tensor(outputs[name][:count]), mask)
            compared += count
        elif not asked[name]:
            assert not (folder / name).exists()
    assert compared > 350


def test_the_model_runner_v2_by_positions(folder):
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=torch.tensor([0, 0, 4, 2]).numpy()))
    processor = RecordingLogitsProcessor(None, states, False)
    processor.add_request(2, params({"eta": 0.1}, "a"))
    processor.add_request(3, params({"p_less": True}, "b"))
    slots, logits = torch.tensor([3, 2]), torch.randn(2, VOCAB)
    positions = [[0, 2], [1, 3], [2, 4]]  # of prompts of two and four tokens: the first step draws nothing
    for pos in positions:
        context = SimpleNamespace(expanded_idx_mapping=slots, idx_mapping_np=slots.numpy(), pos=torch.tensor(pos))
        result = processor.apply(logits, context)
    assert torch.equal(read_mask(folder / "a", 2).kept(), (result[1] > -torch.inf).expand(2, -1))
    assert torch.equal(read_mask(folder / "b", 2).kept(), (result[0] > -torch.inf).expand(2, -1))
    with pytest.raises(ValueError, match="no record of new token 2 of 3"):
        read_mask(folder / "a", 3)
    whole = (folder / "a").read_bytes()
    for cut in (5, len(whole) - 1):  # in the head of a record, and in what follows it
        (folder / "a").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="ends in the middle of a record"):
            read_mask(folder / "a", 2)
    with pytest.raises(ValueError, match="num_tokens must be"):
        read_mask(folder / "b", 0)


def test_a_name_is_a_plain_file_and_new(folder, monkeypatch):
    check = RecordingLogitsProcessor.validate_params
    check(params({"eta": 0.1}, "rollout-17"))
    check(params({"eta": 0.1}))
    check(params({}, top_p=0.9))
    (folder / "taken").write_bytes(b"")
    for name in ("../x", "a/b", "", ".hidden", 7, "x" * 200):
        with pytest.raises(ValueError, match="must be a file name"):
            check(params({"eta": 0.1}, name))
    with pytest.raises(ValueError, match="'taken' is taken"):
        check(params({"eta": 0.1}, "taken"))
    with pytest.raises(ValueError, match="name one, and leave DRY off"):
        check(params({}, "x"))
    with pytest.raises(ValueError, match="name one, and leave DRY off"):
        check(params({"eta": 0.1, "dry_multiplier": 0.8}, "x"))
    with pytest.raises(ValueError, match="eta must be a number above 0 and below 1"):
        check(params({"eta": 2.0}, "x"))
    for setting in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"n": 2}):
        with pytest.raises(ValueError, match=f"cannot see {next(iter(setting))}="):
            check(params({"eta": 0.1}, "x", **setting))
    monkeypatch.delenv(FOLDER)
    with pytest.raises(ValueError, match=f"start the server with {FOLDER}"):
        check(params({"eta": 0.1}, "x"))


def test_vllms_own_masks_are_read_from_their_ids():
    own = [[3, 5], [0, 1, 210]]
    kept = SamplingMask.from_ids(own, VOCAB).kept()
    assert [row.nonzero()[:, 0].tolist() for row in kept] == own
