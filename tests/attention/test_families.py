"""One tiny model of every family: what its page says is so."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from hf_longtrunc import LMInfinite

from .families import GROWS, REFUSED, WORKS, L, S, outcome
from .reference import Naive, Rope, install
from .tiny_models import family_names, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "lm_infinite_families.md"
IS_OF_THIS_RELEASE = f"under transformers {version('transformers')}." in PAGE.read_text(encoding="utf-8")


def documented() -> dict[str, tuple[str, str]]:
    """What the page says of each family: its section, and the reason where there is one."""
    said = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        what = {"Works": WORKS, "Refused": REFUSED}.get(section.split(":")[0], GROWS)
        for line in section.splitlines():
            row = re.fullmatch(r"\| (.*) \| (`.*`) \|", line)
            reason, names = row.groups() if row else ("", line)
            if row or what != REFUSED:
                said |= dict.fromkeys(re.findall(r"`([^`]+)`", names), (what, reason))
    return said


SAID = documented()


def test_the_page_names_a_hundred_families_that_work():
    assert sum(what != REFUSED for what, _ in SAID.values()) >= 100
    assert not any(word in reason for _, reason in SAID.values() for word in ("Error", "object has no", "'Tensor'"))


@pytest.mark.filterwarnings("ignore")  # what model files warn about tiny configurations
@pytest.mark.parametrize("family", sorted(set(SAID) & set(family_names())))
def test_a_family_does_what_the_page_says(family):
    what, reason = SAID[family]
    if what == REFUSED and not IS_OF_THIS_RELEASE:
        pytest.skip("written under another release")
    found, why = outcome(family)
    assert (found, why.replace("|", "/")) == (what, reason)


def test_the_page_says_how_many_families_it_names():
    counts = [int(count) for count in re.findall(r"^## .*: (\d+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)]
    assert sum(counts) == len(SAID)
    if IS_OF_THIS_RELEASE:
        assert f"{len(SAID)} of {len(family_names())} families are listed" in PAGE.read_text(encoding="utf-8")


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
