"""A script in two processes, as a user starts it: `accelerate launch`, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def two_ranks(worker: Path, folder: Path) -> list[dict[str, Any]]:
    """Run `worker folder` on two ranks; return what each of them wrote to rank0.json and rank1.json there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu is accelerate's word for torchrun; the worker's TrainingArguments put it on the CPU and gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*launch, str(worker), str(folder)], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
