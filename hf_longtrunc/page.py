"""One self-contained page for a browser: the frame that all pages share is `page.html`, a room brings what it shows."""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, content: str, data: object, *, title: str, prompt: str) -> Path:
    """Write a page and return its path.

    Args:
        path: of the file, which is overwritten.
        content: markup, styles and script; the script can use `data` and the frame's functions.
        data: what `json` can write.
        title: of the page; `<!--title-->` in `content` too.
        prompt: a text for `<!--prompt-->` in `content`.
    """
    frame = resources.files("hf_longtrunc").joinpath("page.html").read_text(encoding="utf-8")
    page = frame.replace("<!--content-->", content).replace("<!--title-->", html.escape(title))
    # What a user brings comes last, so that nothing in it is taken for one of the marks.
    before, after = page.split("/*data*/null")
    path.write_text(before + _in_a_script(data) + after.replace("<!--prompt-->", html.escape(prompt)), encoding="utf-8")
    return path


def _in_a_script(data: object) -> str:
    """JSON that no text in it can end: the letters that begin a tag are escaped."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
