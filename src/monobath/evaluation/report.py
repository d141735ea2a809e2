"""The report of `monobath eval` and `monobath bench`: one HTML page with tables, plots and pictures."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_file, write_json, write_text
from ..words import count
from . import closeups, plots, tables
from .closeups import Closeup, shown_systems
from .page import Cell, html_list, html_table, made_by, page
from .plots import Axis, Point, group_of, key, plot
from .results import Evaluation, MetricInfo, SystemResult

if TYPE_CHECKING:
    from .bench import Bench
    from .compare import Kept

LIMITS = (
    "The figures hold for these pictures at this size: other pictures, larger ones, text or "
    "faces may rank the systems differently. The intervals say how much the choice of pictures matters; they say "
    "nothing about another training run of the same model.",
    "No metric is what people see. PSNR and SSIM reward blur; distances between features of a network reward texture "
    "that looks right and need not be. Look at the pictures. A reconstruction is a guess: do not use it where details "
    "are evidence.",
    "Systems that keep more bits a pixel have an easier task; compare along the plot of quality against bits. Times "
    "depend on the machine named below and on what else it was doing; all systems were timed in turns in one process.",
)

_STYLE = """
main { max-width: 84rem } p, .lead { max-width: 46rem }
th { white-space: normal; vertical-align: bottom; min-width: 5.2rem; font-size: .85rem; line-height: 1.25 }
td small { display: block; line-height: 1.2 } td { line-height: 1.3 }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); padding-right: .8rem;
  white-space: normal; min-width: 7.5rem }
.best { font-weight: 650 } .better { color: var(--codec) } .worse { color: var(--network) }
.notes { font-size: .85rem; color: var(--soft); padding-left: 1.1rem; max-width: 60rem } .notes li { margin: .25rem 0 }
pre { margin: 0 0 .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
.lead li { margin: .3rem 0 } .lead { padding-left: 1.1rem }
"""


def eval_page(evaluations: Sequence[Evaluation], pictures: Sequence[Closeup]) -> str:
    """The whole page of a comparison: an evaluation a size; plots and pictures are of the last."""
    *_, evaluation = evaluations
    joined = tables.side_by_side(evaluations)
    sides = [f"{e.size}²" for e in evaluations]
    several = len(sides) > 1
    shown = ["<h2>Result</h2>"]
    for e, side in zip(evaluations, sides, strict=True):
        shown += [f"<h3>At {side}</h3>" if several else "", html_list(tables.verdict(e), "lead")]
    skipped = [f"{count(evaluation.skipped, 'unusable picture')} left out."] if evaluation.skipped else []
    shown += [_main_table(evaluations), html_list([*tables.absent(evaluation), *skipped], "notes")]
    for e, side in zip(evaluations, sides, strict=True):
        shown += _differences(e, f" at {side}" if several else "")
    shown += [*_channels(joined), *_plots(evaluation)]
    if pictures:
        shown += [
            "<h2>Pictures</h2>",
            f"<p>The {len(pictures)} pictures on which the systems differ most, of those kept. Below each, the marked "
            f"square enlarged: where the systems differ most in structure. Decibels: PSNR of that picture.</p>",
            closeups.html_closeups(pictures),
        ]
    minutes = f"{joined.seconds / 60:.1f} minutes" if joined.seconds >= 60 else f"{joined.seconds:.0f} s"
    squares = " and ".join(f"{e.size} × {e.size}" for e in evaluations)
    shown += [
        "<h2>What the figures are</h2>",
        f"<p>Pictures: {html.escape(evaluation.data)}, {len(evaluation.names)} of them, short side resized to "
        f"{evaluation.short_side} (bicubic, antialiased), centre {squares} cropped"
        f"{', each encoded and decoded on its own' if several else ''}. Every "
        "system's output is quantised to 8 bit before any metric.</p>",
        html_list(tables.footnotes(evaluations), "notes"),
        "<h2>Systems</h2>",
        html_table(*tables.system_rows(evaluation)),
        "<h2>Speed and memory</h2>",
        _speeds(joined),
        "<h2>Limits</h2>",
        *(f"<p>{html.escape(text)}</p>" for text in LIMITS),
        *made_by(evaluation.command, {**evaluation.machine, "time of quality pass": minutes}),
    ]
    systems = count(len(evaluation.systems), "system")
    title = f"{systems} on {len(evaluation.names)} pictures at {', '.join(sides)}"
    return page(f"monobath eval: {title}", shown, style=plots.STYLE + closeups.STYLE + _STYLE)


def _arrow(metric: MetricInfo) -> str:
    return f"{metric.label} {'↑' if metric.better == 'higher' else '↓'}"


def _main_table(evaluations: Sequence[Evaluation]) -> str:
    joined = tables.side_by_side(evaluations)
    metrics = tables.measured(joined)
    head = tables.head(joined)
    head[2 : 2 + len(metrics)] = [_arrow(metric) for metric in metrics]
    winners = [[tables.best(evaluation, metric).name for metric in metrics] for evaluation in evaluations]
    names = [(system.name, best) for system in evaluations[0].systems for best in winners]
    lines: list[list[Cell]] = []
    for (name, best), row in zip(names, tables.rows(joined), strict=True):
        styles = ["", "", *("best" if winner == name else "" for winner in best), "", ""]
        lines.append([(*cell, style) for cell, style in zip(row, styles, strict=True)])
    return html_table(head, lines) + (
        f"<p><small>Small: the interval. Bold: the best{' at its size' if len(evaluations) > 1 else ''}. "
        "↑ higher is better, ↓ lower is better. "
        "Bits: real bytes of a codec's files, latent values at 16 bit each for the others. "
        "Times: a picture, at the smallest batch measured.</small></p>"
    )


def _channels(evaluation: Evaluation) -> list[str]:
    sections = []
    for metric in tables.measured(evaluation):
        if metric.kind == "channels":
            title = f"<h2>By channel: {html.escape(metric.label)}</h2>"
            sections += [title, html_table(*tables.channel_rows(evaluation, metric))]
    return sections


def _differences(evaluation: Evaluation, at: str) -> list[str]:
    if len(evaluation.systems) < 2:
        return []
    metrics, first = tables.measured(evaluation), evaluation.systems[0].name
    styles = {1: "better", 0: "", -1: "worse"}
    lines: list[list[Cell]] = []
    for system, row in zip(evaluation.systems[1:], tables.difference_rows(evaluation), strict=True):
        marks = ["", *(styles[tables.standing(system.differences.get(m.key), m)] for m in metrics)]
        lines.append([(*cell, style) for cell, style in zip(row, marks, strict=True)])
    return [
        f"<h2>Differences to {html.escape(first)}{at}</h2>",
        f"<p>Each system minus {html.escape(first)}, paired picture by picture (half-sample by half-sample for "
        "distances between sets). ▲ better, ▼ worse, ≈ the interval includes no difference.</p>",
        html_table(["system", *(_arrow(m) for m in metrics)], lines),
    ]


def _plots(evaluation: Evaluation) -> list[str]:
    metrics = tables.measured(evaluation)
    key_line = key([group_of(s.kind) for s in evaluation.systems])
    sections = []
    # SSIM says what PSNR says; the others are faults that nobody trades against time or bits.
    drawn = [m for m in metrics if m.key not in ("ssim", "mean_error", "grid4", "grid8")]
    for title, words, drawing in (
        (
            "Quality and speed",
            "Up is better, left is faster. Dashed: the Pareto front, on which nothing is both faster and better. "
            "Vertical lines: the intervals.",
            _speed_plot,
        ),
        ("Quality and sampler steps", "", _steps_plot),
        (
            "Quality and bits",
            "Up is better, left is smaller. A codec at several rates is joined by a line; a model is shown "
            "at one step count.",
            _rate_plot,
        ),
    ):
        if figures := "".join(drawing(evaluation, metric) for metric in drawn):
            explained = [f"<p>{words}</p>", key_line] if words else []
            sections += [f"<h2>{title}</h2>", *explained, _grid(figures)]
    return sections


def _grid(figures: str) -> str:
    return f'<div class="plots">{figures}</div>'


def _figure(metric: MetricInfo, points: Sequence[Point], x: Axis, *, front: bool = False) -> str:
    lower = metric.better == "lower"
    better = f"{metric.better} is better" + (", axis turned round" if lower else "")
    drawing = plot(points, x, Axis(label=metric.label, lower_is_better=lower), front=front)
    return _captioned(metric.label, better, drawing)


def _captioned(title: str, words: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{html.escape(title)}</b>, {words}</figcaption>{drawing}</figure>"


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


def _speed_plot(evaluation: Evaluation, metric: MetricInfo) -> str:
    points = [
        _mark(s, metric, speed.ms / speed.batch, _short(s), s.family if s.steps is not None else "")
        for s in _finite(shown_systems(evaluation, limit=16), metric)
        if (speed := tables.speed_of(s, "decode"))
    ]
    if len(points) < 2:
        return ""
    return _figure(metric, points, Axis(label="decode time, ms a picture", log=True), front=True)


def _steps_plot(evaluation: Evaluation, metric: MetricInfo) -> str:
    systems = [s for s in _finite(evaluation.systems, metric) if s.steps is not None]
    families: dict[str, list[SystemResult]] = {}
    for system in systems:
        families.setdefault(system.family, []).append(system)
    points = []
    for family, members in families.items():
        members.sort(key=lambda s: s.steps or 0)
        if len({s.steps for s in members}) > 1:
            for system in members:
                label = family if system is members[-1] else ""
                points.append(_mark(system, metric, system.steps or 0, label, family))
    if not points:
        return ""
    return _figure(metric, points, Axis(label="steps", log=True, ticks=sorted({p.x for p in points})))


def _rate_plot(evaluation: Evaluation, metric: MetricInfo) -> str:
    first = {s.family: s for s in reversed(evaluation.systems) if s.steps is not None}  # more steps, the same bits
    systems = [s for s in _finite(evaluation.systems, metric) if s.bits_per_pixel and first.get(s.family, s) is s]
    if len(systems) < 2:
        return ""
    last = {s.family: s for s in sorted(systems, key=lambda s: s.bits_per_pixel or 0) if group_of(s.kind) == "codec"}
    points = []
    for system in systems:
        codec = group_of(system.kind) == "codec"
        label = _short(system) if not codec or last[system.family] is system else ""
        points.append(_mark(system, metric, system.bits_per_pixel or 0, label, system.family if codec else ""))
    return _figure(metric, points, Axis(label="bits a pixel", log=True))


def _speeds(evaluation: Evaluation) -> str:
    head, lines = tables.speed_rows(evaluation)
    if not lines:
        return "<p>Speed was not measured.</p>"
    return html_table(head, lines) + (
        "<p><small>Median and quartiles of interleaved rounds after a warm-up. GFLOP: 10⁹ operations a call, a "
        "multiply-add counts two. Peak memory above what was held before the call.</small></p>"
    )


def write_evaluation(folder: Path, evaluations: Sequence[Evaluation], kept: Kept, *, by_size: bool) -> list[Path]:
    """Write results.json, comparison.png and report.html; returns their paths.

    Args:
        evaluations: one a size.
        kept: pictures of the last.
        by_size: results.json holds all sizes, by size; else those of the only one.
    """
    evaluation = evaluations[-1]
    chosen = closeups.choose(kept.names, kept.originals, kept.outputs, shown_systems(evaluation))
    files = [folder / "results.json", folder / "comparison.png", folder / "report.html"]
    shown = eval_page(evaluations, chosen)
    results = {"sizes": {str(e.size): e.as_dict() for e in evaluations}} if by_size else evaluation.as_dict()
    write_json(files[0], results)
    write_file(files[1], closeups.comparison_sheet(chosen).save)
    write_text(files[2], shown)
    return files


def write_bench(folder: Path, bench: Bench) -> list[Path]:
    """Write results.json, bench.md and report.html; returns their paths."""
    files = [folder / "results.json", folder / "bench.md", folder / "report.html"]
    shown = bench_page(bench)
    write_json(files[0], bench.as_dict())
    write_text(files[1], bench.markdown())
    write_text(files[2], shown)
    return files


def bench_page(bench: Bench) -> str:
    """The whole page of a benchmark: a table and two plots a size."""
    shown = []
    for size, lines in bench.rows().items():
        drawings = []
        for title, value in (("speed ÷ AutoencoderKL", "speed_to_kl"), ("speed ÷ AutoencoderTiny", "speed_to_tiny")):
            points = [
                Point(name=row.name, label=row.name, x=row.gflop, y=getattr(row, value), group=group)
                for row in bench.results
                if row.size == size and row.gflop
                for group in ["network" if row.name.startswith("Autoencoder") else "ours"]
            ]
            if points:
                drawing = plot(points, Axis(label="GFLOP a call", log=True), Axis(label=title, log=True))
                drawings.append(_captioned(title, "higher is faster", drawing))
        shown += [
            f"<h2>{size} × {size}</h2>",
            html_table(bench.head, lines),
            key(["ours", "network"]),
            _grid("".join(drawings)),
        ]
    shown += ["<h2>What the figures hold for</h2>", html_list(bench.notes, "notes")]
    shown += made_by(bench.command, bench.machine)
    return page("monobath bench: decoding speed", shown, style=plots.STYLE + _STYLE)
