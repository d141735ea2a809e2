"""Pictures side by side, enlarged where the systems differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ..files import write_folder
from ..images import psnr, tensor_to_pil
from ..words import count
from .compare import Kept
from .page import picture_uri, render, sheet
from .plots import group_of
from .results import Evaluation, SystemResult
from .tables import decibels

SIDE, ZOOM, BOX, GAP = 64, 3, 7, 8
"""Side of the enlarged square, how much larger it is shown, side of the box filter before the comparison, and the space
between pictures of the sheet, in pixels."""

Card = tuple[str, str, str, str]
"""Title, caption, the whole picture and the enlarged square, both as data URIs."""


@dataclass(kw_only=True)
class Closeup:
    """One picture, what the systems made of it, and where to look."""

    name: str
    original: Tensor
    """uint8 `(3, H, W)`."""
    outputs: dict[str, Tensor]
    """By system, uint8 `(3, H, W)`."""
    top: int
    left: int
    side: int
    """The enlarged square, in pixels."""
    score: float
    """How much the systems differ there."""

    def crop(self, pixels: Tensor) -> Tensor:
        """The enlarged square of a picture."""
        return pixels[:, self.top : self.top + self.side, self.left : self.left + self.side]


def place_of_difference(outputs: Tensor, side: int = SIDE, box: int = BOX) -> tuple[int, int, float]:
    """Where several versions of a picture differ most: (top, left) of the square, and how much.

    The measure is the variance across the versions after a box filter, so that structure counts and noise does not,
    averaged over the square and the channels, of values in [0, 1].

    Args:
        outputs: uint8 `(S, 3, H, W)`, at least two versions.
        side: of the square, at most H and W.
        box: side of the filter, odd.
    """
    smooth = F.avg_pool2d(outputs.float() / 255, box, 1, box // 2, count_include_pad=False)
    variance = smooth.var(0, correction=0).mean(0, keepdim=True)
    local = F.avg_pool2d(variance[None], side, 1)[0, 0]
    index = int(local.argmax())
    return index // local.shape[1], index % local.shape[1], float(local.max())


def shown_systems(evaluation: Evaluation, limit: int = 9) -> list[SystemResult]:
    """The systems for pictures and crowded plots: of a codec at several rates, the one nearest to the first's rate."""
    target = evaluation.systems[0].bits_per_pixel or 0

    def nearest(system: SystemResult) -> bool:
        rivals = [s for s in evaluation.systems if s.family == system.family]
        return system is min(rivals, key=lambda s: abs((s.bits_per_pixel or 0) - target))

    return [s for s in evaluation.systems if group_of(s.kind) != "codec" or nearest(s)][:limit]


def choose(kept: Kept, systems: Sequence[SystemResult], most: int = 4) -> list[Closeup]:
    """The pictures that the systems differ most on. Plain resampling is shown, but does not vote: it blurs everywhere.

    Args:
        kept: the pictures to choose from, and what became of them.
        systems: those to show, in order.
        most: how many pictures, at most.
    """
    voters = [s for s in systems if group_of(s.kind) != "resampling"]
    voters = voters if len(voters) > 1 else list(systems)
    found = []
    side = min(SIDE, *kept.originals.shape[2:])
    for index, name in enumerate(kept.names):
        versions = torch.stack([kept.outputs[s.name][index] for s in voters])
        if len(voters) == 1:  # a lone system is compared with the original
            versions = torch.cat([versions, kept.originals[index : index + 1]])
        top, left, score = place_of_difference(versions, side)
        shown = {s.name: kept.outputs[s.name][index] for s in systems}
        place = {"top": top, "left": left, "side": side}
        found.append(Closeup(name=name, original=kept.originals[index], outputs=shown, score=score, **place))
    return sorted(found, key=lambda c: -c.score)[:most]


def affordable(closeups: Sequence[Closeup], budget: int = 5_000_000) -> list[tuple[Closeup, list[Card]]]:
    """What a page shows of each: the original, then every system.

    Pictures stop before the page holds more than `budget` bytes of them; the first is always shown.
    """
    shown: list[tuple[Closeup, list[Card]]] = []
    spent = 0
    for closeup in closeups:
        cards = [
            (title, caption, picture_uri(pixels, "WEBP"), picture_uri(closeup.crop(pixels), "WEBP"))
            for title, pixels, caption in _versions(closeup)
        ]
        spent += sum(len(whole) + len(enlarged) for _, _, whole, enlarged in cards)
        if shown and spent > budget:
            break
        shown.append((closeup, cards))
    return shown


def _versions(closeup: Closeup) -> list[tuple[str, Tensor, str]]:
    """(title, pixels, caption) of the original and every system."""
    found = [("original", closeup.original, f"{closeup.original.shape[2]} × {closeup.original.shape[1]}")]
    for name, pixels in closeup.outputs.items():
        found.append((name, pixels, decibels(psnr(pixels[None], closeup.original[None]).item())))
    return found


def comparison_sheet(closeups: Sequence[Closeup]) -> Image.Image:
    """One picture of everything: a row a picture, a column a system, enlarged squares below."""
    lines = []
    for closeup in closeups:
        zoom, (_, height, width) = ZOOM * closeup.side, closeup.original.shape
        frame = (closeup.left, closeup.top, closeup.left + closeup.side - 1, closeup.top + closeup.side - 1)
        line: list[tuple[str, Image.Image]] = []
        for system, pixels, caption in _versions(closeup):
            whole = tensor_to_pil(pixels)
            enlarged = tensor_to_pil(closeup.crop(pixels)).resize((zoom, zoom), Image.Resampling.NEAREST)
            ImageDraw.Draw(whole).rectangle(frame, outline="white", width=1)
            both = Image.new("RGB", (max(width, zoom), height + GAP + zoom), "white")
            both.paste(whole, (0, 0))
            both.paste(enlarged, (0, height + GAP))
            line.append((f"{system}\n{caption}" if line else f"{closeup.name}, {system}\n{caption}", both))
        lines.append(line)
    return sheet(lines, label=36, gap=GAP)


# ---- the gallery --------------------------------------------------------------------------------------------------


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
