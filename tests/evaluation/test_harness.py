"""Patched models under lm-evaluation-harness: nothing is cut, lengths are counted right, RULER's offline tasks run."""

from __future__ import annotations

import io
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.evaluation import read_records
from tests.command_line import invoke

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the harness' own
    pytest.mark.xdist_group("lm_eval"),  # imported once: it takes seconds
]


@pytest.fixture(scope="module")
def harness():
    import nltk

    # RULER's module asks for sentence data that only its essay tasks read: no network in tests.
    download, nltk.download = nltk.download, lambda name: True

    nltk.download = download
    from hf_longtrunc.evaluation import harness

    return harness


@pytest.fixture
def ruler(harness, monkeypatch):
    """The harness with RULER's tasks alone: the index of all its tasks takes seconds."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    only = partial(harness.TaskManager, include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", only)
    # Its tasks make up 500 prompts each; here the first two.
    from lm_eval.tasks.ruler import prepare_niah

    monkeypatch.setattr(prepare_niah, "tqdm", lambda numbers, **_: list(numbers)[:2])
    return harness


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, args, 0) for args in arguments]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """The tiny model's folder with a tokenizer that ends texts and pads, as the harness wants it."""
    tiny, tokenizer = load_pretrained(tiny_folder)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    for part in (tiny, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def model(folder):
    return load_pretrained(folder)


def test_a_prompt_that_does_not_fit_is_refused_not_cut(harness, model, prose):
    tiny, tokenizer = model
    settings = {"max_gen_toks": 10, "until": []}
    fits = tokenizer.decode(tokenizer(prose).input_ids[1:54])
    lm = harness.PatchedLM(tiny, tokenizer=tokenizer)
    assert lm.max_length == 64
    assert len(tokenizer(fits).input_ids) == 54
    assert len(lm.generate_until(instances((fits, settings)))) == 1
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens and 54 fit in max_length=64"):
        lm.generate_until(instances((fits + " and", settings)))
    with pytest.raises(ValueError, match=r"a prompt has 65 tokens and 64 fit"):
        lm._loglikelihood_tokens([(("", ""), [5] * 60, [7] * 6)])
    assert len(lm._loglikelihood_tokens([(("", ""), [5] * 60, [7] * 5)])) == 1


def test_with_an_arm_a_prompt_of_any_length_is_read_whole(harness, model, prose):
    tiny, tokenizer = model
    seen = []
    generate = tiny.generate
    tiny.generate = lambda **kwargs: seen.append(kwargs["input_ids"].shape[1]) or generate(**kwargs)
    text, sea = prose * 4, " sea and away"
    ids = tokenizer(text, verbose=False).input_ids
    continuation = tokenizer(sea, add_special_tokens=False).input_ids
    arm = LMInfinite(num_sink_tokens=2, window_length=32)
    with harness.PatchedLM(tiny, tokenizer=tokenizer, arm=arm) as lm:
        lm.generate_until(instances((text, {"max_gen_toks": 3, "until": []})))
        ((likelihood, _),) = lm.loglikelihood(instances((text.rstrip(), sea)))
    assert seen == [len(ids)]
    whole = torch.tensor([tokenizer(text.rstrip(), verbose=False).input_ids + continuation])
    with arm(tiny), torch.no_grad():
        log_probs = tiny(whole).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, whole[0, 1:, None])[-len(continuation) :].sum()
    assert likelihood == pytest.approx(expected.item(), abs=1e-3)


def test_the_patch_comes_off_after_an_error_too(harness, model):
    tiny, tokenizer = model
    ids = torch.arange(1, 100)[None]
    before = tiny(ids).logits
    with (
        pytest.raises(KeyError),
        harness.PatchedLM(tiny, tokenizer=tokenizer, arm=LMInfinite(num_sink_tokens=2, window_length=32)),
    ):
        raise KeyError
    assert torch.equal(tiny(ids).logits, before)


@pytest.fixture
def encoder_decoder(trained_tokenizer):
    sizes = {"vocab_size": trained_tokenizer.get_vocab_size(), "d_model": 16, "pad_token_id": 0}
    config = T5Config(**sizes, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, n_positions=200)
    model = T5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def test_an_encoder_decoder_generates_max_gen_toks_whatever_its_prompt(harness, encoder_decoder, model, prose):
    lm = harness.PatchedLM(encoder_decoder, tokenizer=model[1])
    made = []
    generate = encoder_decoder.generate
    encoder_decoder.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    lm.generate_until(instances((prose[:200], {"max_gen_toks": 7, "until": []})))
    assert made[0].shape == (1, 1 + 7)


def test_an_encoder_decoder_stops_at_a_stop_string(harness, encoder_decoder, model, prose):
    tokenizer = model[1]
    (letter,) = tokenizer("a", add_special_tokens=False).input_ids
    head = encoder_decoder.lm_head.forward
    encoder_decoder.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, torch.tensor([letter]), 1e4)
    lm = harness.PatchedLM(encoder_decoder, tokenizer=tokenizer)
    made = []
    generate = encoder_decoder.generate
    encoder_decoder.generate = lambda **kwargs: made.append(generate(**kwargs)) or made[-1]
    lm.generate_until(instances((prose[:200], {"max_gen_toks": 30, "until": ["aaa"]})))
    assert made[0].shape == (1, 1 + 3)
    with pytest.raises(ValueError, match="tokens and 200 fit"):
        lm.generate_until(instances((prose * 3, {"max_gen_toks": 7, "until": []})))


def answers(tokenizer, sight):
    """A `generate` that answers with the asked number if it stands in the prompt's last `sight` tokens."""

    def generate(input_ids, **kwargs):
        text = tokenizer.decode(input_ids[0], skip_special_tokens=True)
        key = re.findall(r"magic number for (\S+) mentioned", text)[-1]
        seen = tokenizer.decode(input_ids[0, -sight:], skip_special_tokens=True)
        found = re.search(rf"magic numbers for {re.escape(key)} is: (\d+)", seen)
        answer = tokenizer(f" {found[1] if found else 'nothing'}", add_special_tokens=False).input_ids
        return torch.cat([input_ids, torch.tensor([answer])], dim=1)

    return generate


def test_a_ruler_task_of_many_keys_runs(ruler, model):
    """Whoever reads all 4,096 tokens scores 1."""
    tiny, tokenizer = model
    tiny.generate = answers(tokenizer, 10**9)
    (record,) = ruler.run_harness(
        tiny, tokenizer, ["niah_multikey_2"], {"unmodified": nullcontext}, limit=2, max_length=4096
    )
    assert record.metrics == {"4096": 1.0}


def test_a_ruler_task_runs_again_from_its_records(ruler, model, tmp_path):
    """4,096 tokens through a model whose window is 64: nothing is cut, so whoever reads everything scores 1."""
    tiny, tokenizer = model
    arms = {"unmodified": nullcontext, "LM-Infinite": LMInfinite(num_sink_tokens=4, window_length=32)}
    run = partial(ruler.run_harness, tiny, tokenizer, ["niah_single_1"], limit=2, path=tmp_path / "ruler.jsonl")
    (record,) = run({"LM-Infinite": arms["LM-Infinite"]})
    assert (record.samples, record.metrics) == (2, {"4096": 0.0})
    tiny.generate = answers(tokenizer, 10**9)
    records = run(arms, max_length=4096)
    assert [r.metrics for r in records] == [{"4096": 1.0}] * 2
    tiny.generate = answers(tokenizer, 60)
    assert run(arms, max_length=4096) == records == read_records(tmp_path / "ruler.jsonl", ruler.HarnessRecord)[1:]
    assert run({"short sight": nullcontext}, max_length=4096)[0].metrics["4096"] < 1
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens and -?\d+ fit|Invalid"):
        run({"unmodified": nullcontext}, max_length=2048)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ruler.harness_table(records))
    assert "LM-Infinite" in console.export_text()


def test_the_command_takes_a_folder_of_another_family_a_dtype_and_a_device(ruler, folder, tmp_path):
    tokens = load_pretrained(folder)[0].config.vocab_size
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = Qwen3Config(vocab_size=tokens, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    options = ["--model", folder, "--lm-infinite", "--window", "32", "--max-length", "5000", "--limit", "1"]
    options += ["--dtype", "bfloat16", "--device", "cpu"]
    result = invoke("lm-eval", "niah_single_1", *options, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "niah_single_1" in result.output
    records = read_records(tmp_path / "lm_eval.jsonl", ruler.HarnessRecord)
    assert [r.arm for r in records] == ["unmodified", "lm-infinite"]
    assert {(r.model, r.dtype) for r in records} == {(folder, "bfloat16")}


def test_an_unknown_task_is_one_line_with_the_names_that_are_near(ruler, folder, tmp_path):
    result = invoke("lm-eval", "niah_single_one", "--model", folder, "--output-dir", tmp_path / "out", columns=None)
    assert result.exit_code == 2
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith(
        "hf-longtrunc lm-eval: error: lm-evaluation-harness has no task named niah_single_one; did you"
    )
    assert "niah_single_1" in said
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
