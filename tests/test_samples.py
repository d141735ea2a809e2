"""The packaged sample photos."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monobath import resources

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_samples.py"


def test_samples_are_six_at_256_and_a_larger_non_square_one():
    sizes = []
    for path in resources.sample_paths():
        with Image.open(path) as image:
            assert image.mode == "RGB"
            sizes.append(image.size)
    assert sizes.count((256, 256)) >= 6
    assert any(w != h and w * h > 256 * 256 for w, h in sizes)


def test_each_sample_is_listed_with_a_free_licence():
    paths = resources.sample_paths()
    text = (paths[0].parent / "SOURCES.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    licences = {row[0].strip("`"): row[4] for row in rows if len(row) == 7 and row[0].endswith(".png`")}
    assert sorted(licences) == [path.name for path in paths]
    assert set(licences.values()) <= {"CC0", "Public domain"}


def test_samples_and_their_table_are_what_the_script_makes():
    pytest.importorskip("skimage")
    script = runpy.run_path(str(SCRIPT))
    made = {f"{sample.name}.png": script["make"](sample) for sample in script["SAMPLES"]}
    paths = resources.sample_paths()
    assert sorted(made) == [path.name for path in paths]
    for path in paths:
        with Image.open(path) as image:
            difference = np.abs(np.asarray(image, np.int16) - np.asarray(made[path.name], np.int16))
        assert difference.max() <= 4, path.name  # a JPEG source may be decoded a level or two apart elsewhere
    text = (paths[0].parent / "SOURCES.md").read_text(encoding="utf-8")
    assert text == script["sources_table"]()
