"""A page in a real browser: Debian's Chromium without a screen, driven by its debugging protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
# No sandbox: a machine that runs tests is often root in a container. No name resolves: what a page loads, it brings.
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe"),
    *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"),
)


class Browser:
    """One tab of a browser, until `close()`."""

    def __init__(self, folder: Path):
        ask_read, self._ask = os.pipe()
        self._answer, answer_write = os.pipe()
        # The protocol is spoken on descriptors 3 and 4.
        launch = f'exec "$@" 3<&{ask_read} 4>&{answer_write}'
        options = [f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", launch, "bash", str(PROGRAM), *SWITCHES, *options],
            pass_fds=(ask_read, answer_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(ask_read)
        os.close(answer_write)
        self._unread, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        (page,) = [each for each in self._call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._ask)
        os.close(self._answer)

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window and what the user prefers."""
        is_phone = width < 600
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def block(self, *patterns: str) -> None:
        """Load nothing from addresses like these, from now on."""
        self._call("Network.setBlockedURLs", urls=list(patterns))

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key of the keyboard where the focus is."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36} | dict(
            zip(("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"), range(37, 41), strict=True)
        )
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def point(self, selector: str, *, click: bool = False) -> None:
        """Move the mouse onto the first element that matches, and click it."""
        box = self._middle_of(selector)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", **box)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def tap(self, selector: str) -> None:
        """Touch the first element that matches."""
        self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self._middle_of(selector)])
        self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, path: Path) -> None:
        """Write what the window shows."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Return what the page asked for since it was opened."""
        self.ask("1")  # what came before its answer has been read
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[Any]:
        """Return the errors that the page's scripts raised since it was opened."""
        self.ask("1")
        return [event["params"] for event in self.events if event["method"] == "Runtime.exceptionThrown"]

    def _middle_of(self, selector: str) -> dict[str, float]:
        where = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{where}.scrollIntoView({{block: 'center'}})")
        box = f"(r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))({where}.getClientRects()[0])"
        middle: dict[str, float] = self.ask(box)
        return middle

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            part = os.read(self._answer, 1 << 16)
            assert part, "the browser ended"
            self._unread += part
        first, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


def data_of(path: Path) -> Any:
    """Return what a page of this package shows."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL
    )
    return json.loads(text)


def luminance(color: str) -> float:
    """Return the relative luminance of a CSS colour, as WCAG defines it."""
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two CSS colours, from 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine: install the package chromium to test pages in it")
    tab = Browser(tmp_path_factory.mktemp("browser"))
    yield tab
    tab.close()


COLOR = "getComputedStyle(document.querySelector('%s')).%s"


def check_readable(browser: Browser, page: Path, width: int, dark: bool) -> str:
    """Open a page and hold that it fits the width and has light ink on dark, or dark on light; return the ground."""
    browser.resize(width, 844, dark=dark)
    browser.open(page)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    ink, ground = (browser.ask(COLOR % ("body", name)) for name in ("color", "backgroundColor"))
    assert (luminance(ink) > luminance(ground)) == dark
    return str(ground)


def check_step_is_below(browser: Browser, chosen: str) -> None:
    """Hold that on a phone the panel of the chosen element stands below it."""
    tops = browser.ask(
        f"[document.querySelector('{chosen}'), document.getElementById('step')].map(e => e.getBoundingClientRect().top)"
    )
    assert tops[0] < tops[1]
