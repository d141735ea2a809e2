"""TAEF2's own decoder, the last block slimmed, behind its frozen trunk (`models/taesd.py`): trained on with our losses.

It reads neither noise nor time: one step from zero noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import UserError
from ..models import taesd
from .base import DecoderShape, Features, Interval, PixelDecoder


@dataclass(kw_only=True)
class Taef2Config(DecoderShape):
    """The shape of TAEF2's decoder."""

    kind: Literal["taef2"] = "taef2"
    slim: int = taesd.CHANNELS
    """Channels between the convolutions of the last block: 1 to 64; the published one has 64."""
    unfolded: bool = False
    """Whether the last enlargement and the convolution behind it stay two layers, as published: a little slower, and
    whatever is trained, other programs can load it (`export/formats.py`)."""
    trunk = 16

    def __post_init__(self) -> None:
        if not 0 < self.slim <= taesd.CHANNELS:
            raise UserError(f"decoder.slim is {self.slim}: give 1 to {taesd.CHANNELS}")
        super().__post_init__()

    @property
    def title(self) -> str:
        return f"TAEF2's, slim {self.slim}"


class Taef2Decoder(PixelDecoder):
    """See the module and `PixelDecoder`."""

    fixed = "zero"

    def __init__(self, config: Taef2Config) -> None:
        super().__init__(config)
        self.add_trunk()
        self.tail, self.conv_out = taesd.SlimTail(config.slim, config.unfolded), taesd.conv(taesd.CHANNELS, 3)

    def output(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None) -> Tensor:
        return 2 * self.conv_out(self.tail(features.z)) - 1

    def receptive_field(self, output: Interval, factor: int | None = None) -> tuple[Interval, Interval]:
        # four 3×3 convolutions, behind a transposed one of 4×4
        f = factor or self.config.read_factor
        a, b = -((6 - output[0]) // 2), (output[1] + 5) // 2
        return output, (a * f, (b + 1) * f - 1)
