"""One tiny model of every family: what the documentation's table says is so."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from .families import WORKS, outcome
from .tiny_models import family_names

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
