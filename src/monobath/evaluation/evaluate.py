"""The comparison: every system reconstructs the same pictures and is measured in the same way.

Systems come one after the other, each in one pass over the pictures, in constant memory but for the figures. Of several
processes (`processes.group`) each takes every n-th batch; batches are those of a single process, so figures are equal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Crops, PhotoDataset, Source, StreamDataset, iterate_eval, make_dataset
from ..data.pictures import Item
from ..data.transforms import centre, mix_seed
from ..errors import UserError
from ..images import to_float, to_uint8
from . import processes
from .frechet import Gaussian, HalfSampled, frechet_distance
from .metrics import CHANNELS, RESAMPLES, ChannelMetric, Metric, PictureMetric, SetMetric, load_metrics
from .report import machine
from .results import Channel, Estimate, Evaluation, SystemResult
from .system import System

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


@torch.no_grad()
def evaluate(
    systems: Sequence[System],
    data: Source,
    *,
    size: int,
    short_side: int | None = None,
    metrics: Sequence[str | Metric] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    seed: int = 0,
    keep: int = 16,
    progress: Progress | None = None,
    command: str = "",
) -> tuple[Evaluation, Kept]:
    """Compare systems side by side on the same pictures; outputs are quantised to 8 bit before any metric.

    Args:
        systems: of different names. The first is the one that differences are taken from, so it has none itself;
            metrics are computed on its device.
        data: pictures, as `data.make_dataset` takes them; unusable ones are left out and counted.
        size: the centre size × size of each picture is what systems encode and decode.
        short_side: what the short side is resized to before, bicubic with antialias; default: size.
        metrics: keys of `METRICS`, or metrics of your own; None: all that can be had without a download.
        limit: at most so many pictures.
        batch_size: pictures at once, in one process.
        num_workers: processes that decode pictures; 0: this one does.
        seed: of noise (for a picture: seed + its index), crops, half-samples, bootstrap and kept pictures.
        keep: how many pictures to return.
        progress: called after every batch.
        command: that led here, for the record.

    Returns:
        (results, kept pictures), the same on every process. `SystemResult.speed` is left empty.

    Raises:
        UserError: no system, equal names, a short side below the size, too few pictures, an unknown metric, or a
            system that gives NaN or infinity.
    """
    start = time.perf_counter()
    names = [system.name for system in systems]
    if not systems or len(set(names)) < len(names):
        raise UserError(f"systems are {names}: give at least one, each with a name of its own")
    if batch_size < 1 or keep < 1 or (limit is not None and limit < 1):
        raise UserError(f"batch_size={batch_size}, keep={keep} and limit={limit} must be at least 1")
    short_side = size if short_side is None else short_side
    if short_side < size:
        raise UserError(f"short_side={short_side} holds no square of size={size}: it must be at least as long")
    infos, loaded = load_metrics(metrics, device=systems[0].device, seed=seed)
    dataset = make_dataset(data, Crops(size=short_side, augment=False))
    comparison = _Comparison(
        dataset=dataset,
        size=size,
        of_pictures=[metric for metric in loaded if isinstance(metric, PictureMetric)],
        of_channels=[metric for metric in loaded if isinstance(metric, ChannelMetric)],
        of_sets=[metric for metric in loaded if isinstance(metric, SetMetric)],
        device=systems[0].device,
        limit=limit,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        keep=keep,
        progress=progress,
    )
    passes = [comparison.measure(system) for system in systems]
    first = passes[0]
    for system, found in zip(systems, passes, strict=True):
        if found.names != first.names:
            raise UserError(f"{data} gave other pictures to {system.name} than to {names[0]}: use a fixed set of files")
    for metric in comparison.of_sets:
        comparison.state_sample(metric, dict(zip(names, passes, strict=True)))
    return Evaluation(
        command=command,
        data=str(data) if isinstance(data, (str, PathLike)) else " ".join(map(str, data)),
        size=size,
        short_side=short_side,
        names=first.names,
        metrics=infos,
        systems=[_result(s, f, first, size, seed) for s, f in zip(systems, passes, strict=True)],
        machine=machine(systems[0].device),
        seconds=time.perf_counter() - start,
        skipped=dataset.skipped_count,
    ), Kept(
        names=[sample.name for sample in first.samples],
        positions=[sample.position for sample in first.samples],
        originals=torch.stack([sample.original for sample in first.samples]),
        outputs={n: torch.stack([s.output for s in f.samples]) for n, f in zip(names, passes, strict=True)},
    )


@dataclass(kw_only=True)
class _Row:
    """What is found about one picture."""

    position: int
    name: str
    bits: int
    figures: dict[str, float]
    channels: dict[str, list[float]]


@dataclass(kw_only=True)
class _Sample:
    """A picture that may be kept: those with the lowest draws are."""

    draw: int
    position: int
    name: str
    original: Tensor
    output: Tensor


@dataclass(kw_only=True)
class _Pass:
    """What is found about one system."""

    rows: list[_Row] = field(default_factory=list)
    samples: list[_Sample] = field(default_factory=list)
    distances: dict[str, np.ndarray] = field(default_factory=dict)
    """By metric key: Fréchet distances of the whole set, then of its half-samples."""

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]


@dataclass(kw_only=True)
class _Comparison:
    """What the passes of all systems share."""

    dataset: PhotoDataset | StreamDataset
    size: int
    of_pictures: list[PictureMetric]
    of_channels: list[ChannelMetric]
    of_sets: list[SetMetric]
    device: torch.device
    limit: int | None
    batch_size: int
    num_workers: int
    seed: int
    keep: int
    progress: Progress | None
    originals: dict[str, list[Gaussian]] = field(default_factory=dict)
    """By key of a set's metric: features of the originals, whole set and half-samples; found in the first pass."""

    def measure(self, system: System) -> _Pass:
        """One system, over all pictures and processes."""
        found = _Pass()
        outputs = {metric.info.key: self._statistics(metric) for metric in self.of_sets}
        references = {} if self.originals else {metric.info.key: self._statistics(metric) for metric in self.of_sets}
        for start, batch in self._batches(system):
            names, indices = batch["name"], batch["index"].tolist()
            positions = range(start, start + len(names))
            images = centre(batch["image"], self.size)
            output, bits = _reconstruct(system, images, names, [self.seed + index for index in indices])
            original, output = images.to(self.device), output.to(self.device)
            figures = {m.info.key: m.measure(output, original).tolist() for m in self.of_pictures}
            channels = {m.info.key: m.measure(output, original).tolist() for m in self.of_channels}
            for metric in self.of_sets:
                outputs[metric.info.key].update(metric.features(output, indices), positions)
                if references:
                    references[metric.info.key].update(metric.features(original, indices), positions)
            for i, (position, name) in enumerate(zip(positions, names, strict=True)):
                row = {key: values[i] for key, values in figures.items()}
                signed = {key: values[i] for key, values in channels.items()}
                found.rows.append(_Row(position=position, name=name, bits=bits[i], figures=row, channels=signed))
                draw = mix_seed(5, self.seed, indices[i])
                pair = {"original": original[i].to("cpu", copy=True), "output": output[i].to("cpu", copy=True)}
                found.samples.append(_Sample(draw=draw, position=position, name=name, **pair))
            found.samples = self._lowest(found.samples)

        shares = processes.gather(found)
        rows = sorted((row for share in shares for row in share.rows), key=lambda row: row.position)
        samples = self._lowest([sample for share in shares for sample in share.samples])
        least = 4 if self.of_sets else 2  # two vectors in every half-sample; two figures for an interval
        if len(rows) < least:
            raise UserError(f"{len(rows)} usable pictures in {self.dataset.source}: at least {least} are needed")
        self.originals |= {key: statistics.gaussians() for key, statistics in references.items()}
        distances = {}
        for key, statistics in outputs.items():
            pairs = zip(self.originals[key], statistics.gaussians(), strict=True)
            distances[key] = np.array([frechet_distance(a, b) for a, b in pairs])
        samples.sort(key=lambda sample: sample.position)
        return _Pass(rows=rows, samples=samples, distances=distances)

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

    def _batches(self, system: System) -> Iterator[tuple[int, Item]]:
        """This process's batches, each with the position of its first picture among the usable ones."""
        total = len(self.dataset) if isinstance(self.dataset, PhotoDataset) else None
        if total is not None and self.limit is not None:
            total = min(total, self.limit)
        stream = iterate_eval(
            self.dataset, batch_size=self.batch_size, num_workers=self.num_workers, limit=self.limit
        )  # fmt: skip
        for number, batch in enumerate(stream):
            start = number * self.batch_size
            if number % processes.world_size() == processes.rank():
                yield start, batch
            if self.progress and processes.is_main():
                self.progress(system.name, start + len(batch["name"]), total)

    def _statistics(self, metric: SetMetric) -> HalfSampled:
        device = self.device if self.device.type == "cuda" else torch.device("cpu")  # others may lack float64
        return HalfSampled(metric.dim, seed=self.seed, device=device)

    def _lowest(self, samples: list[_Sample]) -> list[_Sample]:
        return sorted(samples, key=lambda sample: (sample.draw, sample.position))[: self.keep]


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


def _reconstruct(system: System, images: Tensor, names: list[str], seeds: list[int]) -> tuple[Tensor, list[int]]:
    """uint8 `(B, 3, H, W)` → (output, uint8 of the same shape; bits of each picture's code)."""
    code = system.encode(to_float(images.to(system.device)))
    output = system.decode(code, seeds)
    assert output.shape == images.shape, (system.name, output.shape, images.shape)
    bad = ~torch.isfinite(output).flatten(1).all(1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise UserError(
            f"{system.name} turned {name} into NaN or infinity: check its weights, or run it in a wider number type"
        )
    return to_uint8(output), code.bits


def _result(system: System, found: _Pass, first: _Pass, size: int, seed: int) -> SystemResult:
    result = SystemResult(
        name=system.name,
        kind=system.kind,
        weights=system.weights,
        family=system.family,
        steps=system.steps,
        bits_per_pixel=float(np.mean([row.bits for row in found.rows])) / size**2,
        encoder_parameters=_parameters(system.encoder),
        decoder_parameters=_parameters(system.decoder),
    )
    for key in found.rows[0].figures:
        values = [row.figures[key] for row in found.rows]
        result.pictures[key] = values
        result.figures[key] = mean_estimate(values, seed)
        if found is not first:
            gaps = [row.figures[key] - other.figures[key] for row, other in zip(found.rows, first.rows, strict=True)]
            result.differences[key] = mean_estimate(gaps, seed)
    for key in found.rows[0].channels:
        of_channels = np.array([row.channels[key] for row in found.rows])
        result.channels[key] = {
            name: Channel(mean=mean_estimate(values, seed), pictures=values)
            for name, values in zip(CHANNELS, of_channels.T.tolist(), strict=True)
        }
        largest = _largest_channel(of_channels)
        estimate = mean_estimate(largest, seed)
        result.figures[key] = dataclasses.replace(estimate, low=max(0.0, estimate.low))
        if found is not first:
            others = _largest_channel(np.array([row.channels[key] for row in first.rows]))
            result.differences[key] = mean_estimate(largest - others, seed)
    for key, distances in found.distances.items():
        estimate = half_sample_estimate(distances)
        result.figures[key] = dataclasses.replace(estimate, low=max(0.0, estimate.low))
        if found is not first:
            result.differences[key] = half_sample_estimate(distances - first.distances[key])
    return result


def _largest_channel(values: np.ndarray) -> np.ndarray:
    """`(pictures, channels)` → `(pictures,)`: the channel whose mean is farthest from 0, signed to make it positive."""
    means = values.mean(0)
    channel = int(np.abs(means).argmax())
    return np.copysign(1.0, means[channel]) * values[:, channel]


def _parameters(network: nn.Module | None) -> int | None:
    return None if network is None else sum(parameter.numel() for parameter in network.parameters())
