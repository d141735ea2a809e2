"""The reports in a real browser: nothing fails, nothing is fetched, nothing sticks out, in light and dark."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_eval_report import example, example_bench

from monobath.evaluation.report import bench_page, eval_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60
"""Seconds for one answer of the browser."""


class Browser:
    """Headless Chromium, spoken to over a pipe in the DevTools protocol: JSON objects, each ended by a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        (there, self._write), (self._read, back) = (map(_above_nine, os.pipe()) for _ in range(2))

        def connect() -> None:
            os.dup2(there, 3)  # where Chromium expects the pipe
            os.dup2(back, 4)

        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [program, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=connect,
            close_fds=False,
            start_new_session=True,
        )
        os.close(there)
        os.close(back)
        self._buffer, self._count = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command; events that come meanwhile are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Until such an event has come since the last `open`."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def open(self, page: Path, width: int, scheme: str, height: int = 900) -> None:
        """Load a page at a width in CSS pixels, in a light or a dark scheme, with no events of before."""
        phone = width < 500
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def screenshot(self) -> Image.Image:
        """The whole page, as far as it scrolls."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 15_000), "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def close(self) -> None:
        """End it, whatever it does."""
        os.killpg(self._process.pid, 9)  # a session of its own: nobody else's processes
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, f"Chromium has said nothing for {TIMEOUT} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"Chromium has ended with code {self._process.poll()}"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _above_nine(descriptor: int) -> int:
    """The same open file under a number that 3 and 4 do not overwrite."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: chromium, chromium-browser or google-chrome is not on the path")
    found = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """An evaluation's report with all it can hold, and a benchmark's."""
    folder = tmp_path_factory.mktemp("pages")
    evaluation, closeups = example()
    found = {"eval": eval_page([evaluation], closeups), "bench": bench_page(example_bench())}
    for name, text in found.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in found}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("name", ["eval", "bench"])
def test_page(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme)
    shot = np.asarray(browser.screenshot())
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event["method"] in complaints] == []
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert shot.std() > 10, "blank"
    paper = shot[2, 2].mean()
    assert paper > 200 if scheme == "light" else paper < 60
    sizes = browser.value("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert min(sizes) > 8, "the text of a plot is too small to read"


def test_the_browser_test_can_fail(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<div style="width:2000px">wide</div><script>console.error("no"); missing()</script>')
    browser.open(page, 380, "light")
    methods = {event["method"] for event in browser.events}
    assert {"Runtime.consoleAPICalled", "Runtime.exceptionThrown"} <= methods
    assert browser.value("document.documentElement.scrollWidth") > 380
