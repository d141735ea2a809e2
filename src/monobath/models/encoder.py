"""KL encoder: image → diagonal Gaussian over latents.

The convolutional encoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix E), which SSDD
(arXiv 2510.04961, section 3) keeps and shares between all its decoders. `EncoderConfig(base=128)` is that
network weight for weight; what we add are compact forms: any width, an optional pixel-unshuffle before the first
convolution, no middle attention, and a linear shortcut from the pixels of a latent cell to its mean
(`linear_skip`, after the space-to-channel shortcuts of DC-AE, arXiv 2410.10733).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, check_choices, check_least
from ..words import did_you_mean
from .blocks import Checkpointed, Conv2d, Padding, cosine_basis, norm_groups, replicated

FAMILIES = {
    "kl": "diffusers' AutoencoderKL",
    "flux2": "diffusers' AutoencoderKLFlux2",
    "tiny": "diffusers' AutoencoderTiny",
    "dc": "diffusers' AutoencoderDC",
    "taef2": "TAEF2",
    "custom": "a callable",
}
"""Other people's encoders (`models/foreign.py`), and whose they are."""


@dataclass(kw_only=True)
class EncoderConfig:
    """The shape of an encoder. `f8c4`, the paper's, is `EncoderConfig()`: 34.16 M parameters.

    Of another `family`, only factor and latent_channels count: the rest is in that encoder's own files.
    """

    factor: int = 8
    """Side of the pixel square behind one latent position: 8, 16, 32 (any power of two)."""
    latent_channels: int = 4
    """c: channels of the latent."""
    base: int = 128
    """Channels of the first level."""
    multipliers: list[int] = field(default_factory=list)
    """Width of each level as a multiple of `base`; empty: 1, 2, 4, 4, … for log2(factor / patch) + 1 levels."""
    blocks: int = 2
    """Residual blocks a level."""
    patch: int = 1
    """Pixel-unshuffle factor before the first convolution; each doubling drops one level."""
    middle_attention: bool = True
    """Self-attention over all latent positions in the middle: O(N²) in latents. Compact encoders drop it."""
    linear_skip: bool = False
    """Add a learned linear map of each cell's factor² pixels to its mean."""
    padding: Padding = "zeros"
    """What convolutions read beyond the edge of the picture; see `DecoderConfig.padding`."""
    family: str = ""
    """Whose latents: kl, flux2, tiny, dc, taef2 or custom, a frozen encoder that is not stored with the model; empty:
    an encoder of ours."""
    source: str = field(default="", compare=False)
    """Of a foreign encoder: the folder, Hub id or MODULE:NAME that it was read from."""

    def __post_init__(self) -> None:
        if self.family and self.family not in FAMILIES:
            hint = did_you_mean(self.family, FAMILIES, f"choose from {', '.join(FAMILIES)}")
            raise UserError(f"encoder.family is {self.family!r}: {hint}")
        for name in ("factor", "patch"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise UserError(f"encoder.{name} is {value}: it must be a power of two")
        if self.patch > self.factor:
            raise UserError(f"encoder.patch={self.patch} is above encoder.factor={self.factor}: lower the patch")
        check_choices("encoder", self)
        check_least(1, {"encoder.latent_channels": self.latent_channels})
        if self.family:
            return
        levels = (self.factor // self.patch).bit_length()
        if not self.multipliers:
            self.multipliers = [1, 2, 4, 4, 4, 4, 4, 4][:levels]
        if len(self.multipliers) != levels:
            raise UserError(
                f"encoder.multipliers={self.multipliers} has {len(self.multipliers)} levels, but factor="
                f"{self.factor} with patch={self.patch} needs {levels}"
            )
        check_least(1, {"encoder.base": self.base, "encoder.blocks": self.blocks})

    @property
    def name(self) -> str:
        """The field's short name, such as `f8c4`."""
        return f"f{self.factor}c{self.latent_channels}"

    @property
    def title(self) -> str:
        """Name and whose it is, such as "TAEF2 (f8c32)", for messages."""
        return f"{FAMILIES[self.family] if self.family else 'an encoder of monobath'} ({self.name})"


class Posterior:
    """Diagonal Gaussian over latents, with the size of the image it came from.

    Args:
        moments: `(B, 2c, h, w)`: mean and log-variance along the channels. The log-variance is clamped to
            [-30, 20], and everything is float32 from here on (the KL overflows in half precision).
        size: (H, W) of the original image, before padding.
    """

    def __init__(self, moments: Tensor, size: tuple[int, int]) -> None:
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.size = size

    @property
    def std(self) -> Tensor:
        """Standard deviation `(B, c, h, w)`."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent: the mean, `(B, c, h, w)`, contiguous: its bytes are its values in order."""
        return self.mean.contiguous()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A random latent `(B, c, h, w)`. A CPU generator gives the same noise on every device."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean.device)

    def kl(self) -> Tensor:
        """KL divergence from N(0, I) in nats, summed over each sample's dimensions: `(B,)`, float32."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    """GroupNorm → SiLU → 3×3 conv, twice, plus the input (through a 1×1 conv where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, padding: Padding) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups(in_channels), in_channels, eps=1e-6)
        self.conv1 = Conv2d(in_channels, out_channels, padding)
        self.norm2 = nn.GroupNorm(norm_groups(out_channels), out_channels, eps=1e-6)
        self.conv2 = Conv2d(out_channels, out_channels, padding)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class GlobalAttention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """3×3 convolution of stride 2, padded on the right and the bottom only."""

    def __init__(self, channels: int, padding: Padding) -> None:
        super().__init__()
        self.conv, self.padding = nn.Conv2d(channels, channels, 3, stride=2), padding

    def forward(self, x: Tensor) -> Tensor:
        sides = (0, 1, 0, 1)
        return self.conv(F.pad(x, sides) if self.padding == "zeros" else replicated(x, sides))


def check_images(x: Tensor, factor: int) -> None:
    """What an encoder takes: `(B, 3, H, W)`, sides divisible by `factor`.

    Raises:
        ValueError: anything else.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"encoder input is {tuple(x.shape)}: expected (B, 3, H, W) with sides divisible by {factor}")


class Encoder(Checkpointed):
    """Image `(B, 3, H, W)` in [-1, 1], sides divisible by `factor` → moments `(B, 2c, H/f, W/f)`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.base * m for m in config.multipliers]
        self.conv_in = Conv2d(3 * config.patch**2, widths[0], config.padding)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            blocks = nn.ModuleList(
                ResBlock(previous if j == 0 else width, width, config.padding) for j in range(config.blocks)
            )
            down = Downsample(width, config.padding) if i < len(widths) - 1 else nn.Identity()
            self.levels.append(nn.ModuleDict({"blocks": blocks, "down": down}))
            previous = width
        self.middle_in = ResBlock(previous, previous, config.padding)
        self.middle_attention = GlobalAttention(previous) if config.middle_attention else nn.Identity()
        self.middle_out = ResBlock(previous, previous, config.padding)
        self.norm_out = nn.GroupNorm(norm_groups(previous), previous, eps=1e-6)
        self.conv_out = Conv2d(previous, 2 * config.latent_channels, config.padding)
        self.moments = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        # Start with little noise on the latents: at log-variance 0 it would drown the untrained means.
        nn.init.constant_(self.moments.bias[config.latent_channels :], -5.0)  # type: ignore[index]
        if config.linear_skip:
            self.linear_skip = nn.Conv2d(3 * config.factor**2, config.latent_channels, 1)
            basis = cosine_basis(config.latent_channels, config.factor) / config.factor
            with torch.no_grad():
                self.linear_skip.weight.copy_(basis[:, :, None, None])
                nn.init.zeros_(self.linear_skip.bias)  # type: ignore[arg-type]

    @property
    def anchor(self) -> Tensor:
        """A tensor where the weights are, and of their type."""
        return self.conv_in.weight

    def forward(self, x: Tensor) -> Tensor:
        f = self.config.factor
        check_images(x, f)
        h = self.conv_in(F.pixel_unshuffle(x, self.config.patch))
        for level in self.levels:
            for block in level["blocks"]:  # type: ignore[index]
                h = self._run(block, h)
            h = level["down"](h)  # type: ignore[index]
        h = self._run(self.middle_in, h)
        h = self.middle_attention(h)
        h = self._run(self.middle_out, h)
        moments = self.moments(self.conv_out(F.silu(self.norm_out(h))))
        if self.config.linear_skip:
            mean = self.linear_skip(F.pixel_unshuffle(x, f))
            moments = moments + F.pad(mean, (0, 0, 0, 0, 0, mean.shape[1]))  # the log-variance has no shortcut
        return moments
