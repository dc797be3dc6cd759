"""Samplers by request through transformers' own continuous batching."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from hf_longtrunc import EtaLogitsProcessor, XTCLogitsProcessor, attach_processors
from hf_longtrunc.sampling.cutoffs import CUTOFFS
from hf_longtrunc.serving.continuous_batching import TruncationByRequest
from hf_longtrunc.serving.rows import parse_request, truncate

ETAS = [0.01, None, 3e-4, 0.3, 2e-3]


def asking(kwargs):
    return [SimpleNamespace(has_new_token=True, state=SimpleNamespace(logit_processor_kwargs=each)) for each in kwargs]


def requests():
    return asking([{} if eta is None else {"eta": eta} for eta in ETAS])


def test_every_row_is_cut_by_its_own_eta():
    scores = torch.randn(5, 1009, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.5], [1], [3], [2], [1]]
    )
    together = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([TruncationByRequest("eta", 0.05)]), True)
    assert together.tensors_required == 1
    storage = torch.zeros(1, 64, dtype=torch.int32)
    together.prepare_tensor_args(requests(), storage)
    alone = [EtaLogitsProcessor(eta or 0.05)(None, row[None]) for eta, row in zip(ETAS, scores, strict=True)]
    assert torch.equal(together(None, scores, storage), torch.cat(alone))
    defaults = torch.zeros(1, 64, dtype=torch.int32)
    together.fill_defaults(defaults)
    assert torch.equal(together(None, scores, defaults), EtaLogitsProcessor(0.05)(None, scores))


VALUES = {
    "eta": 0.01,
    "epsilon": 0.01,
    "top_n_sigma": 1.5,
    "p_less": 1.0,
    "p_less_norm": 1.0,
    "top_h": 0.4,
    "min_k": 3.0,
}


@pytest.mark.parametrize("name", CUTOFFS)
def test_every_sampler_by_request(name):
    """Rows that ask for nothing are left alone."""
    scores = torch.randn(4, 1009, generator=torch.Generator().manual_seed(0)) * 3
    together = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([TruncationByRequest(name)]), True)
    kwargs = [{}, {name: VALUES[name]}, {}, {name: VALUES[name]}]
    storage = torch.zeros(1, 8, dtype=torch.int32)
    together.prepare_tensor_args(asking(kwargs), storage)
    result = together(None, scores, storage)
    assert torch.equal(result, truncate(scores, [parse_request(each) for each in kwargs]))
    assert torch.equal(result[::2], scores[::2])
    assert result[1::2].isinf().any(-1).all()
    assert torch.equal(TruncationByRequest(name)(None, scores), scores)
    assert torch.equal(TruncationByRequest(name, VALUES[name])(None, scores)[1], result[1])


def test_xtc_by_request():
    scores = torch.randn(4, 101, generator=torch.Generator().manual_seed(0))
    together = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([TruncationByRequest("xtc_probability", xtc_threshold=0.02)]), True
    )
    kwargs = [{}, {"xtc_probability": 1.0}, {"xtc_probability": 0.0}, {"xtc_probability": 1.0}]
    storage = torch.zeros(1, 8, dtype=torch.int32)
    together.prepare_tensor_args(asking(kwargs), storage)
    result = together(None, scores, storage)
    excluded = XTCLogitsProcessor(0.02, 1.0)(None, scores)
    assert torch.equal(result, torch.where(torch.tensor([[False], [True], [False], [True]]), excluded, scores))
    assert excluded.isinf().any(-1).all()


def test_without_requests_of_their_own_all_get_the_default():
    scores = torch.randn(3, 101, generator=torch.Generator().manual_seed(0))
    together = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([TruncationByRequest("eta", 0.05)]), False)
    assert torch.equal(together(None, scores, None), EtaLogitsProcessor(0.05)(None, scores))


def test_wrong_values():
    with pytest.raises(ValueError, match="default must be a number above 0 and below 1"):
        TruncationByRequest("eta", 1.0)
    with pytest.raises(ValueError, match="name must be one of 'eta'"):
        TruncationByRequest("dry")
    together = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([TruncationByRequest("eta", 0.05)]), True)
    together.check_kwargs({"eta": 0.1})
    for eta in (1.0, -0.1, 1, "0.1"):
        with pytest.raises(TypeError, match="expected float that is above 0 and below 1"):
            together.check_kwargs({"eta": eta})


def are_kept(model, prompt, drawn, eta):
    """Which drawn tokens eta keeps, given what was drawn before them."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
    kept = EtaLogitsProcessor(eta)(None, logits) > -torch.inf
    return kept.gather(1, torch.tensor(drawn)[:, None])[:, 0].tolist()


def test_requests_of_one_served_batch(tiny_model):
    """Each draws from its own kept set; what the lax one draws, the strict one would not."""
    prompt = [1, 5, 9, 13]
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=24, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, per_request_processors=True)
    with attach_processors(tiny_model, [TruncationByRequest("eta", 1e-6)]):
        manager = tiny_model.init_continuous_batching(generation_config=config, continuous_batching_config=settings)
        manager.start()
        try:
            names = [manager.add_request(prompt, max_new_tokens=24, eta=0.999), manager.add_request(prompt)]
            strict, lax = (manager.get_result(name, timeout=60).generated_tokens for name in names)
        finally:
            manager.stop(block=True)
    assert [len(strict), len(lax)] == [24, 24]
    assert all(are_kept(tiny_model, prompt, strict, 0.999))
    assert not all(are_kept(tiny_model, prompt, lax, 0.999))
