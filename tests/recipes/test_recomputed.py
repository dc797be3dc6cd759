"""The losses of re-read windows, against a full forward of each token's window."""

from __future__ import annotations

import pytest
import torch

from instruments.recomputed import recomputed_losses
from tests.evaluation.test_perplexity import full_forward_losses


@pytest.mark.parametrize(("window", "length"), [(2, 9), (7, 7), (7, 8), (7, 31), (8, 5), (8, 12), (8, 13), (8, 40)])
def test_a_window_read_anew_at_every_half_of_one_shows_each_token_what_stands_in_it(tiny_model, window, length):
    rows = torch.randint(97, (2, length))
    losses = recomputed_losses(tiny_model, rows, window, chunk=3)
    assert losses.shape == (2, length - 1)
    half = window // 2
    for token in range(1, length):
        begin = 0 if token < window else (1 + (token - window) // half) * half
        assert token - begin >= window - half or begin == 0
        alone = full_forward_losses(tiny_model, rows[:, begin : token + 1])[:, -1]
        torch.testing.assert_close(losses[:, token - 1].double(), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[0], recomputed_losses(tiny_model, rows[0], window, chunk=3))


def test_a_window_holds_two_tokens(tiny_model):
    with pytest.raises(ValueError, match="window must be a whole number of at least 2"):
        recomputed_losses(tiny_model, torch.randint(97, (9,)), 1)
