"""Calls with an argument of the wrong kind: the message names the argument, what it got, and the right call."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from hf_longtrunc import (
    BM25,
    BestFitPackingCollator,
    CreamCollator,
    DualChunkAttention,
    EtaLogitsProcessor,
    Fused,
    LMInfinite,
    SentenceEncoder,
    ShardedDatastore,
    SoftmaxBasis,
    StreamingLLM,
    TextIndex,
    TopBlocks,
    TopK,
    TruncationTrace,
    ULDCollator,
    Unlimiformer,
    ask,
    build_pema_memory,
    load_pretrained,
    pack,
    packing_table,
    plot_packing,
    sampler_by_name,
    sampling_settings,
    train_pema,
    trained_length,
    try_packed,
)
from hf_longtrunc.evaluation import (
    cache_bytes,
    compare_losses,
    critical_parameters,
    perplexity_by_position,
    plot_perplexity,
    read_ahead,
    token_losses,
)
from hf_longtrunc.hosting import reading_of
from tests.command_line import letter_tokenizer

TOKENIZER = letter_tokenizer(["<pad>", "<unk>"], "abcdefghijklmnopqrstuvwxyz .?")
NO_PADDING = letter_tokenizer(["<pad>", "<unk>"], "abc")
NO_PADDING.pad_token = None
SIZES = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}
SEQ2SEQ = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=4, max_position_embeddings=16, **SIZES))


def asked(model, tokenizer=TOKENIZER, text="the cat sat.", **options):
    return ask(model, tokenizer, text, "who sat?", **{"finder": BM25(), **options})


CALLS = {
    "LMInfinite takes its settings by name, got Llama.*patch a model by LMInfinite": LMInfinite,
    "StreamingLLM takes its settings by name.*with StreamingLLM\\(...\\)\\(model\\):": StreamingLLM,
    "DualChunkAttention takes its settings by name": DualChunkAttention,
    "Unlimiformer takes its settings by name.*with Unlimiformer\\(...\\)\\(model\\):": Unlimiformer,
    "TopK takes its settings by name.*LMInfinite\\(retrieval=TopK\\(...\\)\\)": TopK,
    "TopBlocks takes its settings by name": TopBlocks,
    "no model to patch yet: write `with Unlimiformer": lambda model: Unlimiformer().__enter__(),
    "Unlimiformer has no setting 'window_length'. Did you mean window": lambda model: Unlimiformer(window_length=8),
    "TopK has no setting 'top_k'. Did you mean k\\?": lambda model: TopK(top_k=8),
    "LMInfinite has no setting 'window_size'. Did you mean window_length\\?": lambda model: LMInfinite(window_size=8),
    "LMInfinite has no setting 'num_sinks'. Did you mean num_sink_tokens\\?": lambda model: LMInfinite(num_sinks=8),
    "LMInfinite has no setting 'zzz'. It takes": lambda model: LMInfinite(zzz=8),
    "TopBlocks has no setting 'block'. Did you mean blocks": lambda model: TopBlocks(block=8),
    "model must be a transformers language model or a wrapper of one, got str; load": lambda model: (
        SoftmaxBasis.from_model("gpt2")
    ),
    "rank must be a whole number from 1 to 32, got 0": lambda model: SoftmaxBasis.from_model(model, 0),
    "model must be a transformers model that generates, got int": lambda model: sampling_settings(42),
    "got BM25; write .processor.": lambda model: TruncationTrace(BM25()),
    "config must be that of a transformers model, `model.config`, got Llama": trained_length,
    "language model or a wrapper of one, got str": lambda model: build_pema_memory("gpt2", []),
    "^seq_length must be a whole number of at least 1, got a LlamaForCausalLM$": BestFitPackingCollator,
    "inner must be a collator .*, got LlamaForCausalLM": lambda model: CreamCollator(model, 8, 2),
    "text must be a string or map names to strings, got int.*read_text": lambda model: TextIndex(42, BM25()),
    "finder must be a finder, such as BM25\\(\\).*, got 'bm25'": lambda model: asked(model, finder="bm25"),
    "finder must be a finder, .*got <class": lambda model: TextIndex("a text", BM25),
    "finder must be a finder, .*got 'encoder'": lambda model: Fused(BM25(), "encoder"),
    "model must be a transformers causal LM, got gpt2; load one": lambda model: asked("gpt2"),
    "model must be a causal LM, got Bart.*Unlimiformer": lambda model: asked(SEQ2SEQ),
    "tokenizer must be the model's tokenizer, got str": lambda model: asked(model, "gpt2"),
    "before must hold pairs of a question and its answer, got 'a'": lambda model: asked(model, before=["a"]),
    "must be an encoder and its tokenizer, got str.*load_encoder": lambda model: SentenceEncoder("minilm", TOKENIZER),
    "inner must be a collator .*, got (TokenizersBackend|PreTrainedTokenizer)": lambda model: CreamCollator(
        TOKENIZER, 8, 2
    ),
    "processors must be a list of processors, got str": lambda model: TruncationTrace(""),
    "processors\\[0\\] must be a processor, got the class Eta.*write EtaLogitsProcessor\\(": lambda model: (
        TruncationTrace([EtaLogitsProcessor])
    ),
    "shards must be a list of at least one datastore.*got \\[\\]": lambda model: ShardedDatastore([]),
    "packing must be a plan, such as PackedDataset.packing, got PackedDataset": lambda model: plot_packing(
        pack([{"input_ids": [1, 2]}], 8)
    ),
    "packing must be a plan, such as PackedDataset.packing, got int": lambda model: packing_table(42),
    "tokens must be a whole number of at least 0, got -1": lambda model: reading_of(LMInfinite(window_length=8), -1),
    "shards must be a list of at least one datastore.*got 'gpt2'": lambda model: ShardedDatastore("gpt2"),
    "losses must map at least one name to its losses": lambda model: plot_perplexity({}),
    "name must be one of .*, got \\[\\]": lambda model: sampler_by_name([]),
    "neither a padding token nor an EOS.*pad_token_id=0": lambda model: BestFitPackingCollator(8, NO_PADDING),
    "a padding token nor an EOS": lambda model: pack([{"input_ids": [1]}], 8, NO_PADDING, pad_document_to=4),
    "pad_token_id must be below the model's vocabulary of 97, got 97": lambda model: BestFitPackingCollator(
        8, pad_token_id=97, model=model
    ),
    "tokenizer must be a tokenizer, got str": lambda model: ULDCollator("gpt2"),
    "to pad rows with: set tokenizer.pad_token first": lambda model: ULDCollator(NO_PADDING),
    "dtype must be a torch.dtype such as torch.bfloat16, its name or None, got 'bf16'": lambda model: load_pretrained(
        "x", dtype="bf16"
    ),
    "device cannot be used here, got gpu": lambda model: load_pretrained("x", device="gpu"),
    "memory must be a PEMAMemory, got 'm' of type str; build_pema_memory": lambda model: train_pema(model, "m"),
    "model must be a transformers model or a wrapper of one, got str; load one": lambda model: try_packed("gpt2", []),
    "cache must be a Cache, got a LlamaForCausalLM": cache_bytes,
    "input_ids must be a Tensor, got \\[5\\] of type list": lambda model: token_losses(model, [5]),
    "input_ids must be a Tensor, got 'text'": lambda model: read_ahead(model, "text"),
    "input_ids must be a Tensor, got \\[7\\]": lambda model: critical_parameters(model, [7]),
    "a wrapper of one, got Tensor; load one": lambda model: read_ahead(torch.ones(2), torch.ones(1, 2)),
    "a transformers model or a wrapper of one, got int": lambda model: critical_parameters(7, [7]),
    "arms must be a Mapping, got \\[\\] of type list; such as": lambda model: compare_losses(model, [5], []),
    "losses must be a Tensor, got \\[1.0\\] .*token_losses": lambda model: perplexity_by_position([1.0], [0, 1]),
    "name_or_path must be a hub id .*, got int": lambda model: load_pretrained(42),
}


@pytest.mark.parametrize("message", CALLS)
def test_a_wrong_call_names_the_right_one(message, tiny_model):
    with pytest.raises((TypeError, ValueError), match=message):
        CALLS[message](tiny_model)


def test_a_list_in_place_of_a_tensor_is_named_where_tests_check_types_first():
    code = """
from hf_longtrunc import Datastore, FaissDatastore, PEMAMemory, truncated_log_probs
import torch
two = torch.ones(2, 2)
calls = [(Datastore, "x"), (FaissDatastore, two, 7), (PEMAMemory, [1], [1], 9), (truncated_log_probs, [], [], [])]
for call, *given in calls:
    try:
        call(*given)
    except TypeError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "states must be a Tensor, got 'x' of type str; torch.tensor(...) makes one" in said
    assert "index must be a str, got 7 of type int; a kind of faiss.index_factory" in said
    assert "hidden must be a Tensor, got [1] of type list; torch.tensor(...) makes one" in said
    assert "logits must be a Tensor, got [] of type list; torch.tensor(...) makes one" in said


def test_what_a_missing_tokenizer_or_eos_means_is_logged(caplog):
    BestFitPackingCollator(8)
    assert "pads rows with token 0" in caplog.text
    assert "pass the tokenizer, or pad_token_id=0" in caplog.text
    caplog.clear()
    pack([{"input_ids": [1, 2]}], 8, TOKENIZER)
    assert "tokenizer has no EOS" in caplog.text
    assert "Set tokenizer.eos_token" in caplog.text


def test_nothing_is_logged_where_nothing_is_guessed(caplog):
    BestFitPackingCollator(8, TOKENIZER)
    BestFitPackingCollator(8, pad_token_id=0)
    BestFitPackingCollator(8, layout="flat")  # pads nothing
    pack([{"input_ids": [1, 2]}], 8)
    assert not caplog.text


def test_padding_changes_no_document(tiny_model):
    """So a collator without a tokenizer may pad with 0."""
    documents = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [8, 9, 10, 11]}, {"input_ids": [12, 13]}]
    logits = [
        tiny_model(**BestFitPackingCollator(11, pad_token_id=pad)(documents), use_cache=False).logits[0, :10]
        for pad in (0, 50)
    ]
    assert torch.equal(*logits)


def test_a_dtype_may_be_named(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
