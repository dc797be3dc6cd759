"""The kept sets of a generation, recorded: equal to what the sampler drew from, in every mode that samples."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    SamplingMaskRecorder,
    SoftmaxBasis,
    TopNSigmaLogitsProcessor,
    attach_processors,
    sampling_settings,
    truncated_log_probs,
    truncated_scores,
)

PROMPTS = torch.tensor([[1, 5, 9], [0, 1, 7], [0, 0, 1]])
SAMPLERS = {
    "eta": ([EtaLogitsProcessor(0.1)], {}),
    "epsilon": ([EpsilonLogitsProcessor(0.05)], {}),
    "top-n-sigma": ([TopNSigmaLogitsProcessor(1.5)], {}),
    "p-less": ([PLessLogitsProcessor()], {}),
    "top-p": ([], {"top_p": 0.8}),
    "min-p": ([], {"min_p": 0.1}),
    "top-k": ([], {"top_k": 7}),
}


@pytest.fixture
def model(tiny_model):
    """In double precision: a step decoded from a cache and the whole text at once differ by 2e-5 in single."""
    return tiny_model.double()


def sample(model, processors, **settings):
    """Three rows of 12 tokens, padded left: ids, the processed scores, and the masks."""
    recorder = SamplingMaskRecorder()
    settings = {**sampling_settings(model), "max_new_tokens": 12, **settings}
    with recorder.attach(model):
        out = model.generate(
            PROMPTS,
            attention_mask=(PROMPTS > 0).long(),
            logits_processor=processors,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    return out.sequences, torch.stack(out.scores, 1), recorder.take()


def logits_of(model, sequences):
    with torch.no_grad():
        return model(sequences, attention_mask=mask_of(sequences), position_ids=positions_of(sequences)).logits[:, 2:-1]


def mask_of(sequences):
    return torch.cat([PROMPTS > 0, torch.ones(3, sequences.shape[1] - 3) > 0], 1).long()


def positions_of(sequences):
    return (mask_of(sequences).cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_policy_log_ratios_are_zero(model, name):
    """What training recomputes from ids and masks is what the sampler drew from; the full vocabulary is not."""
    processors, settings = SAMPLERS[name]
    sequences, scores, masks = sample(model, processors, **settings)
    drawn = sequences[:, 3:]
    assert [len(mask) for mask in masks] == [12] * 3
    assert torch.equal(torch.stack([mask.kept() for mask in masks]), scores > -torch.inf)
    old = scores.log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    found = truncated_scores(logits_of(model, sequences), drawn, masks)
    assert (found.log_probs - old).abs().max() < 2e-6
    full = logits_of(model, sequences).log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    torch.testing.assert_close(full - found.log_probs, found.log_kept_mass, rtol=0, atol=1e-6)
    assert found.log_kept_mass.mean() < -0.01


def test_temperature_is_part_of_the_distribution(model):
    sequences, scores, masks = sample(model, [EtaLogitsProcessor(0.1)], temperature=0.6)
    old = scores.log_softmax(-1).gather(2, sequences[:, 3:, None])[..., 0]
    found = truncated_log_probs(logits_of(model, sequences), sequences[:, 3:], masks, temperature=0.6)
    assert (found - old).abs().max() < 2e-6


def test_rows_that_end_early(model):
    sequences, scores, masks = sample(
        model, [EtaLogitsProcessor(0.1)], eos_token_id=list(range(2, 40)), pad_token_id=0, max_new_tokens=30
    )
    drawn = sequences[:, 3:]
    ended = torch.isin(drawn, torch.arange(2, 40)).cumsum(1)
    is_text = ended - torch.isin(drawn, torch.arange(2, 40)).long() == 0
    assert not is_text.all()
    labels = drawn.masked_fill(~is_text, -100)
    old = scores.log_softmax(-1).gather(2, drawn[..., None])[..., 0].masked_fill(~is_text, 0)
    found = truncated_log_probs(logits_of(model, sequences), labels, masks)
    assert (found - old).abs().max() < 2e-6


def test_the_model_is_as_it_was_and_draws_the_same(tiny_model):
    torch.manual_seed(1)
    before = tiny_model.generate(PROMPTS, **sampling_settings(tiny_model), max_new_tokens=8)
    attributes = dict(tiny_model.__dict__)
    torch.manual_seed(1)
    recorder = SamplingMaskRecorder()
    with recorder.attach(tiny_model):
        during = tiny_model.generate(PROMPTS, **sampling_settings(tiny_model), max_new_tokens=8)
    assert torch.equal(before, during)
    assert tiny_model.__dict__ == attributes
    assert len(recorder.take()) == 3
    assert recorder.take() == []


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
@pytest.mark.parametrize("mode", ["assistant", "prompt_lookup"])
def test_speculative_decoding_is_followed(tiny_model, mode):
    prompt = torch.tensor([[1, 5, 9, 5, 9, 5, 9]])
    options = {"assistant_model": tiny_model} if mode == "assistant" else {"prompt_lookup_num_tokens": 3}
    recorder = SamplingMaskRecorder()
    eta = EtaLogitsProcessor(0.3)
    for _ in range(3):
        with recorder.attach(tiny_model):
            sequences = tiny_model.generate(
                prompt, logits_processor=[eta], **sampling_settings(tiny_model), max_new_tokens=24, **options
            )
        (mask,) = recorder.take()
        count = sequences.shape[1] - 7
        with torch.no_grad():
            logits = tiny_model(sequences).logits[0, 6:-1]
        assert torch.equal(mask[:count].kept(), eta(None, logits) > -torch.inf)
        truncated_log_probs(logits, sequences[0, 7:], mask[:count])


def test_generations_are_told_apart(tiny_model):
    recorder = SamplingMaskRecorder()
    settings = {**sampling_settings(tiny_model), "max_new_tokens": 4}
    with recorder.attach(tiny_model):
        for prompts in (PROMPTS, PROMPTS[:, :2], PROMPTS, PROMPTS[:1], torch.tensor([[1, 2, 3, 4]])):
            tiny_model.generate(prompts, **settings)
            assert [len(mask) for mask in (recorder.take() if len(prompts) > 2 else [])] in ([4] * 3, [])
    assert [len(mask) for mask in recorder.take()] == [4]


def test_threads_record_apart(tiny_model):
    recorder = SamplingMaskRecorder()
    found = {}

    def run(count):
        settings = {**sampling_settings(tiny_model), "max_new_tokens": count}
        tiny_model.generate(PROMPTS, **settings)
        found[count] = [len(mask) for mask in recorder.take()]

    with recorder.attach(tiny_model):
        threads = [threading.Thread(target=run, args=(count,)) for count in (5, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {5: [5] * 3, 9: [9] * 3}


def test_what_draws_from_no_mask_is_refused(tiny_model):
    recorder = SamplingMaskRecorder()
    with recorder.attach(tiny_model):
        for settings in ({"do_sample": False}, {"do_sample": True, "num_beams": 2}):
            with pytest.raises(ValueError, match="takes beams or the most probable token"):
                tiny_model.generate(PROMPTS, max_new_tokens=2, **settings)
        bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, rank=4), 0.05, mode="sample")
        with pytest.raises(ValueError, match="draws the token by itself"):
            tiny_model.generate(PROMPTS, **sampling_settings(tiny_model), max_new_tokens=2, logits_processor=[bat])


@pytest.mark.filterwarnings("ignore:generate.. runs TopKLogitsWarper behind:UserWarning")  # meant here
def test_generate_batch_records_by_request(tiny_model):
    prompts = [[1, 5, 9, 13], [1, 7], [1, 5, 9]]
    config = GenerationConfig(do_sample=True, top_k=5, max_new_tokens=9, eos_token_id=-1, pad_token_id=0)
    options = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, per_request_processors=True)
    recorder = SamplingMaskRecorder()
    eta = EtaLogitsProcessor(0.1)
    with attach_processors(tiny_model, [eta]), recorder.attach(tiny_model):
        outputs = tiny_model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=options, progress_bar=False
        )
    assert set(recorder.requests) == set(outputs)
    for name, output in outputs.items():
        mask, drawn = recorder.requests[name], output.generated_tokens
        with torch.no_grad():
            logits = tiny_model(torch.tensor([output.prompt_ids + drawn])).logits[0, len(output.prompt_ids) - 1 : -1]
        kept = eta(None, logits)
        kept = (kept > -torch.inf) & (kept >= kept.topk(5).values[:, -1:])
        assert torch.equal(mask[:9].kept(), kept)
        truncated_log_probs(logits, torch.tensor(drawn), mask[:9])
    recorder.clear()
    assert recorder.requests == {}


def test_generate_batch_without_requests_is_refused():
    with pytest.raises(ValueError, match="per_request_processors=True"):
        SamplingMaskRecorder()(torch.tensor([1, 2]), torch.randn(2, 9))
