"""The samplers in other engines' types, against stand-ins of their interfaces: row by row what the processors keep."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from enum import Enum, auto
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from hf_longtrunc import (
    DRYLogitsProcessor,
    EpsilonLogitsProcessor,
    EtaLogitsProcessor,
    MinKLogitsProcessor,
    PLessLogitsProcessor,
    TopHLogitsProcessor,
    TopNSigmaLogitsProcessor,
    XTCLogitsProcessor,
)
from hf_longtrunc.serving.rows import parse_request
from hf_longtrunc.serving.sglang import TruncationLogitProcessor
from hf_longtrunc.serving.vllm import TruncationLogitsProcessor

ASKED = [
    {"eta": 2e-3},
    {"eta": 0.05},
    None,
    {"epsilon": 9e-4},
    {"top_n_sigma": 1.5},
    {"p_less": True, "another": "key"},
    {"p_less_norm": True},
    {"eta": 0.01, "top_n_sigma": 2.0},
    {},
    {"p_less": False},
    {"top_h": 0.4},
    {"min_k": 3},
    {"xtc_threshold": 0.01, "xtc_probability": 1},
    {"xtc_threshold": 0.01},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "top_h": 0.9},
    {"dry_multiplier": 3, "dry_base": 2.0, "dry_sequence_breakers": [4], "dry_window": 5},
]
TEXT = [5, 4, 9, 5, 6, 7, 9, 5]
LOGITS = torch.randn(len(ASKED), 1009, generator=torch.Generator().manual_seed(0)) * 3


def by_processors(row, asked):
    """The processors of these names, alone on the row."""
    makers = {
        "eta": EtaLogitsProcessor,
        "epsilon": EpsilonLogitsProcessor,
        "top_n_sigma": TopNSigmaLogitsProcessor,
        "p_less": lambda _: PLessLogitsProcessor(),
        "p_less_norm": lambda _: PLessLogitsProcessor(normalized=True),
        "top_h": TopHLogitsProcessor,
        "min_k": MinKLogitsProcessor,
        "xtc_probability": lambda probability: XTCLogitsProcessor(asked["xtc_threshold"], probability),
    }
    if asked and asked.get("dry_multiplier"):
        options = {name.removeprefix("dry_"): value for name, value in asked.items() if name.startswith("dry_")}
        row = DRYLogitsProcessor(**options)(torch.tensor([TEXT]), row)
    for name, make in makers.items():
        if asked and asked.get(name):
            row = make(asked[name])(None, row)
    return row


EXPECTED = torch.cat([by_processors(row[None], asked) for row, asked in zip(LOGITS, ASKED, strict=True)])


def params(asked):
    return SimpleNamespace(extra_args=asked)


class Direction(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(
        batch_size=0, removed=removed, added=[(i, params(a), TEXT[:3], TEXT[3:]) for i, a in added], moved=moved
    )


def test_model_runner_v1():
    processor = TruncationLogitsProcessor(None, torch.device("cpu"), False)
    assert processor.apply(LOGITS) is LOGITS
    processor.update_state(update(added=enumerate(ASKED)))
    processor.update_state(None)
    before = LOGITS.clone()
    assert torch.equal(processor.apply(LOGITS), EXPECTED)
    assert torch.equal(LOGITS, before)
    assert not processor.is_argmax_invariant()
    # Row 0 leaves and row 7 takes its place; rows 1 and 4 change places; row 3 is another request now.
    processor.update_state(
        update([0], [(3, {"eta": 0.05})], [(7, 0, Direction.UNIDIRECTIONAL), (1, 4, Direction.SWAP)])
    )
    order = {0: ASKED[7], 1: ASKED[4], 4: ASKED[1], 3: {"eta": 0.05}, 7: None}
    asked = [order.get(row, ASKED[row]) for row in range(len(ASKED))]
    expected = torch.cat([by_processors(row[None], each) for row, each in zip(LOGITS, asked, strict=True)])
    assert torch.equal(processor.apply(LOGITS), expected)
    processor.update_state(update(removed=range(len(ASKED))))
    assert processor.apply(LOGITS) is LOGITS


def context(slots):
    slots = torch.tensor(slots)
    return SimpleNamespace(expanded_idx_mapping=slots, idx_mapping_np=np.unique(slots.numpy()))


def test_model_runner_v2():
    """Rows are requests' slots in another order at every step; a slot may own several rows, or be used again."""
    processor = TruncationLogitsProcessor(None, SimpleNamespace(max_num_reqs=64))
    changes = [processor.add_request(slot + 20, params(asked)) for slot, asked in enumerate(ASKED[:10])]
    assert changes == [bool(parse_request(asked)) for asked in ASKED[:10]]
    processor.apply_staged_writes()
    rows = [4, 4, 0, 9, 7, 1, 3, 2, 5, 6, 0]
    expected = torch.cat([by_processors(LOGITS[n % 10][None], ASKED[row]) for n, row in enumerate(rows)])
    logits = LOGITS[[n % 10 for n in range(len(rows))]]
    assert torch.equal(processor.apply(logits, context([row + 20 for row in rows])), expected)
    assert processor.apply(LOGITS, context([2 + 20] * len(LOGITS))) is LOGITS
    assert not processor.add_request(20, params(None))
    assert processor.apply(LOGITS[:1], context([20])) is not None
    assert torch.equal(processor.apply(LOGITS[:2], context([20, 21]))[0], LOGITS[0])


def test_dry_in_the_model_runner_v2_is_left_out_and_said(caplog):
    processor = TruncationLogitsProcessor(None, SimpleNamespace(max_num_reqs=64))
    assert not processor.add_request(0, params({"dry_multiplier": 0.8}))
    assert "DRY is left out" in caplog.text


def test_dry_follows_the_list_that_vllm_writes_to():
    processor, output = TruncationLogitsProcessor(None), [5, 6, 7, 9]
    added = [(0, params({"dry_multiplier": 1.0, "dry_allowed_length": 1}), TEXT[:3], output)]
    processor.update_state(SimpleNamespace(batch_size=1, removed=(), added=added, moved=()))
    first = processor.apply(LOGITS[:1])
    output.append(5)
    second = processor.apply(LOGITS[:1])
    assert (first != LOGITS[:1]).nonzero()[:, 1].tolist() == [5]
    assert (second != LOGITS[:1]).nonzero()[:, 1].tolist() == [4, 6]


def test_a_mistyped_name_is_refused_and_another_processors_is_not():
    for wrong, meant in {
        "eat": "eta",
        "top_nsigma": "top_n_sigma",
        "topNSigma": "top_n_sigma",
        "epsilom": "epsilon",
        "xtc_probabilty": "xtc_probability",
        "dry_multipler": "dry_multiplier",
        "pless": "p_less",
        "xtc": "xtc_",
        "dry": "dry_multiplier",
        "eps": "epsilon",
    }.items():
        with pytest.raises(ValueError, match=f"{wrong} is no sampler's name; did you mean {meant}"):
            TruncationLogitsProcessor.validate_params(params({wrong: 0.1}))
    for others in ("beta", "tau", "min_p", "top_k", "top_p", "temperature", "budget", "__req__", "thinking_budget"):
        assert parse_request({others: 0.1}) == {}


def test_wrong_arguments_fail_the_request_and_not_the_batch():
    for asked in (
        {"eta": 2},
        {"eta": "x"},
        {"epsilon": True},
        {"top_n_sigma": 0},
        {"p_less": 2},
        {"p_less_norm": "true"},
        {"top_h": 1.5},
        {"min_k": -1},
        {"xtc_probability": 2},
        {"dry_multiplier": -1},
        {"dry_sequence_breakers": ["x"], "dry_multiplier": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(asked))):
            TruncationLogitsProcessor.validate_params(params(asked))
    TruncationLogitsProcessor.validate_params(params(None))
    TruncationLogitsProcessor.validate_params(params({"another": "key"}))


def test_a_server_that_makes_numbers_of_true_and_false():
    """As vLLM's does: found by asking one."""
    for one, zero in ((1, 0), (True, False), (1.0, 0.0)):
        assert parse_request({"p_less": one, "p_less_norm": zero}) == {"p_less": 1.0}


def test_it_is_a_subclass_of_both_bases(monkeypatch):
    """Both runners refuse other classes; nothing is imported where there is no vLLM."""
    from hf_longtrunc.serving import vllm

    homes = ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor")
    bases = []
    for home in homes:

        class LogitsProcessor(ABC):
            @abstractmethod
            def apply(self, logits): ...

        module = ModuleType(home)
        module.LogitsProcessor = LogitsProcessor
        bases.append(LogitsProcessor)
        monkeypatch.setitem(sys.modules, home, module)
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "import_module", lambda home: sys.modules[home])
    vllm._register()
    assert all(issubclass(TruncationLogitsProcessor, base) for base in bases)


class Request:
    """What SGLang calls a request, and puts into its parameters."""

    origin_input_ids, output_ids = TEXT[:6], TEXT[6:]


def test_sglang():
    processor = TruncationLogitProcessor()
    asked = [None if each is None else {**each, "__req__": Request()} for each in ASKED]
    assert torch.equal(processor(LOGITS, asked), EXPECTED)
    assert torch.equal(processor(LOGITS), LOGITS)
    assert pickle.loads(bytes.fromhex(json.loads(processor.to_str())["callable"])) is TruncationLogitProcessor
    with pytest.raises(ValueError, match=f"one entry for each of {len(ASKED)} rows, got 1"):
        processor(LOGITS, [{}])


def test_one_wrong_request_leaves_the_others_of_its_batch_alone_in_sglang(caplog):
    asked = [{"eta": 2e-3}, {"eta": "much"}, {"eat": 0.1}, {"eta": 0.05}]
    result = TruncationLogitProcessor()(LOGITS[:4], asked)
    assert torch.equal(result[1:3], LOGITS[1:3])
    for row in (0, 3):
        assert torch.equal(result[row], by_processors(LOGITS[row : row + 1], asked[row])[0])
    assert "a request is not truncated: eta must be a number" in caplog.text
    assert "did you mean eta" in caplog.text


def test_nothing_of_transformers_is_imported():
    program = """
import sys
import hf_longtrunc.sampling.cutoffs, hf_longtrunc.serving.vllm, hf_longtrunc.serving.sglang
print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "vllm", "sglang"}))
"""
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"
