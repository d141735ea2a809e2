"""The decoder of latent diffusion's KL-VAE, diffusers' own: the baseline that a new decoder is measured against.

Rombach et al. 2022 (arXiv 2112.10752): convolutions and one attention layer, trained with L1, a perceptual and an
adversarial loss. Here it is a decoder of a `Tokenizer` like ours, so that it trains in the same loop, on the same
encoder, and is evaluated alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.blocks import Conv2d, norm_groups
from .folded import OneStep
from .uvit import DecoderConfig


class KLDecoder(OneStep):
    """`module(z (B, c, h, w))` → image `(B, 3, f·h, f·w)`, not clipped.

    Args:
        config: for the latent's channels, factor and padding; nothing else of it is used.
        channels: of each level, finest first, such as [128, 256, 512, 512]; their number fixes f = 2^(levels − 1).

    Raises:
        UserError: diffusers is not installed, or the levels do not give the factor.
    """

    trains = True

    def __init__(self, config: DecoderConfig, channels: list[int]) -> None:
        super().__init__(config, "zero")
        try:
            from diffusers.models.autoencoders.vae import Decoder
        except ImportError:
            raise UserError("a KL-VAE decoder needs diffusers: pip install 'monobath[diffusers]'") from None
        if 2 ** (len(channels) - 1) != config.factor:
            levels = config.factor.bit_length()
            raise UserError(f"kl_decoder is {channels}: factor {config.factor} needs {levels} levels")
        c = config.latent_channels
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder: Any = Decoder(
            in_channels=c,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=2,
            norm_num_groups=min(norm_groups(width) for width in channels),
        )
        if config.padding != "zeros":
            for parent in list(self.decoder.modules()):
                for name, module in list(parent.named_children()):
                    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                        ours = Conv2d(module.in_channels, module.out_channels, config.padding)
                        ours.load_state_dict(module.state_dict())
                        setattr(parent, name, ours)

    @property
    def conv_out(self) -> nn.Conv2d:
        """The last layer, where the adversarial loss is weighed."""
        return self.decoder.conv_out

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.decoder(self.post_quant_conv(z))
