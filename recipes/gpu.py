"""Everything that a GPU has to say about these methods, in one command.

    python recipes/gpu.py --out gpu --minutes 25 --texts a_novel.txt another.txt
    python recipes/gpu.py --out gpu --model A_FOLDER --steps ruler-larger    # a larger model's row
    python recipes/gpu.py --out tiny --device cpu --tiny        # the same commands at toy size: two minutes of a CPU

The most valuable steps come first, each in a process of its own with a limit of time; what it prints goes to
OUT/STEP/printed.txt as it comes, its records beside it. A step that ended is a line of OUT/runs.jsonl, shown in
OUT/index.md, and is not run again; one that failed or ran out of time is, by the same command: most go on from their
records. The last text is for evaluation alone. Without texts Python's language reference is read, and what trains is
left out.

Nothing is fetched. What is missing is said first, with the way to bring it.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from packaging.requirements import Requirement

from hf_longtrunc.evaluation import append_records, python_reference
from hf_longtrunc.pretrained import cached_model_folder

ROOT = Path(__file__).parents[1]
EVIDENCE = SimpleNamespace(**runpy.run_path(str(ROOT / "recipes" / "evidence.py")))


@dataclass(frozen=True)
class Step:
    """One table: its folder, what is shown, the command at either size, and its limit.

    TEXT, TRAIN, OUT and DEVICE stand for what they say, MODEL for a larger model's folder. A step without a tiny form
    needs a GPU's speed.
    """

    name: str
    shows: str
    command: str
    tiny: str | None
    minutes: float
    needs_model: bool = True


KERNELS = "benchmarks/lm_infinite.py --device DEVICE --out OUT"
STEPS = [
    Step(
        "cuda-tests",
        "The tests that need CUDA",
        "-m pytest -q -n 0 -k cuda tests/sampling tests/attention/test_cuda.py tests/data/test_collators.py",
        "-m pytest -q -n 0 tests/sampling/test_cuda.py tests/attention/test_cuda.py",
        4,
        needs_model=False,
    ),
    Step(
        "attention-cost",
        "One layer under LM-Infinite: prefill of 8k to a million tokens, decode",
        f"{KERNELS} --parts prefill,decode,million",
        f"{KERNELS} --parts prefill,decode --sizes 2048 --windows 128 --repeats 1",
        6,
        needs_model=False,
    ),
    Step(
        "model-cost",
        "A whole model under LM-Infinite: prompts, and a token, compiled too",
        f"{KERNELS} --parts model --prompts 32768,131072",
        f"{KERNELS} --parts model --prompts 256 --model-windows 64 --layers 1 --repeats 1",
        4,
    ),
    Step(
        "processors-cost",
        "What a truncation step costs beside transformers' own",
        "benchmarks/processors.py --device DEVICE --vocab 128256",
        "benchmarks/processors.py --device DEVICE --vocab 1000 --batch 2 --turns 1 --no-compile",
        3,
        needs_model=False,
    ),
    Step(
        "lm-infinite",
        "LM-Infinite: perplexity by position, tokens a second, prompts of 131k and a million tokens",
        "lm_infinite.py --text TEXT --starts 2000 --stops 10000,30000,60000 --out OUT",
        "lm_infinite.py --text TEXT --parts prompt --prompts 300 --out OUT",
        5,
    ),
    Step(
        "passkey",
        "Reading what the window lost: passkeys by depth",
        "passkey.py --text TEXT --lengths 4000,7500,16000,32000 --keys 4 --window 2048 --dtype bfloat16 --out OUT",
        "passkey.py --lengths 200 --depths 0.5 --keys 1 --window 64 --arms window --out OUT",
        5,
    ),
    Step(
        "dual-chunk",
        "Dual chunk attention past the trained window",
        "dual_chunk.py --text TEXT --tokens 32768 --out OUT",
        None,
        3,
    ),
    Step(
        "cream",
        "CREAM: 8,192 tokens made 32,768, beside its baselines",
        "finetune_cream.py --texts TRAIN --eval-text TEXT --arms untrained,contiguous,cream --checkpointing --out OUT",
        None,
        8,
    ),
    Step(
        "bat-cost",
        "Basis-aware truncation: a check, a mask, a generation",
        "benchmarks/bat.py --problems 20 --highs 0 --rows 15 --tokens 40",
        None,
        3,
    ),
    Step(
        "battery",
        "Needles, variables and dictionaries, by length and depth",
        "retrieval.py --text TEXT --lengths 2000,7000,16000 --prompts 4 --window 2048 --chat --out OUT",
        None,
        5,
    ),
    Step(
        "ruler",
        "Six of RULER's tasks at half, once and twice the trained window, read in eight ways",
        "ruler.py --out OUT",
        "ruler.py --lengths 512 --tasks niah_single_1 --limit 1 --arms bm25 --out OUT",
        20,
    ),
    Step(
        "ruler-larger",
        "The same of a larger model",
        "ruler.py --model MODEL --out OUT",
        "ruler.py --model MODEL --lengths 512 --tasks niah_single_1 --limit 1 --arms unmodified,bm25 --out OUT",
        25,
        needs_model=False,
    ),
    Step(
        "stream",
        "Ten million tokens at constant memory",
        "constant_memory.py --tokens 10000000 --every 1000000 --chunk 4000 --out OUT",
        "constant_memory.py --tokens 2000 --every 1000 --chunk 100 --window 64 --out OUT",
        5,
        needs_model=False,
    ),
]


def main(
    out: Annotated[Path, typer.Option(help="Folder of records and page.")] = Path("gpu"),
    minutes: Annotated[float, typer.Option(help="Begin and run nothing beyond these.")] = 25,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy sizes.")] = False,
    texts: Annotated[list[Path] | None, typer.Option(help="Long texts, the last for evaluation; repeat it.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a larger model, for `ruler-larger`.")] = None,
    steps: Annotated[str | None, typer.Option(help="Only these steps, separated by commas.")] = None,
) -> None:
    until = time.monotonic() + 60 * minutes
    missing = to_bring(device, tiny)
    if missing:
        raise SystemExit("\n".join(["not begun:", *missing]))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    has_model = cached_model_folder().exists()
    print("\n".join(environment(has_model)), flush=True)
    larger = shlex.quote(str(model.resolve())) if model else ""
    paths, ended = written_texts(out, texts) | {"DEVICE": device, "MODEL": larger}, {}
    for step in STEPS:
        command = step.tiny if tiny else step.command
        is_wanted = steps is None or step.name in steps.split(",")
        if not is_wanted or command is None or ("TRAIN" in command and not texts):
            continue
        if "MODEL" in command and model is None:
            ended[step.name] = "left out: no --model"
            continue
        for word in ("TRAIN", "DEVICE", "MODEL"):
            command = command.replace(word, paths[word])
        if any(run.command == EVIDENCE.written(command, None) for run in EVIDENCE.runs_in(out)):
            ended[step.name] = "done before"
        elif step.needs_model and not has_model:
            ended[step.name] = "left out: no model"
        elif time.monotonic() > until:
            ended[step.name] = "not begun: no time left"
        else:
            seconds = min(60 * step.minutes, until - time.monotonic())
            ended[step.name] = run(step.name, command, paths["TEXT"], out, seconds)
            (out / "index.md").write_text(EVIDENCE.page(out, STEPS), encoding="utf-8")
    print("\n".join(f"{name}: {how}" for name, how in ended.items()))
    raise SystemExit(any(how.startswith(("failed", "cut off")) for how in ended.values()))


def to_bring(device: str, tiny: bool) -> list[str]:
    """Return what keeps this from running here, each with the way out."""
    lines = [] if device == "cpu" or torch.cuda.is_available() else ["no CUDA device: --device cpu --tiny tries it out"]
    if device == "cpu" and not tiny:
        lines.append("--device cpu takes days at full size: add --tiny")
    declared = re.search(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert declared is not None
    for requirement in [*ast.literal_eval(declared[1]), "pytest", "matplotlib", "accelerate", "lm_eval", "bm25s"]:
        line = missing_package(Requirement(requirement))
        lines += [] if line is None else [line]
    return lines


def missing_package(needed: Requirement) -> str | None:
    """Return what to bring for one requirement, None if it is met."""
    try:
        here = version(needed.name)
    except PackageNotFoundError:
        here = "not"
    if here != "not" and needed.specifier.contains(here, prereleases=True):
        return None
    return (
        f"{needed.name} {here} installed, {needed} needed: where there is a network, pip download --no-deps -d wheels "
        f"'{needed}'; here, pip install --no-index --find-links wheels '{needed}'"
    )


def environment(has_model: bool) -> list[str]:
    """Return what this runs on, and whether the real model is here."""
    lines = [f"{EVIDENCE.machine()}; {EVIDENCE.versions()}; CUDA {torch.version.cuda}; commit {EVIDENCE.commit()}"]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        lines.append(f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if not has_model:
        lines.append(
            "the real model is not here, and its steps are left out: run `hf-longtrunc demo` where there is a network, "
            "and bring the folder that HF_LONGTRUNC_CACHE names, or ~/.cache/hf_longtrunc"
        )
    return lines


def written_texts(out: Path, texts: list[Path] | None) -> dict[str, str]:
    """Return what TEXT and TRAIN stand for, as a command line holds them."""
    if texts:
        *train, last = (str(text.resolve()) for text in texts)
        return {"TEXT": shlex.quote(last), "TRAIN": shlex.join(train)}
    text = out / "python_reference.txt"
    text.write_text(python_reference(), encoding="utf-8")
    return {"TEXT": shlex.quote(str(text)), "TRAIN": ""}


def run(name: str, command: str, text: str, out: Path, seconds: float) -> str:
    """Run one command within so many seconds, keep its run if it ended well, and say how it ended."""
    print(f"== {name}: {command}", flush=True)
    folder = out / name
    folder.mkdir(exist_ok=True)
    for picture in folder.glob("*.png"):  # of a run that was cut off: commands overwrite nothing
        picture.unlink()
    words = shlex.split(command.replace("TEXT", text).replace("OUT", shlex.quote(str(folder))))
    program = words if words[0] == "-m" else [str(ROOT / "recipes" / words[0]), *words[1:]]
    variables = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started, printed = time.perf_counter(), folder / "printed.txt"
    with printed.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *program], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"cut off after {seconds:.0f} s; {printed} has what it printed"
    took = round(time.perf_counter() - started, 1)
    shown = EVIDENCE.without_paths(printed.read_text(encoding="utf-8"), folder)
    if status:
        return f"failed with status {status}; {printed} says why"
    done = EVIDENCE.Run(
        name, EVIDENCE.written(command, None), took, EVIDENCE.machine(), EVIDENCE.commit(), EVIDENCE.versions(), shown
    )
    append_records(out / "runs.jsonl", [done])
    return f"done in {took:.0f} s"


if __name__ == "__main__":
    typer.run(main)
