"""One tiny model of every family: what the documentation's table says is so."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hf_longtrunc import LMInfinite

from .families import WORKS, L, S, outcome
from .reference import Naive, Rope, install
from .tiny_models import family_names, tiny_model

TABLE = Path(__file__).parents[2] / "docs" / "lm_infinite_families.md"


def documented() -> list[str]:
    line = next(line for line in TABLE.read_text().splitlines() if "families work" in line)
    return re.findall(r"`([^`]+)`", line)


def test_the_table_names_forty_families_or_more():
    assert len(documented()) >= 40


@pytest.mark.filterwarnings("ignore")  # what model files warn about tiny configurations
@pytest.mark.parametrize("family", sorted(set(documented()) & set(family_names())))
def test_a_documented_family_works(family):
    assert outcome(family) == (WORKS, "")


def rows() -> list[tuple[str, str, str]]:
    return re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|$", TABLE.read_text(), re.MULTILINE)


def test_the_table_names_every_family_of_the_release_that_it_was_written_under():
    if f"under transformers {version('transformers')}." in TABLE.read_text():
        assert {*documented(), *(family for family, _, _ in rows())} == set(family_names())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "what", "reason"), rows())
def test_a_row_says_what_happens(family, what, reason):
    if f"under transformers {version('transformers')}." not in TABLE.read_text():
        pytest.skip("written under another release")
    found, why = outcome(family)
    assert (found, why.replace("|", "/")) == (what, reason)


class NaiveJapanese:
    """GPT-NeoX Japanese attends in a method of its own: this one takes its place."""

    def __init__(self, module, naive):
        self.naive, self.scaling = naive, module.head_size**-0.5

    def __call__(self, query, key, value, attention_mask=None):
        positions = torch.arange(query.shape[2])
        rows = [
            self.naive(*(self.naive.rope.turn(x, -positions) for x in (q, k)), v, self.scaling)
            for q, k, v in zip(query, key, value, strict=True)
        ]
        return torch.stack(rows).to(query.dtype), None


@pytest.mark.parametrize("family", ["gpt_neox_japanese", "diffllama"])
def test_attention_of_its_own_and_attention_called_twice_are_the_definition(family):
    ids = torch.randint(3, 90, (2, 3 * L))
    naive, judge = Naive(S, L, L, Rope(8)), tiny_model(family).requires_grad_(False)
    if family == "diffllama":
        install(judge, naive, "naive_diffllama")
    else:
        for module in judge.modules():
            if hasattr(module, "_attn"):
                module._attn = NaiveJapanese(module, naive)
    expected, model = judge(ids, use_cache=False).logits, tiny_model(family).requires_grad_(False)
    before = model(ids).logits
    with LMInfinite(num_sink_tokens=S, window_length=L)(model):
        assert (model(ids, use_cache=False).logits - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(model(ids).logits, before)
