"""The command line as a whole: help, version, completion, what goes to which stream, what importing it costs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import typer

import hf_longtrunc
from hf_longtrunc.cli.app import app
from hf_longtrunc.cli.common import print_json
from hf_longtrunc.cli.scrolls import Task
from hf_longtrunc.evaluation.scrolls import TASKS
from tests.command_line import invoke

COMMANDS = [
    *("ask", "chat", "check-packed", "demo", "export", "lm-eval", "match", "pack", "ppl", "scrolls", "serve"),
    *("summarize", "verify"),
]


def test_help_names_the_commands():
    assert sorted(command.name or command.callback.__name__ for command in app.registered_commands) == COMMANDS
    for arguments in (["--help"], []):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    assert "Usage: hf-longtrunc " + command in invoke(command, "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(command):
    words = " ".join(invoke(command, "--help").stdout.split()).partition(f"Example: hf-longtrunc {command} ")[2]
    assert words
    parsed = typer.main.get_command(app).commands[command].make_context(command, shlex.split(words))
    assert parsed.params


def test_version():
    assert invoke("--version").stdout == f"hf-longtrunc {hf_longtrunc.__version__}\n"


def test_module_and_script_are_the_same_program():
    environment = os.environ | {"COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-m", "hf_longtrunc", "--help"], check=True, capture_output=True, text=True, env=environment
    )
    assert "Usage: hf-longtrunc" in result.stdout


def test_the_script_exits_with_2_at_a_mistake():
    command = [sys.executable, "-m", "hf_longtrunc", "match", "typo.txt"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "hf-longtrunc match: error: Invalid value for FILE: no such file: typo.txt\n"


def test_completion_knows_the_commands():
    environment = os.environ | {
        "_HF_LONGTRUNC_COMPLETE": "complete_bash",
        "COMP_WORDS": "hf-longtrunc s",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-m", "hf_longtrunc"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.stdout.split() == ["scrolls", "serve", "summarize"]


def test_help_imports_neither_torch_nor_what_commands_need():
    program = """
import sys
from hf_longtrunc.cli.app import app
for words in (["--help"], *([name, "--help"] for name in ("ask", "demo", "export", "ppl", "scrolls"))):
    try:
        app(words)
    except SystemExit as error:
        assert error.code == 0
heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets", "pandas", "lm_eval", "tqdm"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stderr.strip() == "[]"


def test_the_tasks_that_are_offered_are_the_benchmarks():
    assert [task.value for task in Task] == list(TASKS)


def test_json_is_one_line_without_words_that_json_lacks(capsys):
    print_json({"a": float("nan"), "b": [1.5, float("inf")], 3: "x"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "3": "x"}
