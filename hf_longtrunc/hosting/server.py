"""`transformers serve` on an exported folder, whose answers say what of a conversation the model saw."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_longtrunc.hosting.folder import verify_export
from hf_longtrunc.hosting.generate import reading_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from hf_longtrunc.hosting.generate import Reading


def serve(folder: str | os.PathLike[str], **options: Any) -> None:
    """Run `transformers serve` on an exported folder until it is stopped.

    The folder is verified first, then trusted. Beside `usage`, each answer of /v1/chat/completions and /v1/completions,
    streamed or not, has a field `longtrunc`: how many tokens of the prompt were read, kept and forgotten, and the
    window. Everything else is transformers' own server.

    Args:
        folder: made by `export`.
        **options: of `transformers serve`, e.g. host, port, device, dtype.

    Raises:
        FileNotFoundError, ValueError: the folder was not exported, or its code was changed.
        ImportError: what `transformers serve` needs is not installed, or this release of transformers has another one.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    technique = verify_export(folder).settings.technique
    build: Any = server.build_server

    def build_with_field(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.add_middleware(ReadingField, reading=partial(reading_of, technique))
        return app

    server.build_server = build_with_field
    try:
        Serve(str(folder), trust_remote_code=True, **options)
    finally:
        server.build_server = build


class ReadingField:
    """ASGI middleware: where an answer has `usage`, its prompt's reading is put beside it as `longtrunc`.

    Args:
        app: what is wrapped.
        reading: (tokens of a prompt) -> Reading.
    """

    def __init__(self, app: Any, reading: Callable[[int], Reading]):
        self.app, self.reading = app, reading

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not scope["path"].endswith("/completions"):
            await self.app(scope, receive, send)
            return
        start: dict[str, Any] = {}
        body = b""

        async def send_with_field(message: dict[str, Any]) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                start.update(message)
                return
            is_stream = b"text/event-stream" in dict(start["headers"]).get(b"content-type", b"")
            body = message.get("body", b"") if is_stream else body + message.get("body", b"")
            more = message.get("more_body", False)
            if more and not is_stream:
                return
            content = b"\n".join(map(self.with_field, body.split(b"\n")))
            if start.get("type"):
                headers = [each for each in start["headers"] if each[0] != b"content-length"]
                length = [] if is_stream else [(b"content-length", b"%d" % len(content))]
                await send({**start, "headers": [*headers, *length]})
                start["type"] = None
            await send({"type": "http.response.body", "body": content, "more_body": more})

        await self.app(scope, receive, send_with_field)

    def with_field(self, line: bytes) -> bytes:
        """Return a line of JSON, or of an event stream, with the field if it has `usage`."""
        mark = b"data: " if line.startswith(b"data: ") else b""
        try:
            answer = json.loads(line.removeprefix(mark))
            tokens = answer["usage"]["prompt_tokens"]
        except (ValueError, TypeError, KeyError):
            return line
        reading = asdict(self.reading(tokens))
        del reading["reused"]
        return mark + json.dumps({**answer, "longtrunc": reading}).encode()
