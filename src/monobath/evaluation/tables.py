"""An evaluation in words and figures: the cells of its tables, its footnotes, and the verdict."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from ..words import count
from .results import Estimate, Evaluation, MetricInfo, Speed, SystemResult

NONE = "–"


def side_by_side(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of the same systems at several sizes as one, in which each system has a row a size."""
    *_, last = evaluations
    if len(evaluations) == 1:
        return last
    rows = zip(*(evaluation.systems for evaluation in evaluations), strict=True)
    named = [
        dataclasses.replace(system, name=f"{system.name} at {evaluation.size}²")
        for row in rows
        for evaluation, system in zip(evaluations, row, strict=True)
    ]
    return dataclasses.replace(last, systems=named, seconds=sum(evaluation.seconds for evaluation in evaluations))


def measured(evaluation: Evaluation) -> list[MetricInfo]:
    """The metrics that at least one system has a figure for."""
    return [m for m in evaluation.metrics if not m.absent and any(m.key in s.figures for s in evaluation.systems)]


def absent(evaluation: Evaluation) -> list[str]:
    """A sentence for each metric that could not be measured."""
    return [f"{m.label}: absent, {m.absent.rstrip('.')}." for m in evaluation.metrics if m.absent]


def footnotes(evaluations: Sequence[Evaluation]) -> list[str]:
    """What each measured figure and its interval are: network, data range, features, sample size; once if all sizes
    say the same.
    """
    lines: list[str] = []
    for of_sizes in zip(*(measured(evaluation) for evaluation in evaluations), strict=True):
        said = [
            f"{m.label}: {m.details.rstrip('.')}. {m.better.capitalize()} is better. "
            f"Interval: {m.interval.rstrip('.')}."
            for m in of_sizes
        ]
        same = len(set(said)) == 1
        lines += said[:1] if same else [f"At {e.size}²: {line}" for e, line in zip(evaluations, said, strict=True)]
    return lines


def head(evaluation: Evaluation) -> list[str]:
    """Headings of the main table."""
    return ["system", "bits/pixel", *(m.label for m in measured(evaluation)), "encode ms", "decode ms"]


def rows(evaluation: Evaluation) -> list[list[tuple[str, str]]]:
    """The main table, a row a system: (figure, its interval or "") in each cell."""
    metrics = measured(evaluation)
    places = {m.key: decimals([s.figures[m.key] for s in evaluation.systems if m.key in s.figures]) for m in metrics}
    return [
        [
            (system.name, ""),
            (NONE if system.bits_per_pixel is None else f"{system.bits_per_pixel:.2f}", ""),
            *(estimate_cell(system.figures.get(m.key), places[m.key]) for m in metrics),
            (number(picture_ms(system, "encode")), ""),
            (number(picture_ms(system, "decode")), ""),
        ]
        for system in evaluation.systems
    ]


def channel_rows(evaluation: Evaluation, metric: MetricInfo) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """(headings, rows) of a metric of channels, a row a system: (signed mean, its interval) of each channel."""
    found = [(system.name, system.channels[metric.key]) for system in evaluation.systems if system.channels]
    places = decimals([channel.mean for _, channels in found for channel in channels.values()])
    lines = [
        [(name, ""), *(estimate_cell(channel.mean, places, signed=True) for channel in channels.values())]
        for name, channels in found
    ]
    return ["system", *found[0][1]], lines


def difference_rows(evaluation: Evaluation) -> list[list[tuple[str, str, str]]]:
    """What each other system has more or less than the first: (mark and difference, interval, "better", "worse" or "")
    in each cell.
    """
    metrics = measured(evaluation)
    others = evaluation.systems[1:]
    places = {m.key: decimals([s.differences[m.key] for s in others if m.key in s.differences]) for m in metrics}
    lines = []
    for system in others:
        line = [(system.name, "", "")]
        for metric in metrics:
            found = system.differences.get(metric.key)
            figure, interval = estimate_cell(found, places[metric.key], signed=True)
            mark, style = _MARKS[standing(found, metric)] if found else ("", "")
            line.append((f"{mark} {figure}".lstrip(), interval, style))
        lines.append(line)
    return lines


_MARKS = {1: ("▲", "better"), 0: ("≈", ""), -1: ("▼", "worse")}


def standing(difference: Estimate | None, metric: MetricInfo) -> int:
    """1: better than the first system, -1: worse, 0: the interval includes no difference at all."""
    if difference is None or not (difference.low > 0 or difference.high < 0):
        return 0
    return 1 if (difference.low > 0) == (metric.better == "higher") else -1


def best(systems: Sequence[SystemResult], metric: MetricInfo) -> SystemResult:
    """The system with the best figure; the first of equals. Those without a finite figure take no part."""
    found = [s for s in systems if metric.key in s.figures and not math.isnan(s.figures[metric.key].value)]
    sign = 1 if metric.better == "higher" else -1
    return max(found, key=lambda s: sign * s.figures[metric.key].value)


def verdict(evaluation: Evaluation) -> list[str]:
    """Sentences, computed: who is best in what; of those that need no more bits than the first, who is; who is fastest.

    "level with" says that the paired difference to the first system includes zero.
    """
    first, metrics = evaluation.systems[0], measured(evaluation)
    if not metrics:
        return ["No metric could be measured."]
    pictures = count(len(evaluation.names), "picture")
    said = [f"Of {len(evaluation.systems)} systems on {pictures}, {_winners(evaluation, evaluation.systems)}."]
    frugal = [s for s in evaluation.systems if _no_more_bits(s, first)]
    if len(frugal) < len(evaluation.systems):
        bits = f"{first.bits_per_pixel:.2f} bits a pixel"
        if len(frugal) == 1:
            said.append(f"No other needs as few bits as {first.name} ({bits}).")
        else:
            said.append(f"Of those with no more bits than {first.name} ({bits}), {_winners(evaluation, frugal)}.")
    timed = [
        (speed.ms / speed.batch, s) for s in evaluation.systems if (speed := speed_of(s, "decode")) and speed.gflop
    ]
    if len(timed) > 1:
        times = "; ".join(f"{s.name} {number(ms)} ms" for ms, s in sorted(timed, key=lambda pair: pair[0]))
        said.append(f"Networks by the time to decode a picture: {times}.")
    return said


def _winners(evaluation: Evaluation, among: Sequence[SystemResult]) -> str:
    """ "X is best in PSNR (28.8, 28.2 to 29.3) and SSIM (…); Y is best in …"."""
    first = evaluation.systems[0]
    won: dict[str, list[str]] = {}
    for metric in measured(evaluation):
        if not any(metric.key in s.figures for s in among):
            continue
        winner = best(among, metric)
        places = decimals([s.figures[metric.key] for s in evaluation.systems if metric.key in s.figures])
        inside = list(filter(None, estimate_cell(winner.figures[metric.key], places)))
        rivals = {first.name: winner} if winner is not first else {s.name: s for s in among if s is not first}
        gaps = {name: s.differences[metric.key] for name, s in rivals.items() if metric.key in s.differences}
        level = [name for name, gap in gaps.items() if standing(gap, metric) == 0]
        inside += [f"level with {' and '.join(level)}"] if level else []
        won.setdefault(winner.name, []).append(f"{metric.label.partition(' (')[0]} ({', '.join(inside)})")
    return "; ".join(f"{name} is best in {_and(entries)}" for name, entries in won.items())


def _and(entries: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(entries[:-1]), entries[-1]]))


def _no_more_bits(system: SystemResult, first: SystemResult) -> bool:
    if system.bits_per_pixel is None or first.bits_per_pixel is None:
        return system is first
    return system.bits_per_pixel <= 1.02 * first.bits_per_pixel  # files cannot hit a size to the byte


def speed_of(system: SystemResult, part: str) -> Speed | None:
    """A system's figures at the smallest batch."""
    return min((s for s in system.speed if s.part == part), key=lambda s: s.batch, default=None)


def picture_ms(system: SystemResult, part: str) -> float | None:
    """Milliseconds a picture at the smallest batch."""
    speed = speed_of(system, part)
    return None if speed is None else speed.ms / speed.batch


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return NONE
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def parameters(number: int | None) -> str:
    """A number of parameters, for people."""
    return NONE if number is None else f"{number / 1e6:.2f} M"


def decimals(estimates: Sequence[Estimate]) -> int:
    """Decimal places for a column: two significant digits of the typical half-width of its intervals."""
    widths = [(e.high - e.low) / 2 for e in estimates if math.isfinite(e.high - e.low) and e.high > e.low]
    if widths:
        return min(6, max(0, 1 - math.floor(math.log10(statistics.median(widths)))))
    sizes = [abs(e.value) for e in estimates if math.isfinite(e.value) and e.value]
    return min(6, max(0, 3 - math.floor(math.log10(max(sizes))))) if sizes else 2


def estimate_cell(estimate: Estimate | None, places: int, *, signed: bool = False) -> tuple[str, str]:
    """(figure, interval) for people: "28.84", "28.31 to 29.37"; no interval where it has no width."""
    if estimate is None:
        return NONE, ""

    def text(value: float) -> str:
        if not math.isfinite(value):
            return "undefined" if math.isnan(value) else "∞" if value > 0 else "−∞"
        return f"{value:{'+' if signed else ''}.{places}f}".replace("-", "−")

    has_width = math.isfinite(estimate.high - estimate.low) and estimate.high > estimate.low
    return text(estimate.value), f"{text(estimate.low)} to {text(estimate.high)}" if has_width else ""


def decibels(value: float) -> str:
    """A PSNR for people."""
    return "identical" if math.isinf(value) else f"{value:.2f} dB"
