"""Every Python block of README and docs runs, on a tiny model in place of the real one."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationMixin

from tests.command_line import model_folder  # noqa: F401

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(page for page in DOCS.rglob("*.md") if page.parent.name != "evidence")])
# README's text that is longer than a window, shortened for a tokenizer of letters that has no chat template.
SHORTER = {
    "tokens = 8150": "tokens = 900",
    'text.index(".\\n"': 'text.index(". "',
    "chat = [": "tokenizer.chat_template = '{{ messages[0].content }}'\nchat = [",
}
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, model_folder, monkeypatch, tmp_path):  # noqa: F811
    from hf_longtrunc import pretrained

    monkeypatch.setattr(pretrained, "default_model_folder", lambda: Path(model_folder))
    monkeypatch.chdir(tmp_path)
    for long, short in SHORTER.items():
        block = block.replace(long, short)
    exec(compile(block, "<documentation>", "exec", dont_inherit=True), {"__name__": "documentation"})


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
PRINTED = [re.findall(r"^# (.*)$", block, re.MULTILINE) for block in README]  # a block's comments: what it prints


@pytest.mark.real_model
@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_readme_prints_what_its_comments_say(number, real_model, monkeypatch, capsys, tmp_path):
    """Without training, and without the unmodified model on a long text: `recipes/readme.py` runs both."""
    comments = [each for each in PRINTED[number] if not each.startswith("alone:")]
    assert comments
    monkeypatch.setattr("transformers.Trainer.train", lambda trainer: None)
    monkeypatch.chdir(tmp_path)
    generate = GenerationMixin.generate

    def quick(model, input_ids=None, **kwargs):
        is_long = input_ids is not None and input_ids.shape[1] > 8000
        return input_ids if is_long else generate(model, input_ids, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", quick)
    exec(compile(README[number], "<documentation>", "exec", dont_inherit=True), {"__name__": "documentation"})
    printed = capsys.readouterr().out.splitlines()
    assert [each for each in comments if each not in printed] == []


def test_readme_costs_what_its_record_says():
    """`python recipes/evidence.py --steps readme` runs each block whole, the unmodified model and training too."""
    printed = next(run["printed"] for run in reversed(RUNS) if run["step"] == "readme")
    spent = {int(number): float(seconds) for number, seconds in re.findall(r"block (\d): ([\d.]+) s", printed)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = [int(seconds) for seconds in re.findall(r"(\d+) s of one processor core", readme)]
    assert said == [round(spent[1]), round(spent[2])]
    assert spent[1] <= 60
    assert spent[2] <= 40
    shown = [comment for comments in PRINTED for comment in comments]
    assert [each for each in shown if each not in printed.splitlines()] == []


def test_readme_has_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert readme.index('pip install -e ".[demo,train]"') < readme.index("```python")
    assert "\nhf-longtrunc demo\n" in readme
    assert 'pip install -e ".[dev]" && pytest' in readme


def test_home_names_every_page_of_the_menu():
    menu = set(
        re.findall(r": ([\w/-]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    )
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert menu - {"index.md"} <= set(re.findall(r"\]\(([\w/-]+\.(?:md|ipynb))", home))


def test_every_picture_and_relative_link_exists():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"


def test_pictures_are_what_their_script_draws():
    drawn = runpy.run_path(str(ROOT / "scripts" / "pictures.py"))["schematic"]()
    assert len(drawn) >= 4
    for name, picture in drawn.items():
        assert (DOCS / "assets" / f"{name}.svg").read_text(encoding="utf-8") == picture, name


def test_the_tree_of_contributing_names_what_there_is():
    """Rooms and the files beside them; a room that moved, or one that nobody describes, is named here."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    named = {name.rstrip("/") for line in re.findall(r"^  (\S.*?)   ", tree, re.MULTILINE) for name in line.split(", ")}
    there = {path.name for path in (ROOT / "hf_longtrunc").iterdir()} - {"__pycache__", "py.typed"}
    assert named == there
    for command in re.findall(r"`((?:scripts|\.ci)/\w+)", text):
        assert os.access(ROOT / command, os.X_OK), command


SCRIPTS = [p.relative_to(ROOT) for p in (ROOT / "recipes").rglob("*.py") if p.parent.name != "instruments"]


@pytest.mark.parametrize("script", sorted(SCRIPTS), ids=str)
def test_recipes_say_what_they_take(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert left.value.code in (0, None)
    assert "usage" in capsys.readouterr().out.lower()


def test_benchmark_of_the_processors_runs():
    options = ["--device", "cpu", "--vocab", "1000", "--batch", "2", "--turns", "1", "--no-compile"]
    command = ["recipes/benchmarks/processors.py", *options]
    result = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "eta / transformers' eta" in result.stdout


RUNS = [json.loads(line) for line in (ROOT / "docs" / "evidence" / "runs.jsonl").read_text().splitlines()]
TABLES = [
    pytest.param(table, steps, id=f"{page.name}-{'-'.join(steps)}")
    for page in PAGES
    for before, table in itertools.pairwise(page.read_text().split("\n\n"))
    if table.startswith("|") and (steps := re.findall(r"evidence/index\.md#([\w-]+)", before))
]


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)]


@pytest.mark.parametrize(("table", "steps"), TABLES)
def test_every_figure_of_a_table_is_in_its_record(table, steps):
    """To the digits that are shown; the first column names the rows."""
    printed = [run["command"] + run["printed"] for run in RUNS if run["step"] in steps]
    files = [path.read_text() for step in steps for path in (ROOT / "docs" / "evidence" / step).glob("*.jsonl")]
    recorded = [float(number) for number in numbers(" ".join([*printed, *files]))]
    for row in table.splitlines()[2:]:
        for shown in numbers(" ".join(row.split("|")[2:])):
            half = 0.5001 * 10.0 ** -len(shown.partition(".")[2])
            assert any(abs(float(shown) - number) <= half for number in recorded), f"{shown} in {row}"


def test_tables_of_results_are_those_of_their_records():
    """`python scripts/tables.py` writes them."""
    made = runpy.run_path(str(ROOT / "scripts" / "tables.py"))["tables"]()
    assert len(made) >= 15
    for table in made:
        text = (DOCS / "results" / f"{table.page}.md").read_text(encoding="utf-8")
        assert table.written(text) == text, table.header


def test_every_step_that_a_page_points_to_was_run():
    named = {step for page in PAGES for step in re.findall(r"evidence/index\.md#([\w-]+)", page.read_text())}
    assert named <= {run["step"] for run in RUNS}
    assert len(TABLES) >= 10
