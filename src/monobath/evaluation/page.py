"""Self-contained HTML pages: no script, no external request; light and dark; readable on a phone.

What they show is data; how they show it is in the templates of the folder `pages`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import write_file, write_json, write_text
from ..images import tensor_to_pil
from ..words import count
from . import tables
from .plots import GROUPS


def picture_uri(pixels: Tensor, kind: Literal["PNG", "WEBP"] = "PNG") -> str:
    """A uint8 image `(3, H, W)` as a data URI, without loss. WebP is a quarter smaller, and slower to write."""
    buffer = io.BytesIO()
    tensor_to_pil(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def write_all(folder: Path, contents: Mapping[str, Any]) -> list[Path]:
    """Write files by name: pictures as such, text as text, and plain values as JSON; returns their paths."""
    for name, content in contents.items():
        if isinstance(content, Image.Image):
            write_file(folder / name, content.save)
        else:
            (write_text if isinstance(content, str) else write_json)(folder / name, content)
    return [folder / name for name in contents]


def sheet(lines: Sequence[Sequence[tuple[str, Image.Image]]], label: int, gap: int = 8) -> Image.Image:
    """One white picture of lines of pictures, each below its label, which has `label` pixels; pixels one to one."""
    width = max(sum(gap + picture.width for _, picture in line) for line in lines)
    heights = [gap + label + max(picture.height for _, picture in line) for line in lines]
    made, font = Image.new("RGB", (width + gap, sum(heights) + gap), "white"), ImageFont.load_default(14)
    draw, y = ImageDraw.Draw(made), gap
    for line, height in zip(lines, heights, strict=True):
        x = gap
        for text, picture in line:
            draw.text((x, y), text.replace("×", "x").replace("÷", "/"), fill="black", font=font)  # which the font lacks
            made.paste(picture, (x, y + label))
            x += picture.width + gap
        y += height
    return made


_PAGES = Environment(loader=PackageLoader(__package__, "pages"), autoescape=True, trim_blocks=True)
_PAGES.globals |= {"count": count, "tables": tables, "GROUPS": GROUPS, "NONE": tables.NONE}
_PAGES.filters |= {
    "uri": picture_uri, "number": tables.number, "parameters": tables.parameters, "decibels": tables.decibels,
}  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A whole page from a template of the folder `pages` and what the template names; all text is escaped."""
    return _PAGES.get_template(template).render(values)
