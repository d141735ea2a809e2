"""Pixel-space U-ViT decoder: (noisy image x_t, time t, latent z) → velocity or clean image.

SSDD (arXiv 2510.04961), section 3.1 and table 1: a U-Net over pixels whose deepest level, 8× down, is a
transformer with windowed attention; every block is conditioned on the latent and on the time. `S/1` … `H/1` are the
paper's networks, weight for weight. What we add: patch p (pixel-unshuffle the input, pixel-shuffle the output,
drop the first log2(p) levels), x-prediction, and a linear shortcut from latent to pixels (`linear_skip`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..models import taesd
from ..models.attention import windowed_attention
from ..models.blocks import (
    Conv2d,
    Padding,
    check_padding,
    cosine_basis,
    norm_groups,
    resample_to,
    timestep_embedding,
    zero_init,
)

# SSDD table 1: base width, multipliers, middle blocks. XS is ours. Decoder parameters at patch 1, c = 4:
SIZES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "XS": (32, (1, 2, 3, 3), 8),  # 5.00 M
    "S": (48, (1, 2, 3, 3), 8),  # 14,057,059
    "B": (64, (1, 2, 3, 3), 10),  # 21,140,459
    "M": (96, (1, 2, 3, 3), 12),  # 50,280,147
    "L": (96, (1, 2, 4, 4), 16),  # 90,759,939
    "XL": (128, (1, 2, 4, 4), 16),  # 161,272,835
    "H": (192, (1, 2, 4, 4), 16),  # 362,688,003
}
PATCHES = (1, 2, 4, 8)
# Ours, for speed (docs/performance.md): convolutions alone, at patch 4: channels of both levels, residual blocks down
# and up. What runs between pixels and latent is two grids, of 4×4 and of 8×8 pixels.
CONVOLUTIONAL: dict[str, tuple[list[int], list[int], list[int]]] = {
    "CS": ([64, 128], [0, 2], [2, 3]),
    "CM": ([96, 192], [0, 2], [2, 3]),
    "CL": ([128, 256], [0, 3], [3, 4]),
}


@dataclass(kw_only=True)
class DecoderConfig:
    """The shape of a decoder. `size` fills in what is left at its zero value; every field can be set by hand."""

    size: str = "S/1"
    """`SIZE/PATCH`: XS, S, B, M, L, XL, H and 1, 2, 4, 8, the paper's network; or CS/4, CM/4, CL/4, convolutions alone
    and the fastest, which set norm, modulation, upsampling and linear_skip too; or `custom`: give patch, channels,
    middle_blocks, heads."""
    latent_channels: int = 4
    """c: channels of the latent."""
    factor: int = 8
    """Side of the pixel square behind one latent position."""
    prediction: Literal["", "v", "x"] = ""
    """What the network returns: velocity or clean image. Default: v at patch 1 (the paper's), x at patch ≥ 2."""
    patch: int = 0
    """Pixel-unshuffle factor of the input and pixel-shuffle factor of the output."""
    channels: list[int] = field(default_factory=list)
    """Channels of each level, finest first; the deepest level holds the transformer."""
    middle_blocks: int = -1
    """Transformer blocks in the middle."""
    heads: int = 0
    """Attention heads."""
    down_blocks: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    down: list[int] = field(default_factory=list)
    """Residual blocks of each level on the way down, finest first; default: `down_blocks` each."""
    up: list[int] = field(default_factory=list)
    """Residual blocks of each level on the way up, finest first; default: one more than on the way down."""
    modulation: bool = True
    """The latent modulates every residual block. False: it reaches them through the input only. Faster."""
    reach: int = 7
    """A token attends to tokens at most this many rows and columns away."""
    dropout: float = 0.0
    """Dropout inside residual blocks."""
    linear_skip: bool = False
    """Add a learned linear map of the latent's 3×3 neighbourhood to the clean image (needs prediction x)."""
    residual: float = 0.0
    """σᵣ, the standard deviation of what the latent leaves open, in image units (about 0.12 at 24 dB). Above 0, the
    clean image is mixed from the network's output and the noisy image as the best linear estimate is (`mixed`; needs
    prediction x): for decoders of several steps. It changes nothing at t = 1."""
    norm: Literal["group", "local"] = "group"
    """group: GroupNorm throughout (the paper's). local: no statistics over the picture, so that a pixel depends on its
    neighbourhood only: no norm in residual blocks, whose first weights keep the activations' scale instead, LayerNorm
    of single tokens before the transformer. Faster."""
    upsampling: Literal["nearest", "shuffle"] = "nearest"
    """Between levels on the way up. nearest: enlarged, then a convolution (the paper's). shuffle: a convolution of the
    coarse map, whose channels become pixels: half the operations, and each of the four pixels has its own weights."""
    padding: Padding = "zeros"
    """What convolutions read beyond the edge of the picture. zeros: the published networks; trained on small crops they
    are off by a constant on large pictures. replicate: the nearest value; right at any size."""
    attention: str = "auto"
    """Windowed attention backend: auto, dense, blocked or flex. All give the same result."""
    stages: int = 1
    """Stages of multi-scale decoding (`monobath.scales`), each with an embedding of its own; 1: none."""
    null_latent: bool = False
    """Learn a latent that stands for no latent at all, for classifier-free guidance (needs stages above 1)."""
    standardise: bool = False
    """Bring each channel of the latent to mean 0 and standard deviation ½ by constants, for foreign encoders. They are
    measured, and `linear_skip` is fitted, before training (`training/retrofit.py`); the weights keep them."""
    trunk: int = 0
    """Layers of the latents' own decoder, TAEF2's, that run before ours, frozen: ours decodes their features instead of
    the latent (`models/taesd.py`). 6: up to the last one with statistics over the picture; 11 and 16: up to the last
    one at twice and at four times the latent's resolution. 0: none."""
    slim: int = 0
    """Channels between the convolutions of TAEF2's last block, which has 64: its own decoder, slimmed and trained on,
    behind trunk 16, in place of ours. It sets all other fields; it reads neither noise nor time. 0: ours."""

    def __post_init__(self) -> None:
        if self.slim:
            if not 0 < self.slim <= taesd.CHANNELS or self.stages > 1:
                raise UserError(
                    f"decoder.slim is {self.slim}, with {self.stages} stages: give 1 to {taesd.CHANNELS}, and one stage"
                )
            self.size, self.patch, self.channels, self.middle_blocks = "custom", 1, [taesd.CHANNELS], 0
            self.down, self.up, self.norm, self.modulation, self.prediction = [0], [1], "local", False, "x"
            self.linear_skip = self.standardise = False
            self.residual, self.trunk, self.padding = 0.0, 16, "zeros"
        if self.size != "custom":
            self._fill_from_size()
        for name in ("patch", "middle_blocks"):
            if getattr(self, name) < (0 if name == "middle_blocks" else 1):
                raise UserError(f"decoder.size is custom: give decoder.{name} too")
        if self.middle_blocks and self.heads < 1:
            raise UserError("decoder.size is custom: give decoder.heads too")
        if not self.channels:
            raise UserError("decoder.size is custom: give decoder.channels too, such as [64, 128]")
        if self.patch & (self.patch - 1):
            raise UserError(f"decoder.patch is {self.patch}: it must be a power of two")
        if self.factor < 1 or self.factor & (self.factor - 1):
            raise UserError(f"decoder.factor is {self.factor}: it must be a power of two")
        if self.middle_blocks and self.channels[-1] % self.heads:
            raise UserError(f"decoder.heads={self.heads} does not divide the deepest width {self.channels[-1]}")
        if self.prediction == "":
            self.prediction = "v" if self.patch == 1 else "x"
        if self.prediction == "v" and self.patch > 1:
            raise UserError(
                f'decoder.prediction is "v" with patch {self.patch}: a patched decoder must predict "x" '
                "(the velocity forces full-resolution noise through a narrow network)"
            )
        if self.linear_skip and self.prediction != "x":
            raise UserError('decoder.linear_skip needs decoder.prediction "x"')
        if self.residual < 0 or (self.residual and self.prediction != "x"):
            raise UserError(f'decoder.residual is {self.residual}: give at least 0, and decoder.prediction "x" with it')
        if self.norm not in ("group", "local"):
            raise UserError(f'decoder.norm is {self.norm!r}: choose "group" or "local"')
        if self.upsampling not in ("nearest", "shuffle"):
            raise UserError(f'decoder.upsampling is {self.upsampling!r}: choose "nearest" or "shuffle"')
        check_padding("decoder.padding", self.padding)
        if self.down_blocks < 1 or self.reach < 0 or self.latent_channels < 1:
            raise UserError("decoder: down_blocks and latent_channels must be at least 1, reach at least 0")
        if self.stages < 1:
            raise UserError(f"decoder.stages is {self.stages}: it must be at least 1")
        if self.null_latent and self.stages == 1:
            raise UserError("decoder.null_latent needs decoder.stages above 1: guidance is for multi-scale decoding")
        if self.trunk and (self.trunk not in taesd.TRUNKS or self.factor != taesd.FACTOR):
            raise UserError(
                f"decoder.trunk is {self.trunk} at factor {self.factor}: choose of {', '.join(map(str, taesd.TRUNKS))} "
                f"for TAEF2's latents, of factor {taesd.FACTOR}, or 0"
            )
        if self.trunk and self.latent_channels == taesd.CHANNELS:
            raise UserError(f"decoder.trunk needs latents of other than {taesd.CHANNELS} channels: set it to 0")
        self.down = self.down or [self.down_blocks] * len(self.channels)
        self.up = self.up or [blocks + 1 for blocks in self.down]
        for name, least in (("down", 0), ("up", 1)):
            blocks = getattr(self, name)
            if len(blocks) != len(self.channels) or min(blocks) < least:
                raise UserError(
                    f"decoder.{name} is {blocks}: give a number for each of the {len(self.channels)} levels, "
                    f"at least {least}"
                )

    def _fill_from_size(self) -> None:
        name, _, patch = self.size.partition("/")
        if name in CONVOLUTIONAL and patch == "4":
            channels, down, up = CONVOLUTIONAL[name]
            self.patch, self.middle_blocks = self.patch or 4, max(0, self.middle_blocks)
            self.channels, self.down, self.up = self.channels or channels, self.down or down, self.up or up
            self.norm, self.modulation, self.upsampling, self.linear_skip = "local", False, "shuffle", True
            return
        if name not in SIZES or patch not in {str(p) for p in PATCHES}:
            raise UserError(
                f"decoder.size is {self.size!r}: give SIZE/PATCH with SIZE in {', '.join(SIZES)} "
                f"and PATCH in {', '.join(map(str, PATCHES))}, one of "
                f"{', '.join(f'{name}/4' for name in CONVOLUTIONAL)}, or custom"
            )
        base, multipliers, middle_blocks = SIZES[name]
        self.patch = self.patch or int(patch)
        dropped = int(patch).bit_length() - 1  # the transformer stays at 8×8 pixels
        self.channels = self.channels or [math.ceil(base * m / 32) * 32 for m in multipliers][dropped:]
        self.middle_blocks = middle_blocks if self.middle_blocks < 0 else self.middle_blocks
        dim = self.channels[-1]
        self.heads = self.heads or (4 if name in ("XS", "S") else min(16, max(4, dim // 64)))

    @property
    def token_side(self) -> int:
        """Side, in pixels, of one transformer token: image sides must be divisible by it."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def read_channels(self) -> int:
        """Channels of what the network reads: the latent, or the features that the trunk makes of it."""
        return taesd.CHANNELS if self.trunk else self.latent_channels

    @property
    def read_factor(self) -> int:
        """Side of the pixel square behind one position of that."""
        return self.factor // taesd.TRUNKS[self.trunk] if self.trunk else self.factor


class ResBlock(nn.Module):
    """Residual block modulated by the latent's context (first norm) and by the time (second norm).

    Without norms the first weights keep the scale (`keep_scale`).
    `context` is its width, 0 for a block that the latent does not modulate.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        context: int,
        time: int,
        dropout: float,
        norm: str = "group",
        padding: Padding = "zeros",
    ) -> None:
        super().__init__()
        local = norm == "local"
        self.norm1: nn.Module = (
            nn.Identity() if local else nn.GroupNorm(norm_groups(in_channels), in_channels, affine=False)
        )
        self.context = nn.Conv2d(context, 2 * in_channels, 1) if context else None
        self.conv1 = Conv2d(in_channels, out_channels, padding)
        self.norm2: nn.Module = nn.Identity() if local else nn.GroupNorm(norm_groups(out_channels), out_channels)
        self.time = nn.Linear(time, 2 * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(out_channels, out_channels, padding))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.context is not None:
            # The 1×1 convolution runs at latent resolution; its result is brought to the feature map.
            h = _modulate(h, self.context(context))
        h = self.conv1(F.silu(h))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


def _modulate(x: Tensor, modulation: Tensor) -> Tensor:
    """x·(1 + scale) + shift, where `modulation` (B, 2C, h, w) holds scale and shift, brought to x (B, C, H, W).

    Where whole rows repeat, only the columns are written out: a row is read H/h times instead. The full-size
    scale and shift would be the largest tensors of the network, and the most read ones.
    """
    (height, width), (h, w) = x.shape[2:], modulation.shape[2:]
    if height % h or width < w:
        scale, shift = resample_to(modulation, (height, width)).chunk(2, dim=1)
        return torch.addcmul(shift, x, 1 + scale)
    scale, shift = resample_to(modulation, (h, width)).unsqueeze(3).chunk(2, dim=1)
    return torch.addcmul(shift, x.unflatten(2, (h, height // h)), 1 + scale).flatten(2, 3)


class TransformerBlock(nn.Module):
    """AdaLN → windowed self-attention → +; LayerNorm → GEGLU MLP → +. Tokens `(B, N, D)`."""

    def __init__(self, dim: int, heads: int, reach: int, context: int, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.context = nn.Linear(context, 2 * dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(2 * reach + 1, 2 * reach + 1, heads))
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, 8 * dim)
        self.mlp_out = zero_init(nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Tensor, grid: tuple[int, int]) -> Tensor:
        # context (B, h, w, C), after SiLU; the linear map runs at latent resolution
        modulation = self.context(context).permute(0, 3, 1, 2)
        shift, scale = resample_to(modulation, grid).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        h = torch.addcmul(shift, self.norm1(x), 1 + scale)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = windowed_attention(q, k, v, self.bias, grid, backend=self.attention)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        value, gate = self.mlp_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp_out(value * F.gelu(gate))


class Middle(nn.Module):
    """The transformer at the deepest level, between two linear maps, added to its input `(B, D, h, w)`."""

    def __init__(self, config: DecoderConfig, context: int) -> None:
        super().__init__()
        dim = config.channels[-1]
        self.norm: nn.Module
        if config.norm == "local":
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        else:
            self.norm = nn.GroupNorm(norm_groups(dim), dim, eps=1e-6)
        self.linear_in = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config.heads, config.reach, context, config.attention)
            for _ in range(config.middle_blocks)
        )
        self.linear_out = nn.Linear(dim, dim)
        self.checkpointing = False

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        context = F.silu(context).permute(0, 2, 3, 1)
        h = self.linear_in(normed_tokens(self.norm, x))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, context, grid, use_reentrant=False)
            else:
                h = block(h, context, grid)
        return x + self.linear_out(h).transpose(1, 2).reshape(x.shape)


def normed_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """Feature map `(B, D, h, w)` → normalised tokens `(B, h·w, D)`."""
    if isinstance(norm, nn.LayerNorm):
        return norm(x.flatten(2).transpose(1, 2))
    return norm(x).flatten(2).transpose(1, 2)


def enlarged(x: Tensor, convolution: nn.Module, upsampling: str) -> Tensor:
    """Twice the height and width, see `DecoderConfig.upsampling`."""
    if upsampling == "shuffle":
        return F.pixel_shuffle(convolution(x), 2)
    return convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, then an optional change of resolution.

    Args:
        widths: (in, out) channels of each block.
        out: channels of the level.
        resample: "down", "up" or "".
        finer: channels that "up" with shuffling gives.
    """

    def __init__(
        self, widths: list[tuple[int, int]], out: int, config: DecoderConfig, resample: str, finer: int = 0
    ) -> None:
        super().__init__()
        width = config.channels[0]
        context = width if config.modulation else 0
        self.blocks = nn.ModuleList(
            ResBlock(i, o, context, 4 * width, config.dropout, config.norm, config.padding) for i, o in widths
        )
        self.resample: nn.Conv2d | None = None
        if resample == "down":
            self.resample = Conv2d(out, out, config.padding, stride=2)
        elif resample == "up":
            self.resample = Conv2d(out, 4 * finer if config.upsampling == "shuffle" else out, config.padding)


def keep_scale(decoder: Decoder) -> None:
    """First weights that keep the variance of activations near 1, which norms would otherwise see to.

    With PyTorch's usual weights, activations shrink to a few hundredths in a decoder without norms: the first
    convolution's are for 3·patch² + c channels, of which zero noise leaves the c of the latent, and each further one
    takes two thirds of the variance. Training then takes several times as long (docs/performance.md, levers).
    """
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.Conv2d) or name.startswith(("context", "trunk")):
            continue
        if name.endswith((".context", "conv2", "conv_out")):  # start without modulation, as the identity, at zero
            zero_init(module)
            continue
        # SiLU lets about a third of the variance through; what follows no SiLU keeps it all.
        gain = 3.0 if name.endswith("conv1") else 1.0
        nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
        nn.init.zeros_(cast(Tensor, module.bias))
    pixels = 3 * decoder.config.patch**2
    with torch.no_grad():
        latent = decoder.conv_in.weight[:, pixels:]
        # Latents have a standard deviation near one half: ours by training, others by `standardise`.
        nn.init.normal_(latent, std=2 / math.sqrt(latent[0].numel()))


def mixed(output: Tensor, x_t: Tensor, t: Tensor, residual: float) -> Tensor:
    """Clean image `(B, 3, H, W)` from the network's output and the noisy image x_t, `t` `(B,)` in [0, 1].

    If the output were what the latent says of the image, E[x | z], with an error of standard deviation σᵣ = `residual`
    in every pixel, this is the best linear estimate from it and from x_t/(1 − t), whose error is t/(1 − t): with little
    noise left the image is nearly there, and the network has little to add. At t = 1 it is the output itself. (The
    preconditioning of EDM, arXiv 2206.00364, section 5, around a conditional mean instead of 0.)
    """
    t = t.to(output.dtype)[:, None, None, None]
    share = t.square() / (t.square() + (residual * (1 - t)).square())  # of the output
    kept = residual**2 * (1 - t) / (t.square() + (residual * (1 - t)).square())  # (1 − share)/(1 − t), finite at 1
    return share * output + kept * x_t


class Decoder(nn.Module):
    """`decoder(x_t (B, 3, H, W), t (B,) in [0, 1], z (B, c, H/f, W/f))` → raw prediction `(B, 3, H, W)`.

    The prediction is the velocity or the clean image (`config.prediction`); `monobath.flow` converts. H and W must
    be divisible by `config.token_side`. The latent may have another resolution than H/f (low-resolution stages).
    With a trunk, z may also be its features, which `features` gives.
    A multi-scale decoder also takes the number of the stage, 0 … `config.stages` − 1, which all samples share; without
    one it is the last, which is at full resolution.
    """

    latent_shift: Tensor
    latent_scale: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        widths, patch = config.channels, config.patch
        context = widths[0]
        time = 4 * context
        read = config.read_channels
        self.middle: nn.Module
        self.trunk = taesd.Trunk(config.latent_channels, config.trunk) if config.trunk else None
        if config.slim:
            self.middle = nn.Identity()
            self.tail, self.conv_out = taesd.SlimTail(config.slim), taesd.conv(taesd.CHANNELS, 3)
            return
        self.conv_in = Conv2d(3 * patch**2 + read, widths[0], config.padding)
        # Only what reads the context makes it.
        self.context: nn.Module = nn.Identity()
        if config.modulation or config.middle_blocks:
            self.context = nn.Sequential(
                Conv2d(read, context, config.padding),
                nn.SiLU(),
                Conv2d(context, context, config.padding),
            )
        self.time = nn.Sequential(nn.Linear(context, time), nn.SiLU(), nn.Linear(time, time))

        self.down, skips = nn.ModuleList(), [[widths[0]]]
        previous, last = widths[0], len(widths) - 1
        for i, (width, blocks) in enumerate(zip(widths, config.down, strict=True)):
            pairs = [(previous if j == 0 else width, width) for j in range(blocks)]
            previous = width if blocks else previous
            self.down.append(Level(pairs, previous, config, "down" if i < last else ""))
            skips[-1] += [width] * blocks
            skips.append([previous])
        self.middle = Middle(config, context) if config.middle_blocks else nn.Identity()
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(config.up[i]):
                # A level's input and the output of each of its blocks on the way down are taken up again, last first.
                pairs.append((previous + (skips[i].pop() if skips[i] else 0), width))
                previous = width
            self.up.append(Level(pairs, width, config, "up" if i > 0 else "", widths[i - 1]))
            if config.upsampling == "shuffle":
                previous = widths[i - 1]
        self.norm_out: nn.Module = (
            nn.Identity() if config.norm == "local" else nn.GroupNorm(norm_groups(widths[0]), widths[0])
        )
        self.conv_out = Conv2d(widths[0], 3 * patch**2, config.padding)
        if config.norm == "local":
            keep_scale(self)
        if config.linear_skip:
            self.linear_skip = zero_init(Conv2d(read, 3 * config.read_factor**2, config.padding))
        if config.linear_skip and not (config.standardise or config.trunk):
            # Starts as the inverse of our encoder's shortcut: the latents' low frequencies as an image.
            basis = cosine_basis(config.latent_channels, config.factor) * config.factor
            with torch.no_grad():
                self.linear_skip.weight[:, :, 1, 1] = basis.T
        if config.standardise:
            self.register_buffer("latent_shift", torch.zeros(read, 1, 1))
            self.register_buffer("latent_scale", torch.ones(read, 1, 1))
        if config.stages > 1:  # zero: a single-scale decoder's weights mean what they meant
            self.stage_embedding = nn.Parameter(torch.zeros(config.stages, time))
        if config.null_latent:
            self.null_latent = nn.Parameter(torch.zeros(config.latent_channels))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor, stage: int | None = None) -> Tensor:
        self._check(x_t, t, z, stage)
        z = self.standardised(self.features(z))
        if self.config.slim:
            return 2 * self.conv_out(self.tail(z)) - 1
        context = self.context(z)
        x = F.pixel_unshuffle(x_t, self.config.patch)
        x = self.conv_in(torch.cat([x, resample_to(z, (x.shape[2], x.shape[3]))], dim=1))
        time = self.time(timestep_embedding(t, self.config.channels[0]).to(x.dtype))
        if self.config.stages > 1:
            time = time + self.stage_embedding[-1 if stage is None else stage]
        time = F.silu(time)
        skips = []
        for level in cast(Iterable[Level], self.down):
            skips.append([x])
            for block in level.blocks:
                x = self._run(block, x, context, time)
                skips[-1].append(x)
            if level.resample is not None:
                x = level.resample(x)
        if self.config.middle_blocks:
            x = self.middle(x, context)
        for level in cast(Iterable[Level], self.up):
            kept = skips.pop()
            for block in level.blocks:
                x = self._run(block, torch.cat([x, kept.pop()], dim=1) if kept else x, context, time)
            if level.resample is not None:
                x = enlarged(x, level.resample, self.config.upsampling)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.config.patch)
        if self.config.linear_skip:
            linear = F.pixel_shuffle(self.linear_skip(z), self.config.read_factor)
            x = x + resample_to(linear, (x.shape[2], x.shape[3]))
        return mixed(x, x_t, t, self.config.residual) if self.config.residual else x

    def features(self, z: Tensor) -> Tensor:
        """What the trunk makes of the latent: `(B, 64, …)`, in the weights' own type; without one, the latent.

        It has statistics over the whole picture. To decode in parts, cut its features, not the latent.
        """
        if self.trunk is None:
            return z
        with torch.autocast(z.device.type, enabled=False):
            return self.trunk(z)

    def standardised(self, z: Tensor) -> Tensor:
        """The latent, or the trunk's features, as the network takes it; see `DecoderConfig.standardise`."""
        return (z - self.latent_shift) * self.latent_scale if self.config.standardise else z

    def without(self, z: Tensor) -> Tensor:
        """What stands for no latent, in the shape of z."""
        assert self.config.null_latent, "this decoder has no null latent"
        return self.null_latent.to(z.dtype)[:, None, None].expand_as(z)

    def set_checkpointing(self, enabled: bool) -> None:
        """Activation checkpointing: less memory in training, one more forward pass. Same results."""
        self.checkpointing = enabled
        if isinstance(self.middle, Middle):
            self.middle.checkpointing = enabled

    def _run(self, block: nn.Module, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, context, time, use_reentrant=False)
        return block(x, context, time)

    def _check(self, x_t: Tensor, t: Tensor, z: Tensor, stage: int | None) -> None:
        side, c, stages = self.config.token_side, self.config.latent_channels, self.config.stages
        channels = {c, self.config.read_channels}
        if stage is not None and not 0 <= stage < stages:
            raise ValueError(f"stage is {stage}: this decoder has {stages}, counted from 0")
        if x_t.ndim != 4 or x_t.shape[1] != 3 or x_t.shape[2] % side or x_t.shape[3] % side:
            raise ValueError(f"x_t is {tuple(x_t.shape)}: expected (B, 3, H, W) with sides divisible by {side}")
        if z.ndim != 4 or z.shape[1] not in channels or z.shape[0] != x_t.shape[0]:
            raise ValueError(f"z is {tuple(z.shape)}: expected ({x_t.shape[0]}, {c}, h, w)")
        if t.shape != (x_t.shape[0],):
            raise ValueError(f"t is {tuple(t.shape)}: expected ({x_t.shape[0]},), one time a sample")
