"""A page to judge by eye: the same pictures by every system, each under a slider over the original.

A folder, not one file: two dozen pictures by many systems are too much for one. Nothing is fetched from elsewhere; the
sliders are the page's only script. Pictures are WebP without loss.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..files import write_folder
from ..images import psnr, tensor_to_pil
from ..words import count
from .compare import Kept
from .page import page
from .results import SystemResult
from .tables import decibels

PICTURES = 24
"""How many pictures a gallery shows, at most."""

_STYLE = """
main { max-width: 84rem } p { max-width: 46rem }
.row { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); gap: 1rem }
.pair { position: relative; --x: 50% }
.pair img { image-rendering: auto } .pair img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--x)) }
.pair i { position: absolute; inset: 0 auto 0 var(--x); border-left: 2px solid #fff; mix-blend-mode: difference }
.pair input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize }
.pair:has(input:focus-visible) { outline: 3px solid var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem } nav a { color: inherit }
"""


def write_gallery(folder: Path, kept: Kept, systems: Sequence[SystemResult]) -> Path:
    """Write `index.html` and its pictures into a folder, atomically; returns the page's path.

    Args:
        folder: of the gallery alone.
        kept: the pictures and what became of them.
        systems: those to show, in order.
    """

    def files(partial: Path) -> None:
        sections = []
        for index, name in enumerate(kept.names):
            original = _save(kept.originals[index], partial, f"{index:02d}-original.webp")
            cards = []
            for number, system in enumerate(systems):
                pixels = kept.outputs[system.name][index]
                shown = _save(pixels, partial, f"{index:02d}-{number}.webp")
                quality = decibels(psnr(pixels[None], kept.originals[index][None]).item())
                cards.append(_card(original, shown, name, system.name, quality, pixels.shape[1:]))
            sections.append(f'<h2 id="p{index}">{html.escape(name)}</h2>\n<div class="row">{"".join(cards)}</div>')
        links = "".join(f'<a href="#p{n}">{html.escape(name)}</a>' for n, name in enumerate(kept.names))
        title = f"{count(len(kept.names), 'picture')} by {count(len(systems), 'system')}"
        lead = (
            "<p>Left of the line is the original, right of it what came back. Drag, or focus a picture and use the "
            "arrow keys. Decibels: PSNR of that picture; what looks right is for you to say.</p>"
        )
        text = page(f"monobath: {title}", [lead, f"<nav>{links}</nav>", *sections], style=_STYLE)
        (partial / "index.html").write_text(text, encoding="utf-8")

    write_folder(folder, files)
    return folder / "index.html"


def _card(original: str, shown: str, name: str, system: str, quality: str, size: Sequence[int]) -> str:
    place, alt = f'width="{size[1]}" height="{size[0]}" loading="lazy"', html.escape(f"{name}, {system}")
    move = "this.parentNode.style.setProperty('--x', this.value + '%')"
    return (
        f'<figure><div class="pair"><img src="{original}" {place} alt="{html.escape(name)}, original">'
        f'<img src="{shown}" {place} alt="{alt}"><i></i><input type="range" min="0" max="100" value="50" '
        f'aria-label="{alt}: how much of the original" oninput="{move}"></div>'
        f"<figcaption><b>{html.escape(system)}</b> {quality}</figcaption></figure>"
    )


def _save(pixels: Tensor, folder: Path, name: str) -> str:
    tensor_to_pil(pixels).save(folder / name, lossless=True)
    return name
