"""Run README's Python blocks on the default model; print the output and the processor time of each.

    python recipes/readme.py

Expect: the comment under each block's last print, and at most 60 seconds of processor time a block, on one thread:
the time that a second thread waits would be counted too.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

README = Path(__file__).parent.parent / "README.md"


def main(
    only: Annotated[int | None, typer.Option(help="Run the block of this number alone.")] = None,
) -> None:
    """Run README's Python blocks one after another, each in a name space of its own."""
    torch.set_num_threads(1)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for number, block in enumerate(blocks, 1):
            if only in (None, number):
                begun = time.process_time()
                exec(compile(block, f"<README, block {number}>", "exec", dont_inherit=True), {"__name__": "readme"})
                print(f"block {number}: {time.process_time() - begun:.1f} s of processor time", flush=True)


if __name__ == "__main__":
    typer.run(main)
