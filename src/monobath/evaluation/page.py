"""Self-contained HTML pages: no script, no external request; light and dark; readable on a phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..images import tensor_to_pil

Place = tuple[int, int]
"""x, y in pixels."""
Cell = str | tuple[str, str] | tuple[str, str, str]
"""Text, what stands small below it, and a CSS class."""


def page(title: str, sections: Sequence[str], *, style: str = "") -> str:
    """A whole page; `sections` are HTML, `title` is text, `style` is CSS beyond what every page has."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[Cell]], foot: Sequence[str] = ()) -> str:
    """Escaped HTML table; the first column is left-aligned text, the others are figures."""

    def line(cells: Sequence[Cell], tag: str) -> str:
        return f"<tr>{''.join(_cell(cell, tag) for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    end = f"<tfoot>{line(foot, 'td')}</tfoot>" if foot else ""
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody>{end}</table></div>'


def _cell(cell: Cell, tag: str) -> str:
    text, small, style = (cell, "", "") if isinstance(cell, str) else (*cell, "")[:3]
    below = f"<small>{html.escape(small)}</small>" if small else ""
    return f"<{tag}{f' class={style}' if style else ''}>{html.escape(text)}{below}</{tag}>"


def html_list(lines: Sequence[str], style: str) -> str:
    """Escaped list of a CSS class; "" without lines."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<ul class="{style}">{items}</ul>' if items else ""


def made_by(command: str, facts: dict[str, Any]) -> list[str]:
    """The last section of a report: the command, and the machine it ran on."""
    named = {name.replace("_", " "): value for name, value in facts.items()}
    return ["<h2>How this was made</h2>", f"<pre>{html.escape(command)}</pre>", html_facts(named)]


def html_facts(facts: dict[str, Any]) -> str:
    """Escaped list of names and values."""
    items = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{items}</dl>"


def picture_uri(pixels: Tensor, kind: Literal["PNG", "WEBP"] = "PNG") -> str:
    """A uint8 image `(3, H, W)` as a data URI, without loss. WebP is a quarter smaller, and slower to write."""
    buffer = io.BytesIO()
    tensor_to_pil(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sheet(
    size: tuple[int, int], labels: Iterable[tuple[Place, str]], pictures: Iterable[tuple[Place, Image.Image]]
) -> Image.Image:
    """One white picture of `size` = (width, height) with labels and pictures, each at (x, y) of its corner."""
    made, font = Image.new("RGB", size, "white"), ImageFont.load_default(14)
    draw = ImageDraw.Draw(made)
    for place, text in labels:
        draw.text(place, text.replace("×", "x").replace("÷", "/"), fill="black", font=font)  # which the font lacks
    for place, picture in pictures:
        made.paste(picture, place)
    return made


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1b1a; --soft: #6b6761; --line: #dcd8d2; --paper: #fdfcfa; --note: #f6efdc }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e4de; --soft: #a09a92; --line: #3a3733; --paper: #191817; --note: #2f2a1c }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 56rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; margin: 0 0 1rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } small, figcaption, dt { color: var(--soft); font-weight: normal }
.note { background: var(--note); padding: .7rem 1rem; border-radius: .4rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tfoot td { font-weight: 600; border-bottom: 0 }
.row { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem }
@media (max-width: 30rem) { .row { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
figure { margin: 0 } img { display: block; width: 100%; height: auto; border-radius: .2rem }
figcaption { font-size: .8rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
pre { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; overflow-x: auto; margin: 0 }
"""
