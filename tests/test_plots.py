"""Plots: the front is the front, labels keep apart, and the SVG takes the page's colours and font."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from monobath.evaluation import plots
from monobath.evaluation.plots import COLOURS, GROUPS, Axis, Point, group_of, pareto_front, plot

PAGES = Path(plots.__file__).with_name("pages")
X, Y = Axis(label="decode time, ms", log=True), Axis(label="PSNR (dB)")


def points(*pairs: tuple[float, float], **more) -> list[Point]:
    return [Point(name=f"p{i}", x=x, y=y, **more) for i, (x, y) in enumerate(pairs)]


def element(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> dict[str, tuple[float, float]]:
    """Every text and where it starts."""
    found = [t for t in element(svg).iter("text") if t.text]
    return {t.text or "": (float(t.attrib["x"]), float(t.attrib["y"])) for t in found}


def test_front_is_what_nothing_beats():
    cloud = points((1, 20), (2, 19), (3, 25), (3, 24), (5, 25), (8, 30), (9, 29))
    assert [p.name for p in pareto_front(cloud, lower_is_better=False)] == ["p0", "p2", "p5"]
    assert [p.name for p in pareto_front(cloud, lower_is_better=True)] == ["p0", "p1"]
    for lower in (False, True):
        front = pareto_front(cloud, lower_is_better=lower)
        for p in cloud:
            beaten = [q for q in cloud if q.x <= p.x and (q.y < p.y if lower else q.y > p.y)]
            assert (p in front) == (not beaten and not [q for q in cloud if q.y == p.y and q.x < p.x])


def test_svg_is_whole_has_no_address_and_no_colour_of_its_own():
    svg = plot(points((1, 20), (10, 25), interval=(19, 26), label="a $b$ <c>"), X, Y, front=True)
    assert element(svg).tag == "svg"
    assert "http" not in svg
    assert "<style" not in svg
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert {f"--{name}" for name in re.findall(r"var\(--(\w+)\)", svg)} <= {f"--{name}" for name in COLOURS}
    assert "a $b$ <c>" in texts(svg)
    assert "DejaVu" not in svg


def test_every_colour_is_defined_for_light_and_dark():
    for name, sheet in [*((group, "report.css") for group in GROUPS), ("ink", "page.css")]:
        assert (PAGES / sheet).read_text(encoding="utf-8").count(f"--{name}:") == 2


def test_marks_lie_in_the_order_of_their_values():
    near, far = (texts(plot([Point(name="a", x=1, y=20, label="A"), Point(name="b", x=10, y=30, label="B")], X, y))
                 for y in (Y, Axis(label="FD", lower_is_better=True)))  # fmt: skip
    assert near["A"][0] < near["B"][0]
    assert near["A"][1] > near["B"][1]  # in SVG, y grows downwards
    assert far["A"][1] < far["B"][1]  # turned round: the lower is up


def test_labels_of_near_points_do_not_overlap():
    crowd = [Point(name=n, label=n, x=100 + i / 10, y=25 + i / 100) for i, n in enumerate(("first", "second", "third"))]
    placed = texts(plot([*crowd, Point(name="far", label="far", x=1, y=20)], X, Y))
    places = [placed[p.label] for p in crowd]
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[i + 1 :]:
            assert abs(x - other_x) > 40 or abs(y - other_y) > 11


def test_labels_stay_inside():
    corners = [Point(name=w, label=w, x=x, y=y) for w, x, y in [("a long name", 1, 1), ("another name", 100, 9)]]
    svg = plot(corners, X, Y)
    for label in ("a long name", "another name"):
        x, y = texts(svg)[label]
        assert 0 < x < 370 - 60
        assert 10 < y < 280


def test_same_names_never_clash_between_plots():
    first, second = (plot(points((1, 20), (10, y)), X, Y) for y in (25, 26))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first == plot(points((1, 20), (10, 25)), X, Y)


@pytest.mark.parametrize("pairs", [[(1, 20)], [(1, 20), (1, 20)], [(0.001, -5), (1e5, 5)]])
def test_degenerate_data_is_drawn(pairs):
    assert element(plot(points(*pairs, label="p"), X, Y, front=True)).attrib["viewBox"]


def test_text_for_screen_readers_holds_the_figures():
    label = element(plot(points((12, 25.5)), X, Y)).attrib["aria-label"]
    assert label == "PSNR (dB) against decode time, ms. p0: 12, 25.5"


def test_given_ticks_are_the_ticks():
    svg = plot(points((1, 3), (4, 5), (16, 6), series="s"), Axis(label="steps", log=True, at_points=True), Y)
    assert {"1", "4", "16"} <= set(texts(svg))
    assert not {"2", "8", "10"} & set(texts(svg))


def test_groups():
    kinds = ["monobath", "TAEF2", "AutoencoderKL", "JPEG", "AVIF", "bicubic"]
    assert [group_of(kind) for kind in kinds] == ["ours", "network", "network", "codec", "codec", "resampling"]
