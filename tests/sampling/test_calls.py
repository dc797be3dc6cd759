"""What a processor finds out about its call: the warning, the mode, and the settings that leave it alone."""

from __future__ import annotations

import warnings

import pytest
import torch

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EtaLogitsProcessor,
    SoftmaxBasis,
    TopNSigmaLogitsProcessor,
    TruncationTrace,
    attach_processors,
    sampling_settings,
)
from hf_longtrunc.sampling.calls import draws_by_itself, neighbours

PROMPT = torch.tensor([[1, 5, 9, 13, 5, 9]])
LATER = {
    "transformers' default": ({}, "TopKLogitsWarper"),
    "top-p": ({"top_k": 0, "top_p": 0.9}, "TopPLogitsWarper"),
    "two": ({"top_p": 0.9}, "TopKLogitsWarper and TopPLogitsWarper"),
    "eta beside eta_cutoff": ({"top_k": 0, "eta_cutoff": 2e-3}, "EtaLogitsWarper"),
}


def generate(model, processors, **options):
    return model.generate(PROMPT, max_new_tokens=3, logits_processor=processors, **{"do_sample": True, **options})


@pytest.mark.parametrize("case", LATER)
@pytest.mark.parametrize(
    "make", [lambda: EtaLogitsProcessor(0.2), TopNSigmaLogitsProcessor], ids=["eta", "top-n-sigma"]
)
def test_a_sampler_behind_is_warned_of_once(tiny_model, case, make):
    options, names = LATER[case]
    processor = make()
    message = f"runs {names} behind {type(processor).__name__}, and so cuts tokens that it keeps.*sampling_settings"
    with pytest.warns(UserWarning, match=message) as caught:
        generate(tiny_model, [processor], **options)
    assert len(caught) == 1
    generate(tiny_model, [processor], **options)  # a second warning would be an error


def test_the_warning_reaches_through_a_trace_and_an_attachment(tiny_model):
    with pytest.warns(UserWarning, match="TopKLogitsWarper behind EtaLogitsProcessor"):
        generate(tiny_model, [TruncationTrace([EtaLogitsProcessor(0.2)])])
    with (
        pytest.warns(UserWarning, match="TopKLogitsWarper behind EtaLogitsProcessor"),
        attach_processors(tiny_model, [EtaLogitsProcessor(0.2)]),
        TruncationTrace().observe(tiny_model),
    ):
        generate(tiny_model, [])


def test_a_temperature_behind_a_drawn_token_is_warned_of(tiny_model):
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)
    message = "TemperatureLogitsWarper behind BasisAwareLogitsProcessor, and so changes nothing.*mode='mask'"
    with pytest.warns(UserWarning, match=message) as caught:
        generate(tiny_model, [bat], top_k=0, temperature=0.7)
    assert len(caught) == 1
    mask = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2, mode="mask")
    generate(tiny_model, [mask], top_k=0, temperature=0.7)  # any warning would be an error


def test_the_settings_leave_the_processor_alone(tiny_model):
    """A model that comes with settings of its own: none of them cuts what eta keeps, and nothing is warned of."""
    own = {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "top_h": 0.4, "typical_p": 0.9}
    own |= {"guidance_scale": 2.0, "encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2}
    own |= {"no_repeat_ngram_size": 2, "sequence_bias": [[[5], 3.0]]}
    tiny_model.generation_config.update(do_sample=True, **own)
    settings = sampling_settings(tiny_model)
    eta = EtaLogitsProcessor(0.2)
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    result = tiny_model.generate(PROMPT, max_new_tokens=5, logits_processor=[eta], **settings, **options)
    for scores, logits in zip(result.scores, result.logits, strict=True):
        assert torch.equal(scores, eta(None, logits))
    with pytest.warns(UserWarning, match="and so cuts"):
        tiny_model.generate(PROMPT, max_new_tokens=1, logits_processor=[eta])


def test_nothing_is_warned_of_without_a_reason(tiny_model):
    eta = EtaLogitsProcessor(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tiny_model, [eta], top_k=0)
        generate(tiny_model, [eta], do_sample=False)
        generate(tiny_model, [eta], top_k=0, temperature=0.7)
        eta(PROMPT, torch.randn(1, 97))
        with attach_processors(tiny_model, [eta], after_warpers=True):
            generate(tiny_model, [])


def test_a_penalty_in_front_of_basis_aware_truncation_is_warned_of(tiny_model):
    processor = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 4), 0.2)
    with pytest.warns(UserWarning, match="RepetitionPenaltyLogitsProcessor in front of BasisAware.*proves nothing"):
        generate(tiny_model, [processor], repetition_penalty=1.3, top_k=0)


MODES = {
    "sampling": ({"do_sample": True}, True),
    "greedy": ({"do_sample": False}, False),
    "beams": ({"do_sample": False, "num_beams": 2}, False),
    "beam-sampling": ({"do_sample": True, "num_beams": 2}, False),
    "prompt lookup": ({"do_sample": True, "prompt_lookup_num_tokens": 2}, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_who_draws(tiny_model, mode):
    options, expected = MODES[mode]
    seen = []

    def ask(input_ids, scores):
        seen.append((draws_by_itself(), [type(each).__name__ for each in neighbours(ask)[1]]))
        return scores

    generate(tiny_model, [ask], **({"top_k": 5} if options["do_sample"] else {}), **options)
    assert {draws for draws, _ in seen} == {expected}
    assert seen[0][1] == (["TopKLogitsWarper"] if options["do_sample"] else [])
    assert draws_by_itself()
    assert neighbours(ask) == ([], [])
