"""The same rows on a GPU: independent of the batch to the bit, and cut as on the CPU. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_longtrunc import EtaLogitsProcessor
from hf_longtrunc.sampling.cutoffs import softmax_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("vocab", [33, 1000, 50257, 128256])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_row_is_the_same_to_the_bit_in_any_batch(vocab, scale):
    scores = torch.randn(64, vocab, device="cuda") * scale
    together = softmax_rows(scores)
    for size in (1, 3, 16):
        parts = [softmax_rows(part) for part in scores.split(size)]
        for field in ("z", "log_total", "entropy"):
            assert torch.equal(getattr(together, field), torch.cat([getattr(part, field) for part in parts])), size


def test_kept_sets_are_those_of_the_cpu():
    scores = torch.randn(512, 50257) * 3
    processor = EtaLogitsProcessor(2e-3)
    differ = (processor(None, scores.cuda()).cpu() == -torch.inf) != (processor(None, scores) == -torch.inf)
    p, threshold = scores.softmax(-1)[differ], processor.threshold(scores).expand_as(scores)[differ]
    torch.testing.assert_close(p, threshold, rtol=4e-6, atol=0)
    assert differ.sum() <= 20


def test_no_host_synchronisation():
    scores = torch.randn(4, 1000, device="cuda")
    processor = EtaLogitsProcessor(2e-3)
    processor(None, scores)
    torch.cuda.set_sync_debug_mode("error")
    try:
        processor(None, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor_into_one_graph():
    program = """
import torch
from hf_longtrunc import EtaLogitsProcessor
scores = torch.randn(32, 50257, device="cuda") * 3
processor = EtaLogitsProcessor(2e-3)
compiled = torch.compile(lambda scores: processor(None, scores), fullgraph=True)
assert ((compiled(scores) == -torch.inf) != (processor(None, scores) == -torch.inf)).sum() <= 5
"""
    subprocess.run([sys.executable, "-c", program], check=True)
