"""The U-Net between x_t and the prediction that our decoders share: levels of residual blocks on the way down and up.

SSDD (arXiv 2510.04961), section 3.1. Pixels are unshuffled by `patch` before the finest level and shuffled behind it
(ours; patch 1 is the paper's). What stands in the middle, and what modulates the blocks, is the decoder's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.blocks import Conv2d, Padding, norm_groups, resample_to, timestep_embedding, zero_init
from .base import Features, Interval, PixelDecoder, WrappedShape


@dataclass(kw_only=True)
class UNetShape(WrappedShape):
    """The shape of a U-Net. `size` fills in what is left at its zero value; every field can be set by hand."""

    size: str
    """Name of a shape; custom: give patch and channels."""
    patch: int = 0
    """Pixel-unshuffle factor of the input and pixel-shuffle factor of the output."""
    channels: list[int] = field(default_factory=list)
    """Channels of each level, finest first."""
    down: list[int] = field(default_factory=list)
    """Residual blocks of each level on the way down, finest first."""
    up: list[int] = field(default_factory=list)
    """Residual blocks of each level on the way up, finest first; default: one more than on the way down."""
    dropout: float = 0.0
    """Dropout inside residual blocks."""

    def __post_init__(self) -> None:
        if self.size != "custom":
            self._fill_from_size()
        if self.patch < 1:
            raise UserError("decoder.size is custom: give decoder.patch too")
        if not self.channels:
            raise UserError("decoder.size is custom: give decoder.channels too, such as [64, 128]")
        if self.patch & (self.patch - 1):
            raise UserError(f"decoder.patch is {self.patch}: it must be a power of two")
        self._complete()
        self.up = self.up or [blocks + 1 for blocks in self.down]
        for name, least in (("down", 0), ("up", 1)):
            blocks = getattr(self, name)
            if len(blocks) != len(self.channels) or min(blocks) < least:
                wanted = f"{len(self.channels)} numbers, one for each level, at least {least}"
                raise UserError(f"decoder.{name} is {blocks}: give {wanted}")
        super().__post_init__()

    def _fill_from_size(self) -> None:
        raise NotImplementedError

    def _complete(self) -> None:
        """What follows from patch and channels."""

    @property
    def title(self) -> str:
        return self.size if self.size != "custom" else f"custom, channels {self.channels}"

    @property
    def token_side(self) -> int:
        """Side, in pixels, of one position of the deepest level: image sides must be divisible by it."""
        return int(self.patch * 2 ** (len(self.channels) - 1))


class ResBlock(nn.Module):
    """Residual block modulated by the latent's context (first norm) and by the time (second norm).

    Without norms the first weights keep the scale (`keep_scale`).

    Args:
        context: width of the latent's context; 0: the latent does not modulate it.
        time: width of the time embedding.
        norm: GroupNorm; False: none.
    """

    def __init__(
        self, widths: tuple[int, int], context: int, time: int, dropout: float, *, norm: bool, padding: Padding
    ) -> None:
        super().__init__()
        i, o = widths
        self.norm1: nn.Module = nn.GroupNorm(norm_groups(i), i, affine=False) if norm else nn.Identity()
        self.context = nn.Conv2d(context, 2 * i, 1) if context else None
        self.conv1 = Conv2d(i, o, padding)
        self.norm2: nn.Module = nn.GroupNorm(norm_groups(o), o) if norm else nn.Identity()
        self.time = nn.Linear(time, 2 * o)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv2d(o, o, padding))
        self.shortcut = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None, time: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.context is not None:
            # The 1×1 convolution runs at latent resolution; its result is brought to the feature map.
            h = modulate(h, self.context(context))
        h = self.conv1.of_silu(h)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(x) + h


def modulate(x: Tensor, modulation: Tensor) -> Tensor:
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


class Level(nn.Module):
    """Residual blocks of one resolution, then an optional change of resolution."""

    def __init__(self, blocks: Iterable[nn.Module], resample: nn.Conv2d | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


def enlarged(x: Tensor, convolution: nn.Module, shuffled: bool) -> Tensor:
    """Twice the height and width: nearest, then a convolution; or a convolution whose channels become pixels."""
    if shuffled:
        return F.pixel_shuffle(convolution(x), 2)
    return convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(PixelDecoder):
    """The network; see the module.

    Attributes:
        norm: GroupNorm in blocks and at the end.
        shuffled: on the way up a convolution of the coarse map gives four pixels each; False: see `enlarged`.
    """

    norm = True
    shuffled = False
    context: nn.Module | None
    """What gives the blocks their context, or what the network reads beside the latent."""
    middle: nn.Module | None
    """What stands between the way down and the way up."""

    def __init__(self, config: UNetShape) -> None:
        super().__init__(config)
        self.context = self.middle = None
        self.add_trunk()
        widths = config.channels
        time, last = 4 * widths[0], len(widths) - 1
        self.conv_in = Conv2d(3 * config.patch**2 + config.known_channels, widths[0], config.padding)
        width = self.add_context()
        self.modulated = width > 0
        self.time = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))

        def block(pair: tuple[int, int]) -> ResBlock:
            return ResBlock(pair, width, time, config.dropout, norm=self.norm, padding=config.padding)

        self.down, skips = nn.ModuleList(), [[widths[0]]]
        previous = widths[0]
        for i, (own, blocks) in enumerate(zip(widths, config.down, strict=True)):
            pairs = [(previous if j == 0 else own, own) for j in range(blocks)]
            previous = own if blocks else previous
            made = [block(pair) for pair in pairs]
            self.down.append(Level(made, Conv2d(previous, previous, config.padding, stride=2) if i < last else None))
            skips[-1] += [own] * blocks
            skips.append([previous])
        self.add_middle()
        self.up = nn.ModuleList()
        for i, own in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(config.up[i]):
                # A level's input and the output of each of its blocks on the way down are taken up again, last first.
                pairs.append((previous + (skips[i].pop() if skips[i] else 0), own))
                previous = own
            finer = 4 * widths[i - 1] if self.shuffled else own
            made = [block(pair) for pair in pairs]
            self.up.append(Level(made, Conv2d(own, finer, config.padding) if i > 0 else None))
            if self.shuffled:
                previous = widths[i - 1]
        self.norm_out: nn.Module = nn.GroupNorm(norm_groups(widths[0]), widths[0]) if self.norm else nn.Identity()
        self.conv_out = Conv2d(widths[0], 3 * config.patch**2, config.padding)
        if not self.norm:
            keep_scale(self)
        self.wrap()
        if config.stages > 1:  # zero: a single-scale decoder's weights mean what they meant
            self.stage_embedding = nn.Parameter(torch.zeros(config.stages, time))
        if config.null_latent:
            self.null_latent = nn.Parameter(torch.zeros(config.latent_channels))

    def add_context(self) -> int:
        """Make `context`, if there is one, and say how wide what it gives the blocks is; 0: it modulates none."""
        return 0

    def add_middle(self) -> None:
        """Make `middle`, if there is one."""

    def context_of(self, z: Tensor) -> Tensor | None:
        return None if self.context is None else self.context(z)

    @property
    def hidden_block(self) -> nn.Module:
        """The block whose output is aligned where nothing else is asked for: the last one before the way up."""
        deepest, first_up = cast(Level, self.down[-1]), cast(Level, self.up[0])
        return deepest.blocks[-1] if len(deepest.blocks) else first_up.blocks[0]

    def output(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None) -> Tensor:
        x = self.start(x_t, features)
        time, skips = self.time_of(t, x.dtype, stage), []
        for level in cast(Iterable[Level], self.down):
            skips.append([x])
            for block in level.blocks:
                x = self._run(block, x, features.context, time)
                skips[-1].append(x)
            if level.resample is not None:
                x = level.resample(x)
        if self.middle is not None:
            x = self.middle(x, features.context)
        for level in cast(Iterable[Level], self.up):
            kept = skips.pop()
            for block in level.blocks:
                x = self._run(block, torch.cat([x, kept.pop()], dim=1) if kept else x, features.context, time)
            if level.resample is not None:
                x = enlarged(x, level.resample, self.shuffled)
        return F.pixel_shuffle(self.conv_out.of_silu(self.norm_out(x)), self.config.patch)

    def start(self, x_t: Tensor, features: Features) -> Tensor:
        """The finest level's map, of what the network reads."""
        x = F.pixel_unshuffle(x_t, self.config.patch)
        return self.conv_in(torch.cat([x, resample_to(features.z, (x.shape[2], x.shape[3]))], dim=1))

    def time_of(self, t: Tensor, dtype: torch.dtype, stage: int | None = None) -> Tensor:
        """Embedding `(B, 4C)` of the times `(B,)` and of the stage, after SiLU; None: the last stage."""
        time = self.time(timestep_embedding(t, self.config.channels[0]).to(dtype))
        if self.stages > 1:
            time = time + self.stage_embedding[-1 if stage is None else stage]
        return F.silu(time)

    def without(self, z: Tensor) -> Tensor:
        """What stands for no latent, in the shape of z."""
        assert self.config.null_latent, "this decoder has no null latent"
        return self.null_latent.to(z.dtype)[:, None, None].expand_as(z)

    def receptive_field(self, output: Interval, factor: int | None = None) -> tuple[Interval, Interval] | None:
        # The walk back through `output`.
        if self.norm:
            return None
        config, f = self.config, factor or self.config.read_factor
        deepest, modulated = len(config.channels) - 1, self.modulated
        # What is read of the features, in pixels; 3×3 convolutions of the context read two positions more.
        reads = [(output[0] // f * f, output[1])]

        def read(first: int, last: int, side: int, around: int) -> None:
            """Cells of `side` pixels read positions that lie up to `around` further out."""
            low, high = first * side // f - around, ((last + 1) * side - 1) // f + around
            reads.append((low * f, (high + 1) * f - 1))

        if config.linear_skip:
            read(*output, 1, 1)
        a, b = (n // config.patch for n in output)
        a, b = a - 1, b + 1  # conv_out
        for i in range(deepest + 1):
            a, b = a - 2 * config.up[i], b + 2 * config.up[i]  # two 3×3 convolutions a block
            if modulated:
                read(a, b, config.patch << i, 2)
            if i < deepest and self.shuffled:
                a, b = a // 2 - 1, b // 2 + 1  # a convolution before the doubling
            elif i < deepest:
                a, b = (a - 1) // 2, (b + 1) // 2  # and after it
        a, b = a - self.middle_reach, b + self.middle_reach
        if self.middle is not None:
            read(a, b, self.unit, 2)
        # Skips need no more than the way through the deeper levels.
        for i in range(deepest, -1, -1):
            if i < deepest:
                a, b = 2 * a - 1, 2 * b + 1  # a convolution of stride 2
            a, b = a - 2 * config.down[i], b + 2 * config.down[i]
            if modulated and config.down[i]:
                read(a, b, config.patch << i, 2)
        a, b = a - 1, b + 1  # conv_in
        read(a, b, config.patch, 0)
        pixels = (a * config.patch, (b + 1) * config.patch - 1)
        return pixels, (min(first for first, _ in reads), max(last for _, last in reads))

    middle_reach = 0
    """How far the middle looks, in its own positions."""


def keep_scale(decoder: UNet) -> None:
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
