"""What is said where a package is missing: one message names the index and the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_longtrunc.extras import missing
from tests.conftest import PYPROJECT

ROOT = Path(__file__).parents[1]
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
SAID = [
    *(path for path in (ROOT / "hf_longtrunc").rglob("*.py") if path.name != "extras.py"),
    *(ROOT / "recipes").rglob("*.py"),
    *(path for kind in ("*.md", "*.ipynb") for path in (ROOT / "docs").rglob(kind)),
    *ROOT.glob("*.md"),
]


def test_the_error_names_package_extra_and_a_way_that_works():
    error = missing("a table", "rich.table", "eval")
    assert isinstance(error, ModuleNotFoundError)
    assert error.name == "rich"
    assert str(error) == (
        'a table needs rich: run pip install "hf_longtrunc[eval]" (in a checkout: pip install -e ".[eval]")'
    )


@pytest.mark.parametrize("path", SAID, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_that_message_tells_to_install_from_an_index(path):
    text = path.read_text(encoding="utf-8")
    assert "hf_longtrunc[" not in text
    assert "pip install hf_longtrunc" not in text
    assert "pip install hf-longtrunc" not in text


def test_every_extra_that_is_named_exists():
    named = {
        line.rsplit('"', 2)[1]
        for path in (ROOT / "hf_longtrunc").rglob("*.py")
        for line in path.read_text().splitlines()
        if 'raise missing("' in line or 'import_extra("' in line
    }
    assert named
    assert named <= set(EXTRAS)
