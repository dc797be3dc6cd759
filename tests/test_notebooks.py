"""The notebooks run from the first cell to the last, on a tiny model in place of the real one."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.command_line import model_folder  # noqa: F401

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["packed_training", "past_the_window", "sampling"]


@pytest.mark.filterwarnings("default:.*:DeprecationWarning")  # Jupyter's own
def test_notebooks_run(model_folder, monkeypatch, tmp_path):  # noqa: F811
    """In one kernel, which imports torch once; no name of one notebook is left for the next."""
    shutil.copytree(model_folder, tmp_path / "cache" / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("HF_LONGTRUNC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = []
    for path in NOTEBOOKS:
        cells += [*nbformat.read(path, as_version=4).cells, nbformat.v4.new_code_cell("%reset -f")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_as_it_ran(path):
    """Every code cell was executed, in order, without an error, and what it printed names no one's machine."""
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert "/tmp/" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_install_line_brings_what_the_cells_import(path):
    """`scripts/notebooks` installs exactly this line, and executes the cells on the real model."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(
        r'pip install -e "\.\[([\w,]+)\]" jupyter', path.read_text(encoding="utf-8").replace("\\", "")
    )
    wanted = project["dependencies"] + [each for e in extras.split(",") for each in project["optional-dependencies"][e]]
    brought = {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in wanted} | {"hf_longtrunc"}
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", "\n".join(cells), re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) <= brought
