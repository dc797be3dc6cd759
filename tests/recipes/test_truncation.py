from __future__ import annotations

import io
import math

import matplotlib as mpl
import pytest
import torch
from rich.console import Console
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_longtrunc import EpsilonLogitsProcessor, EtaLogitsProcessor
from hf_longtrunc.evaluation import read_records, token_losses
from instruments.truncation import (
    RepetitionRecord,
    TruncationScore,
    plot_repetition,
    plot_truncation,
    repetition_table,
    run_repetition,
    truncation_scores,
    truncation_table,
)

mpl.use("agg")

SAMPLERS = {
    "none": [],
    "eta 0.01": [EtaLogitsProcessor(0.01)],
    "eta 0.1": [EtaLogitsProcessor(0.1)],
    "top-p 0.7": [TopPLogitsWarper(0.7)],
    "top-k 5": [TopKLogitsWarper(5)],
    "min-p then k": [MinPLogitsWarper(0.05), TopKLogitsWarper(3)],
    "penalty": [RepetitionPenaltyLogitsProcessor(5.0), EpsilonLogitsProcessor(0.02)],
    "hot": [TemperatureLogitsWarper(2.0)],
}


def naive_scores(model, ids, processors):
    """The definitions, one full forward and a loop in doubles."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0]
    rows = []
    for t in range(len(ids) - 1):
        p = logits[t].double().softmax(-1).tolist()
        scores = logits[t][None].float().clone()
        for processor in processors:
            scores = processor(ids[None, : t + 1], scores)
        q = scores[0].double().softmax(-1).tolist()
        kept = [v for v, score in enumerate(scores[0].tolist()) if score != -math.inf]
        mass = sum(p[v] for v in kept)
        entropy = [-sum(x * math.log(x) for x in row if x > 0) for row in (p, q)]
        rows.append([int(ids[t + 1]) in kept, mass, 1 - mass, len(kept), *entropy])
    names = ("accepted", "kept_mass", "total_variation", "kept", "entropy", "kept_entropy")
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_scores_are_the_definitions(tiny_model, chunk):
    ids = torch.randint(97, (40,))
    scores = truncation_scores(tiny_model, ids, SAMPLERS, chunk=chunk)
    assert [score.sampler for score in scores] == list(SAMPLERS)
    for score in scores:
        expected = naive_scores(tiny_model, ids, SAMPLERS[score.sampler])
        found = {name: getattr(score, name) for name in expected}
        assert found == pytest.approx(expected, abs=1e-5)
        assert score.tokens == 39


def test_nothing_cut_is_nothing_lost(tiny_model):
    (score,) = truncation_scores(tiny_model, torch.randint(97, (20,)), {"none": []})
    assert (score.accepted, score.kept) == (1, 97)
    assert score.kept_mass == pytest.approx(1)
    assert score.entropy == pytest.approx(score.kept_entropy)


def test_total_variation_is_that_of_the_two_distributions(tiny_model):
    """1 - kept mass against half the L1 distance of p and of p truncated and renormalised."""
    ids = torch.randint(97, (2,))
    (score,) = truncation_scores(tiny_model, ids, {"k": [TopKLogitsWarper(4)]})
    with torch.no_grad():
        p = tiny_model(ids[None, :1]).logits[0, 0].double().softmax(-1)
    q = torch.where(p >= p.topk(4).values[-1], p, 0.0)
    assert score.total_variation == pytest.approx(0.5 * (p - q / q.sum()).abs().sum().item(), abs=1e-6)


def test_a_processor_sees_the_text_so_far_and_may_write_in_place(tiny_model):
    ids, seen = torch.randint(97, (12,)), []

    def spoil(input_ids, scores):
        seen.append(input_ids[0].tolist())
        scores[:, 1:] = -math.inf
        return scores

    one, two = truncation_scores(tiny_model, ids, {"spoils": [spoil], "none": []}, chunk=5)
    assert seen == [ids[:t].tolist() for t in range(1, 12)]
    assert (one.kept, two.kept) == (1, 97)


def test_finished_samplers_are_not_run_again(tiny_model, tmp_path):
    path, ids, calls = tmp_path / "out" / "scores.jsonl", torch.randint(97, (10,)), []

    class Counted(EtaLogitsProcessor):
        def __call__(self, input_ids, scores):
            calls.append(self.epsilon)
            return super().__call__(input_ids, scores)

    first = truncation_scores(tiny_model, ids, {"a": [Counted(0.1)]}, path=path)
    both = {"b": [Counted(0.2)], "a": [Counted(0.1)]}
    again = truncation_scores(tiny_model, ids, both, path=path)
    assert calls == [0.1] * 9 + [0.2] * 9
    assert again[1:] == first
    assert read_records(path, TruncationScore) == [*first, again[0]]
    truncation_scores(tiny_model, ids, {"a": [Counted(0.3)]}, path=path)
    truncation_scores(tiny_model, ids.flip(0), {"a": [Counted(0.3)]}, path=path)
    assert calls[18:] == [0.3] * 18
    forwards = []
    tiny_model.register_forward_hook(lambda *_: forwards.append(1))
    assert truncation_scores(tiny_model, ids, both, path=path) == again
    assert forwards == []


def test_settings_are_the_same_in_every_process_and_tell_parameters_apart(tiny_model):
    ids = torch.randint(97, (3,))
    pairs = [
        (TopPLogitsWarper(0.7), TopPLogitsWarper(0.8)),
        (EtaLogitsProcessor(0.1), EtaLogitsProcessor(0.1, min_tokens_to_keep=2)),
    ]
    for left, right in pairs:
        one, two = truncation_scores(tiny_model, ids, {"l": [left], "r": [right]})
        assert one.settings != two.settings
        assert "0x" not in one.settings + two.settings


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("at least 2 tokens", lambda model: truncation_scores(model, torch.ones(1, dtype=torch.long), {})),
        ("one row", lambda model: truncation_scores(model, torch.ones(1, 9, dtype=torch.long), {})),
        ("eval()", lambda model: truncation_scores(model.train(), torch.ones(9, dtype=torch.long), {})),
        (
            "'all' cuts every token",
            lambda model: truncation_scores(
                model, torch.ones(9, dtype=torch.long), {"all": [lambda ids, scores: scores - math.inf]}
            ),
        ),
    ],
)
def test_bad_input_is_named(tiny_model, says, call):
    with pytest.raises(ValueError, match=says):
        call(tiny_model)


@pytest.fixture
def writer(tokenizer, trained_tokenizer):
    from transformers import LlamaForCausalLM

    from tests.conftest import tiny_config

    config = tiny_config(vocab_size=trained_tokenizer.get_vocab_size(), bos_token_id=0, initializer_range=0.2)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_repetition_counts_the_continuation_alone(writer):
    model, tokenizer = writer
    texts = []
    generate = model.generate
    model.generate = lambda *args, **kwargs: texts.append((args[0], generate(*args, **kwargs))) or texts[-1][1]
    state = torch.get_rng_state()
    (record,) = run_repetition(model, tokenizer, ["to sea"], {"plain": []}, max_new_tokens=6)
    assert torch.equal(state, torch.get_rng_state())
    prompt, output = texts[0]
    assert tokenizer.decode(prompt[0]) == "<|start|>" + " ".join(["to sea"] * 5)
    assert output.shape[1] - prompt.shape[1] == record.tokens == 6
    expected = token_losses(model, output)[0, prompt.shape[1] - 1 :]
    assert len(expected) == 6
    assert record.loss == pytest.approx(expected.mean().item())
    assert record.text == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


def test_a_sampler_that_takes_the_likeliest_token_is_repetitive_and_a_flat_one_is_not(writer):
    model, tokenizer = writer
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    samplers = {"greedy": [TopKLogitsWarper(1)], "flat": [TemperatureLogitsWarper(1e4)]}
    records = run_repetition(model, tokenizer, ["a b"], samplers, seeds=(0, 1), max_new_tokens=20)
    assert [record.repetitive for record in records] == [True, True, False, False]
    assert records[2].text != records[3].text


def test_a_repetition_run_goes_on_where_it_was_cut_off(writer, tmp_path):
    model, tokenizer = writer
    path = tmp_path / "repetition.jsonl"
    settings = {"seeds": (0, 1), "max_new_tokens": 3, "path": path}
    first = run_repetition(model, tokenizer, ["a"], {"eta": [EtaLogitsProcessor(0.01)]}, **settings)
    more = run_repetition(model, tokenizer, ["a", "b"], {"eta": [EtaLogitsProcessor(0.01)]}, **settings)
    assert more[:2] == first
    assert read_records(path, RepetitionRecord) == more
    whole = run_repetition(
        model, tokenizer, ["a", "b"], {"eta": [EtaLogitsProcessor(0.01)]}, seeds=(0, 1), max_new_tokens=3
    )
    assert whole == more


def test_the_models_own_sampling_settings_do_not_come_in(writer):
    model, tokenizer = writer
    plain = run_repetition(model, tokenizer, ["a"], {"p": []}, max_new_tokens=12)
    model.generation_config.update(top_k=1, temperature=0.1, top_p=0.1, do_sample=False)
    assert run_repetition(model, tokenizer, ["a"], {"p": []}, max_new_tokens=12) == plain


def test_tables_and_pictures(tiny_model, writer):
    scores = truncation_scores(tiny_model, torch.randint(97, (20,)), SAMPLERS)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(truncation_table(scores))
    shown = console.export_text()
    assert f"{scores[1].accepted:.2%}" in shown
    axes = plot_truncation(scores)
    eta = next(line for line in axes.lines if line.get_label().startswith("eta "))
    ordered = sorted(scores[1:3], key=lambda score: score.total_variation)
    assert eta.get_label() == "eta " + ", ".join(score.sampler.removeprefix("eta ") for score in ordered)
    assert sorted(eta.get_xdata()) == sorted(score.total_variation for score in scores[1:3])
    assert plot_truncation(scores, axes) is axes
    records = run_repetition(*writer, ["a", "b"], {"one": [], "two": [TopKLogitsWarper(2)]}, max_new_tokens=3)
    console.print(repetition_table(records))
    assert f"{min(record.loss for record in records[:2]):.2f}" in console.export_text()
    axes = plot_repetition(records)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    assert plot_repetition(records, axes) is axes
