"""TruncationTrace: its numbers recomputed from the text, whatever the mode of generation does with rows and steps."""

from __future__ import annotations

import math

import matplotlib as mpl
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM, TopKLogitsWarper

from hf_longtrunc import EtaLogitsProcessor, TruncationTrace
from tests.conftest import tiny_config

mpl.use("Agg")

PROMPT = torch.tensor([[1, 5, 9, 13, 5, 9]])
EPSILON = 0.2
INF = math.inf


def check_against_text(model, trace, sequences, prompt_length, keep, pad=0):
    """Recompute every record of a row from the finished text: a full forward, double precision, one token at a time."""
    logits = model(sequences).logits.double()
    by_place = {(record.row, record.position): record for record in trace.records}
    assert set(by_place) == {(r, t) for r in range(len(sequences)) for t in range(prompt_length, sequences.shape[1])}
    for (row, position), record in by_place.items():
        scores = logits[row, position - 1]
        probs = scores.softmax(-1)
        mask = keep(scores.float()[None])[0] > -INF
        token = sequences[row, position].item()
        assert record.token == token
        assert record.entropy == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-4)
        assert record.kept == mask.sum().item()
        assert record.kept_mass == pytest.approx(probs[mask].sum().item(), rel=1e-4)
        assert record.lowest_kept == pytest.approx(probs[mask].min().item(), rel=1e-3)
        assert record.probability == pytest.approx(probs[token].item(), rel=1e-3)
        assert record.rank == (probs > probs[token]).sum().item() + 1


def eta(scores):
    return EtaLogitsProcessor(EPSILON)(None, scores)


MODES = {
    "sampling": {"do_sample": True},
    "four returns": {"do_sample": True, "num_return_sequences": 4},
    "prompt lookup": {"do_sample": True, "prompt_lookup_num_tokens": 3},
    "greedy": {"do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_records_are_those_of_the_text(tiny_model, mode):
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    settings = {"top_k": 0} | MODES[mode] if MODES[mode]["do_sample"] else MODES[mode]
    sequences = tiny_model.generate(PROMPT, max_new_tokens=20, logits_processor=[trace], **settings)
    check_against_text(tiny_model, trace.finish(sequences), sequences, 6, eta)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_speculation_that_is_taken_back_leaves_no_record(tiny_model):
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    sequences = tiny_model.generate(
        PROMPT, assistant_model=assistant, do_sample=True, top_k=0, max_new_tokens=20, logits_processor=[trace]
    )
    check_against_text(tiny_model, trace.finish(sequences), sequences, 6, eta)


def test_threshold_is_the_processors_own(tiny_model):
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    sequences = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=10, logits_processor=[trace])
    for record in trace.finish(sequences).records:
        expected = min(EPSILON, math.sqrt(EPSILON) * math.exp(-record.entropy))
        assert record.threshold == pytest.approx(expected, rel=1e-5)
        assert record.lowest_kept >= record.threshold * (1 - 1e-5) or record.kept == 1


def test_transformers_own_warpers_are_observed(tiny_model):
    trace = TruncationTrace()
    with trace.observe(tiny_model):
        sequences = tiny_model.generate(PROMPT, do_sample=True, top_k=7, max_new_tokens=15)
    check_against_text(tiny_model, trace.finish(sequences), sequences, 6, top_7)
    assert all(record.kept == 7 and record.threshold is None for record in trace.records)
    assert "_get_logits_processor" not in tiny_model.__dict__


@pytest.mark.filterwarnings("ignore:generate.. runs TopKLogitsWarper behind EtaLogitsProcessor:UserWarning")
def test_what_a_later_warper_cuts_is_not_drawable(tiny_model):
    """A trace in the list runs in front of transformers' top-k, and reported what that cuts as drawable."""
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    options = {"top_k": 2, "temperature": 1.5, "max_new_tokens": 15}
    sequences = tiny_model.generate(PROMPT, do_sample=True, logits_processor=[trace], **options)

    def keep(scores):
        return TopKLogitsWarper(2)(None, EtaLogitsProcessor(EPSILON)(None, scores))

    check_against_text(tiny_model, trace.finish(sequences), sequences, 6, keep)
    assert max(record.kept for record in trace.records) == 2


def test_continuous_batching_is_refused_and_not_run_without_the_watched(tiny_model):
    trace = TruncationTrace()
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with trace.observe(tiny_model):
        outputs = tiny_model.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
    assert not any(output.generated_tokens for output in outputs.values())  # transformers logs why a request failed


def test_the_handle_detaches(tiny_model):
    trace = TruncationTrace()
    handle = trace.observe(tiny_model)
    tiny_model.generate(PROMPT, do_sample=False, max_new_tokens=2)
    assert "every processor list is watched" in repr(handle)
    handle.detach()
    tiny_model.generate(PROMPT, do_sample=False, max_new_tokens=2)
    assert len(trace.records) == 2


def top_7(scores):
    return TopKLogitsWarper(7)(None, scores)


def test_watching_changes_no_draw(tiny_model):
    texts = []
    for watched in (False, True):
        processors = [EtaLogitsProcessor(EPSILON)]
        torch.manual_seed(9)
        texts.append(
            tiny_model.generate(
                PROMPT.repeat(3, 1),
                do_sample=True,
                top_k=0,
                max_new_tokens=20,
                logits_processor=[TruncationTrace(processors)] if watched else processors,
            )
        )
    assert torch.equal(*texts)


def test_left_padded_rows(tiny_model):
    ids = torch.tensor([[0, 0, 0, 7, 8, 9], [1, 5, 9, 13, 5, 9]])
    mask = (ids != 0).long()
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    both = tiny_model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=10, logits_processor=[trace]
    )
    trace.finish(both)
    alone = tiny_model(both[:1, 3:]).logits[0].double().softmax(-1)
    for record in trace.records:
        if record.row == 0:
            assert record.probability == pytest.approx(alone[record.position - 4, record.token].item(), rel=1e-3)


def test_beams_are_followed_when_they_permute(tiny_model):
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    tiny_model.generate(PROMPT, num_beams=3, do_sample=False, max_new_tokens=10, logits_processor=[trace])
    known = [record for record in trace.records if record.token is not None]
    assert {record.row for record in known} == {0, 1, 2}
    # A beam that was continued names a token that its own distribution allowed.
    assert all(record.probability >= record.lowest_kept * (1 - 1e-5) for record in known if record.position > 6)


def test_rows_end_at_their_end_of_sequence_token(tiny_model):
    sequences = torch.tensor([[1, 5, 9, 2, 0], [1, 5, 9, 4, 3]])
    trace = TruncationTrace(eos_token_id=2)
    for length in (2, 3, 4):
        trace(sequences[:, :length], torch.randn(2, 97))
    trace.finish(sequences)
    assert [(r.row, r.token) for r in trace.records] == [(0, 9), (0, 2), (1, 9), (1, 4), (1, 3)]


def test_steps_proposed_past_the_end_are_dropped():
    sequence = torch.tensor([[1, 5, 9, 4, 3, 8]])
    trace = TruncationTrace()
    for length in (3, 4, 5):
        trace(sequence[:, :length], torch.randn(1, 97))
    trace.finish(sequence[:, :5])
    assert [(record.position, record.token) for record in trace.records] == [(3, 4), (4, 3)]


def test_a_new_prompt_is_a_new_run(tiny_model):
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    for prompt in (PROMPT, PROMPT[:, :3] + 1):
        sequences = tiny_model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=4, logits_processor=[trace])
        trace.finish(sequences)
    assert [record.run for record in trace.records] == [0] * 4 + [1] * 4
    assert None not in [record.token for record in trace.records]


def test_records_are_bounded_and_the_dropped_ones_counted(tiny_model):
    trace = TruncationTrace(max_records=5)
    tiny_model.generate(PROMPT, do_sample=True, max_new_tokens=12, logits_processor=[trace])
    assert len(trace.records) == 5
    assert trace.dropped == 7
    assert [record.position for record in trace.records] == [13, 14, 15, 16, 17]


def test_memory_of_a_long_batch_is_one_step(tiny_model):
    trace = TruncationTrace()
    tiny_model.generate(PROMPT.repeat(2, 1), do_sample=True, max_new_tokens=12, logits_processor=[trace])
    assert len(trace._generation.open) == 1


def test_finite_filter_values_count_as_cut():
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON, filter_value=-1e9)])
    trace(torch.tensor([[1]]), torch.tensor([[5.0, 0.0, -5.0]]))
    assert trace.records[0].kept == 1


def test_clear(tiny_model):
    trace = TruncationTrace()
    trace(torch.tensor([[1]]), torch.randn(1, 5))
    trace.clear()
    assert trace.records == []


def test_frame_and_plot(tiny_model):
    trace = TruncationTrace([EtaLogitsProcessor(EPSILON)])
    sequences = tiny_model.generate(PROMPT, do_sample=True, top_k=0, max_new_tokens=8, logits_processor=[trace])
    frame = trace.finish(sequences).to_frame()
    assert frame.shape == (8, 15)
    assert frame["token"].tolist() == sequences[0, 6:].tolist()
    assert repr(trace) == "<TruncationTrace of EtaLogitsProcessor(epsilon=0.2): 8 records of 1 runs>"
    axes = trace.plot(label="eta")
    assert axes[0].lines[0].get_ydata().tolist() == frame["entropy"].tolist()
    assert axes[1].lines[0].get_ydata().tolist() == frame["threshold"].tolist()
    assert axes[2].lines[0].get_ydata().tolist() == frame["kept_mass"].tolist()
    assert trace.plot(axes=axes, label="again")[0] is axes[0]
    assert len(axes[0].lines) == 2
    with pytest.raises(ValueError, match="nothing recorded for row=7"):
        trace.plot(row=7)


def test_empty_frame_has_its_columns():
    assert "kept_mass" in TruncationTrace().to_frame().columns


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "9"])
def test_bad_arguments_are_named(bad):
    with pytest.raises((TypeError, ValueError), match="max_records must be a whole number"):
        TruncationTrace(max_records=bad)
