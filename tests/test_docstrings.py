"""Examples in docstrings run, on tiny models and without a network."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_longtrunc
from hf_longtrunc.models import cache_of

from .command_line import letter_tokenizer
from .cross_attention.seq2seq_models import tiny_seq2seq

ATTENTION = [
    *("dual_chunk", "dual_chunk_attention", "explanation", "full_store", "key_retrieval", "lambda_attention"),
    *("lm_infinite", "ring_cache", "rope", "streaming_llm", "technique", "trace"),
]
SAMPLING = (
    *("attach", "basis", "bat", "by_name", "calls", "mask", "processors", "recorder", "support"),
    *("trace", "trace_records"),
)
SERVING = ("continuous_batching", "rows", "sglang")
MIXING = ("auxiliary", "pema", "pema_processor", "uld")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    public = {name: getattr(hf_longtrunc, name) for name in hf_longtrunc.__all__}
    public |= {"LlamaForCausalLM": LlamaForCausalLM, "cache_of": cache_of, "seq2seq": tiny_seq2seq(vocab_size=96)}
    public |= {"tokenizer": letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], "abcdefghijklmnopqrstuvwxyz .,")}
    scratch = tmp_path_factory.mktemp("examples")
    model.save_pretrained(scratch / "model")
    public |= {"scratch": str(scratch), "model_folder": str(scratch / "model")}
    letter_tokenizer(["<pad>", "<s>", "</s>", "<unk>"], "abc .").save_pretrained(scratch / "whole")
    model.save_pretrained(scratch / "whole")
    public["folder"] = str(scratch / "whole")
    return {**public, "model": model, "ids": torch.randint(3, 90, (1, 100)), "torch": torch}


OTHERS = [
    f"data.{name}"
    for name in (
        *("balance", "collators", "dataset", "datatrove", "megatron", "mixture", "packing", "report", "states"),
        *("stream", "verify"),
    )
]
OTHERS += [f"asking.{name}" for name in ("finders", "index", "passages", "prompt")]
OTHERS += [
    f"evaluation.{name}"
    for name in (
        "card",
        "intervals",
        "matching",
        "perplexity",
        "records",
        "scrolls",
        "scrolls_metrics",
        "streaming",
        "texts",
        "traces",
    )
]
OTHERS += [f"positions.{name}" for name in ("collator", "cream", "scaling", "verify")]
OTHERS += ["saving", "pretrained", "errors", "handles", "cross_attention.datastore", "cross_attention.unlimiformer"]
OTHERS += [*(f"hosting.{name}" for name in ("settings", "find_and_read", "generate", "folder"))]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize(
    "module",
    [
        f"hf_longtrunc.{name}"
        for name in [
            *OTHERS,
            *(f"attention.{name}" for name in ATTENTION),
            *(f"sampling.{name}" for name in SAMPLING),
            *(f"mixing.{name}" for name in MIXING),
            *(f"serving.{name}" for name in SERVING),
        ]
    ],
)
def test_examples_run(module, names):
    found = importlib.import_module(module)
    examples = [test for test in doctest.DocTestFinder().find(found, extraglobs=names) if test.examples]
    assert examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert [runner.run(test).failed for test in examples] == [0] * len(examples)
