"""Plots as inline SVG: colours are CSS variables of the page, text stays text, legible at a phone's width."""

from __future__ import annotations

import functools
import html
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""
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
    lower = kind.lower()
    if lower == "monobath":
        return "ours"
    if lower in ("jpeg", "webp", "avif"):
        return "codec"
    return "resampling" if "bicubic" in lower else "network"


def pareto_front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """Points that no other one beats in y without a larger x, in the order of x."""
    sign = -1 if lower_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def plot(points: Sequence[Point], x: Axis, y: Axis, *, front: bool = False, size: tuple[int, int] = (370, 280)) -> str:
    """A scatter of points, some of them joined, as an `<svg>` element for an HTML page.

    Args:
        points: at least one; those that a logarithmic axis cannot show must have been left out.
        x, y: the axes.
        front: draw the Pareto front (small x, good y).
        size: width and height in CSS pixels at which the text has its own size.
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
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures the labels
        axes = figure.add_subplot()
        _prepare(axes, points, x, y)
        steps = _draw_front(axes, pareto_front(points, lower_is_better=y.lower_is_better)) if front else []
        _draw_series(axes, points)
        for point in points:
            colour = COLOURS[point.group]
            if point.interval:
                axes.vlines(point.x, *point.interval, color=colour, linewidth=1.2, alpha=0.7)
            marker = GROUPS[point.group][0]
            axes.plot(
                point.x, point.y, marker, color=colour, markersize=7, markeredgecolor=COLOURS["paper"], zorder=3
            )  # fmt: skip
        _place_labels(figure, axes, points, steps)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    said = "; ".join(f"{p.name}: {p.x:.3g}, {p.y:.4g}" for p in points)
    return _inline(buffer.getvalue(), f"{y.label} against {x.label}. {said}")


def _prepare(axes: Axes, points: Sequence[Point], x: Axis, y: Axis) -> None:
    """Scales, limits with room for labels, ticks with plain numbers, a light grid."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ends = [end for p in points for end in (p.interval or ())]
    for name, given, values, room in (
        ("x", x, [p.x for p in points], 0.14),
        ("y", y, [*(p.y for p in points), *ends], 0.12),
    ):
        axis = getattr(axes, f"{name}axis")
        shown = [math.log10(v) for v in values if v > 0] if given.log else values
        low, high = min(shown), max(shown)
        margin = room * (high - low) or (0.3 if given.log else 0.05 * abs(high) or 1)
        low, high = low - margin, high + margin
        limits = (10**low, 10**high) if given.log else (low, high)
        axes.set(**{f"{name}scale": "log" if given.log else "linear", f"{name}lim": limits})
        if given.at_points:
            axis.set_major_locator(FixedLocator(sorted(set(values))))
        elif given.log:
            wide = high - low > 2.5
            axis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5), numticks=99))
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


def _draw_front(axes: Axes, front: Sequence[Point]) -> list[Place]:
    """Steps through the front, on to the edges: what is below and right of them is beaten. Returns their corners."""
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    corners = [(front[0].x, bottom)]
    for point, following in itertools.zip_longest(front, front[1:]):
        corners += [(point.x, point.y), (following.x if following else right, point.y)]
    style: dict[str, Any] = {"color": COLOURS["ink"], "linewidth": 1.2, "linestyle": (0, (4, 3)), "alpha": 0.55}
    axes.plot([x for x, _ in corners], [y for _, y in corners], **style)
    return corners


def _draw_series(axes: Axes, points: Sequence[Point]) -> None:
    for joined in _series(points):
        colour = COLOURS[joined[0].group]
        axes.plot([p.x for p in joined], [p.y for p in joined], color=colour, linewidth=1.4, alpha=0.6)


def _series(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The points of each series, in the order of x."""
    for series in dict.fromkeys(p.series for p in points if p.series):
        yield sorted((p for p in points if p.series == series), key=lambda p: p.x)


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point], steps: Sequence[tuple[float, float]]) -> None:
    """Each label where it hides least: tried around its mark, ever farther away, joined to it where far.

    `steps` are the corners of a line that labels should not cross.
    """
    figure.draw_without_rendering()  # settles the layout
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    pixels = axes.transData.transform([(p.x, p.y) for p in points])
    centres: list[Place] = [(float(x), float(y)) for x, y in pixels]
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    lines = [box for a, b in _segments(points, steps) for box in _along(*axes.transData.transform([a, b]))]
    taken: list[Box] = []
    for point, (x, y) in sorted(zip(points, centres, strict=True), key=lambda pair: -pair[1][1]):
        if not point.label:
            continue
        text = figure.text(0, 0, point.label, fontsize=11, color=COLOURS["ink"], verticalalignment="bottom", zorder=4)
        extent = text.get_window_extent()

        places = _around(x, y, extent.width, extent.height)
        others = [centre for centre in centres if math.dist(centre, (x, y)) > 1]
        cost = functools.partial(_cost, frame=frame.extents, taken=[*taken, *marks, *lines], others=others)
        _, box = min(places, key=cost)
        taken.append(box)
        text.set_position((box[0] / figure.bbox.width, box[1] / figure.bbox.height))
        near = _nearest(box, (x, y))
        if math.dist(near, (x, y)) > 12:
            ends = axes.transData.inverted().transform([(x, y), near])
            axes.plot(ends[:, 0], ends[:, 1], color=COLOURS["soft"], linewidth=0.8, zorder=2)


def _segments(points: Sequence[Point], steps: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    """Ends of every straight piece of the front and of the joined series."""
    yield from itertools.pairwise(steps)
    for joined in _series(points):
        yield from itertools.pairwise((p.x, p.y) for p in joined)


def _along(a: Any, b: Any) -> Iterator[Box]:
    """Small boxes along a line between two pixels."""
    count = max(1, int(math.dist(a, b) / 4))
    for part in range(count + 1):
        x, y = a + (b - a) * part / count
        yield x - 2, y - 2, x + 2, y + 2


def _around(x: float, y: float, width: float, height: float) -> Iterator[tuple[float, Box]]:
    """Places of a label around a mark, the preferred ones first: (distance, box)."""
    for reach in (9, 16, 26, 38, 52, 70):
        for right, up in ((1, 0), (0.8, 0.6), (0.8, -0.6), (-0.8, 0.6), (-0.8, -0.6), (-1, 0), (0, 1), (0, -1)):
            left = x + reach * right - width * (0.5 if right == 0 else right < 0)
            bottom = y + reach * up - height * (0.5 if up == 0 else up < 0)
            yield reach, (left, bottom, left + width, bottom + height)


def _cost(place: tuple[float, Box], *, frame: Box, taken: Sequence[Box], others: Sequence[Place]) -> float:
    """How bad a place of a label is: what it hides, what leaves the frame, how far it is, and whose it might seem."""
    reach, box = place
    outside = _overlap(box, box) - _overlap(box, frame)
    hidden = sum(_overlap(box, other) for other in taken)
    mistaken = sum(max(0.0, reach + 5 - math.dist(_nearest(box, other), other)) for other in others)
    return 10 * outside + 5 * hidden + 8 * mistaken + 2 * reach


def _nearest(box: Box, point: Place) -> Place:
    """The point of a box that is nearest to another one."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _overlap(a: Box, b: Box) -> float:
    """Area in common."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


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
