"""TAESD family: tiny convolutional encoder and decoder of a larger autoencoder's latents.

After github.com/madebyollin/taesd (MIT licence), in the form of its later members (TAEF2, for the latents of FLUX.2's
autoencoder): a plain `Sequential` each, whose positions are the names in the files, so that a published state dict
loads strictly. Images are in [0, 1], unlike everywhere else in monobath; latents are the large autoencoder's, raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import explained_as
from .loading import load_strictly

FACTOR = 8
"""Side of the pixel square behind one latent position."""
CHANNELS = 64
"""Of the features between the layers of the published networks."""
TRUNKS = {6: 1, 11: 2, 16: 4}
"""How many first layers of a decoder make a `Trunk`, and how many times the latent's resolution their features have."""


class Block(nn.Module):
    """ReLU(three convolutions + skip), `(B, C, H, W)` → the same; `pooled` first adds a bottleneck turned inside out.

    That one is 1×1 to four times the channels, GroupNorm over four groups, ReLU, 1×1 back: the norm's statistics are
    the only thing that reaches across the whole picture.
    """

    def __init__(self, channels: int, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(), conv(channels, channels)
        )
        self.pool: nn.Sequential | None = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                nn.GroupNorm(4, 4 * channels),
                nn.ReLU(),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Latents → [-3, 3], smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Trunk(nn.Module):
    """The first layers of a TAESD decoder, frozen: latents `(B, c, h, w)` → features `(B, 64, s·h, s·w)`.

    Published latents may hold what no neighbourhood tells, such as the mean colour of TAEF2's: the norms that undo it
    are among these layers (`Block`). What comes after them is local. Features are left as they are: latents are told
    from them by their number of channels.

    Args:
        latent_channels: c, not 64.
        layers: how many; a key of `TRUNKS`, whose value is s.
    """

    def __init__(self, latent_channels: int, layers: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.layers = taesd_decoder(latent_channels)[:layers]
        self.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z) if z.shape[1] == self.latent_channels else z


class SlimTail(nn.Module):
    """What a decoder does behind 16 layers and before its last, with fewer channels in its last block.

    Features `(B, 64, h, w)` → `(B, 64, 2h, 2w)`. The enlargement and the convolution behind it are one transposed
    convolution, with the same result and 4 products instead of 9.

    Args:
        hidden: channels between the block's convolutions; the published networks have 64.
        unfolded: keep the two apart, as the published networks have them.
    """

    def __init__(self, hidden: int, unfolded: bool = False) -> None:
        super().__init__()
        self.up: nn.Module = nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, stride=2, padding=1, bias=False)
        if unfolded:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2), conv(CHANNELS, CHANNELS, bias=False))
        self.conv = nn.Sequential(
            conv(CHANNELS, hidden), nn.ReLU(), conv(hidden, hidden), nn.ReLU(), conv(hidden, CHANNELS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return torch.relu(self.conv(x) + x)

    @torch.no_grad()
    def take(self, own: nn.Sequential, features: Tensor) -> None:
        """Weights from a whole decoder: of its last block, the channels that say most.

        That is the deviation of a channel times the norm of the weights that read it; the mean of those that are left
        out goes into the biases behind them.

        Args:
            own: what `taesd_decoder` makes.
            features: `(B, 64, h, w)`, of its first 16 layers, to take means and deviations over.
        """
        kernel = cast(nn.Conv2d, own[17]).weight
        pulse = torch.eye(CHANNELS).reshape(CHANNELS, CHANNELS, 1, 1).to(kernel)
        answer = F.conv2d(F.interpolate(F.pad(pulse, (2, 2, 2, 2)), scale_factor=2.0), kernel, padding=1)
        if isinstance(self.up, nn.Sequential):
            cast(nn.Conv2d, self.up[1]).weight.copy_(kernel)
        else:
            cast(nn.ConvTranspose2d, self.up).weight.copy_(answer[:, :, 3:7, 3:7])
        given, ours = cast(Block, own[18]).conv, self.conv
        x, kept = self.up(features), torch.arange(CHANNELS)  # channels of x that are read
        for i in (0, 2, 4):
            source, target = cast(nn.Conv2d, given[i]), cast(nn.Conv2d, ours[i])
            x = x if i == 0 else torch.relu(x)
            left = torch.ones(x.shape[1], dtype=torch.bool)
            left[kept] = False
            bias = cast(Tensor, source.bias) + source.weight.sum((2, 3))[:, left] @ x.mean((0, 2, 3))[left]
            x = source(x)
            chosen = torch.arange(CHANNELS)
            if i < 4:
                read = cast(nn.Conv2d, given[i + 2]).weight.square().sum((0, 2, 3)).sqrt()
                chosen = (torch.relu(x).std((0, 2, 3)) * read).topk(target.out_channels).indices.sort().values
            target.weight.copy_(source.weight[chosen][:, kept])
            cast(Tensor, target.bias).copy_(bias[chosen])
            kept = chosen


def conv(i: int, o: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """3×3, padded."""
    return nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=bias)


def taesd_encoder(latent_channels: int, channels: int = 64) -> nn.Sequential:
    """Images `(B, 3, H, W)` in [0, 1], sides divisible by 8 → latents `(B, c, H/8, W/8)`."""
    layers: list[nn.Module] = [conv(3, channels), Block(channels)]
    for pooled in (False, False, True):
        layers += [conv(channels, channels, stride=2, bias=False), *(Block(channels, pooled) for _ in range(3))]
    return nn.Sequential(*layers, conv(channels, latent_channels))


def taesd_decoder(latent_channels: int, channels: int = 64) -> nn.Sequential:
    """Latents `(B, c, h, w)` → images `(B, 3, 8h, 8w)`, about in [0, 1] (not clipped)."""
    layers: list[nn.Module] = [Clamp(), conv(latent_channels, channels), nn.ReLU()]
    for pooled in (True, False, False):
        layers += [Block(channels, pooled) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv(channels, channels, bias=False)]
    return nn.Sequential(*layers, Block(channels), conv(channels, 3))


def from_state(part: Literal["encoder", "decoder"], state: Mapping[str, Tensor], what: str) -> nn.Sequential:
    """Build the encoder or decoder behind a state dict, in float32 and evaluation mode; its shapes tell the sizes.

    Raises:
        UserError: another architecture; the message starts with `what` and says what does not fit.
    """
    make, first, last = (taesd_encoder, "0", "14") if part == "encoder" else (taesd_decoder, "1", "1")
    told = f"{what} does not fit the model: {first}.weight or {last}.weight is no 3×3 convolution of this architecture"
    with explained_as(told):
        channels, latent_channels = len(state[f"{first}.weight"]), state[f"{last}.weight"].shape[part == "decoder"]
    model = make(latent_channels, channels)
    load_strictly(model, state, what)
    return model.eval()
