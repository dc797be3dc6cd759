"""What the evaluation says about SmolLM2-135M-Instruct inside its window, where the answer is known."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from hf_longtrunc import LMInfinite
from hf_longtrunc.evaluation import compare_losses, perplexity_by_position, python_reference
from instruments.passkey import PasskeyPrompts, passkey_tasks, run_passkey

pytestmark = [pytest.mark.real_model, pytest.mark.xdist_group("real_model")]


def test_the_unmodified_model_finds_every_key_in_a_short_prompt(real_model):
    model, tokenizer = real_model
    tasks = passkey_tasks([500], [0, 0.5, 1], keys_per_cell=1)
    records = run_passkey(model, PasskeyPrompts(tokenizer), tasks, {"unmodified": nullcontext})
    assert all(record.correct for record in records), [(record.key, record.answer) for record in records]


def test_sinks_keep_the_perplexity_that_a_bare_window_loses(real_model):
    model, tokenizer = real_model
    ids = torch.tensor(tokenizer(python_reference()[:20_000], verbose=False).input_ids[:256])
    arms = {
        "unmodified": nullcontext,
        "sinks": LMInfinite(num_sink_tokens=4, window_length=64),
        "none": LMInfinite(num_sink_tokens=0, window_length=64),
    }
    losses = compare_losses(model, ids, arms, chunk=128)
    perplexities = {name: perplexity_by_position(loss, [64, 256])[0].perplexity for name, loss in losses.items()}
    assert perplexities["unmodified"] < perplexities["sinks"] < 2 * perplexities["unmodified"]
    assert perplexities["none"] > 2 * perplexities["sinks"]
    torch.testing.assert_close(losses["sinks"][:60], losses["unmodified"][:60], atol=1e-3, rtol=1e-3)
