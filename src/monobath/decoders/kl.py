"""The decoder of latent diffusion's KL-VAE, diffusers' own: the baseline that a new decoder is measured against.

Rombach et al. 2022 (arXiv 2112.10752): convolutions and one attention layer, trained with L1, a perceptual and an
adversarial loss. Here it is a decoder of a `Tokenizer` like ours, so that it trains in the same loop, on the same
encoder, and is evaluated alike. It reads neither noise nor time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import UserError, imported
from ..models.blocks import Conv2d, Padding, norm_groups
from .base import DecoderShape, Features, PixelDecoder


@dataclass(kw_only=True)
class KLConfig(DecoderShape):
    """The shape of a KL-VAE decoder."""

    kind: Literal["kl"] = "kl"
    channels: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Of each level, finest first; their number fixes the factor, 2^(levels − 1)."""
    padding: Padding = "zeros"
    """What convolutions read beyond the edge of the picture; the published one: zeros."""

    def __post_init__(self) -> None:
        if not self.channels or 2 ** (len(self.channels) - 1) != self.factor:
            levels = self.factor.bit_length()
            raise UserError(f"decoder.channels is {self.channels}: factor {self.factor} needs {levels} levels")
        super().__post_init__()

    @property
    def title(self) -> str:
        return f"KL-VAE, channels {self.channels}"


class KLDecoder(PixelDecoder):
    """Latents `(B, c, h, w)` → image `(B, 3, f·h, f·w)`, not clipped; see `PixelDecoder`.

    Raises:
        UserError: diffusers is not installed.
    """

    fixed = "zero"

    def __init__(self, config: KLConfig) -> None:
        super().__init__(config)
        lacking = "a KL-VAE decoder needs diffusers: pip install 'monobath[diffusers]'"
        c = config.latent_channels
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder: Any = imported("diffusers.models.autoencoders.vae", lacking).Decoder(
            in_channels=c,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(config.channels),
            block_out_channels=tuple(config.channels),
            layers_per_block=2,
            norm_num_groups=min(norm_groups(width) for width in config.channels),
        )
        if config.padding != "zeros":
            for parent in list(self.decoder.modules()):
                for name, module in list(parent.named_children()):
                    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                        ours = Conv2d(module.in_channels, module.out_channels, config.padding)
                        ours.load_state_dict(module.state_dict())
                        setattr(parent, name, ours)

    @property
    def last_layer(self) -> nn.Conv2d:
        return self.decoder.conv_out

    def output(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None) -> Tensor:
        return self.decoder(self.post_quant_conv(features.z))
