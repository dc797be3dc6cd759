"""The page of evidence: made from what was run, and what was run is not run again."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import typer

from instruments.evidence_steps import STEPS, Step

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "evidence.py"


@pytest.fixture
def recipe():
    recipe = runpy.run_path(str(RECIPE))
    before = [*STEPS]
    STEPS[:] = [Step("help", "What pack takes", "hf-longtrunc pack --help", "hf-longtrunc --help")]
    yield recipe
    STEPS[:] = before


def test_a_step_is_run_once_and_shown(recipe, tmp_path):
    for _ in range(2):
        recipe["main"](full=False, text=None, steps=None, out=tmp_path)
    (done,) = recipe["runs_in"](tmp_path)
    assert (done.step, done.command) == ("help", "hf-longtrunc pack --help")
    assert "--seq-length" in done.printed
    page = (tmp_path / "index.md").read_text()
    assert "## help" in page
    assert "--seq-length" in page
    recipe["main"](full=True, text=None, steps=None, out=tmp_path)
    assert len(recipe["runs_in"](tmp_path)) == 2
    page = (tmp_path / "index.md").read_text()
    assert page.count("## help") == 1
    assert "`hf-longtrunc pack --help`" in page
    assert "`hf-longtrunc --help`" in page


def test_a_command_is_written_as_a_user_types_it(recipe):
    commands = {"pema.py": "python recipes/pema.py", "-m tests.x 10": "python -m tests.x 10"}
    assert [recipe["written"](command, None) for command in commands] == list(commands.values())


def test_no_path_of_this_machine_is_shown(recipe, tmp_path):
    text = f"{tmp_path}/records.jsonl {Path.home()}/.cache/model {sys.prefix}/lib/model.zip"
    assert recipe["without_paths"](text, tmp_path) == "OUT/records.jsonl ~/.cache/model ENVIRONMENT/lib/model.zip"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.json*")) + sorted((ROOT / "docs").rglob("*.md")))
def test_no_page_and_no_record_names_a_path_of_a_machine(path):
    assert not re.findall(r"(?<![\w.~/-])/(?:tmp|root|home|Users|work|opt|usr)/\S*", path.read_text(encoding="utf-8"))


def test_an_unknown_step_is_named(recipe, tmp_path):
    with pytest.raises(typer.BadParameter, match="no such step: nothing"):
        recipe["main"](full=False, text=None, steps="help,nothing", out=tmp_path)


def test_the_page_in_docs_is_what_its_records_render_to():
    """If not, `python recipes/evidence.py --steps cream --out docs/evidence` writes it and runs nothing anew."""
    evidence = ROOT / "docs" / "evidence"
    assert (evidence / "index.md").read_text(encoding="utf-8") == runpy.run_path(str(RECIPE))["page"](evidence)
