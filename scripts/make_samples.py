"""Make the sample photos that ship with monobath, and the table that says where they come from.

Reads the CC0 and public-domain pictures inside the scikit-image wheel (nothing is downloaded), crops and
resizes them, and writes `src/monobath/samples/*.png` and `SOURCES.md`. PNG, so that a reconstruction is
compared with exact pixels. The same Pillow writes the same bytes every time.

    python scripts/make_samples.py [FOLDER]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "src" / "monobath" / "samples"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One packaged photo: what it shows, whose it is, and how it is cut from its source."""

    name: str
    """File name of the sample, without `.png`."""
    source: str
    """File name under `skimage/data/`."""
    shows: str
    author: str
    licence: str
    origin: str
    """Where scikit-image took it from."""
    size: tuple[int, int] = (256, 256)
    """Width and height of the sample, in pixels."""
    crop: tuple[int, int] | None = None
    """Width and height of the centred crop, in source pixels; None: the largest with the shape of `size`."""


SAMPLES = (
    Sample(
        name="astronaut",
        source="astronaut.png",
        shows="portrait of the astronaut Eileen Collins: a face, a flag, lettering",
        author="NASA",
        licence="Public domain",
        origin="NASA Great Images, https://flic.kr/p/r9qvLn",
    ),
    Sample(
        name="camera",
        source="camera.png",
        shows="a photographer on a lawn, buildings behind (greyscale)",
        author="Lav Varshney",
        licence="CC0",
        origin="given to scikit-image by the photographer",
    ),
    Sample(
        name="cat",
        source="chelsea.png",
        shows="Chelsea the cat: fur, whiskers, eyes",
        author="Stéfan van der Walt",
        licence="CC0",
        origin="given to scikit-image by the photographer",
    ),
    Sample(
        name="coffee-wide",
        source="coffee.png",
        shows="an espresso cup on a wooden table, the whole frame",
        author="Rachel Michetti",
        licence="CC0",
        origin="given to scikit-image by the photographer, courtesy of Pikolo Espresso Bar",
        size=(480, 320),
    ),
    Sample(
        name="galaxies",
        source="hubble_deep_field.jpg",
        shows="Hubble eXtreme Deep Field: small bright shapes on black",
        author="NASA",
        licence="Public domain",
        origin="HubbleSite, news release 2012-37",
        crop=(512, 512),
    ),
    Sample(
        name="grass",
        source="grass.png",
        shows="grass and clover, texture all over (greyscale)",
        author="linolafett",
        licence="CC0",
        origin="https://www.deviantart.com/linolafett/art/Grass-01-434853879",
    ),
    Sample(
        name="retina",
        source="retina.jpg",
        shows="the back of a human eye: smooth colour, thin vessels",
        author="Mikael Häggström",
        licence="CC0",
        origin="https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    Sample(
        name="rocket",
        source="rocket.jpg",
        shows="a Falcon 9 with DSCOVR lifts off at dusk",
        author="SpaceX",
        licence="Public domain",
        origin="https://www.flickr.com/photos/spacexphotos/16511594820",
    ),
)


def crop_size(sample: Sample, width: int, height: int) -> tuple[float, float]:
    """Width and height of the crop from a `width` x `height` source, in source pixels."""
    if sample.crop is not None:
        return sample.crop
    scale = min(width / sample.size[0], height / sample.size[1])
    return sample.size[0] * scale, sample.size[1] * scale


def make(sample: Sample) -> Image.Image:
    """Cut `sample` from its source: a centred crop, resized with Lanczos in one step, as RGB."""
    with as_file(files("skimage") / "data" / sample.source) as path, Image.open(path) as image:
        source = image.convert("RGB")
    width, height = crop_size(sample, *source.size)
    assert width >= sample.size[0], f"{sample.name} would be enlarged"
    left, top = (source.width - width) / 2, (source.height - height) / 2
    box = (left, top, left + width, top + height)
    return source.resize(sample.size, Image.Resampling.LANCZOS, box=box)


def sources_table() -> str:
    """The text of `SOURCES.md`."""
    lines = [
        "# Sample photos",
        "",
        "Every picture here is CC0 or in the public domain, as the scikit-image documentation states it "
        "(`skimage/data/_fetchers.py`).",
        "All come from `skimage/data/` in the scikit-image wheel; `scripts/make_samples.py` makes them and "
        "this table: centred crop, Lanczos, RGB, PNG. Keep them out of training data.",
        "",
        "| file | size | shows | author | licence | source | cut |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for sample in SAMPLES:
        with as_file(files("skimage") / "data" / sample.source) as path, Image.open(path) as image:
            width, height = crop_size(sample, *image.size)
            cut = f"{width:.0f}×{height:.0f} of {image.width}×{image.height}"
        size = f"{sample.size[0]}×{sample.size[1]}"
        lines.append(
            f"| `{sample.name}.png` | {size} | {sample.shows} | {sample.author} | {sample.licence} "
            f"| scikit-image `{sample.source}`; {sample.origin} | {cut} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path = FOLDER) -> None:
    """Write every sample and `SOURCES.md` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in SAMPLES:
        make(sample).save(folder / f"{sample.name}.png", optimize=True)
    (folder / "SOURCES.md").write_text(sources_table(), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
