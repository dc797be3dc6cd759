"""The processors inside every mode of generation: what is drawn was kept, and the distribution cut is the model's."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM, LogitsProcessor

from hf_longtrunc import EtaLogitsProcessor, attach_processors
from tests.conftest import tiny_config

INF = math.inf
PROMPT = torch.tensor([[1, 5, 9, 13, 5, 9]])
EPSILON = 0.2  # high for a vocabulary of 97: cuts most of it at every step


class Recorder(LogitsProcessor):
    """Keeps what it was handed, and hands it on."""

    supports_continuous_batching = True

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids.clone(), scores.clone()))
        return scores


@pytest.fixture
def assistant() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()


def drawn_tokens_are_kept(model, sequences, prompt_length, processor=None):
    """Every generated token is in the eta-set of the model's own distribution, computed afresh from the sequence."""
    processor = processor or EtaLogitsProcessor(EPSILON)
    with torch.no_grad():
        logits = model(sequences).logits.float()
    for row, sequence in enumerate(sequences):
        cut = processor(None, logits[row, prompt_length - 1 : -1])
        drawn = cut.gather(1, sequence[prompt_length:, None])
        assert (drawn > -INF).all()


MODES = {
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling with transformers' defaults": {"do_sample": True},
    "several returns": {"do_sample": True, "top_k": 0, "num_return_sequences": 5},
    "beam-sampling": {"do_sample": True, "top_k": 0, "num_beams": 3},
    "beam search": {"do_sample": False, "num_beams": 3},
    "greedy": {"do_sample": False},
    "prompt lookup": {"do_sample": True, "top_k": 0, "prompt_lookup_num_tokens": 3},
    "no cache": {"do_sample": True, "top_k": 0, "use_cache": False},
}


@pytest.mark.filterwarnings("ignore:generate.. runs .* and so cuts tokens that it keeps:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_what_is_drawn_was_kept(tiny_model, mode):
    settings = MODES[mode]
    torch.manual_seed(1)
    plain = tiny_model.generate(PROMPT, max_new_tokens=20, **settings)
    torch.manual_seed(1)
    processors = [EtaLogitsProcessor(EPSILON)]
    sequences = tiny_model.generate(PROMPT, max_new_tokens=20, logits_processor=processors, **settings)
    if settings.get("num_beams") is None:
        drawn_tokens_are_kept(tiny_model, sequences, PROMPT.shape[1])
    if settings["do_sample"] and mode != "beam-sampling":
        with pytest.raises(AssertionError):  # the check can fail: without the processor other tokens are drawn
            drawn_tokens_are_kept(tiny_model, plain, PROMPT.shape[1])
    if mode == "greedy":
        assert torch.equal(sequences, plain)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_under_beams_and_sampling_are_the_models_own_cut(tiny_model, num_beams):
    """Under beams transformers hands log-probabilities, in sampling raw logits: the kept set is the same of both."""
    recorder = Recorder()
    tiny_model.generate(
        PROMPT, max_new_tokens=8, num_beams=num_beams, do_sample=True, logits_processor=[recorder], top_k=0
    )
    for ids, scores in recorder.seen:
        logits = tiny_model(ids).logits[:, -1]
        kept = EtaLogitsProcessor(EPSILON)(ids, logits) > -INF
        assert torch.equal(EtaLogitsProcessor(EPSILON)(ids, scores) > -INF, kept)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_assisted_decoding(tiny_model, assistant):
    sequences = tiny_model.generate(
        PROMPT,
        assistant_model=assistant,
        do_sample=True,
        top_k=0,
        max_new_tokens=20,
        logits_processor=[EtaLogitsProcessor(EPSILON)],
    )
    drawn_tokens_are_kept(tiny_model, sequences, PROMPT.shape[1])


def test_left_padded_rows_draw_from_the_sets_that_they_have_alone(tiny_model):
    """Fails when a neighbour or padding reaches a row: the scores of each step are cut as the row alone would be."""
    rows = [[7, 8, 9], [1, 5, 9, 13, 5, 9]]
    ids = torch.tensor([[0, 0, 0, *rows[0]], rows[1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    result = tiny_model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=12,
        logits_processor=[EtaLogitsProcessor(EPSILON)],
        output_scores=True,
        return_dict_in_generate=True,
    )
    for row, prompt in enumerate(rows):
        alone = torch.tensor([prompt + result.sequences[row, 6:].tolist()])
        logits = tiny_model(alone).logits[0, len(prompt) - 1 : -1]
        expected = EtaLogitsProcessor(EPSILON)(None, logits) > -INF
        assert torch.equal(torch.stack(result.scores)[:, row] > -INF, expected)


def test_it_sees_the_models_distribution_before_temperature_top_k_and_top_p(tiny_model):
    """Fails when eta is computed on the tempered or truncated distribution."""
    recorder, behind = Recorder(), Recorder()
    with attach_processors(tiny_model, [behind], after_warpers=True):
        tiny_model.generate(
            PROMPT,
            do_sample=True,
            temperature=0.25,
            top_k=10,
            top_p=0.5,
            max_new_tokens=6,
            logits_processor=[recorder],
        )
    for (ids, scores), (_, tempered) in zip(recorder.seen, behind.seen, strict=True):
        torch.testing.assert_close(scores, tiny_model(ids).logits[:, -1])
        kept = tempered > -INF
        torch.testing.assert_close(tempered[kept], 4 * scores[kept])
        assert kept.sum() <= 10


def test_transformers_eta_cutoff_sits_behind_top_k_50():
    """Why `eta_cutoff=` is not this method: with generate()'s defaults it is handed 50 tokens, ours all of them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=2000, initializer_range=0.02)).eval()
    options = {"do_sample": True, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    stock = model.generate(PROMPT, eta_cutoff=0.01, **options).scores[0]
    ours = model.generate(PROMPT, logits_processor=[EtaLogitsProcessor(0.01)], top_k=0, **options).scores[0]
    assert (stock > -INF).sum() == 50
    assert (ours > -INF).sum() > 1000, "a nearly flat distribution keeps its tail under eta"


def test_generate_batch_through_attach(tiny_model):
    """Continuous batching takes no processor list; the instance's own door lets them in."""
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=10, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    prompts = [[1, 5, 9], [1, 5, 9, 13, 5, 9], [7, 8]]
    with attach_processors(tiny_model, [EtaLogitsProcessor(EPSILON)]):
        outputs = tiny_model.generate_batch(prompts, generation_config=config, continuous_batching_config=settings)
    assert len(outputs) == 3
    for output in outputs.values():
        assert len(output.generated_tokens) == 10
        sequence = torch.tensor([output.prompt_ids + output.generated_tokens])
        drawn_tokens_are_kept(tiny_model, sequence, len(output.prompt_ids))


@pytest.mark.real_model
def test_sampling_on_the_real_model(real_model):
    model, tokenizer = real_model
    prompt = tokenizer(["My name is", "The capital of France is the city of"], return_tensors="pt", padding=True)
    result = model.generate(
        **prompt,
        do_sample=True,
        top_k=0,
        max_new_tokens=12,
        logits_processor=[EtaLogitsProcessor(2e-3)],
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for logits, scores in zip(result.logits, result.scores, strict=True):
        probs = logits.double().softmax(-1)
        entropy = torch.distributions.Categorical(probs=probs).entropy()
        eta = (math.sqrt(2e-3) * torch.exp(-entropy)).clamp_max(2e-3)[:, None]
        on_the_bar = (probs - eta).abs() < 1e-5 * eta
        assert (((scores > -INF) == (probs >= eta)) | on_the_bar).all()
