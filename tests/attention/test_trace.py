"""What an answer read: every share against a softmax pair by pair in fp64, and nothing left behind."""

from __future__ import annotations

import math
import re
import threading
from collections import defaultdict

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import AttentionTrace, DualChunkAttention, LMInfinite, TopBlocks, TopK
from hf_longtrunc.attention.context import get_context
from hf_longtrunc.attention.dual_chunk import ChunkLaw
from hf_longtrunc.attention.trace import weights_of_keys, weights_of_positions
from tests.attention.reference import Rope, is_visible
from tests.attention.tiny_models import tiny_model as family
from tests.conftest import tiny_config

LAYERS, HEADS, DIM, SINKS, WINDOW = 5, 4, 8, 4, 24
CHUNKS = DualChunkAttention(chunk_length=20, trained_length=32)
PLAIN = LMInfinite(window_length=WINDOW, num_sink_tokens=SINKS)
BLOCKS = TopBlocks(block_size=8, blocks=3, margin=2, voting_rows=3, rows=6, first_voting_layer=2)
WITH_BLOCKS = LMInfinite(window_length=WINDOW, num_sink_tokens=SINKS, retrieval=BLOCKS)
WITH_KEYS = LMInfinite(window_length=WINDOW, num_sink_tokens=SINKS, retrieval=TopK(k=3, first_layer=2))
CHUNKS_AND_BLOCKS = DualChunkAttention(chunk_length=20, trained_length=32, retrieval=BLOCKS)
TECHNIQUES = {"dca": CHUNKS, "dca-blocks": CHUNKS_AND_BLOCKS, "λ": PLAIN, "blocks": WITH_BLOCKS, "k": WITH_KEYS}
EVERY = pytest.mark.parametrize("technique", TECHNIQUES.values(), ids=list(TECHNIQUES))


@pytest.fixture
def model():
    return LlamaForCausalLM(tiny_config(num_hidden_layers=LAYERS)).eval().double()


def prompt(tokens=70, rows=1):
    return torch.randint(4, 97, (rows, tokens))


class Projected:
    """Every token's queries and keys before they are rotated, by layer, row and position, as the last forward made
    them."""

    def __init__(self, model):
        self.query, self.key = defaultdict(dict), defaultdict(dict)
        for index, layer in enumerate(model.model.layers):
            for kind in ("q", "k"):
                module = getattr(layer.self_attn, f"{kind}_proj")
                module.register_forward_hook(lambda _, args, output, at=(kind, index): self.note(*at, output))

    def note(self, kind, index, output):
        context, store = get_context(), self.query if kind == "q" else self.key
        order = context.query_order
        for row, states in enumerate(output):
            states = states if order is None else states[order[row]]
            positions = context.query_positions.expand(len(output), -1)[row].tolist()
            for position, state in zip(positions, states, strict=True):
                store[index, row][position] = state.view(-1, DIM).detach()


def naive(technique, projected, row, i, blocks=None):
    """The mean over layers and heads of one token's attention to each position."""
    rope, mass = Rope(DIM), torch.zeros(i + 1, dtype=torch.float64)
    retrieval = getattr(technique, "retrieval", None)
    for layer in range(LAYERS):
        query, keys = projected.query[layer, row][i], projected.key[layer, row]
        for head in range(HEADS):

            def scores(js, away, head=head, query=query, keys=keys):
                if not len(js):
                    return []
                turned = rope.turn(query[head].expand(len(js), -1), torch.as_tensor(away).expand(len(js)))
                key = torch.stack([keys[j][head * len(keys[j]) // HEADS] for j in js])
                return list(zip(js, ((turned * key).sum(-1) / math.sqrt(DIM)).tolist(), strict=True))

            if isinstance(technique, DualChunkAttention):
                logits = scores(range(i + 1), ChunkLaw(20, 32).distance(torch.tensor([i]), torch.arange(i + 1))[0])
            else:
                seen = [j for j in range(i + 1) if is_visible(i, j, SINKS, WINDOW)]
                logits = scores(seen, torch.tensor([min(i - j, WINDOW) for j in seen]))
            if isinstance(retrieval, TopK) and layer >= 2:
                middle = scores(range(SINKS, i - WINDOW + 1), WINDOW // 2)
                logits += sorted(middle, key=lambda pair: -pair[1])[:3]
            if technique is CHUNKS_AND_BLOCKS and layer >= retrieval.first_layer:
                chosen = {j for start, stop in blocks for j in range(start, stop)}
                logits = [(j, logit + math.log(retrieval.emphasis if j in chosen else 1.0)) for j, logit in logits]
            elif isinstance(retrieval, TopBlocks) and layer >= retrieval.first_layer:
                far = WINDOW // 4
                chosen = {j for start, stop in blocks for j in range(start, stop)}
                more = scores([j for j in chosen if SINKS <= j <= i - far], far)
                logits += [(j, logit + math.log(retrieval.emphasis)) for j, logit in more]
            weights = torch.tensor([logit for _, logit in logits], dtype=torch.float64).softmax(0)
            for (j, _), weight in zip(logits, weights.tolist(), strict=True):
                mass[j] += weight
    return mass / (LAYERS * HEADS)


@EVERY
@pytest.mark.parametrize("padding", [0, 7])
def test_every_share_is_that_of_the_one_softmax(model, technique, padding):
    ids = prompt(rows=2 if padding else 1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with technique(model) as handle, AttentionTrace(handle, stretch=1) as trace:
        projected = Projected(model)
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    for step, record in enumerate(trace.records):
        assert record.position.tolist() == [69 + step - padding, 69 + step][-len(ids) :]
        assert record.token.tolist() == sequences[:, 69 + step].tolist()
        assert (record.blocks is not None) == (technique in (WITH_BLOCKS, CHUNKS_AND_BLOCKS))
        for row, i in enumerate(record.position.tolist()):
            blocks = None if record.blocks is None else record.blocks[row].tolist()
            expected = naive(technique, projected, row, i, blocks)
            torch.testing.assert_close(record.mass[row, : i + 1], expected, rtol=2e-6, atol=1e-7)
            assert not record.mass[row, i + 1 :].any()
    assert len(trace.records) == 3


@EVERY
def test_rows_whose_last_column_is_no_token(model, technique):
    if technique in (WITH_BLOCKS, CHUNKS_AND_BLOCKS):
        pytest.skip("runs the end of a prompt twice, with the cache of generate()")
    ids = prompt(40, rows=2)
    mask = torch.ones_like(ids)
    mask[0, 35:] = 0
    with technique(model) as handle, AttentionTrace(handle, stretch=1) as trace:
        projected = Projected(model)
        model(ids, attention_mask=mask, use_cache=False)
    (record,) = trace.records
    assert record.position.tolist() == [34, 39]
    assert record.token.tolist() == [int(ids[0, 34]), int(ids[1, 39])]
    for row, i in enumerate((34, 39)):
        expected = naive(technique, projected, row, i)
        torch.testing.assert_close(record.mass[row, : i + 1], expected, rtol=2e-6, atol=1e-7)


@EVERY
def test_tracing_changes_no_answer_and_leaves_nothing(model, technique):
    ids, options = prompt(), {"max_new_tokens": 6, "do_sample": False}
    with technique(model) as handle:
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        plain = model.generate(ids, **options)
        with AttentionTrace(handle, stretch=8) as trace:
            traced = model.generate(ids, **options)
        assert torch.equal(plain, traced)
        assert [int(record.position[0]) for record in trace.records] == list(range(69, 75))
        for name, module in model.named_modules():
            assert module.__dict__.keys() == before[name].keys()
            assert all(value is before[name][key] for key, value in module.__dict__.items() if callable(value))
        model.generate(ids, **options)
        assert len(trace.records) == 6
    with technique(model) as handle, pytest.raises(KeyboardInterrupt), AttentionTrace(handle):
        raise KeyboardInterrupt
    assert not any("_hf_longtrunc_attend" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["falcon", "bloom", "deepseek_v3", "gemma3_text", "gpt_oss"])
def test_families_with_attention_of_their_own(name):
    model = family(name)
    ids = torch.randint(4, 97, (1, 40))
    with LMInfinite(window_length=16, num_sink_tokens=4)(model) as handle:
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)
        with AttentionTrace(handle, stretch=4) as trace:
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    assert len(trace.records) == 4
    sums = torch.stack([record.mass.sum() for record in trace.records])
    if name == "gpt_oss":  # learned sink logits take a part that is no token's
        assert (sums < 0.9999).all()
    else:
        torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0)
    assert all(not record.mass[0, 1:5].any() for record in trace.records)  # neither sinks nor window


def test_a_text_within_one_chunk_is_traced_too(model):
    ids = prompt(12)
    with CHUNKS(model) as handle:
        plain = model.generate(ids, max_new_tokens=3, do_sample=False)
        with AttentionTrace(handle, stretch=4) as trace:
            assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), plain)
    assert [record.mass.shape[1] for record in trace.records] == [3, 4, 4]


def test_half_precision_is_counted_in_single(model):
    model, ids = model.bfloat16(), prompt()
    with PLAIN(model) as handle, AttentionTrace(handle) as trace:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert all(abs(float(record.mass.sum()) - 1) < 1e-6 for record in trace.records)


def test_two_threads_on_one_model(model):
    texts = [prompt(40), prompt(60)]
    with PLAIN(model) as handle, AttentionTrace(handle) as trace:
        threads = [threading.Thread(target=model, args=(ids,)) for ids in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(int(record.position[0]) for record in trace.records) == [39, 59]
    assert all(abs(float(record.mass.sum()) - 1) < 1e-9 for record in trace.records)


def test_training_steps_are_recorded_once(model):
    ids = prompt()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    with PLAIN(model) as handle, AttentionTrace(handle, stretch=8) as trace:
        model(ids, labels=ids).loss.backward()
    (record,) = trace.records
    assert float(record.mass.sum()) == pytest.approx(1)


def test_masses_are_those_of_the_weights():
    query, key = torch.randn(2, 4, 3, 8).double(), torch.randn(2, 2, 9, 8).double()
    weights = (query @ key.repeat_interleave(2, dim=1).transpose(-1, -2)).softmax(-1)

    def attend(values):
        return weights @ values.repeat_interleave(2, dim=1)

    (mass,) = weights_of_keys(attend, key, dtype=torch.float64)
    torch.testing.assert_close(mass, weights.sum((1, 2)))
    positions = torch.tensor([[-3, -1, 0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    mass[0, :2] = 0
    summed = weights_of_positions(mass, positions, 4, 3)
    for row in range(2):
        for part in range(3):
            inside = [c for c, p in enumerate(positions[row].tolist()) if p >= 0 and p // 4 == part]
            torch.testing.assert_close(summed[row, part], mass[row, inside].sum())


def test_what_cannot_be_traced_is_refused(model):
    ids = prompt()
    with pytest.raises(TypeError, match="handle must be what LMInfinite"):
        AttentionTrace(model)
    with PLAIN(model) as handle:
        with pytest.raises(ValueError, match="stretch must be"):
            AttentionTrace(handle, stretch=0)
        with AttentionTrace(handle) as trace:
            with pytest.raises(ValueError, match="has an AttentionTrace already"):
                AttentionTrace(handle)
            with pytest.raises(ValueError, match="num_beams=2"):
                model.generate(ids, num_beams=2, max_new_tokens=2)
            with pytest.raises(ValueError, match="use torch"), torch.inference_mode():
                model(ids)
            with pytest.raises(RuntimeError, match="cannot be detached yet"):
                handle.detach()
        assert "detached; 0 forwards" in repr(trace)
        model.generate(ids, num_beams=2, max_new_tokens=2)
        handle.compiled = model.forward
        with pytest.raises(ValueError, match="compiled step"):
            AttentionTrace(handle)
    with pytest.raises(ValueError, match="reads nothing any more"):
        AttentionTrace(handle)


class Letters:
    """A token a letter."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def test_ids_that_were_not_read_are_refused(model, tmp_path):
    ids, path = prompt(), tmp_path / "page.html"
    with PLAIN(model) as handle, AttentionTrace(handle) as trace:
        sequences = model.generate(ids, max_new_tokens=4, do_sample=False)
    page = {"tokenizer": Letters(), "path": path}
    with pytest.raises(ValueError, match="nothing was recorded at position 67"):
        trace.to_html(ids=sequences[0], prompt_length=68, **page)
    with pytest.raises(ValueError, match="nothing was recorded at position 69 of row 1"):
        trace.to_html(ids=sequences[0], prompt_length=70, row=1, **page)
    other = sequences[0].clone()
    other[71] += 1
    with pytest.raises(ValueError, match=re.escape(f"token {int(sequences[0, 71])} was recorded at position 71")):
        trace.to_html(ids=other, prompt_length=70, **page)
    with pytest.raises(ValueError, match="prompt_length must be"):
        trace.to_html(ids=sequences[0], prompt_length=74, **page)
    assert not path.exists()
