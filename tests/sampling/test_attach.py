"""attach_processors: one instance, inside the block only, in the place that was asked for."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper

from hf_longtrunc import EtaLogitsProcessor, attach_processors

PROMPT = torch.tensor([[1, 5, 9]])


class Tag(LogitsProcessor):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def __call__(self, input_ids, scores):
        self.log.append(self.name)
        return scores


def types_of(model, **settings):
    """The processor list that generate would build, by class name."""
    seen = []
    build = model._get_logits_processor

    def spy(*args, **kwargs):
        seen.append(build(*args, **kwargs))
        return seen[-1]

    model._get_logits_processor = spy
    try:
        model.generate(PROMPT, max_new_tokens=1, **settings)
    finally:
        del model._get_logits_processor
    return [type(processor).__name__ for processor in seen[0]]


def test_same_draws_as_the_list(tiny_model):
    eta = EtaLogitsProcessor(0.2)
    torch.manual_seed(3)
    listed = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=20, logits_processor=[eta])
    torch.manual_seed(3)
    with attach_processors(tiny_model, [eta]):
        attached = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=20)
    assert torch.equal(listed, attached)


@pytest.mark.filterwarnings("ignore:generate.. runs .* and so cuts tokens that it keeps:UserWarning")
def test_places_in_the_list(tiny_model):
    log = []
    eta = EtaLogitsProcessor(0.2)
    settings = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2, "renormalize_logits": True}
    expected = {
        False: ["RepetitionPenaltyLogitsProcessor", "Tag", "EtaLogitsProcessor"],
        True: ["RepetitionPenaltyLogitsProcessor", "Tag"],
    }
    warpers = ["TemperatureLogitsWarper", "TopKLogitsWarper"]
    for after, front in expected.items():
        tail = ["EtaLogitsProcessor"] if after else []
        with attach_processors(tiny_model, [eta], after_warpers=after):
            inside = []
            original = tiny_model._get_logits_processor

            def look(*args, _build=original, _seen=inside, **kwargs):
                _seen.extend(_build(*args, **kwargs))
                return _build(*args, **kwargs)

            tiny_model._get_logits_processor = look
            tiny_model.generate(PROMPT, max_new_tokens=1, logits_processor=[Tag("mine", log)], **settings)
            tiny_model._get_logits_processor = original
        assert [type(p).__name__ for p in inside] == [*front, *warpers, *tail, "LogitNormalization"]


def test_undone_completely_also_after_an_exception(tiny_model):
    before = dict(tiny_model.__dict__)
    with contextlib.suppress(RuntimeError), attach_processors(tiny_model, [EtaLogitsProcessor(0.2)]):
        assert "_get_logits_processor" in tiny_model.__dict__
        raise RuntimeError("on purpose")
    assert tiny_model.__dict__ == before
    assert types_of(tiny_model, do_sample=True) == ["TopKLogitsWarper"]


def test_attached_without_a_block(tiny_model):
    """An un-entered handle is no silent no-op: it is attached, and says so."""
    log = []
    handle = attach_processors(tiny_model, [Tag("here", log)])
    tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    assert log == ["here"]
    assert "in front of the warpers" in repr(handle)
    inner = attach_processors(tiny_model, [Tag("inner", log)])
    with pytest.raises(RuntimeError, match="detach that first"):
        handle.detach()
    inner.detach()
    handle.detach()
    tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    assert log == ["here"]


def test_blocks_nest_and_other_models_are_not_touched(tiny_model, tiny_gpt2):
    log = []
    with attach_processors(tiny_model, [Tag("outer", log)]):
        with attach_processors(tiny_model, [Tag("inner", log)]):
            tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False)
            assert sorted(log) == ["inner", "outer"]
        tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False)
        tiny_gpt2.generate(PROMPT, max_new_tokens=1, do_sample=False)
    assert sorted(log) == ["inner", "outer", "outer"]
    tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False)
    assert len(log) == 3


@pytest.mark.parametrize("after_warpers", [False, True])
def test_a_processor_that_is_also_in_the_list_runs_once(tiny_model, after_warpers):
    log = []
    tag = Tag("once", log)
    with attach_processors(tiny_model, [tag], after_warpers=after_warpers):
        tiny_model.generate(PROMPT, max_new_tokens=1, do_sample=False, logits_processor=[tag])
    assert log == ["once"]


def test_a_user_can_move_eta_behind_temperature(tiny_model):
    options = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 1}
    options |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    eta = EtaLogitsProcessor(0.05)
    with attach_processors(tiny_model, [eta], after_warpers=True):
        result = tiny_model.generate(PROMPT, **options)
    tempered = TemperatureLogitsWarper(3.0)(None, result.logits[0])
    assert torch.equal(result.scores[0], eta(None, tempered))
    assert not torch.equal(result.scores[0] > -torch.inf, eta(None, result.logits[0]) > -torch.inf)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
def test_peft_wrappers_are_reached(tiny_model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    log = []
    with attach_processors(wrapped, [Tag("seen", log)]):
        wrapped.generate(input_ids=PROMPT, max_new_tokens=1, do_sample=False)
    assert log == ["seen"]
    assert "_get_logits_processor" not in tiny_model.__dict__


def test_bad_arguments_are_named(tiny_model):
    eta = EtaLogitsProcessor(0.1)
    with (
        pytest.raises(TypeError, match="model must be a transformers model with generate"),
        attach_processors(3, [eta]),
    ):
        pass
    with pytest.raises(TypeError, match=r"processors must be a list.*write \[processor\]"):
        attach_processors(tiny_model, eta).__enter__()
    with pytest.raises(TypeError, match=r"processors\[1\] must be callable, got int"):
        attach_processors(tiny_model, [eta, 3]).__enter__()
