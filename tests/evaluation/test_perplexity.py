from __future__ import annotations

import io
import itertools
import math
from contextlib import contextmanager, nullcontext

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from rich.console import Console

from hf_longtrunc.evaluation.perplexity import (
    PerplexityRecord,
    compare_losses,
    default_edges,
    perplexity_by_position,
    perplexity_records,
    perplexity_table,
    plot_perplexity,
    stream_losses,
    token_losses,
)
from hf_longtrunc.models import CACHE

mpl.use("agg")


def full_forward_losses(model, rows):
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits
    return torch.stack(
        [
            torch.stack(
                [-F.log_softmax(logits[text, t].double(), -1)[rows[text, t + 1]] for t in range(rows.shape[1] - 1)]
            )
            for text in range(rows.shape[0])
        ]
    )


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("length", [2, 16, 17, 41])
def test_chunked_losses_equal_those_of_one_full_forward(tiny_model, chunk, length):
    rows = torch.randint(97, (3, length))
    losses = token_losses(tiny_model, rows, chunk=chunk)
    assert losses.shape == (3, length - 1)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), full_forward_losses(tiny_model, rows), atol=1e-5, rtol=1e-5)


def test_learned_positions_go_through_the_cache_too(tiny_gpt2):
    rows = torch.randint(97, (1, 60))
    torch.testing.assert_close(
        token_losses(tiny_gpt2, rows, chunk=13).double(), full_forward_losses(tiny_gpt2, rows), atol=1e-5, rtol=1e-5
    )


def test_one_text_needs_no_batch_dimension(tiny_model):
    ids = torch.randint(97, (30,))
    assert token_losses(tiny_model, ids, chunk=8).equal(token_losses(tiny_model, ids[None], chunk=8)[0])


def test_a_stream_without_end_is_read_as_it_comes_and_logits_exist_for_one_chunk_only(tiny_model):
    shapes = []
    tiny_model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    text = torch.randint(97, (1, 64))
    endless = (text[:, start : start + 8] for start in itertools.cycle(range(0, 64, 8)))
    pieces = list(itertools.islice(stream_losses(tiny_model, endless), 8))
    assert [piece.shape[1] for piece in pieces] == [7] + [8] * 7
    assert shapes == [(1, 1, 97), (1, 7, 97)] + [(1, 8, 97)] * 7
    tiny_model.lm_head._forward_hooks.clear()
    torch.testing.assert_close(torch.cat(pieces, 1), token_losses(tiny_model, text))


def test_bf16_losses_are_computed_in_fp32(tiny_model):
    rows = torch.randint(97, (1, 20))
    losses = token_losses(tiny_model.bfloat16(), rows, chunk=20)
    logits = tiny_model(rows).logits[0, :-1]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses[0], F.cross_entropy(logits.float(), rows[0, 1:], reduction="none"))


def test_progress_counts_every_token_once(tiny_model, capsys):
    token_losses(tiny_model, torch.randint(97, (1, 40)), chunk=16, progress="some arm")
    assert "some arm: 100%" in capsys.readouterr().err


def test_arms_are_run_on_the_same_tokens_and_entered_one_after_the_other(tiny_model):
    log = []

    def louder(factor):
        @contextmanager
        def arm(model):
            log.append(f"enter {factor}")
            handle = model.lm_head.register_forward_hook(lambda module, args, output: output * factor)
            yield
            handle.remove()
            log.append(f"exit {factor}")

        return arm

    rows = torch.randint(97, (2, 30))
    losses = compare_losses(tiny_model, rows, {"plain": nullcontext, "double": louder(2), "zero": louder(0)}, chunk=9)
    assert log == ["enter 2", "exit 2", "enter 0", "exit 0"]
    assert list(losses) == ["plain", "double", "zero"]
    assert losses["plain"].equal(token_losses(tiny_model, rows, chunk=9))
    torch.testing.assert_close(losses["zero"], torch.full((2, 29), math.log(97)))


def test_bins_average_over_texts_then_positions_then_exponentiate():
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 0.0, 1.0]])
    first, second, third = perplexity_by_position(losses, [0, 2, 3, 100])
    assert (first.start, first.end, first.tokens, first.nll) == (0, 2, 4, 2.5)
    assert first.perplexity == pytest.approx(math.exp(2.5))
    assert (second.tokens, second.nll) == (2, 4.0)
    assert (third.start, third.end, third.tokens, third.nll) == (3, 100, 4, 2.5)
    assert perplexity_by_position(losses[0], [1, 3])[0].nll == 2.5
    assert perplexity_by_position(losses, [5, 9]) == []


@given(st.integers(1, 40), st.integers(1, 3), st.sets(st.integers(0, 50), min_size=2))
def test_bins_agree_with_a_loop_over_positions(length, texts, positions):
    losses = torch.rand(texts, length) * 9
    edges = sorted(positions)
    expected = {}
    for start, end in itertools.pairwise(edges):
        at_position = [sum(losses[:, t].tolist()) / texts for t in range(start, min(end, length))]
        if at_position:
            expected[start, end] = math.exp(sum(at_position) / len(at_position))
    bins = perplexity_by_position(losses, edges)
    assert {(point.start, point.end): point.perplexity for point in bins} == pytest.approx(expected)


def test_a_loss_that_is_no_number_shows():
    (point,) = perplexity_by_position(torch.tensor([1.0, float("nan")]), [0, 2])
    assert math.isnan(point.perplexity)


def test_default_edges_stand_around_the_trained_window():
    assert default_edges(8192, 65_535) == [0, 4096, 8192, 10_240, 12_288, 16_384, 32_768, 65_536]
    assert default_edges(8192, 10_000) == [0, 4096, 8192, 10_240]
    assert default_edges(8192, 100) == [0, 4096]


def test_table_and_plot_show_every_arm(tiny_model):
    arms = {"unmodified": nullcontext, "again": nullcontext}
    losses = compare_losses(tiny_model, torch.randint(97, (2, 50)), arms)
    records = perplexity_records(tiny_model, losses, arms, [0, 20, 1000])
    assert [(record.arm, record.start, record.texts) for record in records] == [
        ("unmodified", 0, 2),
        ("unmodified", 20, 2),
        ("again", 0, 2),
        ("again", 20, 2),
    ]
    assert isinstance(records[0], PerplexityRecord)
    assert (records[0].settings, records[0].model, records[0].dtype) == ("nullcontext", "LlamaForCausalLM", "float32")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(perplexity_table(records))
    shown = console.export_text()
    assert f"{records[1].perplexity:,.1f}" in shown
    assert "20-1,000" in shown
    axes = plot_perplexity(losses, trained_window=25)
    assert [line.get_label() for line in axes.lines] == ["unmodified", "again", "trained window"]
    first, second = axes.lines[:2]
    assert first.get_linewidth() > second.get_linewidth()  # where both agree, the first is seen between dashes
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--")
    assert len(first.get_xdata()) == 49
    torch.testing.assert_close(torch.tensor(first.get_ydata()), losses["unmodified"].double().mean(0).exp())
    assert plot_perplexity(losses, axes=axes) is axes


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (TypeError, "integers", lambda model: token_losses(model, torch.rand(1, 9))),
        (ValueError, "at least 2 tokens", lambda model: token_losses(model, torch.ones(1, 1, dtype=torch.long))),
        (ValueError, r"\[texts, tokens\]", lambda model: token_losses(model, torch.ones(1, 2, 3, dtype=torch.long))),
        (ValueError, "chunk", lambda model: token_losses(model, torch.ones(9, dtype=torch.long), chunk=0)),
        (ValueError, "eval()", lambda model: token_losses(model.train(), torch.ones(9, dtype=torch.long))),
        (ValueError, "edges", lambda model: perplexity_by_position(torch.ones(9), [3])),
        (ValueError, "edges", lambda model: perplexity_by_position(torch.ones(9), [3, 3])),
        (ValueError, "edges", lambda model: perplexity_by_position(torch.ones(9), [-1, 3])),
    ],
)
def test_bad_input_is_named(tiny_model, error, says, call):
    with pytest.raises(error, match=says):
        call(tiny_model)


def test_a_model_without_a_cache_is_refused(tiny_model):
    without = {CACHE: None, "use_cache": False}
    tiny_model.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, **without}), with_kwargs=True)
    with pytest.raises(ValueError, match="keeps no cache"):
        token_losses(tiny_model, torch.ones(9, dtype=torch.long))


def test_a_first_token_that_is_padding_or_ends_texts_counts_like_any_other(tiny_model):
    tiny_model.generation_config.update(pad_token_id=0, eos_token_id=3, temperature=0.5, top_k=7, do_sample=True)
    rows = torch.tensor([[0, 5, 3, 8, 0, 9], [3, 3, 3, 1, 0, 2]])
    losses = token_losses(tiny_model, rows, chunk=4).double()
    torch.testing.assert_close(losses, full_forward_losses(tiny_model, rows), atol=1e-5, rtol=1e-5)
