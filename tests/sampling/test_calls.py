"""What a processor finds out about its call: the warning, the mode, and the settings that leave it alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EtaLogitsProcessor,
    SamplingMaskRecorder,
    SoftmaxBasis,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    TruncationTrace,
    XTCLogitsProcessor,
    attach_processors,
    sampling_settings,
)
from hf_longtrunc.sampling.calls import is_sampling, neighbours
from hf_longtrunc.serving.continuous_batching import TruncationByRequest

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


class Bias(LogitsProcessor):
    """Disfavours half of the vocabulary, in front of or behind others."""

    def __call__(self, input_ids, scores):
        return scores - 8.0 * (torch.arange(scores.shape[-1]) % 2)


class Nothing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def test_what_stands_behind_basis_aware_truncation_has_its_effect(tiny_model):
    """Drawing itself it left one token, of which a bias disfavoured every second."""
    torch.manual_seed(1)
    prompts = PROMPT.repeat(24, 1)
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 1e-3)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 2}
    drawn = tiny_model.generate(prompts, logits_processor=[bat, Bias()], **options)[:, 6:]
    assert (drawn % 2).double().mean() < 0.1
    scores = tiny_model.generate(
        PROMPT, logits_processor=[bat, Nothing()], output_scores=True, return_dict_in_generate=True, **options
    ).scores
    assert all((each > -torch.inf).sum() > 1 for each in scores)
    tempered = tiny_model.generate(
        PROMPT, logits_processor=[bat], temperature=0.5, output_scores=True, return_dict_in_generate=True, **options
    ).scores
    assert all((each > -torch.inf).sum() > 1 for each in tempered)
    alone = tiny_model.generate(
        PROMPT, logits_processor=[bat], output_scores=True, return_dict_in_generate=True, **options
    ).scores
    assert all((each > -torch.inf).sum() == 1 for each in alone)


def test_a_trace_of_sample_mode_shows_what_the_rule_kept(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 3)
    records = []
    for mode in ("sample", "mask"):
        torch.manual_seed(0)
        trace = TruncationTrace([BasisAwareLogitsProcessor(basis, 0.05, mode=mode)])
        sequences = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=1, logits_processor=[trace])
        records.append(trace.finish(sequences).records[0])
    sampled, masked = records
    assert (sampled.kept, sampled.kept_mass) == (masked.kept, masked.kept_mass)
    assert sampled.kept > 1
    assert sampled.cut_above == 0


@pytest.mark.parametrize(
    ("in_front", "names"),
    [
        (Bias(), "Bias"),
        (TopKLogitsWarper(5), "TopKLogitsWarper"),
        (EtaLogitsProcessor(0.3), "EtaLogitsProcessor"),
        (TemperatureLogitsWarper(0.7), "TemperatureLogitsWarper"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_whatever_changes_the_distribution_in_front_of_a_proof_is_warned_of(tiny_model, in_front, names):
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)
    with pytest.warns(UserWarning, match=f"{names} in front of BasisAwareLogitsProcessor.*proves nothing") as caught:
        generate(tiny_model, [in_front, bat], top_k=0)
    assert len(caught) == 1
    silent = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)
    generate(tiny_model, [Nothing(), silent], top_k=0)  # any warning would be an error
    generate(tiny_model, [TruncationTrace([silent])], top_k=0)


class InPlace(LogitsProcessor):
    """Masks the scores that it is handed, as xgrammar's processor does."""

    def __call__(self, input_ids, scores):
        return scores.index_fill_(1, torch.arange(50), -torch.inf)


def test_a_mask_in_place_in_front_of_a_proof_is_warned_of(tiny_model):
    """The loop's own copy of the model's scores was masked with it, and no change was to be seen."""
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)
    with pytest.warns(UserWarning, match=r"InPlace in front of BasisAware.*proves nothing"):
        generate(tiny_model, [InPlace(), bat], top_k=0)


def test_a_grammar_behind_a_truncation_sampler_is_refused(tiny_model):
    grammar = PrefixConstrainedLogitsProcessor(lambda batch, ids: [7, 8], 1)
    for sampler in (EtaLogitsProcessor(0.2), BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)):
        with pytest.raises(ValueError, match=r"PrefixConstrained.* runs behind .*put it in front"):
            generate(tiny_model, [sampler, grammar], top_k=0)
    result = generate(tiny_model, [grammar, EtaLogitsProcessor(0.2)], top_k=0)
    assert set(result[0, 6:].tolist()) <= {7, 8}


class Nobody:
    """Lets nothing through in the second row."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(0, torch.tensor([1]), -torch.inf)


def test_a_row_with_nothing_left_is_refused_by_name(tiny_model):
    """The sampler says "probability tensor contains either inf, nan or element < 0"."""
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.2)
    recorder = SamplingMaskRecorder()
    for processor in (EtaLogitsProcessor(0.2), TopHLogitsProcessor(), XTCLogitsProcessor(), bat, recorder):
        with pytest.raises(ValueError, match=rf"row 1 has no token left.*{type(processor).__name__}.*Nobody removed"):
            generate(tiny_model, [Nobody(), processor], top_k=0, num_return_sequences=2)


def test_attached_processors_warn_of_the_default_top_k_in_generate_batch(tiny_model):
    config = GenerationConfig(do_sample=True, max_new_tokens=2, eos_token_id=-1, pad_token_id=0, top_k=50)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    for processor in (EtaLogitsProcessor(0.2), TruncationByRequest("eta", 0.2)):
        with (
            attach_processors(tiny_model, [processor]),
            pytest.warns(UserWarning, match="TopKLogitsWarper behind") as caught,
        ):
            tiny_model.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
        assert len(caught) == 1


def test_values_are_one_a_prompt(tiny_model):
    """Two values for four prompts were given to two prompts each."""
    two = EtaLogitsProcessor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"epsilon has 2 values, and generate\(\) runs 4 rows, 1 for each prompt"):
        tiny_model.generate(PROMPT.repeat(4, 1), do_sample=True, top_k=0, max_new_tokens=1, logits_processor=[two])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "logits_processor": [two]}
    assert len(tiny_model.generate(PROMPT.repeat(2, 1), num_return_sequences=2, **options)) == 4
    assert len(tiny_model.generate(PROMPT.repeat(2, 1), num_beams=2, **options)) == 2


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
        seen.append((is_sampling(), [type(each).__name__ for each in neighbours(ask)[1]]))
        return scores

    generate(tiny_model, [ask], **({"top_k": 5} if options["do_sample"] else {}), **options)
    assert {draws for draws, _ in seen} == {expected}
    assert seen[0][1] == (["TopKLogitsWarper"] if options["do_sample"] else [])
    assert is_sampling()
    assert neighbours(ask) == ([], [])
