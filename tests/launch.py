"""A script on two ranks, on the CPU over gloo: processes with torchrun's variables, as `accelerate launch` makes them.

The ranks are forks of a process that has imported what they need and waits for the next script: imports are most of
what a short training costs. Tests that use it are of the xdist group "two_ranks", so that there is one such process.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def two_ranks(worker: Path, folder: Path) -> list[dict[str, Any]]:
    """Run `worker folder` on two ranks; return what each of them wrote to rank0.json and rank1.json there."""
    server = _server()
    print(worker, folder, sep="\t", file=server.stdin, flush=True)
    is_done = server.stdout.readline() == "done\n"
    assert is_done, "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log")))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@functools.cache
def _server() -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.launch"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.communicate)
    return server


def main() -> None:
    import datasets  # noqa: F401
    import transformers.trainer  # noqa: F401

    for line in sys.stdin:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        worker, folder = line.rstrip("\n").split("\t")
        ranks = {_forked(rank, worker, folder) for rank in range(2)}
        statuses = []
        while ranks:
            process, status = os.wait()
            ranks.discard(process)
            statuses.append(status)
            for other in ranks if status else ():  # it waits for the one that failed
                os.kill(other, signal.SIGKILL)
        print("failed" if any(statuses) else "done", flush=True)


def _forked(rank: int, worker: str, folder: str) -> int:
    process = os.fork()
    if process:
        return process
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(240)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = [worker, folder]
    code = 1
    try:
        runpy.run_path(worker, run_name="__main__")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
