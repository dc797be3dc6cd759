"""BasisAwareLogitsProcessor as a host object: what it draws, which sets it leaves, and every mode of generation."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    SoftmaxBasis,
    SupportChecker,
    TruncationTrace,
    attach_processors,
)
from tests.conftest import tiny_config

INF = math.inf
PROMPT = torch.tensor([[1, 5, 9, 13, 5, 9]])
EPSILON = 0.2


@pytest.fixture
def basis(tiny_model) -> SoftmaxBasis:
    return SoftmaxBasis.from_model(tiny_model, rank=6)


@pytest.fixture
def logits(tiny_model) -> torch.Tensor:
    """[12, 97]: what the tiny model says along a text."""
    with torch.no_grad():
        return tiny_model(torch.arange(1, 13)[None]).logits[0]


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + n) for n in range(count)]


@pytest.mark.parametrize("cutoff", ["eta", "epsilon"])
def test_mask_is_token_by_token_checks_and_holds_the_plain_set(basis, logits, cutoff):
    processor = BasisAwareLogitsProcessor(basis, EPSILON, cutoff=cutoff, mode="mask", floor=0)
    kept = processor(None, logits) > -INF
    plain = (EtaLogitsProcessor if cutoff == "eta" else EpsilonLogitsProcessor)(EPSILON)(None, logits) > -INF
    assert (kept | ~plain).all()
    assert kept.sum() > plain.sum()
    checker, every = SupportChecker(basis), torch.arange(97)
    for row, tau in enumerate(processor.threshold(logits)[:, 0].tolist()):
        alone = checker.check(logits[row], tau, every) == 1
        assert torch.equal(kept[row], alone | plain[row])


def test_mask_leaves_kept_scores_as_they_are_and_cuts_under_the_floor(basis, logits):
    processor = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0.015)
    before = logits.clone()
    result = processor(None, logits)
    assert torch.equal(logits, before)
    kept = result > -INF
    assert torch.equal(result[kept], logits[kept])
    plain = EtaLogitsProcessor(EPSILON)(None, logits) > -INF
    assert (kept & ~plain).any()
    assert logits.softmax(-1)[kept & ~plain].min() >= 0.015
    assert torch.equal(result, processor(None, logits)), "deterministic"


def remember_decisions(sampler) -> dict[int, int]:
    """The same row thousands of times: decide each of its tokens once."""
    decisions, row = {}, sampler.checker.row

    class Remembering:
        def __init__(self, scores):
            self.row = row(scores)

        def decide(self, token, tau):
            if token not in decisions:
                decisions[token] = self.row.decide(token, tau)
            return decisions[token]

    sampler.checker.row = Remembering
    return decisions


@pytest.mark.parametrize("cutoff", ["eta", "epsilon"])
def test_sampling_follows_p_restricted_to_the_kept_set(basis, logits, cutoff):
    """Chi-square over 4,000 draws of one row; the sampler must not lean to the tokens that it tries first."""
    row = logits[7:8]
    options = {"cutoff": cutoff, "epsilon": EPSILON}
    kept = BasisAwareLogitsProcessor(basis, mode="mask", floor=0, **options)(None, row)[0] > -INF
    plain = row[0].softmax(-1) >= BasisAwareLogitsProcessor(basis, **options).threshold(row)[0]
    assert kept.sum() > plain.sum() + 1, "the case must have rescued tokens"
    expected = row[0].double().softmax(-1) * kept
    expected /= expected.sum()
    sampler = BasisAwareLogitsProcessor(basis, generator=torch.Generator().manual_seed(1), **options)
    draws = 4000
    decisions = remember_decisions(sampler)
    counts = torch.zeros(97, dtype=torch.double)
    for _ in range(draws // 100):
        result = sampler(None, row.expand(100, -1))
        assert ((result > -INF).sum(-1) == 1).all()
        counts += (result > -INF).sum(0)
    assert counts[~kept].sum() == 0
    assert len(decisions) > 10
    likely = expected * draws >= 5
    bins = torch.cat([expected[likely] * draws, (expected[~likely].sum() * draws)[None]])
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    used = bins > 0
    chi2 = ((seen - bins)[used] ** 2 / bins[used]).sum().item()
    degrees = int(used.sum()) - 1
    # The 1e-4 quantile of chi-square by Wilson and Hilferty.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi2 < limit


def test_a_row_draws_alone_what_it_draws_in_a_batch(basis, logits):
    scores = logits[:8]
    together = BasisAwareLogitsProcessor(basis, EPSILON, generator=generators(8))(None, scores)
    for row in range(8):
        alone = BasisAwareLogitsProcessor(basis, EPSILON, generator=generators(8)[row : row + 1])
        assert torch.equal(alone(None, scores[row : row + 1])[0], together[row])


def test_left_padded_batch_draws_the_texts_that_its_rows_draw_alone(tiny_model, basis):
    rows = [torch.arange(2, 3 + n) for n in range(8)]
    ids = torch.stack([torch.cat([torch.zeros(8 - len(row), dtype=torch.long), row]) for row in rows])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8}
    processor = BasisAwareLogitsProcessor(basis, EPSILON, generator=generators(8))
    together = tiny_model.generate(ids, attention_mask=(ids != 0).long(), logits_processor=[processor], **options)
    for n, row in enumerate(rows):
        processor = BasisAwareLogitsProcessor(basis, EPSILON, generator=generators(8)[n : n + 1])
        alone = tiny_model.generate(row[None], logits_processor=[processor], **options)
        assert torch.equal(alone[0, len(row) :], together[n, 8:])


def test_max_tries_falls_back_to_the_most_probable_token(basis, logits):
    few = basis.truncated(1)  # refuses most draws
    sampler = BasisAwareLogitsProcessor(few, 0.2, cutoff="epsilon", max_tries=1, generator=generators(1)[0])
    unlimited = BasisAwareLogitsProcessor(few, 0.2, cutoff="epsilon", generator=generators(1)[0])
    first, second = (p(None, logits.repeat(4, 1)).argmax(-1) for p in (sampler, unlimited))
    top = logits.repeat(4, 1).argmax(-1)
    assert (first != second).any()
    assert (first[first != second] == top[first != second]).all()


MODES = {
    "sampling": {"do_sample": True, "top_k": 0},
    "transformers' defaults": {"do_sample": True},
    "several returns": {"do_sample": True, "top_k": 0, "num_return_sequences": 4},
    "prompt lookup": {"do_sample": True, "top_k": 0, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.filterwarnings("ignore:generate.. runs TopKLogitsWarper behind:UserWarning")  # it masks there
@pytest.mark.parametrize("mode", MODES)
def test_every_drawn_token_is_in_the_kept_set(tiny_model, basis, mode):
    processor = BasisAwareLogitsProcessor(basis, EPSILON)
    sequences = tiny_model.generate(PROMPT, max_new_tokens=15, logits_processor=[processor], **MODES[mode])
    again = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0)
    with torch.no_grad():
        logits = tiny_model(sequences).logits
    for row, sequence in enumerate(sequences):
        kept = again(None, logits[row, 5:-1])
        assert (kept.gather(1, sequence[6:, None]) > -INF).all()


def test_seeds_repeat_and_differ(tiny_model, basis):
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        processor = BasisAwareLogitsProcessor(basis, EPSILON)
        texts.append(
            tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=15, logits_processor=[processor])
        )
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("do_sample", [True, False])
def test_beams_in_mask_mode(tiny_model, basis, do_sample):
    """Beam search hands log-probabilities and its own running sums come later: the kept sets are the same."""
    processor = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0)
    result = tiny_model.generate(
        PROMPT, num_beams=3, do_sample=do_sample, top_k=0, max_new_tokens=6, logits_processor=[processor]
    )
    if not do_sample:
        with torch.no_grad():
            kept = processor(None, tiny_model(result).logits[0, 5:-1])
        assert (kept.gather(1, result[0, 6:, None]) > -INF).all()


@pytest.mark.parametrize(("num_beams", "do_sample"), [(3, False), (3, True), (1, False)])
def test_sample_mode_masks_where_generate_does_not_draw_by_itself(tiny_model, basis, num_beams, do_sample):
    """Its one token a row was what beams had to go on with, and greedy decoding became random."""
    options = {"num_beams": num_beams, "do_sample": do_sample, "max_new_tokens": 8}
    options |= {"top_k": 0} if do_sample else {}
    results = []
    for mode in ("sample", "mask"):
        torch.manual_seed(4)
        processor = BasisAwareLogitsProcessor(basis, EPSILON, mode=mode)
        results.append(tiny_model.generate(PROMPT, logits_processor=[processor], **options))
    assert torch.equal(*results)
    if num_beams == 1:
        assert torch.equal(results[0], tiny_model.generate(PROMPT, **options))


def test_continuous_batching_is_refused_and_not_run_without_it(tiny_model, basis):
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with attach_processors(tiny_model, [BasisAwareLogitsProcessor(basis, EPSILON)]):
        outputs = tiny_model.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
    assert not any(output.generated_tokens for output in outputs.values())  # transformers logs why a request failed
    with pytest.raises(ValueError, match="cannot be used in continuous batching"):
        BasisAwareLogitsProcessor(basis, EPSILON)(torch.tensor([1, 2]), torch.zeros(2, 97))


@pytest.mark.parametrize("mode", ["mask", "sample"])
def test_no_rows_and_a_value_a_row(basis, logits, mode):
    epsilons = [0.1, 0.2, 0.3]
    together = BasisAwareLogitsProcessor(basis, epsilons, mode=mode, generator=generators(3))(None, logits[:3])
    for row, epsilon in enumerate(epsilons):
        alone = BasisAwareLogitsProcessor(basis, epsilon, mode=mode, generator=generators(3)[row : row + 1])
        assert torch.equal(alone(None, logits[row : row + 1])[0], together[row])
    assert BasisAwareLogitsProcessor(basis, 0.1, mode=mode)(None, logits[:0]).shape == (0, 97)


def test_rows_that_are_no_distribution_and_constant_rows_come_back(basis):
    scores = torch.randn(4, 97)
    scores[0, 3], scores[1], scores[2] = torch.nan, -INF, 1.0
    for mode in ("mask", "sample"):
        result = BasisAwareLogitsProcessor(basis, EPSILON, mode=mode)(None, scores)
        assert torch.equal(result[:3].nan_to_num(7), scores[:3].nan_to_num(7))
        assert (result[3] > -INF).sum() < 97


def test_tokens_at_minus_infinity_are_never_drawn(basis, logits):
    scores = logits.clone()
    scores[:, ::2] = -INF
    sampler = BasisAwareLogitsProcessor(basis, EPSILON, generator=generators(1)[0])
    for _ in range(20):
        assert (sampler(None, scores).argmax(-1) % 2 == 1).all()
    assert not (BasisAwareLogitsProcessor(basis, EPSILON, mode="mask")(None, scores)[:, ::2] > -INF).any()


def test_trace_shows_what_was_rescued_and_the_critical_threshold(tiny_model, basis):
    processor = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0)
    trace = TruncationTrace([processor], critical_threshold=SupportChecker(basis).critical_threshold)
    sequences = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=6, logits_processor=[trace])
    records = trace.finish(sequences).records
    assert sum(record.kept_below for record in records) > 0
    assert sum(record.cut_above for record in records) == 0
    for record in records:
        assert record.critical_threshold >= max(record.probability, record.threshold) * (1 - 1e-5)
    plain = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=12, logits_processor=[plain])
    assert sum(record.cut_above for record in plain.records) == 0


def test_gemma_style_softcap_is_sampled_right_and_refused_under_beams():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.6, "eos_token_id": None}
    model = Gemma2ForCausalLM(Gemma2Config(**settings, **heads, final_logit_softcapping=3.0)).eval()
    basis = SoftmaxBasis.from_model(model, rank=4)
    assert basis.softcap == 3.0
    processor = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0)
    logits = model(PROMPT).logits[0].detach()
    kept = processor(None, logits) > -INF
    slope = 1 - (logits[-1].double() / 3.0).square()
    by_hand = SoftmaxBasis(basis.factors * slope[:, None], basis.singular_values, "")
    tau = float(processor.threshold(logits)[-1])
    plain = logits[-1].softmax(-1) >= tau
    assert torch.equal(kept[-1], SupportChecker(by_hand).kept(logits[-1], tau, floor=0.0) | plain)
    sampler = BasisAwareLogitsProcessor(basis, EPSILON)
    model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=4, logits_processor=[sampler])
    with pytest.raises(ValueError, match="caps its logits"):
        model.generate(PROMPT, num_beams=2, do_sample=False, max_new_tokens=4, logits_processor=[processor])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.5}, "epsilon must be a number above 0 and below 1"),
        ({"cutoff": "top-p"}, "cutoff must be"),
        ({"mode": "draw"}, "mode must be"),
        ({"max_tries": 0}, "max_tries must be"),
        ({"floor": 1.0}, "floor must be"),
        ({"limit": 0}, "limit must be"),
        ({"filter_value": INF}, "filter_value must be"),
    ],
)
def test_bad_arguments_are_named(basis, options, message):
    with pytest.raises(ValueError, match=message):
        BasisAwareLogitsProcessor(basis, **{"epsilon": 0.1, **options})


def test_mask_decides_no_more_than_its_limit(basis, logits):
    counts = []
    for limit in (4, None):
        processor = BasisAwareLogitsProcessor(basis, EPSILON, mode="mask", floor=0, limit=limit)
        kept = processor(None, logits) > -INF
        counts.append((processor.checker.checked, int(kept.sum())))
    assert counts[0][0] <= 4 * len(logits) < counts[1][0]
    assert counts[0][1] < counts[1][1]


def test_scores_of_another_vocabulary_and_too_few_generators(basis):
    with pytest.raises(ValueError, match="the vocabulary of the basis"):
        BasisAwareLogitsProcessor(basis, 0.1)(None, torch.zeros(1, 98))
    with pytest.raises(ValueError, match="one for each of the 2 rows"):
        BasisAwareLogitsProcessor(basis, 0.1, generator=generators(3))(None, torch.randn(2, 97))
    assert "epsilon=0.1" in repr(BasisAwareLogitsProcessor(basis, 0.1))


@pytest.mark.real_model
def test_real_model_samples_and_counts(real_model, real_basis):
    model, tokenizer = real_model
    processor = BasisAwareLogitsProcessor(real_basis, 2e-3)
    torch.manual_seed(0)
    inputs = tokenizer("My name is", return_tensors="pt")
    model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=8, logits_processor=[processor])
    assert processor.checker.undecided == 0


def test_larger_tiny_model_with_a_bias_is_no_trouble():
    model = LlamaForCausalLM(tiny_config(vocab_size=600)).eval()
    processor = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model, rank=20), 0.02)
    sequences = model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=10, logits_processor=[processor])
    assert sequences.shape == (1, 16)
