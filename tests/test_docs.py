"""Every Python block of README and docs runs, on a tiny model in place of the real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import model_folder  # noqa: F401

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, model_folder, monkeypatch, tmp_path):  # noqa: F811
    from hf_longtrunc import pretrained

    monkeypatch.setattr(pretrained, "default_model_folder", lambda: Path(model_folder))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "<documentation>", "exec"), {"__name__": "documentation"})


def test_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[demo]" && hf-longtrunc demo' in readme
    assert 'pip install -e ".[dev]" && pytest' in readme


def test_every_picture_and_relative_link_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"


@pytest.mark.parametrize("script", sorted(p.relative_to(ROOT) for p in (ROOT / "recipes").rglob("*.py")), ids=str)
def test_recipes_say_what_they_take(script):
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert "usage" in result.stdout.lower()


def test_benchmark_of_the_processors_runs():
    options = ["--device", "cpu", "--vocab", "1000", "--batch", "2", "--turns", "1", "--no-compile"]
    command = ["recipes/benchmarks/processors.py", *options]
    result = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "eta ratio" in result.stdout
