"""The page in a real browser, beside a Space's `app.py`: photo, slider, previews, errors, phone, keyboard, offline."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_running import requests, running, wait_for
from test_browser import Browser
from test_browser import browser as browser  # the fixture

from monobath.app.protocol import psnr
from monobath.images import pil_to_tensor
from monobath.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIELD = "#photo input[type=file]"
FIGURES = "document.querySelector('#figures').innerText"


class Address:
    """Where a page is; `Browser.open` asks a path for it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def as_uri(self) -> str:
        return self.url


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    served = {name: Tokenizer.from_pretrained(name) for name in ("default", "progressive")}
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("uploads"))
        patch.setenv("GRADIO_TEMP_DIR", folder)  # set again by the server, and taken back here
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        with running(page_folder=folder, served=served) as server:
            yield server.url + "/"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A small one: the tests are about the page."""
    path = tmp_path_factory.mktemp("photo") / "wide photo.png"
    rows, columns = np.mgrid[0:64, 0:96]
    Image.fromarray(np.stack([rows * 3, columns * 2, rows + columns], axis=2).astype(np.uint8)).save(path)
    return path


def open_page(browser: Browser, url: str, width: int, scheme: str) -> None:
    browser.open(Address(url), width, scheme)  # type: ignore[arg-type]
    wait_for(lambda: browser.value("document.querySelectorAll('#samples img').length") == 8)
    wait_for(lambda: browser.value(f"document.querySelector('{FIELD}') !== null"))


def upload(browser: Browser, path: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    field = browser.call("DOM.querySelector", nodeId=root, selector=FIELD)["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])


def choose(browser: Browser, label: str) -> None:
    labels = f"[...document.querySelectorAll('label')].filter(l => l.innerText.trim() == '{label}')"
    done = browser.value(f"{labels}.map(l => l.click()).length")
    assert done == 1


def press(browser: Browser, key: str, code: int, times: int = 1) -> None:
    for _ in range(times):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if (key, kind) == ("Enter", "keyDown") else {}
            browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)


def check_quiet(browser: Browser, url: str) -> None:
    """No error in the console, and no request to anywhere else."""
    for event in browser.events:
        parameters = event.get("params", {})
        assert event["method"] != "Runtime.exceptionThrown", event
        assert event["method"] != "Runtime.consoleAPICalled" or parameters["type"] not in ("error", "assert"), event
        assert event["method"] != "Log.entryAdded" or parameters["entry"]["level"] != "error", event
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [found for found in asked if not found.startswith((url, "data:", "blob:"))] == []


@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (380, "dark"), (380, "light"), (1100, "dark")])
def test_a_photo_is_developed(browser, url, photo, width, scheme):
    open_page(browser, url, width, scheme)
    upload(browser, photo)
    wait_for(lambda: " dB PSNR" in browser.value(FIGURES))
    text = browser.value(FIGURES)
    image = Image.open(photo)
    (output,) = Tokenizer.from_pretrained("default")(pil_to_tensor(image)[None])
    assert f"{psnr(pil_to_tensor(image), output):.2f} dB PSNR" in text
    assert "96 × 64 pixels, 1,536 latent numbers of 16 bits" in text
    assert "4.00 bits per pixel of 24" in text
    assert text.count(" ms") == 2
    wait_for(lambda: browser.value("document.querySelectorAll('#slider img').length") == 2)
    wait_for(lambda: browser.value("document.querySelectorAll('#latents img').length") == 1)
    browser.value("document.querySelector('#slider input').value = 20")
    browser.value("document.querySelector('#slider input').oninput() || 1")
    assert browser.value("document.querySelector('.compare').style.getPropertyValue('--at')") == "20%"
    assert browser.value("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shot = np.asarray(browser.screenshot())
    assert shot.std() > 10, "blank"
    assert (shot[2, 2].mean() > 200) == (scheme == "light")
    check_quiet(browser, url)


def test_previews_samples_steps_and_errors(browser, url, tmp_path):
    open_page(browser, url, 380, "light")
    browser.value(  # every text that the figures ever show
        "window.seen = []; new MutationObserver(() => window.seen.push(document.querySelector('#figures').innerText))"
        ".observe(document.querySelector('#figures'), {subtree: true, childList: true, characterData: true}) || 1"
    )
    choose(browser, "progressive")
    browser.value("document.querySelectorAll('#samples button')[3].click() || 1")
    wait_for(lambda: " dB PSNR" in browser.value(FIGURES))
    seen = browser.value("window.seen")
    assert any("Preview: 120 × 80" in text for text in seen), seen
    assert any("Preview: 240 × 160" in text for text in seen), seen
    before = browser.value(FIGURES)
    choose(browser, "2")
    wait_for(lambda: browser.value(FIGURES) != before and " dB PSNR" in browser.value(FIGURES))
    assert before.partition(" dB")[0] != browser.value(FIGURES).partition(" dB")[0]
    wrong = tmp_path / "no<b>picture.txt"
    wrong.write_text("words")
    upload(browser, wrong)
    wait_for(lambda: "is not a picture that can be read: give a JPEG, PNG" in browser.value(FIGURES))
    assert browser.value("document.querySelector('#figures [role=alert]') !== null")
    assert browser.value("document.documentElement.scrollWidth") <= 380
    check_quiet(browser, url)


def test_everything_is_within_reach_of_the_keyboard(browser, url):
    open_page(browser, url, 1100, "light")
    focus = (
        "document.activeElement.closest('#photo') ? 'photo' : document.activeElement.closest('#samples') ? 'samples' :"
    )
    focus += " document.activeElement.type == 'radio' ? document.activeElement.value : document.activeElement.type"
    reached = []
    for _ in range(30):
        press(browser, "Tab", 9)
        reached.append(browser.value(focus))
        if reached[-1] == "samples":
            press(browser, "Enter", 13)
            break
    assert "photo" in reached
    assert "samples" in reached
    wait_for(lambda: " dB PSNR" in browser.value(FIGURES))
    for _ in range(30):
        press(browser, "Tab", 9)
        reached.append(browser.value(focus))
        if reached[-1] == "range":
            break
    assert {"default", "as made", "range"} <= set(reached), reached
    press(browser, "ArrowRight", 39, times=3)
    assert browser.value("document.querySelector('.compare').style.getPropertyValue('--at')") == "53%"


def test_the_space_runs_as_it_stands():
    """`space/app.py`, as Hugging Face runs it; its requirements and its front matter."""
    space = ROOT / "space"
    front = re.match(r"---\n(.*?)\n---\n", (space / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert front
    assert {"sdk: gradio", "app_file: app.py"} <= set(front[1].splitlines())
    assert "monobath[serve]" in (space / "requirements.txt").read_text(encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": folder}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT / "src")}
        with subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.PIPE
        ) as process:
            try:
                assert b"running" in process.stdout.readline().lower()
                assert "monobath" in requests.get(f"http://127.0.0.1:{port}/", timeout=30).text
            finally:
                process.terminate()
                time.sleep(0.1)
                process.kill()
