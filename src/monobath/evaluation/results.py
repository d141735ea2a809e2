"""What an evaluation finds: plain dataclasses that become results.json, the tables and the report."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class Estimate:
    """A figure and its uncertainty."""

    value: float
    low: float
    """Low end of the uncertainty interval; the metric's `interval` says what it is."""
    high: float


@dataclass(kw_only=True)
class MetricInfo:
    """What a column of the table is."""

    key: str
    """Name in results.json: psnr, ssim, mean_error, grid4, grid8, efflite, fd_efflite, lpips, lpips_alex, rfid or
    dreamsim."""
    label: str
    """Heading with unit and network, such as "LPIPS (VGG)"."""
    better: Literal["higher", "lower"] = "lower"
    kind: Literal["picture", "channels", "set"] = "picture"
    """picture: a figure for each picture, averaged. channels: signed figures of each picture's channels, averaged; the
    mean farthest from 0 counts. set: one figure for all pictures (a Fréchet distance)."""
    details: str
    """Data range, network, features, sample size: everything needed to compare the figure with another's."""
    interval: str = ""
    """What `Estimate.low` and `.high` are, such as "95 % bootstrap interval of the mean"."""
    absent: str = ""
    """Why the metric could not be measured; then no system has a figure for it."""

    @property
    def heading(self) -> str:
        """Label, and which way is better."""
        return f"{self.label} {'↑' if self.better == 'higher' else '↓'}"


@dataclass(kw_only=True)
class Channel:
    """Signed figures of one channel of the pictures."""

    mean: Estimate
    pictures: list[float]
    """In the order of `Evaluation.names`."""


@dataclass(kw_only=True)
class Cost:
    """Time, operations and memory of a call."""

    ms: float
    """Median milliseconds."""
    ms_low: float
    """First quartile."""
    ms_high: float
    """Third quartile."""
    gflop: float | None
    """10⁹ floating-point operations (a multiply-add counts two); see `speed.count_flops` for what is left out. None:
    computed outside PyTorch, where they are not counted."""
    peak_mb: float | None
    """Peak memory above what was held before the call, in 10⁶ bytes; None: cannot be measured here."""


@dataclass(kw_only=True)
class Speed(Cost):
    """What one part of one system costs at one size and batch; a call is a whole batch."""

    part: Literal["encode", "decode"]
    size: tuple[int, int]
    """(H, W) in pixels."""
    batch: int
    repeats: int

    @property
    def images_per_second(self) -> float:
        """batch / median time."""
        return 1000 * self.batch / self.ms


@dataclass(kw_only=True)
class SystemResult:
    """One row of the comparison."""

    name: str
    kind: str
    """monobath, AutoencoderKL, TAEF2, JPEG, bicubic …"""
    weights: str
    """Where the weights come from; "random" says that only speed means anything; "" for systems without any."""
    family: str = ""
    """Systems of one family differ in `steps` only, or are one codec at several rates; curves join them."""
    steps: int | None = None
    """Sampler steps, for diffusion decoders."""
    bits_per_pixel: float | None = None
    """Mean over the pictures: real bytes of a codec's files, latent values at 16 bit for the others."""
    encoder_parameters: int | None = None
    decoder_parameters: int | None = None
    pictures: dict[str, list[float]] = field(default_factory=dict)
    """Figures of the single pictures, by metric key, in the order of `Evaluation.names`."""
    channels: dict[str, dict[str, Channel]] = field(default_factory=dict)
    """By key of a metric of channels, then by channel: red, green, blue."""
    figures: dict[str, Estimate] = field(default_factory=dict)
    """By metric key."""
    differences: dict[str, Estimate] = field(default_factory=dict)
    """This system minus the first one, paired picture by picture (half-sample by half-sample for sets)."""
    speed: list[Speed] = field(default_factory=list)


@dataclass(kw_only=True)
class Evaluation:
    """A whole comparison."""

    command: str
    data: str
    """Where the pictures come from, as the user gave it."""
    size: int
    """Side of the centre crops."""
    short_side: int
    """What the pictures' short side was resized to before."""
    names: list[str]
    """Pictures, in order."""
    metrics: list[MetricInfo]
    systems: list[SystemResult]
    machine: dict[str, Any]
    seconds: float
    skipped: int = 0
    """Unusable pictures left out."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite and undefined figures become null."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values


def plain(value: Any) -> Any:
    """A value for JSON, in which infinite and undefined numbers are null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
