"""`monobath demo`: the figures are true, and the report needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from PIL import Image

from monobath import resources
from monobath.cli import main
from monobath.evaluation.demo import PREVIEW, Reconstruction, run_demo
from monobath.evaluation.tables import decibels
from monobath.images import open_image, psnr


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    sizes = {"square": (32, 32), "wide <&> odd": (45, 21)}
    for name, (w, h) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny-preview", "tiny"):
        extra = {"recipe": {"name": "tiny-recipe"}, "step": 7}
        tiny_tokenizer(noise="zero").save_pretrained(folder / name, extra=extra)
    return folder


@pytest.fixture(scope="module")
def shown(models, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(out, str(models / "tiny-preview"), pictures=photos), out


def test_what_is_written(shown):
    demo, out = shown
    assert sorted(p.name for p in out.iterdir()) == ["comparison.png", "report.html", "results.json"]
    assert demo.files == [out / "comparison.png", out / "results.json", out / "report.html"]
    assert demo.preview


def test_figures_are_those_of_the_model(shown, photos):
    _, out = shown
    results = json.loads((out / "results.json").read_text())
    tokenizer, values = tiny_tokenizer(noise="zero"), []
    for path, found in zip(photos, results["pictures"], strict=True):
        picture = open_image(path)
        posterior = tokenizer.encode(picture)
        (output,) = tokenizer.decode(posterior.mode(), size=posterior.size, output="pil")
        error = np.square(np.asarray(picture, dtype=float) - np.asarray(output, dtype=float)).mean()
        values.append(10 * math.log10(255**2 / error))
        assert (found["name"], found["width"], found["height"]) == (path.stem, *picture.size)
        assert found["psnr"] == pytest.approx(values[-1], abs=1e-3)
        assert found["encode_ms"] > 0
        assert found["decode_ms"] > 0
    assert results["mean_psnr"] == pytest.approx(np.mean(values), abs=1e-3)
    kept = {p["name"]: p["bits_kept_percent"] for p in results["pictures"]}
    assert kept["square"] == pytest.approx(100 * 4 * 16 / (64 * 24), abs=1e-3)
    assert kept["wide <&> odd"] == pytest.approx(100 * 4 * 6 * 3 * 16 / (45 * 21 * 24), abs=1e-3)
    assert results["command"].startswith("monobath demo --model ")
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["torch_threads"] == torch.get_num_threads()
    assert results["model"]["training"]["recipe"] == "tiny-recipe"


def test_comparison_shows_the_pixels_one_to_one(shown, photos):
    demo, out = shown
    page = np.asarray(Image.open(out / "comparison.png").convert("RGB"))
    for row in demo.rows:
        for pixels in (row.original, row.output, row.difference):
            assert contains(page, pixels.permute(1, 2, 0).numpy()), row.name


def contains(page: np.ndarray, part: np.ndarray) -> bool:
    h, w = part.shape[:2]
    corners = np.argwhere((page[: len(page) - h + 1, : page.shape[1] - w + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + h, x : x + w], part) for y, x in corners)


def test_report_is_self_contained_and_escaped(shown):
    demo, out = shown
    text = (out / "report.html").read_text(encoding="utf-8")
    tags: list[tuple[str, dict]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Reader().feed(text)
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(images) == 3 * len(demo.rows)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert all(attrs["alt"] for tag, attrs in tags if tag == "img")
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    assert not re.search(r"https?://|@import|url\(", text)
    assert "wide &lt;&amp;&gt; odd" in text
    assert "<&>" not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    for said in (PREVIEW, "monobath demo --model ", torch.__version__, "f8c4", "tiny-recipe", "Limits"):
        assert said in text, said


def test_the_label_follows_the_name(models, photos, tmp_path):
    demo = run_demo(tmp_path / "out", str(models / "tiny"), pictures=photos[:1])
    assert not demo.preview
    assert PREVIEW not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_command_prints_table_files_and_time(models, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resources, "sample_paths", lambda: photos)
    out = tmp_path / "out"
    assert main(["demo", "--model", str(models / "tiny-preview"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for said in ("square", "45×21", "mean", " dB", "bits kept", PREVIEW, " s in all", *map(str, out.iterdir())):
        assert said in text, said


def test_samples_are_there_one_of_them_not_square():
    sizes = [Image.open(path).size for path in resources.sample_paths()]
    assert len(sizes) >= 6
    assert sizes.count((256, 256)) >= 5
    assert any(w != h for w, h in sizes)


def test_psnr():
    a = torch.zeros(1, 3, 2, 5, dtype=torch.uint8)
    assert psnr(a, a + 255) == 0
    assert psnr(a, a + 1).item() == pytest.approx(10 * math.log10(255**2))
    assert psnr(a, a) == math.inf
    assert decibels(math.inf) == "identical"


def test_difference_is_five_times_and_clipped():
    original = torch.tensor([0, 10, 200], dtype=torch.uint8).reshape(3, 1, 1)
    output = torch.tensor([3, 0, 100], dtype=torch.uint8).reshape(3, 1, 1)
    row = Reconstruction(
        name="a", original=original, output=output, psnr=1, encode_ms=1, decode_ms=1, bits_kept=1
    )  # fmt: skip
    assert row.difference.flatten().tolist() == [15, 50, 255]
