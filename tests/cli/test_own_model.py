"""A model of one's own: a folder, a dtype and a device in every command, and the sizes that the page names."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_longtrunc import LMInfinite, load_pretrained
from hf_longtrunc.cli import common
from tests.command_line import invoke, letter_tokenizer
from tests.test_docs import DOCS, ROOT

PAGE = (DOCS / "howto" / "your_model.md").read_text(encoding="utf-8")
# As published on the hub: what a size in memory depends on.
PUBLISHED = {
    "SmolLM2-135M-Instruct": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
        ),
    ),
    "Qwen3-0.6B": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960,
        ),
    ),
    "Qwen3-4B-Instruct-2507": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=262144,
        ),
    ),
    "Llama-3.1-8B-Instruct": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=131072,
        ),
    ),
}  # fmt: skip


def ring_bytes(config, sinks, window, width):
    """Keys and values of sinks, window and 64 more slots, `width` bytes a number: the page's formula."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * width * config.num_hidden_layers * config.num_key_value_heads * head * (sinks + window + 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_on_the_page_follow_from_the_published_configs(name):
    kind, config = PUBLISHED[name]
    with torch.device("meta"):
        model = kind(config)
    weights = 2 * model.num_parameters() / 1e9
    cache = ring_bytes(config, 16, 4096, 2) / 1e6
    row = re.search(rf"^\| \[?{re.escape(name)}\b.*$", PAGE, re.MULTILINE)[0].split("|")
    said_weights, said_cache = (float(re.search(r"[\d.]+", cell)[0]) for cell in row[2:4])
    assert weights == pytest.approx(said_weights, rel=0.05, abs=0.05)
    assert cache == pytest.approx(said_cache, rel=0.01)
    assert name in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMN?.,")
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


COMMANDS = {  # what each needs besides a model
    "ask": ("TEXT", "who lit the lamp?", "--finder", "bm25", "--max-new-tokens", 3),
    "chat": ("--max-new-tokens", 3),
    "check-packed": (),
    "demo": ("sampling", "past-window", "--max-new-tokens", 3, "--output-dir", "OUT"),
    "match": ("TEXT", "--rank", 2, "--bat-tokens", 8, "--picture", "OUT/match.png"),
    "ppl": ("TEXT", "--tokens", 100),
    "scrolls": ("qasper", "--data", "ROWS", "--max-new-tokens", 2, "--output-dir", "OUT", "--lm-infinite"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_a_dtype_and_a_device_go_through_every_command(command, qwen3, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("The keeper lit the lamp. Nobody came to the sea that day, and it was long. " * 4)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "pid": "a_0", "input": "who\\n\\na text", "output": "b"}\n')
    places = {"TEXT": tmp_path / "text", "ROWS": tmp_path / "rows.jsonl", "OUT": tmp_path}
    given = [places.get(word, str(word).replace("OUT", str(tmp_path))) for word in COMMANDS[command]]
    loaded = []
    load = common.load
    monkeypatch.setattr(common, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[-1])
    model = [qwen3] if command == "check-packed" else ["--model", qwen3]
    options = [*model, "--dtype", "bfloat16", "--device", "cpu"]
    result = invoke(command, *given, *options, input="hello\n" if command == "chat" else None)
    assert result.exit_code == 0, result.output
    ((own, _),) = loaded
    assert type(own) is Qwen3ForCausalLM
    assert own.dtype == torch.bfloat16
    assert own.device.type == "cpu"


def test_the_formula_of_the_cache_is_what_a_model_keeps(qwen3):
    model, _ = load_pretrained(qwen3, dtype=torch.bfloat16, device="cpu")
    kept = LMInfinite(num_sink_tokens=4, window_length=64).explain(model).cache_bytes(1000)
    assert kept == pytest.approx(ring_bytes(model.config, 4, 64, 2), rel=0.05)
