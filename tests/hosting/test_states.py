"""Caches between calls: what goes on from them equals what is read anew, whatever was asked before."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from hf_longtrunc import AttentionTrace, DualChunkAttention, LMInfinite
from hf_longtrunc.attention import patch
from hf_longtrunc.hosting import HostSettings, hosted_generate
from hf_longtrunc.hosting.generate import host_of
from tests.conftest import tiny_config

TECHNIQUE = LMInfinite(num_sink_tokens=2, window_length=16)
SETTINGS = HostSettings(technique=TECHNIQUE).to_json()
NEW = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def answer(model, ids, settings=SETTINGS, **options):
    """Return the new tokens and how many of the prompt's were read earlier."""
    output = hosted_generate(
        settings, model, ids, **(options if "generation_config" in options else {**NEW, **options})
    )
    return output.sequences[0, ids.shape[1] :].tolist(), output.reading["reused"]


def anew(model, ids, technique=TECHNIQUE):
    with technique(model):
        return model.generate(ids, **NEW).sequences[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("technique", [TECHNIQUE, DualChunkAttention(chunk_length=12, trained_length=16)], ids=repr)
def test_random_histories(tiny_model, technique):
    """Turns, edits, branches and repetitions, against reading everything anew."""
    settings, draw = HostSettings(technique=technique).to_json(), random.Random(4)
    reference = copy.deepcopy(tiny_model)
    technique.attach(reference)
    history, reused = [text(20)], 0
    for step in range(12):
        before = draw.choice(history[-3:])
        kept = before.shape[1] - draw.choice([0, 0, 1, 3, before.shape[1] // 2])
        ids = torch.cat([before[:, :kept], text(draw.choice([0, 1, 2, 15, 40]) + 1, seed=step + 1)], dim=1)
        history.append(ids)
        tokens, again = answer(tiny_model, ids, settings)
        assert tokens == reference.generate(ids, **NEW).sequences[0, ids.shape[1] :].tolist(), f"step {step}"
        assert again < ids.shape[1]
        reused += again
    assert reused > sum(ids.shape[1] for ids in history) / 3


def test_a_turn_reads_what_is_new_and_the_last_message_can_be_edited(tiny_model):
    turns = [text(100, seed=1)]
    for turn in range(1, 5):
        turns.append(torch.cat([turns[-1], text(80, seed=turn + 1)], dim=1))
    assert [answer(tiny_model, ids)[1] for ids in turns] == [0, 99, 179, 259, 339]
    edited = torch.cat([turns[3], text(80, seed=99)], dim=1)  # as long as the last turn
    assert answer(tiny_model, edited) == (anew(tiny_model, edited), 339)
    assert answer(tiny_model, edited)[1] == 419  # a second answer to the same message
    assert answer(tiny_model, turns[2])[1] == 0  # older turns were let go


def test_tokens_at_the_end_that_changed_are_taken_back(tiny_model):
    ids = text(200, seed=2)
    answer(tiny_model, ids)
    same_length = torch.cat([ids[:, :150], text(50, seed=5)], dim=1)
    assert [answer(tiny_model, same_length)[1] for _ in range(2)] == [150, 199]  # kept, though as long as the first
    other = torch.cat([ids[:, :150], text(40, seed=3)], dim=1)
    assert answer(tiny_model, other) == (anew(tiny_model, other), 150)  # 49 taken back, of at most 65
    far = torch.cat([ids[:, :60], text(80, seed=4)], dim=1)
    assert answer(tiny_model, far) == (anew(tiny_model, far), 0)


def test_bytes_are_bounded_and_the_least_recently_used_go(tiny_model):
    one = _bytes_of_a_state(tiny_model)
    settings = HostSettings(technique=TECHNIQUE, cache_bytes=2 * one).to_json()
    first, second, third = (text(60, seed=seed) for seed in (1, 2, 3))
    for ids in (first, second, first, third):  # the second is the least recently used
        answer(tiny_model, ids, settings)
        assert host_of(tiny_model).states.bytes <= 2 * one
    assert [answer(tiny_model, ids, settings)[1] for ids in (first, third, second)] == [59, 59, 0]
    for limit in (one - 1, 0):
        small = HostSettings(technique=TECHNIQUE, cache_bytes=limit).to_json()
        assert [answer(tiny_model, first, small)[1] for _ in range(2)] == [0, 0]


def _bytes_of_a_state(model) -> int:
    answer(model, text(60, seed=50))
    size = host_of(model).states.bytes
    del model._hf_longtrunc_host
    return size


def test_other_weights_settings_and_salts_read_anew(tiny_model):
    ids, other = text(60), HostSettings(technique=LMInfinite(num_sink_tokens=2, window_length=20))
    answer(tiny_model, ids)
    assert answer(tiny_model, ids, other.to_json()) == (anew(tiny_model, ids, other.technique), 0)
    salted = GenerationConfig(cache_salt="mine", pad_token_id=0, **NEW)
    assert [answer(tiny_model, ids, generation_config=salted)[1] for _ in range(2)] == [0, 59]
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(-1)
        tiny_model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert answer(tiny_model, ids) == (anew(tiny_model, ids), 0)


def test_calls_that_are_not_one_plain_text_are_left_to_generate(tiny_model):
    ids, mask = text(60), torch.ones(1, 60, dtype=torch.long)
    mask[0, :5] = 0
    for options in ({"num_beams": 2}, {"attention_mask": mask}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        for _ in range(2):
            assert answer(tiny_model, ids, **options)[1] == 0
        with TECHNIQUE(tiny_model):
            wanted = tiny_model.generate(ids, **NEW, **options).sequences
        assert torch.equal(hosted_generate(SETTINGS, tiny_model, ids, **NEW, **options).sequences, wanted)


def test_threads_get_what_each_gets_alone(tiny_model):
    talks = [[text(40 + 10 * turn, seed=seed) for turn in range(3)] for seed in range(4)]
    with TECHNIQUE(copy.deepcopy(tiny_model)) as handle:
        made = [[handle.model.generate(ids, **NEW).sequences for ids in talk] for talk in talks]
    alone = [[each[0, -4:].tolist() for each in talk] for talk in made]
    found = [[] for _ in talks]

    def speak(number: int) -> None:
        found[number].extend(answer(tiny_model, ids)[0] for ids in talks[number])

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_the_model_is_as_it_was_after_an_exception_too(tiny_model):
    ids, host = text(60), host_of(tiny_model)
    before = dict(vars(tiny_model))
    plain = tiny_model(ids).logits
    good = answer(tiny_model, ids)[0]

    class Cancelled(Exception):  # noqa: N818
        pass

    class Streamer:
        def put(self, value):
            raise Cancelled

    longer = torch.cat([ids, text(9, seed=7)], dim=1)
    with pytest.raises(Cancelled):
        hosted_generate(SETTINGS, tiny_model, longer, streamer=Streamer(), **NEW)
    assert vars(tiny_model) == before == {**before, "_hf_longtrunc_host": host}
    assert torch.equal(tiny_model(ids).logits, plain)
    assert answer(tiny_model, ids)[0] == good
    assert answer(tiny_model, longer)[0] == anew(tiny_model, longer)


def test_a_model_that_nobody_holds_goes_with_its_caches():
    model = LlamaForCausalLM(tiny_config()).eval()
    answer(model, text(60))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_is_forgotten_is_said(tiny_model, caplog):
    output = hosted_generate(SETTINGS, tiny_model, text(60), **NEW)
    assert output.reading == {"read": 60, "kept": 18, "forgotten": 42, "window": 16, "reused": 0}
    assert "60 tokens read (0 of them earlier), 18 kept, 42 forgotten" in caplog.text
    caplog.clear()
    assert hosted_generate(SETTINGS, tiny_model, text(18), **NEW).reading["forgotten"] == 0
    whole = HostSettings(technique=DualChunkAttention(trained_length=32)).to_json()
    assert hosted_generate(whole, tiny_model, text(60), **NEW).reading["kept"] == 60
    assert caplog.text == ""


def test_a_model_is_probed_once_and_again_after_it_changed(tiny_model, monkeypatch):
    probed, probe = [], patch.probe
    monkeypatch.setattr(patch, "probe", lambda decoder, *args: probed.append(decoder) or probe(decoder, *args))
    ids, plain = text(60), tiny_model(text(60)).logits
    for _ in range(3):
        tokens, _ = answer(tiny_model, ids)
        assert torch.equal(tiny_model(ids).logits, plain)
    assert len(probed) == 1
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(-1)
        plain = -plain
    changed, _ = answer(tiny_model, ids)
    assert changed == anew(tiny_model, ids) != tokens
    tiny_model.config.rms_norm_eps = 1e-3
    answer(tiny_model, ids)
    assert len(probed) == 2
    copied = copy.deepcopy(tiny_model)
    assert answer(copied, ids)[0] == answer(tiny_model, ids)[0]
    assert len(probed) == 3
    assert torch.equal(copied(ids).logits, plain)
    with TECHNIQUE(tiny_model), pytest.raises(ValueError, match="patched"):
        answer(tiny_model, ids)
    answer(tiny_model, ids)


def test_where_an_answer_attended(tiny_model):
    ids = text(300)
    output = hosted_generate(SETTINGS, tiny_model, ids, trace_attention=True, **NEW)
    with TECHNIQUE(tiny_model) as handle, AttentionTrace(handle, stretch=64) as trace:
        wanted = tiny_model.generate(ids, **NEW)
    assert torch.equal(output.sequences, wanted.sequences)
    mean = sum(record.mass[0] for record in trace.records) / len(trace.records)
    attended = output.reading["attended"]
    assert {each["start"] // 64 for each in attended} == {n for n, share in enumerate(mean.tolist()) if share > 0}
    assert [each["share"] for each in attended] == sorted((each["share"] for each in attended), reverse=True)
    for each in attended:
        assert each["share"] == pytest.approx(float(mean[each["start"] // 64]), abs=1e-3)
    assert sum(each["share"] for each in attended) == pytest.approx(1, abs=1e-3)
