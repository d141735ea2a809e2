"""Plots as inline SVG: colours are CSS variables of the page, text stays text, legible at a phone's width."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# What matplotlib draws in these colours takes the page's, light or dark.
COLOURS = {
    "ink": "#0a0001", "soft": "#0a0002", "line": "#0a0003", "paper": "#0a0004",
    "ours": "#0a0011", "network": "#0a0012", "codec": "#0a0013", "resampling": "#0a0014",
}  # fmt: skip
GROUPS = {
    "ours": ("o", "●", "monobath"),
    "network": ("s", "■", "other networks"),
    "codec": ("^", "▲", "codecs"),
    "resampling": ("D", "◆", "resampling"),
}
"""Matplotlib's marker, the same as a character, and what it stands for."""

KINDS = {"monobath": "ours", "JPEG": "codec", "WebP": "codec", "AVIF": "codec", "bicubic": "resampling"}
"""Which of them a kind of systems belongs to; others are networks."""

Place = tuple[float, float]
"""x, y in the units of the axes."""


@dataclass(kw_only=True)
class Point:
    """One mark of a plot."""

    name: str
    x: float
    y: float
    group: str = "ours"
    """A key of `GROUPS`."""
    interval: tuple[float, float] | None = None
    """Ends of the vertical line through the mark."""
    label: str = ""
    """What stands beside the mark; "": nothing."""
    series: str = ""
    """Points of one series are joined in the order of x; "": not joined."""


@dataclass(kw_only=True)
class Axis:
    """How an axis is scaled and what it is called in the text for screen readers."""

    label: str
    log: bool = False
    lower_is_better: bool = False
    """For y: the axis is turned round, so that better is up in every plot."""
    at_points: bool = False
    """Ticks are at the points' own values, not wherever they look well."""


def group_of(kind: str) -> str:
    """Which of `GROUPS` a system of a kind belongs to."""
    return KINDS.get(kind, "network")


def pareto_front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """Points that no other one beats in y without a larger x, in the order of x."""
    sign = -1 if lower_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def plot(points: Sequence[Point], x: Axis, y: Axis, *, front: bool = False) -> str:
    """A scatter of points, some of them joined, as an `<svg>` element for an HTML page, 370 × 280 CSS pixels.

    Args:
        points: at least one; those that a logarithmic axis cannot show must have been left out.
        x, y: the axes.
        front: draw the Pareto front (small x, good y).
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{error}: plots need matplotlib; pip install 'monobath[eval]'") from None

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text, not outlines
        "svg.hashsalt": repr((points, x, y)),  # names that do not clash with another plot's
        "text.parse_math": False,  # a name may hold a $
        "font.size": 11,
    }
    with rc_context(settings):
        figure = Figure(figsize=(370 / 72, 280 / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures the labels
        axes = figure.add_subplot()
        for point in points:
            colour, edge = COLOURS[point.group], COLOURS["paper"]
            if point.interval:
                axes.vlines(point.x, *point.interval, color=colour, linewidth=1.2, alpha=0.7)
            marker = GROUPS[point.group][0]
            axes.plot(point.x, point.y, marker, color=colour, markersize=7, markeredgecolor=edge, zorder=3)
        _prepare(axes, points, x, y)
        lines = []
        if front:
            lines.append(_steps(axes, pareto_front(points, lower_is_better=y.lower_is_better)))
            style: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (4, 3)), "alpha": 0.55}
            axes.plot(*zip(*lines[0], strict=True), color=COLOURS["ink"], **style)
        for series in dict.fromkeys(p.series for p in points if p.series):
            joined = sorted((p for p in points if p.series == series), key=lambda p: p.x)
            lines.append([(p.x, p.y) for p in joined])
            colour = COLOURS[joined[0].group]
            axes.plot(*zip(*lines[-1], strict=True), color=colour, linewidth=1.4, alpha=0.6)
        _place_labels(figure, axes, points, lines)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    said = "; ".join(f"{p.name}: {p.x:.3g}, {p.y:.4g}" for p in points)
    return _inline(buffer.getvalue(), f"{y.label} against {x.label}. {said}")


def _prepare(axes: Axes, points: Sequence[Point], x: Axis, y: Axis) -> None:
    """Scales, limits with room for labels, ticks with plain numbers, a light grid."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(xscale="log" if x.log else "linear", yscale="log" if y.log else "linear")
    axes.margins(0.14, 0.12)
    axes.autoscale_view()
    axes.autoscale(False)  # lines that lead to the edges are still to come
    for axis, given, values in ((axes.xaxis, x, [p.x for p in points]), (axes.yaxis, y, [p.y for p in points])):
        if given.at_points:
            axis.set_major_locator(FixedLocator(sorted(set(values))))
        elif given.log:
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 3) if high > 300 * low else (1, 2, 5), numticks=99))
        else:
            axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:g}"))
    if y.lower_is_better:
        axes.invert_yaxis()
    axes.set_xlabel(x.label, color=COLOURS["soft"])
    axes.tick_params(colors=COLOURS["soft"], length=0)
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _steps(axes: Axes, front: Sequence[Point]) -> list[Place]:
    """Corners of steps through the front, on to the edges: what is below and right of them is beaten."""
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    corners = [(front[0].x, bottom)]
    for point, following in itertools.zip_longest(front, front[1:]):
        corners += [(point.x, point.y), (following.x if following else right, point.y)]
    return corners


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point], lines: Sequence[Sequence[Place]]) -> None:
    """Each label where it hides least: tried around its mark, ever farther away, joined to it where far.

    `lines` are what labels should not cross.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    centres = axes.transData.transform([(p.x, p.y) for p in points])
    taken = [Bbox([centre - 5, centre + 5]) for centre in centres]
    paths = [Path(axes.transData.transform(line)) for line in lines]

    def cost(place: tuple[float, Bbox], others: np.ndarray) -> float:
        """How bad a place is: what it hides, what leaves the frame, how far it is, and whose it might seem."""
        reach, box = place
        inside = Bbox.intersection(box, frame)
        outside = 1 - (inside.width * inside.height / (box.width * box.height) if inside else 0)
        hidden = box.count_overlaps(taken) + sum(path.intersects_bbox(box, filled=False) for path in paths)
        mistaken = np.clip(reach + 5 - _distance(box, others), 0, None).sum()
        return 2000 * outside + 100 * hidden + 8 * mistaken + 2 * reach

    for point, centre in sorted(zip(points, centres, strict=True), key=lambda pair: -pair[1][1]):
        if not point.label:
            continue
        text = figure.text(0, 0, point.label, fontsize=11, color=COLOURS["ink"], verticalalignment="bottom", zorder=4)
        others = centres[np.hypot(*(centres - centre).T) > 1]
        _, box = min(_around(centre, np.array(text.get_window_extent().size)), key=lambda place: cost(place, others))
        taken.append(box)
        text.set(x=box.x0 / figure.bbox.width, y=box.y0 / figure.bbox.height)
        if _distance(box, centre) > 12:
            ends = axes.transData.inverted().transform([centre, np.clip(centre, box.min, box.max)])
            axes.plot(*ends.T, color=COLOURS["soft"], linewidth=0.8, zorder=2)


def _around(centre: np.ndarray, size: np.ndarray) -> Iterator[tuple[float, Bbox]]:
    """Places of a label around a mark, the preferred ones first: (distance, box)."""
    from matplotlib.transforms import Bbox

    for reach in (9, 16, 26, 38, 52, 70):
        for way in ((1, 0), (0.8, 0.6), (0.8, -0.6), (-0.8, 0.6), (-0.8, -0.6), (-1, 0), (0, 1), (0, -1)):
            corner = centre + reach * np.array(way) - size * (1 - np.sign(way)) / 2
            yield reach, Bbox([corner, corner + size])


def _distance(box: Bbox, places: np.ndarray) -> np.ndarray:
    """From a box to places `(…, 2)`."""
    return np.linalg.norm(places - np.clip(places, box.min, box.max), axis=-1)


def _inline(svg: str, label: str) -> str:
    """Matplotlib's file as an element of an HTML page: the page's colours and font, no names that clash."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', body)
    assert view, body[:200]
    body = body[body.index(">") + 1 :].replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: m.group() if m.group(1) in used else "", body)
    body = re.sub(r"font-family: 'DejaVu Sans'[^;\"]*", "font-family: inherit", body)
    return f'<svg {view.group()} role="img" aria-label="{html.escape(label)}">{body}'
