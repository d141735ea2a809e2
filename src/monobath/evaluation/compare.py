"""The comparison: every system reconstructs the same pictures and is measured in the same way.

Systems come one after the other, each in one pass over the pictures, in constant memory but for the figures. Of several
processes (`processes.group`) each takes every n-th batch; batches are those of a single process, so figures are equal.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Crops, PhotoDataset, Source, StreamDataset, iterate_eval, make_dataset
from ..data.transforms import mix_seed
from ..errors import UserError, check_least
from . import processes
from .facts import machine
from .frechet import Gaussian, HalfSampled, frechet_distance
from .measuring import Measuring, Row
from .metrics import CHANNELS, RESAMPLES, Metric, SetMetric, load_metrics
from .results import Channel, Estimate, Evaluation, SystemResult
from .system import System

Found = tuple[list[Row], dict[int, int]]
Engine = Callable[[Callable[[list[int]], Found], Sequence[list[int]]], Iterator[Found]]
"""`map` by other processes: (function, pictures' numbers by batch) → its results, in order."""
Progress = Callable[[str, int, int | None], None]
"""(system's name, pictures done, pictures there are or None), after every batch that the main process has seen."""


@dataclass(kw_only=True)
class Kept:
    """Some pictures and what became of them, for people to look at."""

    names: list[str]
    positions: list[int]
    """In `Evaluation.names`, ascending."""
    originals: Tensor
    """uint8 `(n, 3, H, W)`, on the CPU."""
    outputs: dict[str, Tensor]
    """By system name: uint8 `(n, 3, H, W)`, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How systems are compared."""

    size: int
    """The centre size × size of each picture is what systems encode and decode."""
    short_side: int | None = None
    """What the short side is resized to before, bicubic with antialias; default: size."""
    metrics: Sequence[str | Metric] | None = None
    """Keys of `METRICS`, or metrics of your own; None: all that can be had without a download."""
    limit: int | None = None
    """At most so many pictures."""
    batch_size: int = 8
    """Pictures at once, in one process."""
    num_workers: int = 0
    """Processes that decode pictures; 0: this one does."""
    seed: int = 0
    """Of noise (for a picture: seed + its index), crops, half-samples, bootstrap and kept pictures."""
    keep: int = 16
    """How many pictures to return."""
    progress: Progress | None = None
    """Called after every batch."""
    command: str = ""
    """What led here, for the record."""
    engine: Engine | None = None
    """Measures batches elsewhere (`integrations.ray.engine`); None: here."""

    def __post_init__(self) -> None:
        check_least(1, {"batch_size": self.batch_size, "keep": self.keep, "limit": self.limit})
        if self.resized < self.size:
            raise UserError(
                f"short_side={self.resized} holds no square of size={self.size}: it must be at least as long"
            )

    @property
    def resized(self) -> int:
        """Length of the short side before cropping."""
        return self.size if self.short_side is None else self.short_side


@torch.no_grad()
def evaluate(systems: Sequence[System], data: Source, settings: Settings) -> tuple[Evaluation, Kept]:
    """Compare systems side by side on the same pictures; outputs are quantised to 8 bit before any metric.

    Args:
        systems: of different names. The first is the one that differences are taken from, so it has none itself;
            metrics are computed on its device.
        data: pictures, as `data.make_dataset` takes them; unusable ones are left out and counted.
        settings: size, metrics and the like.

    Returns:
        (results, kept pictures), the same on every process. `SystemResult.speed` is left empty.

    Raises:
        UserError: no system, equal names, too few pictures, an unknown metric, or a system that gives NaN or infinity.
    """
    start = time.perf_counter()
    names = [system.name for system in systems]
    if not systems or len(set(names)) < len(names):
        raise UserError(f"systems are {names}: give at least one, each with a name of its own")
    infos, loaded = load_metrics(settings.metrics, device=systems[0].device, seed=settings.seed)
    dataset = make_dataset(data, Crops(size=settings.resized, augment=False))
    comparison = _Comparison(dataset, settings, loaded, systems[0].device)
    passes = {system.name: comparison.measure(system) for system in systems}
    first = passes[names[0]]
    pictures = [row.name for row in first.rows]
    for name, found in passes.items():
        if [row.name for row in found.rows] != pictures:
            raise UserError(f"{data} gave other pictures to {name} than to {names[0]}: use a fixed set of files")
    for metric in comparison.of_sets:
        comparison.state_sample(metric, passes)
    kept = [row for row in first.rows if row.pair]
    return Evaluation(
        command=settings.command,
        data=str(data) if isinstance(data, (str, PathLike)) else " ".join(map(str, data)),
        size=settings.size,
        short_side=settings.resized,
        names=pictures,
        metrics=infos,
        systems=[_result(system, passes[system.name], first, settings) for system in systems],
        machine=machine(systems[0].device),
        seconds=time.perf_counter() - start,
        skipped=dataset.skipped_count,
    ), Kept(
        names=[row.name for row in kept],
        positions=[row.position for row in kept],
        originals=_pictures(first, 0),
        outputs={name: _pictures(found, 1) for name, found in passes.items()},
    )


def _pictures(found: _Pass, which: Literal[0, 1]) -> Tensor:
    """The originals (0) or outputs (1) that a pass has kept."""
    return torch.stack([row.pair[which] for row in found.rows if row.pair])


@dataclass(kw_only=True)
class _Pass:
    """What is found about one system."""

    rows: list[Row]
    distances: dict[str, np.ndarray]
    """By metric key: Fréchet distances of the whole set, then of its half-samples."""


class _Comparison:
    """What the passes of all systems share."""

    def __init__(
        self, dataset: PhotoDataset | StreamDataset, settings: Settings, metrics: Sequence[Metric], device: torch.device
    ) -> None:
        self.dataset, self.settings, self.metrics, self.device = dataset, settings, metrics, device
        self.of_sets = [metric for metric in metrics if isinstance(metric, SetMetric)]
        self.total = min(len(dataset), settings.limit or len(dataset)) if isinstance(dataset, PhotoDataset) else None
        self.originals: dict[str, list[Gaussian]] = {}
        """By key of a set's metric: features of the originals, whole set and half-samples; found in the first pass."""

    def measure(self, system: System) -> _Pass:
        """One system, over all pictures and processes."""
        rows: list[Row] = []
        outputs = {metric.info.key: self._statistics(metric) for metric in self.of_sets}
        references = {} if self.originals else {metric.info.key: self._statistics(metric) for metric in self.of_sets}
        measuring = Measuring(
            system=system, metrics=self.metrics, size=self.settings.size, seed=self.settings.seed,
            references=bool(references), device=self.device, dataset=self.dataset,
        )  # fmt: skip
        for start, part, seen in self._parts(measuring):
            positions = range(start, start + len(part))
            for row, position in zip(part, positions, strict=True):
                row.position = position
            if part:
                for key, statistics in outputs.items():
                    statistics.update(torch.stack([row.features.pop(key) for row in part]), positions)
                for key, statistics in references.items():
                    statistics.update(torch.stack([row.references.pop(key) for row in part]), positions)
            rows += part
            self._keep_lowest(rows)
            if self.settings.progress and processes.rank() == 0:
                self.settings.progress(system.name, seen, self.total)

        rows = sorted(itertools.chain(*processes.gather(rows)), key=lambda row: row.position)
        self._keep_lowest(rows)
        least = 4 if self.of_sets else 2  # two vectors in every half-sample; two figures for an interval
        if len(rows) < least:
            raise UserError(f"{len(rows)} usable pictures in {self.dataset.source}: at least {least} are needed")
        self.originals |= {key: statistics.gaussians() for key, statistics in references.items()}
        distances = {}
        for key, statistics in outputs.items():
            pairs = zip(self.originals[key], statistics.gaussians(), strict=True)
            distances[key] = np.array([frechet_distance(a, b) for a, b in pairs])
        return _Pass(rows=rows, distances=distances)

    def state_sample(self, metric: SetMetric, passes: dict[str, _Pass]) -> None:
        """Put the size of the sample and the spread of the half-samples on what the tables say of a metric."""
        info, key = metric.info, metric.info.key
        vectors, pictures = self.originals[key][0].count, len(next(iter(passes.values())).rows)
        spreads = ", ".join(f"{name} {_spread(found.distances[key][1:]):.3g}" for name, found in passes.items())
        info.label = f"{info.label}, n = {vectors:,}"
        info.details = (
            f"{info.details}; {vectors:,} feature vectors of {pictures:,} pictures on each side; standard deviation "
            f"over half-samples: {spreads}"
        )

    def _parts(self, measuring: Measuring) -> Iterator[tuple[int, list[Row], int]]:
        """What this process finds, or another for it, batch by batch: the position of its first picture among the
        usable ones, its rows, and how many pictures have been seen.
        """
        settings, dataset, size = self.settings, self.dataset, self.settings.batch_size
        if settings.engine is None:
            batches = iterate_eval(dataset, batch_size=size, num_workers=settings.num_workers, limit=settings.limit)
            for number, batch in enumerate(batches):
                mine = number % processes.world_size() == processes.rank()
                start, rows = number * size, measuring.measured(batch) if mine else []
                yield start, rows, start + len(batch["name"])
            return
        if not isinstance(dataset, PhotoDataset):
            raise UserError(f"{dataset.source}: streamed shards are measured here only; leave --engine out")
        numbers = range(len(dataset))
        start, limit = 0, settings.limit or len(numbers)
        for rows, skipped in settings.engine(measuring, [list(numbers[i : i + size]) for i in numbers[::size]]):
            dataset.unusable = dataset.unusable | skipped
            rows = rows[: limit - start]
            yield start, rows, start + len(rows)
            start += len(rows)
            if start == limit:
                return

    def _statistics(self, metric: SetMetric) -> HalfSampled:
        device = self.device if self.device.type == "cuda" else torch.device("cpu")  # others may lack float64
        return HalfSampled(metric.dim, seed=self.settings.seed, device=device)

    def _keep_lowest(self, rows: list[Row]) -> None:
        """Let go of the pictures that will not be kept."""
        seed = self.settings.seed
        candidates = [row for row in rows if row.pair]
        candidates.sort(key=lambda row: (mix_seed(5, seed, row.index), row.position))
        for row in candidates[self.settings.keep :]:
            row.pair = None


def mean_estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of at least two figures with its 95 % percentile bootstrap interval (Efron & Tibshirani 1993).

    Equal seeds give equal resamples.
    """
    from scipy.stats import bootstrap

    figures = np.asarray(values, dtype=np.float64)
    interval = bootstrap(
        (figures,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(figures)),  # 32 MiB of resamples at once
        confidence_level=0.95,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value=float(figures.mean()), low=float(interval.low), high=float(interval.high))


def half_sample_estimate(figures: np.ndarray) -> Estimate:
    """The whole set's figure (the first one), ± 2 standard deviations over its half-samples (the others)."""
    value, spread = float(figures[0]), _spread(figures[1:])
    return Estimate(value=value, low=value - 2 * spread, high=value + 2 * spread)


def _spread(halves: np.ndarray) -> float:
    return float(np.std(halves, ddof=1))


def _result(system: System, found: _Pass, first: _Pass, settings: Settings) -> SystemResult:
    result = SystemResult(
        name=system.name,
        kind=system.kind,
        weights=system.weights,
        family=system.family,
        steps=system.steps,
        bits_per_pixel=float(np.mean([row.bits for row in found.rows])) / settings.size**2,
        encoder_parameters=_parameters(system.encoder),
        decoder_parameters=_parameters(system.decoder),
    )
    seed = settings.seed
    for key in found.rows[0].figures:
        own, others = (np.array([row.figures[key] for row in each.rows]) for each in (found, first))
        if own.ndim == 2:
            result.channels[key] = {
                name: Channel(mean=mean_estimate(values, seed), pictures=values)
                for name, values in zip(CHANNELS, own.T.tolist(), strict=True)
            }
            own, others = _largest_channel(own), _largest_channel(others)
            result.figures[key] = _from_zero(mean_estimate(own, seed))
        else:
            result.pictures[key] = own.tolist()
            result.figures[key] = mean_estimate(own, seed)
        if found is not first:
            result.differences[key] = mean_estimate(own - others, seed)
    for key, distances in found.distances.items():
        result.figures[key] = _from_zero(half_sample_estimate(distances))
        if found is not first:
            result.differences[key] = half_sample_estimate(distances - first.distances[key])
    return result


def _from_zero(estimate: Estimate) -> Estimate:
    """The estimate of a figure that is never negative, nor is its interval."""
    return dataclasses.replace(estimate, low=max(0.0, estimate.low))


def _largest_channel(values: np.ndarray) -> np.ndarray:
    """`(pictures, channels)` → `(pictures,)`: the channel whose mean is farthest from 0, signed to make it positive."""
    means = values.mean(0)
    channel = int(np.abs(means).argmax())
    return np.copysign(1.0, means[channel]) * values[:, channel]


def _parameters(network: nn.Module | None) -> int | None:
    return None if network is None else sum(parameter.numel() for parameter in network.parameters())
