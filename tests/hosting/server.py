"""A server of transformers in a thread of this process, as its own command line builds it."""

from __future__ import annotations

import gc
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def served(folder: object, start: Any = None) -> Iterator[str]:
    """Serve a folder, by `start` or transformers' own `Serve`, and give the address."""
    import uvicorn
    from transformers.cli.serve import Serve

    servers: list[Any] = []

    class Server(uvicorn.Server):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            servers.append(self)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = {"trust_remote_code": True} if start is None else {}
    options |= {"device": "cpu", "port": port}
    thread = threading.Thread(target=start or Serve, args=(str(folder),), kwargs=options)
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Server)
        thread.start()
        try:
            for _ in range(200):
                try:
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            for server in servers:
                server.should_exit = True
            thread.join()
    assert_closed()


def assert_closed() -> None:
    """Raise here for a client or socket that a test left open, not in a later test that collects it."""
    import openai

    clients = [each for each in gc.get_objects() if type(each) is openai.OpenAI]
    left = [each for each in clients if not each.is_closed()]
    assert not left, f"{len(left)} OpenAI clients were not closed: use `with OpenAI(...) as client:`"
    del clients, left
    gc.collect()
