"""The processors as host objects: beside transformers' own, in every dtype, compiled, and against bad arguments."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import EpsilonLogitsWarper, EtaLogitsWarper, TopKLogitsWarper

from hf_longtrunc import (
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    PLessLogitsProcessor,
    TopNSigmaLogitsProcessor,
)
from hf_longtrunc.sampling import processors

INF = math.inf


def random_scores(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Rows of several scales, some of them with a heavy head, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 3.0, 8.0])[torch.arange(rows) % 4, None]
    return torch.randn(rows, vocab, generator=generator) * scale + 12 * (
        torch.rand(rows, vocab, generator=generator) < 2 / vocab
    )


def same_outside_rounding(ours, theirs, scores, threshold) -> int:
    """Number of tokens on which the kept sets differ, each of which must lie on the threshold to fp32 rounding."""
    differ = (ours == -INF) != (theirs == -INF)
    p, thresholds = scores.double().softmax(-1)[differ], threshold.double().expand_as(scores)[differ]
    assert ((p - thresholds).abs() <= 4e-6 * thresholds).all()
    return int(differ.sum())


@pytest.mark.parametrize("epsilon", [3e-4, 2e-3, 0.1])
def test_kept_set_is_that_of_transformers_on_ten_thousand_rows(epsilon):
    ours, theirs = EtaLogitsProcessor(epsilon), EtaLogitsWarper(epsilon)
    differing = 0
    for seed in range(10):
        scores = random_scores(1000, 997, seed)
        differing += same_outside_rounding(ours(None, scores), theirs(None, scores), scores, ours.threshold(scores))
    assert differing <= 20, f"{differing} of 9,970,000 tokens"


def test_epsilon_kept_set_is_that_of_transformers():
    for seed in range(3):
        scores = random_scores(1000, 997, seed)
        ours, theirs = EpsilonLogitsProcessor(3e-3), EpsilonLogitsWarper(3e-3)
        same_outside_rounding(ours(None, scores), theirs(None, scores), scores, ours.threshold(scores))


def test_kept_scores_keep_their_bits_and_the_input_is_not_written():
    scores = random_scores(8, 300)
    before = scores.clone()
    result = EtaLogitsProcessor(2e-3)(None, scores)
    assert torch.equal(scores, before)
    assert torch.equal(result[result > -INF], scores[result > -INF])
    assert result.data_ptr() != scores.data_ptr()


def test_bfloat16_is_computed_in_fp32_where_transformers_rounds_the_threshold():
    """Transformers' warper computes softmax and entropy in bf16, 3 digits: its threshold is off by up to percents."""
    scores = (torch.randn(8, 50000) * 3).bfloat16()
    processor = EtaLogitsProcessor(2e-3)
    ours = processor(None, scores)
    assert ours.dtype == torch.bfloat16
    exact = processor(None, scores.float())
    assert torch.equal(ours == -INF, exact == -INF)
    theirs = EtaLogitsWarper(2e-3)(None, scores)
    assert ((theirs == -INF) != (exact == -INF)).sum() > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_were(dtype):
    scores = torch.randn(4, 100, dtype=dtype)
    result = EtaLogitsProcessor(0.01)(None, scores)
    assert result.dtype == dtype
    assert torch.equal(result == -INF, EtaLogitsProcessor(0.01)(None, scores.float()) == -INF)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [INF, 1.0], [-INF, -INF]])
def test_rows_that_are_no_distribution_come_back_unchanged_where_transformers_raises(bad, monkeypatch):
    # On by default; a compiler run earlier in this process may have switched it off for good.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    scores = torch.tensor([bad, [4.0, -9.0]])
    result = EtaLogitsProcessor(0.01)(None, scores)
    assert torch.equal(result[0].nan_to_num(nan=77.0), scores[0].nan_to_num(nan=77.0))
    assert result[1].tolist() == [4.0, -INF]
    with pytest.raises(ValueError, match=r"Categorical|constraint"):
        EtaLogitsWarper(0.01)(None, scores)


@pytest.mark.parametrize("processor", [EtaLogitsProcessor(2e-3), EpsilonLogitsProcessor(2e-3)])
def test_a_row_does_not_depend_on_its_batch(processor):
    scores = random_scores(32, 50257)
    together = processor(None, scores)
    assert torch.equal(together, torch.cat([processor(None, scores[i : i + 1]) for i in range(32)]))
    garbage = torch.cat([scores[:1], torch.full((1, 50257), math.nan), torch.full((1, 50257), 1e30)])
    assert torch.equal(processor(None, garbage)[:1], together[:1])


def test_filter_value_and_min_tokens_to_keep():
    scores = torch.tensor([[9.0, 1.0, 0.0, -1.0]])
    assert EtaLogitsProcessor(0.2, filter_value=-1e4)(None, scores).tolist() == [[9.0, -1e4, -1e4, -1e4]]
    assert EtaLogitsProcessor(0.2, min_tokens_to_keep=3)(None, scores).tolist() == [[9.0, 1.0, 0.0, -INF]]
    assert EtaLogitsProcessor(0.2, min_tokens_to_keep=99)(None, scores).tolist() == scores.tolist()


def test_ties_on_the_last_token_to_keep_all_stay():
    scores = torch.tensor([[9.0, 1.0, 1.0, -1.0]])
    assert EpsilonLogitsProcessor(0.5, min_tokens_to_keep=2)(None, scores).tolist() == [[9.0, 1.0, 1.0, -INF]]


def test_after_another_processor_the_entropy_is_that_of_what_remains():
    scores = torch.randn(4, 1000)
    cut = TopKLogitsWarper(top_k=20)(None, scores)
    remaining = cut[cut > -INF].view(4, 20)
    threshold = EtaLogitsProcessor(0.05).threshold
    torch.testing.assert_close(threshold(cut), threshold(remaining), rtol=1e-6, atol=0)
    assert not EtaLogitsProcessor(0.05)(None, cut).isnan().any()


def test_compiles_into_one_graph():
    """In a process of its own: the shape checks that the tests put around pure files are not for the compiler."""
    program = """
import torch
from hf_longtrunc import EpsilonLogitsProcessor, EtaLogitsProcessor, PLessLogitsProcessor, TopNSigmaLogitsProcessor
scores = torch.randn(4, 1003) * 4
for processor in (
    EtaLogitsProcessor(2e-3), EpsilonLogitsProcessor(2e-3), EtaLogitsProcessor(2e-3, min_tokens_to_keep=3),
    TopNSigmaLogitsProcessor(), PLessLogitsProcessor(), PLessLogitsProcessor(normalized=True),
):
    compiled = torch.compile(lambda scores: processor(None, scores), fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores), processor(None, scores)), processor
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("cls", [EtaLogitsProcessor, EpsilonLogitsProcessor])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be a number above 0 and below 1, got 0.0"),
        ({"epsilon": 1.0}, ValueError, "epsilon must be"),
        ({"epsilon": -3e-4}, ValueError, "epsilon must be"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be"),
        ({"epsilon": INF}, ValueError, "epsilon must be"),
        ({"epsilon": "3e-4"}, TypeError, "epsilon must be a number.*'3e-4' of type str"),
        ({"epsilon": True}, TypeError, "epsilon must be a number"),
        ({"epsilon": None}, TypeError, "epsilon must be a number"),
        ({"epsilon": []}, ValueError, "epsilon must be a number or one for every row, got none"),
        ({"epsilon": [3e-4, 2]}, ValueError, r"epsilon\[1\] must be a number above 0 and below 1, got 2.0"),
        ({"epsilon": torch.tensor([True])}, TypeError, r"epsilon\[0\] must be a number"),
        ({"epsilon": 0.1, "min_tokens_to_keep": 0}, ValueError, "min_tokens_to_keep must be .* at least 1, got 0"),
        ({"epsilon": 0.1, "min_tokens_to_keep": 1.5}, TypeError, "min_tokens_to_keep must be a whole number"),
        ({"epsilon": 0.1, "min_tokens_to_keep": True}, TypeError, "min_tokens_to_keep must be a whole number"),
        ({"epsilon": 0.1, "filter_value": "-inf"}, TypeError, "filter_value must be a number"),
        ({"epsilon": 0.1, "filter_value": math.nan}, ValueError, "filter_value must be a number"),
        ({"epsilon": 0.1, "filter_value": INF}, ValueError, "filter_value must be a number"),
    ],
)
def test_bad_arguments_are_named(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        EtaLogitsProcessor(0.1, 2)


def test_numpy_numbers_are_numbers():
    eta = EtaLogitsProcessor(np.float32(0.25), min_tokens_to_keep=np.int64(3), filter_value=np.float32(-INF))
    assert (eta.epsilon, eta.min_tokens_to_keep, eta.filter_value) == (0.25, 3, -INF)
    assert eta(None, torch.tensor([[9.0, 1.0, 0.0, -1.0]])).isfinite().sum() == 3


def test_bad_scores_are_named():
    with pytest.raises(TypeError, match=r"floating-point.*int64"):
        EtaLogitsProcessor(0.1)(None, torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="at least one token"):
        EtaLogitsProcessor(0.1)(None, torch.zeros(2, 0))


def test_repr_shows_the_parameter():
    assert repr(EtaLogitsProcessor(3e-4)) == "EtaLogitsProcessor(epsilon=0.0003)"


def by_hand(processor, scores):
    """The kept set of each row in float64, token by token, and which tokens lie on the threshold to fp32 rounding."""
    scores = scores.double()
    probs = scores.softmax(-1)
    if isinstance(processor, TopNSigmaLogitsProcessor):
        finite = [row[row > -INF] for row in scores]
        sigma = torch.stack([row.std(correction=0) for row in finite])[:, None]
        distance = scores - (scores.amax(-1, keepdim=True) - processor.n * sigma)
    else:
        collision, size = probs.square().sum(-1, keepdim=True), scores.shape[-1]
        threshold = (size * collision - 1) / (size - 1) if processor.normalized else collision
        distance = probs.log() - threshold.clamp_min(0).log()
    return distance >= 0, distance.abs() < 2e-5


FAMILY = [
    TopNSigmaLogitsProcessor(),
    TopNSigmaLogitsProcessor(2.5),
    PLessLogitsProcessor(),
    PLessLogitsProcessor(normalized=True),
]


@pytest.mark.parametrize("processor", FAMILY, ids=repr)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_the_family_is_its_closed_form_in_float64(processor, scale):
    scores = torch.randn(500, 211) * scale
    scores[::3, ::5] = -INF
    kept, on_the_bar = by_hand(processor, scores)
    result = processor(None, scores)
    assert (((result > -INF) == kept) | on_the_bar | scores.isinf()).all()
    assert (result.argmax(-1) == scores.argmax(-1)).all()
    assert torch.equal(result[result > -INF], scores[result > -INF])
    if scale > 0.1:
        assert (kept & ~scores.isinf()).sum() < (~scores.isinf()).sum()


@pytest.mark.parametrize("processor", [*FAMILY, EtaLogitsProcessor(0.01), EpsilonLogitsProcessor(0.01)], ids=repr)
def test_edges_of_the_family(processor):
    rows = torch.randn(4, 300)
    assert processor(None, rows[:0]).shape == (0, 300)
    assert processor(None, torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]
    rows[0, 3], rows[1], rows[2, 5] = torch.nan, -INF, INF
    rows[3] *= 4
    result = processor(None, rows)
    assert torch.equal(result[:3].nan_to_num(7), rows[:3].nan_to_num(7))
    assert (result[3] > -INF).sum() < 300
    flat = torch.zeros(1, 300)
    assert torch.equal(processor(None, flat), flat)
    alone = torch.full((1, 300), -INF)
    alone[0, 7] = 3.0
    assert torch.equal(processor(None, alone), alone)


@pytest.mark.parametrize("processor", [*FAMILY, EtaLogitsProcessor(0.01)], ids=repr)
def test_transposed_scores_give_the_same_bits(processor):
    """A strided row is summed in another order: its threshold differed in the last bit."""
    scores = torch.randn(64, 5003) * 3
    strided = scores.T.contiguous().T
    assert torch.equal(processor.threshold(strided), processor.threshold(scores))
    assert torch.equal(processor.threshold(scores[::2]), processor.threshold(scores)[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_filter_value_that_the_dtype_cannot_hold(dtype):
    result = EtaLogitsProcessor(0.3, filter_value=-1e30)(None, torch.tensor([[4.0, 0.0]], dtype=dtype))
    assert result[0, 0] == 4
    assert result[0, 1] == torch.tensor(max(torch.finfo(dtype).min, -1e30), dtype=dtype)


PER_ROW = {
    "eta": (EtaLogitsProcessor, [3e-4, 2e-3, 0.02, 0.2]),
    "epsilon": (EpsilonLogitsProcessor, [3e-4, 2e-3, 0.02, 0.2]),
    "top-n-sigma": (TopNSigmaLogitsProcessor, [0.5, 1.0, 1.5, 2.0]),
}


@pytest.mark.parametrize("case", PER_ROW)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_a_value_a_row_is_each_row_by_itself_to_the_bit(case, kind):
    cls, values = PER_ROW[case]
    values = [float(torch.tensor(value)) for value in values] if kind is torch.tensor else values
    scores = torch.randn(4, 997) * 3
    together = cls(kind(values))
    for row, value in enumerate(values):
        assert torch.equal(together(None, scores)[row], cls(value)(None, scores[row : row + 1])[0])
        assert torch.equal(together.threshold(scores)[row], cls(value).threshold(scores[row : row + 1])[0])
    twice = together(None, scores.repeat_interleave(2, 0))  # two returns of each prompt
    assert torch.equal(twice[1::2], together(None, scores))
    assert together(None, scores[:0]).shape == (0, 997)
    with pytest.raises(ValueError, match="4 values, one a row, do not fit"):
        together(None, scores[:3])
    with pytest.raises(ValueError, match="continuous batching mixes the rows"):
        together(torch.tensor([1, 2, 3]), scores)
    assert "[" in repr(together)


def test_the_family_names_bad_arguments():
    with pytest.raises(ValueError, match=r"n must be a number above 0, got 0\.0"):
        TopNSigmaLogitsProcessor(0)
    with pytest.raises(TypeError, match="n must be a number"):
        TopNSigmaLogitsProcessor(True)
    with pytest.raises(TypeError, match="normalized must be True or False"):
        PLessLogitsProcessor(normalized=1)
    assert repr(TopNSigmaLogitsProcessor(np.float32(1.5))) == "TopNSigmaLogitsProcessor(n=1.5)"
    assert repr(PLessLogitsProcessor()) == "PLessLogitsProcessor(normalized=False)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_in_parts_has_the_bits_of_one_pass(monkeypatch, dtype):
    scores = (torch.randn(23, 300) * 3).to(dtype)
    scores[4], scores[5, 2] = -math.inf, math.nan
    for processor in (EtaLogitsProcessor(2e-3, min_tokens_to_keep=2), EpsilonLogitsProcessor(2e-3)):
        whole = processor(None, scores)
        monkeypatch.setattr(processors, "_CACHED", 1500)
        sizes, truncated = [], type(processor)._truncated

        def counting(self, part, out=None, sizes=sizes, truncated=truncated):
            sizes.append(len(part))
            return truncated(self, part, out)

        monkeypatch.setattr(type(processor), "_truncated", counting)
        assert torch.equal(processor(None, scores).nan_to_num(7), whole.nan_to_num(7))
        assert sizes == [5, 5, 5, 5, 3]
        monkeypatch.undo()
