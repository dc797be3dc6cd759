"""Every figure and table of docs/evidence from scratch, by one command.

    python recipes/evidence.py --quick                       # two CPU cores, a quarter of an hour
    python recipes/evidence.py --steps pema,uld              # steps that take longer, by name
    python recipes/evidence.py --full --text some_novel.txt  # one GPU

Each step is a command that can be run by itself. Its records and pictures go to OUT/STEP; one line of OUT/runs.jsonl
holds the command, the machine, commit and versions, how long it took and everything that it printed. OUT/index.md shows
all of it. A step with a recorded command is not run again: delete its line and its folder to repeat it. The
folder of an interrupted step stays, and most steps continue from it.

The text is Python's own language reference, unless one is given.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from hf_longtrunc.evaluation import append_records, python_reference, read_records
from instruments.evidence_steps import COMMAND, STEPS

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPES = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One step as it was run; the seconds are those since it was last started."""

    step: str
    command: str
    seconds: float
    machine: str
    commit: str
    versions: str
    printed: str


def main(
    full: Annotated[
        bool, typer.Option("--full/--quick", help="What a GPU or two CPU cores can do in minutes.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="A long text; Python's language reference if left out.")] = None,
    steps: Annotated[str | None, typer.Option(help="Only these steps, separated by commas.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("evidence"),
) -> None:
    named = None if steps is None else steps.split(",")
    unknown = set(named or ()) - {step.name for step in STEPS if step.quick or step.full}
    if unknown:
        raise typer.BadParameter(f"no such step: {', '.join(sorted(unknown))}", param_hint="--steps")
    for step in STEPS:
        command = step.full if full or (named and step.quick is None) else step.quick
        is_wanted = command is not None and (named is None or step.name in named)
        if command is not None and is_wanted and written(command, text) not in {run.command for run in runs_in(out)}:
            run(step.name, command, out, text)
    (out / "index.md").write_text(page(out), encoding="utf-8")
    print(f"page: {out / 'index.md'}")


def runs_in(out: Path) -> list[Run]:
    return read_records(out / "runs.jsonl", Run)


def written(command: str, text: Path | None) -> str:
    """Return a step's command as a user would type it."""
    command = command if text is None else command.replace("TEXT", text.name)
    if command.startswith(COMMAND):
        return command
    return f"python {command}" if command.startswith("-m ") else f"python recipes/{command}"


def run(name: str, command: str, out: Path, text: Path | None) -> None:
    """Run one step's command, print its output, and keep the output with the records."""
    print(f"== {name}: {command}", flush=True)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    source = out / "python_reference.txt" if text is None else text
    if text is None:
        source.write_text(python_reference(), encoding="utf-8")
    words = [word.replace("TEXT", str(source)).replace("OUT", str(folder)) for word in shlex.split(command)]
    if words[0] == COMMAND:
        program = ["-m", "hf_longtrunc", *words[1:]]
    else:
        program = words if words[0] == "-m" else [str(RECIPES / words[0]), *words[1:]]
    for picture in folder.glob("*.png"):  # of a run that was cut off: commands overwrite nothing
        picture.unlink()
    started = time.perf_counter()
    # Progress bars go to stderr, and are for whoever is watching.
    result = subprocess.run(
        [sys.executable, *program], stdout=subprocess.PIPE, text=True, check=False, env=os.environ | {"COLUMNS": "100"}
    )
    seconds = round(time.perf_counter() - started, 1)
    print(result.stdout, flush=True)
    if result.returncode:
        raise SystemExit(f"{name} ended with status {result.returncode}; the steps before it are kept")
    for records in folder.rglob("*.jsonl"):
        records.write_text(without_paths(records.read_text(encoding="utf-8"), folder), encoding="utf-8")
    printed = without_paths(result.stdout, folder)
    done = Run(name, written(command, text), seconds, machine(), commit(), versions(), printed)
    append_records(out / "runs.jsonl", [done])


def without_paths(text: str, folder: Path) -> str:
    """Leave out where on this machine things lie."""
    return text.replace(str(folder), "OUT").replace(sys.prefix, "ENVIRONMENT").replace(str(Path.home()), "~")


def page(out: Path, steps: Sequence[Any] = STEPS) -> str:
    """Return the page: a section per step with its commands, their output, and its pictures.

    Args:
        out: folder of the records.
        steps: with a name and a title each.
    """
    runs = runs_in(out)
    parts = [
        "# Evidence",
        "Made by `python recipes/evidence.py`. Every step is a line of [`runs.jsonl`](runs.jsonl), its records lie in "
        "its folder there. TEXT is Python's language reference where a command names no other, OUT the step's folder. "
        "Nothing was edited by hand, but for `hosts-serve`, which was cut off at its last step, the start of a second "
        "server. `asking` and `ruler` ran in parts, two at once; `asking-trailing` searched once where questions "
        "are the same without their instruction; `hosts-receipts` ran in parts; two arms of `dual-chunk-2`, an option "
        "that is gone, are left out of its table.",
        "Where a command names no model it ran on SmolLM2-135M-Instruct as `load_pretrained()` loads it: 4-bit weights "
        "(Q4_1) unpacked to fp32. The hub's own weights give figures near these, not the same digits.",
    ]
    shown: dict[bytes, str] = {}
    for step in steps:
        ran = [run for run in runs if run.step == step.name]
        if ran:
            parts += [f"## {step.name}", f"{step.shows}.", *(said for run in ran for said in said_by(run))]
        pictures = sorted((out / step.name).glob("*.png")) if ran else []
        for picture in pictures:
            first = shown.setdefault(picture.read_bytes(), step.name)
            is_new = first == step.name
            drawn = f"![{step.shows}]({step.name}/{picture.name})"
            parts.append(drawn if is_new else f"The picture is that of [{first}](#{first}).")
    return "\n\n".join(parts) + "\n"


def said_by(run: Run) -> list[str]:
    """Return a run's command and its output, as two paragraphs."""
    shown = [line for line in run.printed.rstrip().splitlines() if not line.startswith("{'")]  # Trainer's log
    return [
        f"`{run.command}`: {run.seconds:.0f} s on {run.machine}; commit {run.commit}; {run.versions}.",
        "\n".join(["```text", *shown, "```"]),
    ]


def machine() -> str:
    """Describe the machine without identifying anybody."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} shared CPU cores ({platform.machine()})"


def commit() -> str:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RECIPES, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or "unknown"


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


if __name__ == "__main__":
    typer.run(main)
