"""The report of `monobath eval` and `monobath bench`: one HTML page with tables, plots and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..words import count
from . import closeups, tables
from .bench import HEAD, Bench
from .closeups import Closeup, shown_systems
from .page import render, write_all
from .plots import Axis, Point, group_of, plot
from .results import Evaluation, MetricInfo, SystemResult

if TYPE_CHECKING:
    from .compare import Kept


class Drawing(NamedTuple):
    """A plot of a page."""

    title: str
    better: str
    """Which way is better."""
    svg: str


def eval_page(evaluations: Sequence[Evaluation], pictures: Sequence[Closeup]) -> str:
    """The whole page of a comparison: an evaluation a size; plots and pictures are of the last."""
    *_, evaluation = evaluations
    joined = tables.side_by_side(evaluations)
    systems = count(len(evaluation.systems), "system")
    title = f"{systems} on {len(evaluation.names)} pictures at {', '.join(f'{e.size}²' for e in evaluations)}"
    minutes = f"{joined.seconds / 60:.1f} minutes" if joined.seconds >= 60 else f"{joined.seconds:.0f} s"
    return render(
        "eval.html",
        title=f"monobath eval: {title}",
        evaluations=evaluations,
        evaluation=evaluation,
        joined=joined,
        main=_main_rows(evaluations, joined),
        plots=_plots(evaluation),
        groups=[group_of(s.kind) for s in evaluation.systems],
        pictures=closeups.affordable(pictures),
        magnification=closeups.ZOOM,
        command=evaluation.command,
        machine={**evaluation.machine, "time of quality pass": minutes},
    )


def _main_rows(evaluations: Sequence[Evaluation], joined: Evaluation) -> list[list[tuple[str, str, str]]]:
    """`tables.rows` of all sizes, with the class "best" on the best figures at each size."""
    winners = [["", "", *(tables.best(e.systems, m).name for m in tables.measured(e)), "", ""] for e in evaluations]
    names = [(system.name, best) for system in evaluations[0].systems for best in winners]
    return [
        [(*cell, "best" if winner == name else "") for cell, winner in zip(row, best, strict=True)]
        for (name, best), row in zip(names, tables.rows(joined), strict=True)
    ]


def _plots(evaluation: Evaluation) -> dict[str, list[Drawing]]:
    """By what quality is drawn against: a plot for each metric, as far as there is something to draw."""
    # SSIM says what PSNR says; the others are faults that nobody trades against time or bits.
    drawn = [m for m in tables.measured(evaluation) if m.key not in ("ssim", "mean_error", "grid4", "grid8")]
    axes = {
        "speed": (Axis(label="decode time, ms a picture", log=True), _by_speed),
        "steps": (Axis(label="steps", log=True, at_points=True), _by_steps),
        "bits": (Axis(label="bits a pixel", log=True), _by_rate),
    }
    return {
        name: [
            _drawing(metric, points, x, front=name == "speed")
            for metric in drawn
            if (points := choose(evaluation, metric))
        ]
        for name, (x, choose) in axes.items()
    }


def _drawing(metric: MetricInfo, points: Sequence[Point], x: Axis, *, front: bool) -> Drawing:
    lower = metric.better == "lower"
    better = f"{metric.better} is better" + (", axis turned round" if lower else "")
    return Drawing(metric.label, better, plot(points, x, Axis(label=metric.label, lower_is_better=lower), front=front))


def _mark(system: SystemResult, metric: MetricInfo, x: float, label: str, series: str = "") -> Point:
    figure = system.figures[metric.key]
    interval = (figure.low, figure.high) if math.isfinite(figure.low) and math.isfinite(figure.high) else None
    group = group_of(system.kind)
    return Point(name=system.name, x=x, y=figure.value, group=group, interval=interval, label=label, series=series)


def _finite(systems: Sequence[SystemResult], metric: MetricInfo) -> list[SystemResult]:
    """Those with a figure to draw; random weights have figures that mean nothing."""
    return [
        s
        for s in systems
        if s.weights != "random" and metric.key in s.figures and math.isfinite(s.figures[metric.key].value)
    ]


def _short(system: SystemResult) -> str:
    """A name for a crowded plot."""
    return system.kind if group_of(system.kind) == "codec" else system.name


def _by_speed(evaluation: Evaluation, metric: MetricInfo) -> list[Point]:
    points = [
        _mark(s, metric, ms, _short(s), s.family if s.steps is not None else "")
        for s in _finite(shown_systems(evaluation, limit=16), metric)
        if (ms := tables.picture_ms(s, "decode"))
    ]
    return points if len(points) > 1 else []


def _by_steps(evaluation: Evaluation, metric: MetricInfo) -> list[Point]:
    systems = sorted((s for s in _finite(evaluation.systems, metric) if s.steps), key=lambda s: s.steps or 0)
    most = {s.family: s for s in systems}
    several = {s.family for s in systems if s.steps != most[s.family].steps}
    return [
        _mark(s, metric, s.steps or 0, s.family if s is most[s.family] else "", s.family)
        for s in systems
        if s.family in several
    ]


def _by_rate(evaluation: Evaluation, metric: MetricInfo) -> list[Point]:
    first = {s.family: s for s in reversed(evaluation.systems) if s.steps is not None}  # more steps, the same bits
    systems = [s for s in _finite(evaluation.systems, metric) if s.bits_per_pixel and first.get(s.family, s) is s]
    last = {s.family: s for s in sorted(systems, key=lambda s: s.bits_per_pixel or 0) if group_of(s.kind) == "codec"}
    points = []
    for system in systems:
        codec = group_of(system.kind) == "codec"
        label = _short(system) if not codec or last[system.family] is system else ""
        points.append(_mark(system, metric, system.bits_per_pixel or 0, label, system.family if codec else ""))
    return points if len(points) > 1 else []


def write_evaluation(folder: Path, evaluations: Sequence[Evaluation], kept: Kept, *, by_size: bool) -> list[Path]:
    """Write results.json, comparison.png and report.html; returns their paths.

    Args:
        evaluations: one a size.
        kept: pictures of the last.
        by_size: results.json holds all sizes, by size; else those of the only one.
    """
    evaluation = evaluations[-1]
    chosen = closeups.choose(kept, shown_systems(evaluation))
    results = {"sizes": {str(e.size): e.as_dict() for e in evaluations}} if by_size else evaluation.as_dict()
    page, sheet = eval_page(evaluations, chosen), closeups.comparison_sheet(chosen)
    return write_all(folder, {"results.json": results, "comparison.png": sheet, "report.html": page})


def write_bench(folder: Path, bench: Bench) -> list[Path]:
    """Write results.json, bench.md and report.html; returns their paths."""
    contents = {"results.json": bench.as_dict(), "bench.md": bench.markdown(), "report.html": bench_page(bench)}
    return write_all(folder, contents)


def bench_page(bench: Bench) -> str:
    """The whole page of a benchmark: a table and two plots a size."""
    drawings: dict[int, list[Drawing]] = {size: [] for size in bench.rows()}
    for size, shown in drawings.items():
        for title, value in (("speed ÷ AutoencoderKL", "speed_to_kl"), ("speed ÷ AutoencoderTiny", "speed_to_tiny")):
            points = [
                Point(name=row.name, label=row.name, x=row.gflop, y=getattr(row, value), group=group)
                for row in bench.results
                if row.size == size and row.gflop
                for group in ["network" if row.name.startswith("Autoencoder") else "ours"]
            ]
            if points:
                svg = plot(points, Axis(label="GFLOP a call", log=True), Axis(label=title, log=True))
                shown.append(Drawing(title, "higher is faster", svg))
    return render(
        "bench.html", title="monobath bench: decoding speed", head=HEAD, bench=bench, plots=drawings,
        command=bench.command, machine=bench.machine,
    )  # fmt: skip
