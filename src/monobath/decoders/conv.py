"""The fast family: convolutions alone, on grids of 4×4 and of 8×8 pixels (docs/performance.md).

No norms, no attention, no modulation by the latent: it reaches the network through the input only. So a pixel depends
on its neighbourhood alone, and on the context of the whole picture where there is one, which is computed once. First
weights keep the activations' scale instead of norms (`keep_scale`). On the way up each of the four pixels has its own
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from .context import Context
from .unet import UNet, UNetShape

# Channels of both levels, residual blocks down and up, at patch 4.
SIZES: dict[str, tuple[list[int], list[int], list[int]]] = {
    "CS/4": ([64, 128], [0, 2], [2, 3]),
    "CM/4": ([96, 192], [0, 2], [2, 3]),
    "CL/4": ([128, 256], [0, 3], [3, 4]),
}


@dataclass(kw_only=True)
class ConvConfig(UNetShape):
    """The shape of a decoder of convolutions. It predicts the clean image."""

    kind: Literal["conv"] = "conv"
    size: str = "CM/4"
    """CS/4, CM/4, CL/4; or `custom`: give patch, channels and down."""
    linear_skip: bool = True
    context: int = 0
    """Channels of a context with statistics over the whole picture (`context.py`), read beside the latent: for latents
    whose colour no neighbourhood tells. Tiles have that of the whole picture. 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 0:
            raise UserError(f"decoder.context is {self.context}: give its channels, such as 64, or 0 for none")
        if self.context and self.trunk:
            raise UserError(
                f"decoder.context is {self.context} with decoder.trunk {self.trunk}: a trunk has statistics over the "
                "picture itself; set one of them to 0"
            )

    def _fill_from_size(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"decoder.size is {self.size!r}: choose {', '.join(SIZES)}, or custom")
        channels, down, up = SIZES[self.size]
        self.patch = self.patch or 4
        self.channels, self.down, self.up = self.channels or channels, self.down or down, self.up or up


class ConvDecoder(UNet):
    """A U-Net of residual convolutions; see `PixelDecoder`."""

    norm = False
    shuffled = True

    def add_context(self) -> int:
        config = self.config
        if config.context:
            self.context = Context(config.read_channels, config.context, config.padding)
        return 0  # it is read, and modulates no block
