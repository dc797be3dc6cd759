"""Everything that is attached to a model or handed to generate, by several threads at once.

Each thread gets what it gets alone. Threads are made to meet: every layer of every model sleeps for a moment now and
then, so that forwards of different threads stand beside each other.
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_longtrunc import (
    PEMA,
    BasisAwareLogitsProcessor,
    ContrastiveDecodingLogitsProcessor,
    CreamCollator,
    DualChunkAttention,
    EtaLogitsProcessor,
    GuidanceLogitsProcessor,
    LMInfinite,
    PEMAAdapter,
    ProxyTuningLogitsProcessor,
    SoftmaxBasis,
    TopBlocks,
    TopK,
    TruncationTrace,
    ULDLogitsProcessor,
    Unlimiformer,
    attach_processors,
)
from tests.conftest import tiny_config
from tests.cross_attention.seq2seq_models import random_ids, tiny_seq2seq

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

THREADS, ROUNDS, NEW_TOKENS = 4, 2, 5
LENGTHS = (29, 20, 37, 20)  # of each thread's prompt
WITHIN = {"rtol": 1e-4, "atol": 1e-4}


class Shared(NamedTuple):
    """One attached object: the block that it lasts for, and what each thread asks of it."""

    block: AbstractContextManager[Any]
    asks: list[Callable[[], Any]]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return slowed(LlamaForCausalLM(tiny_config()).eval())


def slowed(model):
    """Let every layer give other threads a turn; the pauses are drawn apart from torch's generators."""
    pauses = random.Random(0)

    def pause(*_):
        time.sleep(pauses.choice((0, 0, 0.0005)))

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "mlp", "encoder_attn", "embed_tokens", "lm_head")):
            module.register_forward_hook(pause)
    return model


def generations(model, **options: Any) -> list[Callable[[], Any]]:
    """Return greedy generations of a prompt each: ids and scores."""

    def generation(seed: int, length: int) -> Callable[[], Any]:
        def ask():
            output = model.generate(
                random_ids(1, length, seed=seed),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
                **options,
            )
            return [output.sequences, *output.scores]

        return ask

    return [generation(seed, length) for seed, length in enumerate(LENGTHS)]


def attached(technique) -> Shared:
    model = llama()
    return Shared(technique(model), generations(model))


def in_generate(make: Callable[[Any], Any]) -> Shared:
    model = llama()
    return Shared(nullcontext(), generations(model, logits_processor=[make(model)]))


def unlimiformer(**options: Any) -> Shared:
    model = slowed(tiny_seq2seq())
    return Shared(Unlimiformer(top_k=4, window=16, **options)(model), generations(model, num_beams=2))


def unlimiformer_in_training() -> Shared:
    """Loss and gradient of a long input, without dropout: what a thread that trains gets."""
    model = slowed(tiny_seq2seq().train())

    def training(seed: int, length: int) -> Callable[[], Any]:
        def ask():
            loss = model(input_ids=random_ids(1, length, seed=seed), labels=random_ids(1, 4, seed=seed)).loss
            weights = [layer.encoder_attn.k_proj.weight for layer in model.get_decoder().layers]
            return [loss, *torch.autograd.grad(loss, weights)]

        return ask

    asks = [training(seed, length) for seed, length in enumerate(LENGTHS)]
    return Shared(Unlimiformer(top_k=4, window=16)(model), asks)


def cream() -> Shared:
    model = llama().train()
    collator = CreamCollator(lambda examples: {"input_ids": torch.stack(list(examples))}, window=64, factor=4)

    def training(seed: int, length: int) -> Callable[[], Any]:
        ids = random_ids(1, length, seed=seed)
        batch = {"input_ids": ids, "rope_position_ids": collator.rope_ids({"input_ids": ids})}

        def ask():
            return [model(**batch).logits]

        return ask

    return Shared(collator.attach(model), [training(seed, length) for seed, length in enumerate(LENGTHS)])


def pema() -> Shared:
    model = llama()
    adapter = PEMAAdapter(32, 4, 97, generator=torch.Generator().manual_seed(7)).eval()
    torch.nn.init.normal_(adapter.B_pd, generator=torch.Generator().manual_seed(8))
    processor = PEMA(adapter)(model)
    return Shared(processor, generations(model, logits_processor=[processor]))


def recorded() -> Shared:
    """Texts of different lengths: each position's entropy tells whose it is."""
    model, trace = llama(), TruncationTrace()
    asks = []
    for seed, length in enumerate(LENGTHS):
        ids = random_ids(1, length, seed=seed)

        def ask(ids=ids):
            sequences = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            trace.finish(sequences)
            drawn = sequences[0, ids.shape[1] :].tolist()
            runs = {record.run for record in trace.records if record.token == drawn[0]}
            of_run = [[r.token for r in trace.records if r.run == run] for run in runs]
            return [torch.tensor(drawn if drawn in of_run else [])]

        asks.append(ask)
    return Shared(trace.observe(model), asks)


def bat(model) -> BasisAwareLogitsProcessor:
    return BasisAwareLogitsProcessor(SoftmaxBasis.from_model(model, rank=4), epsilon=0.05, mode="mask", floor=1e-3)


def guided() -> Shared:
    """Guidance belongs to a prompt: each thread continues it, without a token of its own."""
    model, prompt = llama(), random_ids(1, 20)
    processor = GuidanceLogitsProcessor(model, 1.5, prompt)

    def generation(token: int) -> Callable[[], Any]:
        def ask():
            return [
                model.generate(prompt, max_new_tokens=NEW_TOKENS, suppress_tokens=[token], logits_processor=[processor])
            ]

        return ask

    first, second, third = (int(token) for token in model(prompt).logits[0, -1].topk(3).indices)
    return Shared(nullcontext(), [generation(token) for token in (first, second, third, 3)])


TABLE: dict[str, Callable[[], Shared]] = {
    "DualChunkAttention": lambda: attached(DualChunkAttention(chunk_length=6, trained_length=8)),
    "LMInfinite": lambda: attached(LMInfinite(num_sink_tokens=2, window_length=8)),
    "LMInfinite, TopK": lambda: attached(
        LMInfinite(num_sink_tokens=2, window_length=8, retrieval=TopK(k=3, first_layer=0))
    ),
    "LMInfinite, TopBlocks": lambda: attached(
        LMInfinite(num_sink_tokens=2, window_length=8, retrieval=TopBlocks(blocks=2, block_size=4, first_layer=0))
    ),
    "Unlimiformer": unlimiformer,
    "Unlimiformer in training": unlimiformer_in_training,
    "CreamCollator": cream,
    "PEMA": pema,
    "attach_processors": lambda: attached(lambda model: attach_processors(model, [EtaLogitsProcessor(0.01)])),
    "attach_processors, after warpers": lambda: attached(
        lambda model: attach_processors(model, [EtaLogitsProcessor(0.01)], after_warpers=True)
    ),
    "trace.observe": recorded,
    "ULD": lambda: in_generate(lambda model: ULDLogitsProcessor(llama(1), alpha=0.5)),
    "contrastive": lambda: in_generate(lambda model: ContrastiveDecodingLogitsProcessor(llama(1))),
    "proxy": lambda: in_generate(lambda model: ProxyTuningLogitsProcessor(llama(1), llama(2))),
    "guidance": guided,
    "BAT": lambda: in_generate(bat),
    "eta": lambda: in_generate(lambda model: EtaLogitsProcessor(0.01)),  # one class with the other cutoffs
}


@pytest.fixture
def hasty():
    """Let threads take turns a thousand times more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("name", TABLE)
def test_threads_on_one_object_each_get_what_they_get_alone(name, hasty):
    shared = TABLE[name]()
    with shared.block:
        alone = [ask() for ask in shared.asks]
        barrier = Barrier(THREADS)

        def asked(ask):
            barrier.wait(timeout=60)
            return [ask() for _ in range(ROUNDS)]

        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(asked, shared.asks))
    for found, expected in zip(together, alone, strict=True):
        for answer in found:
            for tensor, other in zip(answer, expected, strict=True):
                torch.testing.assert_close(tensor, other, **WITHIN)


def test_the_pauses_let_threads_meet(hasty):
    """Without this the test above could pass by luck: an attribute that one forward sets is overwritten by another."""
    model = llama()
    kept = {}

    def remember(module, args, kwargs):
        kept["ids"] = kwargs["input_ids"]

    met = []
    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    model.model.norm.register_forward_hook(
        lambda module, args, output: met.append(output.shape[1] != kept["ids"].shape[1])
    )
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda ids: model(input_ids=ids), [random_ids(1, n) for n in (20, 21, 22, 23)] * 4))
    assert sum(met) >= 4
