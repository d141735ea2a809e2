"""What a latent says only together with the whole picture: a few blocks at latent resolution, run once a picture.

Encoders with norms or attention over the whole picture leave latents whose colour no neighbourhood tells (TAEF2's,
docs/retrofit.md). What undoes that has to see the whole picture, too; here each block's channels are scaled and shifted
by their own mean and deviation over it, through a small network (the squeeze and excitation of arXiv 1709.01507, with a
second moment and a shift). A decoder reads the result beside the latent, and stays local behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import Conv2d, Padding, zero_init

BLOCKS = 3
"""As many as TAEF2's own decoder has with statistics over the picture."""


class MomentBlock(nn.Module):
    """Residual block, `(B, D, h, w)` → the same, modulated by the moments of its own channels over the picture."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv2d(channels, channels, padding), zero_init(Conv2d(channels, channels, padding))
        self.linear1 = nn.Linear(2 * channels, 2 * channels)
        self.linear2 = zero_init(nn.Linear(2 * channels, 2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1.of_silu(x)
        mean = h.float().mean((2, 3), keepdim=True)
        deviation = ((h.float() - mean).square().mean((2, 3)) + 1e-4).sqrt()
        moments = torch.cat([mean[:, :, 0, 0], deviation], dim=1).to(h.dtype)
        scale, shift = self.linear2(F.silu(self.linear1(moments)))[:, :, None, None].chunk(2, dim=1)
        return x + self.conv2.of_silu(torch.addcmul(shift, h, 1 + scale.tanh()))  # bounded: blocks multiply


class Context(nn.Sequential):
    """Latents `(B, c, h, w)` of standard deviation near ½ → their context `(B, D, h, w)`, of any h and w."""

    def __init__(self, latent_channels: int, channels: int, padding: Padding) -> None:
        first = Conv2d(latent_channels, channels, padding)
        super().__init__(first, *(MomentBlock(channels, padding) for _ in range(BLOCKS)))
        # Keeps the latent's scale; the blocks begin as the identity.
        nn.init.normal_(first.weight, std=first.weight[0].numel() ** -0.5)
