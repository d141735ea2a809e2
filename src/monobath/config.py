"""`TokenizerConfig`: everything needed to build a tokenizer, as it is stored with its weights."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor

from .decoders import DecoderConfig, UViTConfig, decoder_config
from .decoding import SamplerConfig
from .errors import UserError, explained_as
from .models.encoder import EncoderConfig

T = TypeVar("T")

SHARED = ("factor", "latent_channels", "padding")
"""What a KL-VAE decoder takes over from the decoder it stands in place of."""


PATCH = 4
"""Positions that FLUX.2's pipelines pack into one, 2×2."""
PACKED = ("flux2", "taef2")
"""Families of encoders whose latents those pipelines hold."""


@dataclass(frozen=True)
class Packing:
    """Latents as FLUX.2's pipelines hold them, `(B, 4c, h/2, w/2)`: 2×2 positions packed, and each channel normalised.

    Channel 4i + 2·dy + dx is channel i at place (dy, dx) of the square.
    """

    mean: list[float]
    """Of each packed channel, 4c."""
    variance: list[float]
    """Likewise."""
    eps: float
    """Added to the variance."""

    def pack(self, z: Tensor) -> Tensor:
        """What `decode` takes, `(B, c, h, w)` with even sides → what pipelines hold."""
        mean, std = self._statistics(z)
        return (F.pixel_unshuffle(z, 2) - mean) / std

    def unpack(self, held: Tensor) -> Tensor:
        """What pipelines hold → what `decode` takes."""
        mean, std = self._statistics(held)
        return F.pixel_shuffle(held * std + mean, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (like.new_tensor(values)[:, None, None] for values in (self.mean, self.variance))
        return mean, (variance + self.eps).sqrt()


@dataclass(kw_only=True)
class TokenizerConfig:
    """Everything needed to build a tokenizer; stored with its weights."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=UViTConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    scaling_factor: float = 1.0
    """1 / std of the latents. Published for generators and diffusers pipelines; `encode` and `decode` ignore it."""
    shift_factor: float = 0.0
    """Mean of the latents, likewise."""
    latent_mean: list[float] = field(default_factory=list)
    """Mean of each channel of the latents, likewise; empty: never measured (`monobath stats` does)."""
    latent_std: list[float] = field(default_factory=list)
    """Standard deviation of each channel, likewise."""
    latents: Literal["family", "raw", "normalised"] = "family"
    """Of FLUX.2's latents: normalised as its pipelines hold them, which normalise each of the 4c channels of 2×2 packed
    positions (TAEF2's convention), or raw, as its autoencoder makes them. family: as the encoder's family are."""
    packed_mean: list[float] = field(default_factory=list)
    """Of raw ones: what those pipelines subtract, 4c numbers, channel by channel; empty: not known."""
    packed_variance: list[float] = field(default_factory=list)
    """What they divide by the square root of, likewise."""
    packed_eps: float = 0.0
    """What they add to that before."""

    def __post_init__(self) -> None:
        for name in ("factor", "latent_channels"):
            a, b = getattr(self.encoder, name), getattr(self.decoder, name)
            if a != b:
                raise UserError(f"encoder.{name}={a} and decoder.{name}={b} must be equal")
        if self.sampler.stages not in (1, self.decoder.stages):
            both = f"sampler.stages={self.sampler.stages} with decoder.stages={self.decoder.stages}"
            raise UserError(f"{both}: they must be equal, or the former 1")
        if self.sampler.guidance != 1 and not self.decoder.null_latent:
            raise UserError(f"sampler.guidance={self.sampler.guidance} needs decoder.null_latent: else leave it at 1")
        if self.sampler.guidance != 1 and self.sampler.stages == 1:
            raise UserError(f"sampler.guidance={self.sampler.guidance} needs sampler.stages above 1: leave it at 1")
        if self.decoder.kind in ("kl", "taef2") and (self.sampler.steps, self.sampler.noise) != (1, "zero"):
            needed = 'sampler.steps 1 and sampler.noise "zero"'
            raise UserError(f"decoder.kind {self.decoder.kind} needs {needed}: it takes no noise")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.encoder.latent_channels):
                channels = f"{self.encoder.latent_channels} latent channels"
                raise UserError(f"{name} is {getattr(self, name)}: give one number for each of the {channels}, or none")

        lengths = len(self.packed_mean), len(self.packed_variance)
        if lengths not in ((0, 0), (PATCH * self.encoder.latent_channels,) * 2):
            raise UserError(
                f"packed_mean and packed_variance have {lengths[0]} and {lengths[1]} numbers: give {PATCH} each for "
                f"every one of the {self.encoder.latent_channels} latent channels, or none"
            )
        if self.latents == "normalised" and self.packed_mean:
            raise UserError("packed_mean is for raw latents: leave it out, or set latents to raw")

    @property
    def takes_normalised(self) -> bool:
        """Whether `decode` takes latents as FLUX.2's pipelines hold them; see `latents`."""
        return self.encoder.family == "taef2" if self.latents == "family" else self.latents == "normalised"

    @property
    def packing(self) -> Packing | None:
        """How FLUX.2's pipelines hold these latents; None: they are of another family.

        Raises:
            UserError: raw ones, whose statistics the configuration lacks.
        """
        if self.encoder.family not in PACKED:
            return None
        channels = PATCH * self.encoder.latent_channels
        if self.takes_normalised:
            return Packing([0.0] * channels, [1.0] * channels, 0.0)
        if not self.packed_mean:
            raise UserError(
                "this model decodes FLUX.2's raw latents and does not know the statistics that its pipelines normalise "
                'them by: load it with encoder="flux2=WHERE", which has them'
            )
        return Packing(self.packed_mean, self.packed_variance, self.packed_eps)

    @classmethod
    def from_dict(cls, values: dict[str, Any], stages: int = 0) -> TokenizerConfig:
        """Build from plain values; an unknown key is a `UserError` that names it.

        Args:
            stages: `sampler.stages`, whatever the values say; 0: what they say.
        """
        with explained_as("not a tokenizer configuration of this version"):
            values = dict(values)
            if stages:
                values["sampler"] = values["sampler"] | {"stages": stages}
            values = with_kinds(values)
        parts: dict[str, Callable[..., Any]] = {
            "encoder": EncoderConfig,
            "decoder": lambda **fields: decoder_config(fields),
            "sampler": SamplerConfig,
        }
        return config_of(cls, values, parts, "tokenizer")


def with_kinds(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a tokenizer, whose `kl_decoder`, as it was written before decoders had kinds, is its decoder."""
    channels, others = values.get("kl_decoder"), {k: v for k, v in values.items() if k != "kl_decoder"}
    if not channels:
        return others
    kept = {name: value for name, value in (values.get("decoder") or {}).items() if name in SHARED}
    return others | {"decoder": {"kind": "kl", "channels": channels, **kept}}


def config_of(kind: type[T], values: Mapping[str, Any], parts: Mapping[str, Callable[..., Any]], what: str) -> T:
    """A configuration dataclass from plain values, its `parts` from dictionaries of their own.

    Raises:
        UserError: an unknown key, which the message names, or values that cannot be.
    """
    with explained_as(f"not a {what} configuration of this version"):
        return check_types(kind(**{k: parts[k](**v) if k in parts else v for k, v in values.items()}))


def check_types(config: T) -> T:
    """A dataclass whose values, and those of the dataclasses in it, have the types that it says; returns it.

    Raises:
        TypeError: one has another type; the message names it.
    """
    hints = typing.get_type_hints(type(config))
    for part in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            check_types(value)
        elif not _is_a(value, hints[part.name]):
            raise TypeError(f"{part.name} is {str(value)[:80]!r}: expected {_name(hints[part.name])}")
    return config


def _is_a(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, inner[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, origin or kind)


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
