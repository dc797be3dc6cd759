"""One tiny model of every family: what the documentation's table says is so."""

from __future__ import annotations

import re
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
