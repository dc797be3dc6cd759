"""What a GPU has to say, in one command: kept as it comes, cut off in time, begun again where it stopped."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SLEEP = "-m timeit -n 1 -r 1 'import time; print(1, flush=True); time.sleep(60)'"


@pytest.fixture
def recipe(monkeypatch):
    recipe = runpy.run_path(str(ROOT / "recipes" / "gpu.py"))
    steps = {"long": (SLEEP, 0.02), "quick": ("-m platform", 1), "broken": ("-m no_such_module", 1)}
    recipe["STEPS"][:] = [
        recipe["Step"](name, f"A {name} step", command, command, minutes, needs_model=False)
        for name, (command, minutes) in steps.items()
    ]
    return recipe


def run(recipe, out, **options):
    with pytest.raises(SystemExit) as end:
        recipe["main"](out=out, device="cpu", tiny=True, **options)
    return end.value.code


def test_what_ended_is_kept_and_what_did_not_is_begun_again(recipe, tmp_path, capsys):
    assert run(recipe, tmp_path) == 1
    shown = capsys.readouterr().out
    assert "long: cut off after 1 s" in shown
    assert "quick: done in" in shown
    assert "broken: failed with status 1" in shown
    assert (tmp_path / "long" / "printed.txt").read_text() == "1\n"
    assert "no_such_module" in (tmp_path / "broken" / "printed.txt").read_text()
    assert [run.step for run in recipe["EVIDENCE"].runs_in(tmp_path)] == ["quick"]
    assert "## quick" in (tmp_path / "index.md").read_text()
    assert run(recipe, tmp_path, minutes=0) == 0
    shown = capsys.readouterr().out
    assert "quick: done before" in shown
    assert "long: not begun: no time left" in shown


def test_without_the_real_model_its_steps_are_left_out_in_words(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_LONGTRUNC_CACHE", str(tmp_path / "empty"))
    recipe["STEPS"][:] = [recipe["Step"]("passkey", "Passkeys", "-m platform", "-m platform", 1)]
    assert run(recipe, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "passkey: left out: no model" in shown
    assert "HF_LONGTRUNC_CACHE" in shown


def test_a_larger_model_is_named_or_its_step_is_left_out(recipe, tmp_path, capsys):
    command = "-m platform MODEL"
    recipe["STEPS"][:] = [recipe["Step"]("larger", "A model", command, command, 1, needs_model=False)]
    assert run(recipe, tmp_path) == 0
    assert "larger: left out: no --model" in capsys.readouterr().out
    assert run(recipe, tmp_path, model=tmp_path / "a folder") == 0
    assert f"platform '{tmp_path / 'a folder'}'" in capsys.readouterr().out


def test_what_is_missing_is_said_with_the_way_to_bring_it(recipe, tmp_path):
    line = recipe["missing_package"](Requirement("transformers>=99"))
    assert "transformers>=99 needed: where there is a network, pip download" in line
    assert "no_such_package not installed" in recipe["missing_package"](Requirement("no_such_package"))
    assert recipe["to_bring"]("cpu", True) == []
    with pytest.raises(SystemExit, match=r"(?s)not begun:.*add --tiny"):
        recipe["main"](out=tmp_path, device="cpu", tiny=False)


def test_every_command_names_a_script_that_is_there():
    for step in runpy.run_path(str(ROOT / "recipes" / "gpu.py"))["STEPS"]:
        for command in filter(None, (step.command, step.tiny)):
            script = command.split()[0]
            assert script == "-m" or (ROOT / "recipes" / script).exists(), command
