"""Truncation samplers beside xgrammar's processor: in front of them it works, behind them it is refused by name."""

from __future__ import annotations

import pytest
import torch

from hf_longtrunc import (
    BasisAwareLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    SamplingMaskRecorder,
    SoftmaxBasis,
    TopHLogitsProcessor,
    TruncationTrace,
    XTCLogitsProcessor,
    attach_processors,
    sampling_settings,
)

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar constrains the text: pip install xgrammar")

END = 96
WORDS = [*(chr(48 + n) for n in range(10)), *(f"<{n}>" for n in range(10, 96)), "</s>"]
PROMPTS = torch.tensor([[40, 41, 42], [50, 51, 52]])
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def grammar(text):
    info = xgrammar.TokenizerInfo(WORDS, stop_token_ids=[END])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(text)
    return xgrammar.contrib.hf.LogitsProcessor(compiled)


def sample(model, processors, **options):
    return model.generate(
        PROMPTS, **sampling_settings(model), max_new_tokens=8, eos_token_id=END, pad_token_id=0,
        logits_processor=processors, **options,
    )[:, 3:]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [lambda: EtaLogitsProcessor(0.02), TopHLogitsProcessor, MinKLogitsProcessor, lambda: XTCLogitsProcessor(0.05, 1.0)],
    ids=["eta", "top-h", "min-k", "xtc"],
)
def test_a_grammar_in_front_holds(tiny_model, make):
    """Six digits and the end; what the sampler may draw lies inside what the grammar lets through."""
    recorder = SamplingMaskRecorder()
    with recorder.attach(tiny_model):
        text = sample(tiny_model, [grammar("root ::= [0-9] [0-9] [0-9] [0-9] [0-9] [0-9]"), make()])
    assert (text[:, :6] < 10).all()
    assert (text[:, 6] == END).all()
    for mask in recorder.take():
        assert not mask.kept()[:6, 10:].any()
        assert mask.kept()[6].nonzero()[:, 0].tolist() == [END]


def test_a_grammar_in_front_of_attached_and_watched_samplers_holds(tiny_model):
    with attach_processors(tiny_model, [EtaLogitsProcessor(0.02)]):
        text = sample(tiny_model, [grammar("root ::= [0-9]+")])
    assert ((text < 10) | (text == END)).all()
    trace = TruncationTrace([grammar('root ::= "1" "2" "3"'), EtaLogitsProcessor(0.02)])
    assert sample(tiny_model, [trace])[:, :4].tolist() == [[1, 2, 3, END]] * 2


def test_a_grammar_behind_is_refused_by_name(tiny_model):
    basis = SoftmaxBasis.from_model(tiny_model, 3)
    for processor in (EtaLogitsProcessor(0.02), BasisAwareLogitsProcessor(basis, 0.02)):
        with pytest.raises(ValueError, match=r"LogitsProcessor of xgrammar runs behind .* put it in front"):
            sample(tiny_model, [processor, grammar("root ::= [0-9]+")])


def test_a_grammar_in_front_of_a_proof_is_warned_of(tiny_model):
    bat = BasisAwareLogitsProcessor(SoftmaxBasis.from_model(tiny_model, 3), 0.02)
    with pytest.warns(UserWarning, match="in front of BasisAwareLogitsProcessor.*proves nothing"):
        assert (sample(tiny_model, [grammar("root ::= [0-9] [0-9] [0-9]"), bat])[:, :3] < 10).all()


def test_rows_that_contradict_the_grammar_are_refused_by_name(tiny_model):
    """A processor that forbids all digits in front: xgrammar is left with nothing, and so is the sampler."""

    class NoDigits:
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.arange(10), -torch.inf)

    with pytest.raises(ValueError, match=r"row 0 has no token left.*NoDigits and LogitsProcessor removed"):
        sample(tiny_model, [NoDigits(), grammar("root ::= [0-9]"), EtaLogitsProcessor(0.02)])
