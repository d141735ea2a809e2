"""The packaged sample photos."""

from __future__ import annotations

from PIL import Image

from monobath import resources


def test_samples_are_six_at_256_and_a_larger_non_square_one_each_listed_with_its_source():
    paths = resources.sample_paths()
    sources = (paths[0].parent / "SOURCES.md").read_text(encoding="utf-8")
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            assert image.mode == "RGB"
            sizes.append(image.size)
        assert f"`{path.name}`" in sources
    assert sizes.count((256, 256)) >= 6
    assert any(w != h and w * h > 256 * 256 for w, h in sizes)
