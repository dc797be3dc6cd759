"""PEMA in generation: every mode against recomputation from the ids alone, and what its block leaves behind."""

from __future__ import annotations

import json
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_longtrunc import (
    PEMA,
    GradualUnrolling,
    PEMAAdapter,
    PEMALogitsProcessor,
    attach_processors,
    build_pema_memory,
    train_pema,
)
from hf_longtrunc.head import LanguageModelHead, head_inputs
from tests.command_line import model_folder  # noqa: F401
from tests.conftest import tiny_config
from tests.mixing.pema_models import (
    MASK,
    PADDED,
    PROMPTS,
    VOCAB,
    WIDTH,
    generate,
    last_hidden_states,
    random_adapter,
)

# -- generation --------------------------------------------------------------------------------------------------------


class BruteForce(LogitsProcessor):
    """The mixture recomputed from the ids alone: no hook, no cache, W by hand."""

    def __init__(self, model, adapter, share):
        self.model, self.adapter, self.share = model, adapter, share

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        mask = ((input_ids != 0).cumsum(-1) > 0).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        states = last_hidden_states(self.model, input_ids, attention_mask=mask, position_ids=positions)[:, -1]
        p_lm = (states @ self.model.lm_head.weight.T).softmax(-1)
        p_pema = (self.adapter(states) @ self.model.lm_head.weight.T).softmax(-1)
        share = self.share(input_ids) if callable(self.share) else self.share
        return (share * p_pema + (1 - share) * p_lm).log()


class Seen(LogitsProcessor):
    """Keeps what a processor was given and gave."""

    def __init__(self, processor):
        self.processor, self.calls = processor, []

    def __call__(self, input_ids, scores):
        result = self.processor(input_ids, scores)
        self.calls.append((input_ids.clone(), scores, result))
        return result


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "4 beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 4, "do_sample": True, "top_k": 0},
    "several returns": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}
MODES_OF_ALL = [mode for mode in MODES if mode != "static cache"]


def same_as_brute_force(model, mode, ids=PADDED, mask=MASK, share=0.5, interpolation=0.5):
    adapter = random_adapter()
    brute = BruteForce(model, adapter, share)
    with PEMALogitsProcessor(model, adapter, interpolation) as pema:
        seen = Seen(pema)
        ours = generate(model, [seen], ids, mask, **MODES[mode])
    assert len(seen.calls) == 6
    for input_ids, scores, result in seen.calls:
        torch.testing.assert_close(result, brute(input_ids, scores), atol=1e-4, rtol=0)
    assert torch.equal(ours.sequences, generate(model, [brute], ids, mask, **MODES[mode]).sequences)
    return ours.sequences


@pytest.mark.parametrize("mode", MODES_OF_ALL)
@pytest.mark.parametrize("is_padded", [False, True], ids=["", "left-padded"])
def test_every_mode_is_recomputation_from_the_ids(model, mode, is_padded):
    prompts = (PADDED, MASK) if is_padded else (PADDED[:, 3:], MASK[:, 3:])
    mixed = same_as_brute_force(model, mode, *prompts)
    assert not torch.equal(mixed, generate(model, [], *prompts, **MODES[mode]).sequences)


def test_static_cache(tiny_model):
    same_as_brute_force(tiny_model, "static cache")


@pytest.mark.parametrize("mode", ["greedy", "4 beams", "several returns"])
def test_gradual_unrolling_in_generation(tiny_model, mode):
    """Each row's share from its own source length and from the ids: the same under beams and padding."""
    lengths = [3, 8]

    def share(input_ids):
        rows = len(input_ids)
        step = input_ids.shape[1] - PADDED.shape[1]
        own = [lengths[row // (rows // 2)] for row in range(rows)]
        return torch.tensor([[(0.9 * max(0.0, 1 - step / length)) ** 2] for length in own])

    schedule = GradualUnrolling(source_length=lengths, prompt_length=PADDED.shape[1])
    same_as_brute_force(tiny_model, mode, share=share, interpolation=schedule)


def test_several_calls_in_one_block(tiny_model):
    """Another batch, and a call that goes on from what the last one wrote."""
    adapter = random_adapter()
    brute = BruteForce(tiny_model, adapter, 0.5)
    one = torch.tensor([[4, 5, 6, 7]])
    with PEMALogitsProcessor(tiny_model, adapter) as pema:
        first = generate(tiny_model, [pema]).sequences
        second = generate(tiny_model, [pema], one, torch.ones_like(one)).sequences
        third = generate(tiny_model, [pema], second, torch.ones_like(second), num_beams=3).sequences
    assert torch.equal(first, generate(tiny_model, [brute]).sequences)
    assert torch.equal(second, generate(tiny_model, [brute], one, torch.ones_like(one)).sequences)
    assert torch.equal(third, generate(tiny_model, [brute], second, torch.ones_like(second), num_beams=3).sequences)


def test_the_models_logits_are_stored_as_they_were(tiny_model):
    """transformers hands out the very tensor that output_logits stores."""
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema:
        stored = generate(tiny_model, [pema], output_logits=True)
    sequences = stored.sequences
    mask = torch.cat([MASK, torch.ones_like(sequences[:, 6:])], dim=1)
    logits = tiny_model(sequences, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(torch.stack(stored.logits, 1), logits[:, 5:-1], atol=1e-5, rtol=1e-5)


def test_what_an_earlier_processor_removed_stays_removed(tiny_model):
    """P_PEMA alone would bring the end of the text back before min_new_tokens."""
    eos = int(generate(tiny_model, [BruteForce(tiny_model, random_adapter(), 0.9)]).sequences[1, 6])
    with PEMALogitsProcessor(tiny_model, random_adapter(), 0.9) as pema:
        options = {"eos_token_id": eos, "pad_token_id": 0}
        assert (generate(tiny_model, [pema], **options).sequences[1, 6:] == eos).any()
        held = generate(tiny_model, [pema], min_new_tokens=6, **options).sequences
    assert not (held[:, 6:] == eos).any()


# -- the block ---------------------------------------------------------------------------------------------------------


@contextmanager
def left_as_it_was(model):
    before = model(PADDED).logits
    yield
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(model(PADDED).logits, before)


def test_the_block_leaves_nothing_behind(tiny_model):
    with left_as_it_was(tiny_model):
        with PEMALogitsProcessor(tiny_model, random_adapter()) as pema:
            generate(tiny_model, [pema])
        with pytest.raises(RuntimeError, match="stop here"), PEMALogitsProcessor(tiny_model, random_adapter()):
            raise RuntimeError("stop here")
        with pytest.raises(ValueError, match="outside its block"):
            generate(tiny_model, [pema])
        with pema, pytest.raises(ValueError, match="outside its block"):
            generate(tiny_model, [pema])


def test_the_handle_is_the_processor(tiny_model):
    """By `with`, by attach and detach, and the same tokens as by the earlier name."""
    adapter = random_adapter()
    with PEMALogitsProcessor(tiny_model, adapter, 0.3) as pema:
        expected = generate(tiny_model, [pema]).sequences
    with left_as_it_was(tiny_model):
        with PEMA(adapter, interpolation=0.3)(tiny_model) as pema:
            assert torch.equal(generate(tiny_model, [pema]).sequences, expected)
        pema = PEMA(adapter, interpolation=np.float32(0.3)).attach(tiny_model)
        assert torch.equal(generate(tiny_model, [pema]).sequences, expected)
        assert "PEMA(PEMAAdapter(" in repr(pema)
        assert "on LlamaForCausalLM: the input of its output embedding is read" in repr(pema)
        pema.detach()
        pema.detach()
        assert "detached" in repr(pema)
        with pytest.raises(ValueError, match="outside its block"):
            generate(tiny_model, [pema])


def test_a_generation_without_it_in_the_block_changes_nothing(tiny_model):
    """It used to pile up the states of these, and to refuse the next call for prompt lookup."""
    with PEMA(random_adapter())(tiny_model) as pema:
        expected = generate(tiny_model, [pema]).sequences
        generate(tiny_model, [])
        tiny_model(PADDED)
        assert torch.equal(generate(tiny_model, [pema]).sequences, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own import
def test_a_compiled_model_is_refused_with_the_way_out(tiny_model):
    with pytest.raises(ValueError, match="compile that afterwards"):
        PEMA(random_adapter()).attach(torch.compile(tiny_model))
    with pytest.raises(TypeError, match="adapter must be a PEMAAdapter"):
        PEMA(tiny_model)


def test_two_adapters_at_once(tiny_model):
    """The second mixes into what the first returned; neither hears the other's use of the head."""
    one, two = (PEMALogitsProcessor(tiny_model, random_adapter(seed=seed), 0.3) for seed in (7, 9))
    with one, two:
        scores = generate(tiny_model, [one, two], output_scores=True).scores[0]
    first, second = (BruteForce(tiny_model, part.adapter, 0.3)(PADDED, None).exp() for part in (one, two))
    plain = BruteForce(tiny_model, one.adapter, 0.0)(PADDED, None).exp()
    alone = (second - 0.7 * plain) / 0.3
    torch.testing.assert_close(scores.exp(), 0.3 * alone + 0.7 * first, atol=1e-5, rtol=1e-4)


REFUSED = {
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "saw 0 since the last one"),
    "guidance": ({"guidance_scale": 1.5}, "saw 2 since the last one"),
    "chunks": ({"prefill_chunk_size": 2}, "saw 3 since the last one"),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_modes_that_cannot_be_right_are_refused(tiny_model, mode):
    options, message = REFUSED[mode]
    ids = torch.tensor([PROMPTS[1]])
    refused = pytest.raises(ValueError, match=f"one forward of the model for every step, and {message}")
    with left_as_it_was(tiny_model), PEMALogitsProcessor(tiny_model, random_adapter(), 1e-9) as pema, refused:
        generate(tiny_model, [pema], ids, torch.ones_like(ids), **options)


@pytest.mark.transformers_own_deprecation("Passing `generation_config` together with")
def test_assisted_decoding_is_refused(tiny_model):
    torch.manual_seed(5)
    assistant = LlamaForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    ids = torch.tensor([PROMPTS[1]])
    refused = pytest.raises(ValueError, match="assisted decoding")
    with left_as_it_was(tiny_model), PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        generate(tiny_model, [pema], ids, torch.ones_like(ids), assistant_model=assistant)


def test_several_positions_of_one_forward_are_refused(tiny_model):
    """What assisted decoding does once its candidates are there: no second row of scores from the same forward."""
    adapter, ids = random_adapter(), PADDED[:, 3:]
    expected = BruteForce(tiny_model, adapter, 0.5)(ids, None)
    with PEMALogitsProcessor(tiny_model, adapter) as pema, torch.no_grad():
        logits = tiny_model(ids).logits
        mixed = pema(ids, logits[:, -1])
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="saw 0 since the last one"):
            pema(ids, logits[:, -1])


def test_continuous_batching_is_refused(tiny_model):
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, attach_processors(tiny_model, [pema]):
        outputs = tiny_model.generate_batch([[1, 5, 9]], generation_config=config, continuous_batching_config=settings)
    assert not any(output.generated_tokens for output in outputs.values())  # transformers logs why a request failed


def test_another_models_scores_are_refused(tiny_model, tiny_gpt2):
    refused = pytest.raises(ValueError, match="the model that PEMALogitsProcessor was given")
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        generate(tiny_gpt2, [pema])


def test_inputs_embeds_are_refused(tiny_model):
    embeds = tiny_model.get_input_embeddings()(PADDED)
    refused = pytest.raises(ValueError, match="instead of inputs_embeds")
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, refused:
        tiny_model.generate(inputs_embeds=embeds, attention_mask=MASK, max_new_tokens=2, logits_processor=[pema])


def test_scores_of_other_rows_or_tokens_are_refused(tiny_model):
    with PEMALogitsProcessor(tiny_model, random_adapter()) as pema, torch.no_grad():
        for rows, vocab in ((1, VOCAB), (2, VOCAB + 1)):
            scores = torch.randn(rows, vocab)
            tiny_model(PADDED)
            with pytest.raises(ValueError, match=r"scores must have shape \(2, 97\)"):
                pema(PADDED[:rows], scores)


def test_adapters_and_models_that_do_not_fit(tiny_model):
    with pytest.raises(ValueError, match="a vocabulary of 98, this model has 32 and 97"):
        PEMALogitsProcessor(tiny_model, PEMAAdapter(WIDTH, 4, VOCAB + 1))
    with pytest.raises(ValueError, match="the adapter was made for states of width 16"):
        PEMALogitsProcessor(tiny_model, PEMAAdapter(16, 4, VOCAB))
    with pytest.raises(ValueError, match=r"interpolation must be a number of at least 0 and of at most 1, got 1\.5"):
        PEMALogitsProcessor(tiny_model, random_adapter(), 1.5)
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        PEMALogitsProcessor(tiny_model.model, random_adapter())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        PEMALogitsProcessor(t5, random_adapter())


def test_head_inputs_lets_go_after_an_exception(tiny_model):
    with pytest.raises(RuntimeError, match="stop here"), head_inputs(tiny_model.lm_head, lambda states: None):
        raise RuntimeError("stop here")
    assert not tiny_model.lm_head._forward_pre_hooks


def test_training_makes_the_targets_likely(tiny_model):
    """From memory to generation: what was taught comes out, and not without the adapter."""
    taught = [[1, 5, 9, 13, 20, 21, 22, 23], [4, 6, 8, 30, 31, 32, 33, 34]]
    examples = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in taught]
    memory = build_pema_memory(tiny_model, examples)
    adapter = train_pema(tiny_model, memory, rank=16, epochs=150, learning_rate=5e-3)
    prompts = torch.tensor([ids[:3] for ids in taught])
    assert F.cross_entropy(LanguageModelHead(tiny_model)(adapter(memory.hidden)), memory.tokens) < 0.1
    with PEMALogitsProcessor(tiny_model, adapter, 0.7) as pema:
        said = generate(tiny_model, [pema], prompts, torch.ones_like(prompts)).sequences
    assert said[:, :8].tolist() == taught
    assert generate(tiny_model, [], prompts, torch.ones_like(prompts)).sequences[:, :8].tolist() != taught


def test_the_recipe_runs(model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = Path(__file__).parents[2] / "recipes" / "pema.py"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    options = ["--examples", "2", "--tests", "2", "--epochs", "1", "--rank", "4"]
    monkeypatch.setattr(
        sys, "argv", ["pema.py", *options, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(recipe), run_name="__main__")
    assert not ended.value.code
    assert "exact match" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out" / "pema.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len({record["arm"] for record in records})
    assert PEMAAdapter.load(tmp_path / "out" / "adapter").rank == 4


@pytest.mark.real_model
def test_on_the_real_model(real_model):
    """Left-padded, 2 beams: the scores of every step are those of the ids alone."""
    model, tokenizer = real_model
    prompts = ["Dear colleagues,", "The capital of France is the city of"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    examples = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    adapter = train_pema(model, build_pema_memory(model, examples), rank=16, epochs=1)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    with PEMALogitsProcessor(model, adapter) as pema:
        seen = Seen(pema)
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False, logits_processor=[seen])
    for input_ids, _, result in seen.calls:
        for rows, mixed in zip(input_ids.split(2), result.split(2), strict=True):  # the beams of one prompt
            padding = int((rows[0] == tokenizer.pad_token_id).sum())
            states = last_hidden_states(model, rows[:, padding:])[:, -1]
            p_lm, p_pema = (
                torch.softmax(state @ model.lm_head.weight.T, -1) for state in (states, adapter(states).detach())
            )
            torch.testing.assert_close(mixed.exp(), 0.5 * p_pema + 0.5 * p_lm, atol=1e-5, rtol=1e-3)
