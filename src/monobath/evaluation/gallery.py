"""A page to judge by eye: the same pictures by every system, each under a slider over the original.

A folder, not one file: two dozen pictures by many systems are too much for one. Nothing is fetched from elsewhere; the
sliders are the page's only script. Pictures are WebP without loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..files import write_folder
from ..images import psnr, tensor_to_pil
from ..words import count
from .compare import Kept
from .page import render
from .results import Evaluation, SystemResult

PICTURES = 24
"""How many pictures a gallery shows, at most."""


def write_gallery(folder: Path, evaluation: Evaluation, kept: Kept, systems: Sequence[SystemResult]) -> Path:
    """Write `index.html` and its pictures into a folder, atomically; returns the page's path.

    Args:
        folder: of the gallery alone.
        kept: the pictures and what became of them.
        systems: those to show, in order.
    """

    def files(partial: Path) -> None:
        pictures = []
        for index, name in enumerate(kept.names):
            original, versions = kept.originals[index], []
            for number, system in enumerate(systems):
                pixels = kept.outputs[system.name][index]
                quality = psnr(pixels[None], original[None]).item()
                shown = _save(pixels, partial, f"{index:02d}-{number}.webp")
                versions.append((system.name, shown, quality, *pixels.shape[1:]))
            pictures.append((name, _save(original, partial, f"{index:02d}-original.webp"), versions))
        title = f"monobath: {count(len(pictures), 'picture')} by {count(len(systems), 'system')}"
        text = render(
            "gallery.html", title=title, pictures=pictures, command=evaluation.command, machine=evaluation.machine
        )
        (partial / "index.html").write_text(text, encoding="utf-8")

    write_folder(folder, files)
    return folder / "index.html"


def _save(pixels: Tensor, folder: Path, name: str) -> str:
    tensor_to_pil(pixels).save(folder / name, lossless=True)
    return name
