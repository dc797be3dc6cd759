"""Random histories of a patched model against the definition: what users combine, in any order.

In the suite a few hundred steps run. `python -m tests.attention.machine 10000` runs so many and prints the worst error
by family; `Histories`, `StreamingHistories` or `ChunkHistories` behind the number runs one technique's alone.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from hypothesis.strategies import booleans, data, integers, sampled_from
from transformers import DynamicCache

from hf_longtrunc import CacheLawError, DualChunkAttention, LambdaCacheLayer, LMInfinite, StreamingLLM, TopK
from hf_longtrunc.models import CACHE

from .reference import Naive, NaiveTopK, Rope, install
from .test_dual_chunk_attention import CHUNK, TRAINED, NaiveChunks
from .test_lm_infinite import model_of, naive_bloom_logits, ring_cache

S, L, ROLLBACK = 3, 7, 6
# What their attention is made of: rotations in halves and pairs, ALiBi, soft-capping, learned sink logits, latent
# attention, keys shared between layers.
FAMILIES = ["llama", "cohere", "gptj", "bloom", "gemma2", "gpt_oss", "deepseek_v2", "gemma3n_text", "lfm2", "falcon_h1"]
IN_CHUNKS = ["llama", "cohere", "gptj", "gpt_neox", "lfm2", "gemma3_text"]
STREAMING = ["llama", "cohere", "bloom", "deepseek_v2"]
ROPES = {"llama": Rope(8), "cohere": Rope(8, pairs=True, base=5e5), "gpt_neox": Rope(4)}
WINDOWED = ("gemma2", "gpt_oss", "gemma3n_text", "gemma3_text")
STATES = ("lfm2", "falcon_h1")  # of convolutions in other layers, and of Mamba in those that attend
LEFT_ALONE = (*WINDOWED, *STATES)  # padding stands on the left alone, and tokens are not taken back
IN_FP32 = ("gemma2", "gpt_oss", "deepseek_v2", "falcon_h1")
MODELS: dict[str, Any] = {}
NAIVE: dict[Any, Any] = {}
worst: dict[str, float] = {}
steps = 0


def model_for(family: str) -> Any:
    if family not in MODELS:
        # Mixtures of experts have no kernel in fp64, and Gemma 2's own windowed layers give NaN for padding there.
        MODELS[family] = model_of(family) if family in IN_FP32 else model_of(family).double()
    return MODELS[family]


def defined(family: str, ids: torch.Tensor, reads: bool) -> torch.Tensor | None:
    """Logits pair by pair, for families whose layout is written down independently."""
    if family == "bloom" and not reads:
        return naive_bloom_logits(model_of(family).double(), ids, Naive(S, L, L))
    if family not in ROPES:
        return None
    if (family, reads) not in NAIVE:
        rope, model = ROPES[family], model_of(family).double()
        naive = NaiveTopK(S, L, L, rope, k=2, away=3) if reads else Naive(S, L, L, rope)
        install(model, naive, f"naive_{family}_{reads}")
        NAIVE[family, reads] = model
    return NAIVE[family, reads](ids, use_cache=False).logits


class Histories(RuleBasedStateMachine):
    """A batch of rows, each with its text so far, beside a cache that has seen the same columns."""

    family = "llama"
    under = ""

    @initialize(
        rows=integers(1, 3),
        padding=data(),
        n=integers(1, 3 * L),
        reads=booleans(),
        dynamic=sampled_from([False, False, True]),
        seed=integers(0, 2**20),
    )
    def begin(self, rows, padding, n, reads, dynamic, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.model = model_for(self.family)
        self.reads = reads
        self.attach()
        self.cache = self.new_cache(dynamic)
        self.texts = [[] for _ in range(rows)]
        self.mask = torch.zeros(rows, 0, dtype=torch.long)
        self.latest = 0
        self.floor = 0
        pads = [padding.draw(integers(0, n - 1)) for _ in range(rows)]
        self.forward(n, torch.arange(n) >= torch.tensor(pads)[:, None])

    def attach(self):
        retrieval = TopK(k=2, distance=3, first_layer=0, rows=None) if self.reads else None
        self.handle = LMInfinite(num_sink_tokens=S, window_length=L, retrieval=retrieval).attach(self.model)

    def new_cache(self, dynamic):
        return DynamicCache(config=self.model.config) if dynamic else ring_cache(self.model)

    def definition(self, ids):
        return defined(self.family, ids, self.reads)

    def teardown(self):
        if hasattr(self, "handle"):
            self.handle.detach()

    def forward(self, n, real):
        """Give n columns, tokens where `real` [rows, n] says so, and hold the logits against each row alone."""
        global steps
        steps += 1
        ids = torch.randint(3, 90, (len(self.texts), n), generator=self.generator)
        self.mask = torch.cat([self.mask, real.long().expand(len(self.texts), -1)], dim=1)
        inputs = {} if bool(self.mask.all()) else {"attention_mask": self.mask}
        got = self.model(ids, **{CACHE: self.cache}, **inputs).logits
        for row, text in enumerate(self.texts):
            now = ids[row][real.expand(len(self.texts), -1)[row]]
            text += now.tolist()
            if len(now):
                whole = torch.tensor([text])
                answers = [self.model(whole, use_cache=False).logits]
                if steps % 12 == 0:
                    self.handle.detach()
                    definition = self.definition(whole)
                    self.attach()
                    answers += [] if definition is None else [definition]
                mine = got[row][real.expand(len(self.texts), -1)[row]]
                for index, answer in enumerate(answers):
                    scale = max(1.0, float(answer.abs().max()))
                    error = float((mine - answer[0, -len(now) :]).abs().max()) / scale
                    name = f"{self.family}{self.under}" + (", definition" if index else "")
                    worst[name] = max(worst.get(name, 0.0), error)
                    # The definition keeps the model's own cosines, whose fp32 angles are off by 2^-24 of themselves.
                    rounded = max(2e-6, len(text) * 2.0**-24)
                    assert error < (rounded if index else 3e-5 if self.family in IN_FP32 else 1e-9), (name, error)
        assert self.cache.get_seq_length() == self.mask.shape[1]
        self.latest = n

    @rule(n=integers(1, 2 * L))
    def several(self, n):
        self.forward(n, torch.ones(1, n, dtype=torch.bool))

    @rule()
    def one(self):
        self.forward(1, torch.ones(1, 1, dtype=torch.bool))

    @rule(n=integers(1, 2 * L), draw=data())
    def chunks(self, n, draw):
        while n:
            part = draw.draw(integers(1, n))
            self.forward(part, torch.ones(1, part, dtype=torch.bool))
            n -= part

    @precondition(lambda self: self.family not in LEFT_ALONE)
    @rule(n=integers(2, 2 * L), draw=data())
    def turn_with_holes(self, n, draw):
        """A turn padded on the left, on the right or in between."""
        where = [draw.draw(integers(0, 2**n - 1)) for _ in self.texts]
        real = torch.tensor([[bool(bits >> column & 1) for column in range(n)] for bits in where])
        self.forward(n, real)
        self.floor = self.mask.shape[1]

    @precondition(lambda self: self.family not in LEFT_ALONE)
    @rule(n=integers(2, ROLLBACK), then=integers(1, L), draw=data())
    def answers_of_different_lengths(self, n, then, draw):
        """Rows that have ended are fed tokens like others; the next turn's mask says that these are none."""
        before = [len(text) for text in self.texts]
        for _ in range(n):
            self.one()
        for row, text in enumerate(self.texts):
            kept = draw.draw(integers(0, n))
            del text[before[row] + kept :]
            self.mask[row, self.mask.shape[1] - (n - kept) :] = 0
        self.forward(then, torch.ones(1, then, dtype=torch.bool))
        self.floor = self.mask.shape[1]

    @precondition(lambda self: self.family not in LEFT_ALONE)
    @rule(n=integers(1, ROLLBACK))
    def crop(self, n):
        if self.mask.shape[1] - n <= self.floor or any(len(text) <= n for text in self.texts):
            return
        if bool((self.mask[:, -n:] == 0).any()):
            return
        rings = [layer for layer in self.cache.layers if isinstance(layer, LambdaCacheLayer)]
        if rings and self.mask.shape[1] - n < rings[0].crop_length():
            with pytest.raises(ValueError, match="cannot take back"):
                rings[0].crop(-n)
            return
        self.cache.crop(-n)
        self.mask = self.mask[:, :-n]
        for text in self.texts:
            del text[-n:]

    @precondition(lambda self: self.family not in STATES)
    @rule(draw=data())
    def select(self, draw):
        chosen = draw.draw(sampled_from([[0], [len(self.texts) - 1], list(range(len(self.texts)))]))
        self.cache.batch_select_indices(torch.tensor(chosen))
        self.follow(chosen)

    @precondition(lambda self: len(self.texts) < 3 and self.family not in STATES)
    @rule()
    def repeat(self):
        self.cache.batch_repeat_interleave(2)
        self.follow([row for row in range(len(self.texts)) for _ in range(2)])

    @rule(draw=data())
    def reorder(self, draw):
        order = [draw.draw(integers(0, len(self.texts) - 1)) for _ in self.texts]
        self.cache.reorder_cache(torch.tensor(order))
        self.follow(order)

    def follow(self, rows):
        self.texts = [list(self.texts[row]) for row in rows]
        self.mask = self.mask[rows]

    @rule()
    def detach_and_attach_again(self):
        self.handle.detach()
        self.attach()

    @precondition(lambda self: not any(isinstance(layer, LambdaCacheLayer) for layer in self.cache.layers))
    @rule()
    def another_patch_in_between(self):
        """An ordinary cache serves any patch that reads its text alike; others refuse it, and it stays as it was."""
        if (
            not all(layer.is_croppable for layer in self.cache.layers)
            or self.mask.shape[1] < 2
            or self.family in LEFT_ALONE
        ):
            return
        self.handle.detach()
        mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        reads_alike = self.mask.shape[1] <= 5  # sinks and window of the other patch
        told = nullcontext() if reads_alike else pytest.raises(CacheLawError, match="start anew")
        with LMInfinite(num_sink_tokens=1, window_length=4)(self.model), told:
            self.model(torch.full((len(self.texts), 1), 5), attention_mask=mask, **{CACHE: self.cache})
        if reads_alike:
            self.cache.crop(-1)
        self.attach()


class StreamingHistories(Histories):
    """The same under StreamingLLM."""

    under = " streaming"

    def attach(self):
        self.handle = StreamingLLM(num_sink_tokens=S, window_length=L).attach(self.model)

    def definition(self, ids):
        if self.family not in ROPES:
            return None
        name = f"{self.family} streaming"
        if name not in NAIVE:
            NAIVE[name] = model_of(self.family).double()
            install(NAIVE[name], Naive(S, L, S + L - 1, ROPES[self.family], spacing=1), f"naive_streams_{self.family}")
        return NAIVE[name](ids, use_cache=False).logits


class ChunkHistories(Histories):
    """The same under dual chunk attention, whose cache is an ordinary one."""

    under = " in chunks"

    def attach(self):
        self.handle = DualChunkAttention(chunk_length=CHUNK, trained_length=TRAINED).attach(self.model)

    def new_cache(self, dynamic):
        return DynamicCache(config=self.model.config)

    def definition(self, ids):
        if self.family not in ROPES:
            return None
        name = f"{self.family} in chunks"
        if name not in NAIVE:
            NAIVE[name] = model_of(self.family).double()
            install(NAIVE[name], NaiveChunks(0, 1, 1, ROPES[self.family]), f"naive_chunks_{self.family}")
        return NAIVE[name](ids, use_cache=False).logits


def run(family: str, examples: int, length: int, derandomize: bool, kind: Any = Histories) -> None:
    before = LambdaCacheLayer.ROLLBACK
    LambdaCacheLayer.ROLLBACK = ROLLBACK
    machine = type(f"{kind.__name__} of {family}", (kind,), {"family": family})
    options = settings(
        max_examples=examples,
        stateful_step_count=length,
        deadline=None,
        derandomize=derandomize,
        database=None,
        phases=[Phase.generate] if not derandomize else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        with torch.no_grad():
            run_state_machine_as_test(machine, settings=options)
    finally:
        LambdaCacheLayer.ROLLBACK = before


def main() -> None:
    wanted = int(sys.argv[1])
    torch.set_num_threads(1)
    machines = [(family, Histories) for family in FAMILIES] + [(family, ChunkHistories) for family in IN_CHUNKS]
    machines += [(family, StreamingHistories) for family in STREAMING]
    chosen = [(family, kind) for family, kind in machines if kind.__name__ in sys.argv[2:] or not sys.argv[2:]]
    for family, kind in chosen:
        first = steps
        while steps - first < wanted // len(chosen):
            run(family, 5, 30, derandomize=False, kind=kind)
        name = family + kind.under
        errors = [f"{worst[each]:.1e}" for each in (name, f"{name}, definition") if each in worst]
        print(
            f"{name}: {steps - first} forwards, worst relative error {', by the definition '.join(errors)}", flush=True
        )


if __name__ == "__main__":
    main()
