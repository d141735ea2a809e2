"""The gallery of `monobath eval --gallery`: every kept picture by every system, under a slider."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import tiny_tokenizer
from PIL import Image
from test_browser import browser  # noqa: F401

from monobath import resources
from monobath.cli import main


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    root = tmp_path_factory.mktemp("gallery")
    tiny_tokenizer(noise="zero").save_pretrained(root / "<m>")
    (root / "photos").mkdir()
    for number, path in enumerate(resources.sample_paths()[:3]):
        with Image.open(path) as photo:
            photo.convert("RGB").resize((40, 48)).save(root / "photos" / f"{number}&.png")
    command = ["eval", "--data", str(root / "photos"), "--model", str(root / "<m>"), "--size", "32", "--repeats", "0"]
    assert main([*command, "--metrics", "psnr", "--gallery", "--out", str(root / "out")]) == 0
    return root / "out" / "gallery"


def test_every_picture_by_every_system(gallery):
    text = (gallery / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'<img src="([^"]+)"', text)
    systems = len(re.findall("<figure>", text)) // 3
    assert systems >= 2
    assert len(sources) == 2 * 3 * systems
    assert {path.name for path in gallery.glob("*.webp")} == set(sources)
    assert "<m>" not in text
    assert "&lt;m&gt;" in text
    originals = [np.asarray(Image.open(gallery / name)) for name in sorted(set(sources)) if "original" in name]
    assert [picture.shape for picture in originals] == [(32, 32, 3)] * 3
    shown = np.asarray(Image.open(gallery / "00-0.webp")).astype(float)
    quality = 10 * np.log10(255**2 / ((shown - originals[0]) ** 2).mean())
    assert f"{quality:.2f} dB" in text


@pytest.mark.parametrize("width", [380, 1200])
def test_the_slider_uncovers_the_original(gallery, browser, width):  # noqa: F811
    browser.open(gallery / "index.html", width, "light")
    assert browser.value("document.documentElement.scrollWidth") <= width
    clip = "getComputedStyle(document.querySelector('.pair img + img')).clipPath"
    assert browser.value(clip) == "inset(0px 0px 0px 50%)"
    browser.value("s = document.querySelector('.pair input'); s.value = 80; s.dispatchEvent(new Event('input'))")
    assert browser.value(clip) == "inset(0px 0px 0px 80%)"
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in requests)
