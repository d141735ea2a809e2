"""The decoder at t = 1, with everything that is constant there folded away: latent (and noise) → picture.

`FoldedDecoder(decoder)` computes what one Euler step from pure noise computes, x̂ = D(ε, 1, z) (SSDD, arXiv
2510.04961, section 3), to rounding. At a fixed time the time network and every time scale and shift are constants:
they go into the second norm's affine map. With ε = 0 the noise half of the input convolution does nothing: it goes.
All modulations by the latent are one convolution at latent resolution; normalisation and modulation are one pass over
a feature map instead of two; queries, keys and values are one matrix product; a LayerNorm's affine map goes into the
linear layer behind it. No branch depends on the picture's size, so that the module exports with free H and W.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import Prediction
from ..models.attention import windowed_attention
from ..models.blocks import Conv2d
from ..sampling import Noise
from .base import Features, PixelDecoder
from .unet import Level, ResBlock, UNet, enlarged
from .uvit import Middle, TransformerBlock, normed_tokens

L = TypeVar("L", nn.Conv2d, nn.Linear)


def folded(decoder: PixelDecoder, noise: Noise) -> PixelDecoder:
    """The one-step form of a decoder, which shares no memory with it; one that has nothing to fold is copied.

    Args:
        noise: "zero" leaves out the noise input; "gaussian" keeps it. Of several stages it is the last one, from t = 1.
    """
    if isinstance(decoder, UNet) and decoder.trains:
        return FoldedDecoder(decoder, noise)
    copied = deepcopy(decoder).requires_grad_(False).eval()
    copied.trains = False
    return copied


class OneStepCall(nn.Module):
    """A decoder as other programs call it: `module(latent (B, c, h, w), noise (B, 3, H, W) if it needs one)`.

    The result is the clean image `(B, 3, H, W)`, not clipped. The latent's sides must be multiples of
    max(1, `decoder.unit` / f).
    """

    def __init__(self, decoder: PixelDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        time = z if noise is None else noise  # a fixed decoder reads no time
        return self.decoder.predict(noise if noise is not None else z, time, self.decoder.features(z))


class FoldedDecoder(UNet):
    """A U-Net at t = 1. It reads no time, and x_t only where it starts from Gaussian noise; see `folded`."""

    trains = False

    @torch.no_grad()
    def __init__(self, decoder: UNet, noise: Noise) -> None:
        config = decoder.config
        PixelDecoder.__init__(self, config)
        self.fixed, self.norm, self.shuffled = noise, decoder.norm, decoder.shuffled
        self.middle_reach, self.modulated = decoder.middle_reach, decoder.modulated
        self.trunk = deepcopy(decoder.trunk)
        time = F.silu(decoder.time_of(decoder.conv_in.weight.new_ones(1), decoder.conv_in.weight.dtype))
        if config.standardise:
            # Not folded into the weights: where a convolution pads the latent with zeros, its mean would be missing.
            self.register_buffer("latent_shift", decoder.latent_shift.clone())
            self.register_buffer("latent_scale", decoder.latent_scale.clone())
        self.context = deepcopy(decoder.context)
        pixels = 3 * config.patch**2
        self.conv_in = deepcopy(decoder.conv_in)
        if noise == "zero":
            self.conv_in = Conv2d(config.read_channels, config.channels[0], config.padding)
            _filled(self.conv_in, decoder.conv_in.weight[:, pixels:], decoder.conv_in.bias)
        parts: list[nn.Conv2d] = []
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for levels, kept in ((decoder.down, self.down), (decoder.up, self.up)):
            for level in cast(list[Level], levels):
                blocks = cast(list[ResBlock], list(level.blocks))
                parts += [block.context for block in blocks if block.context is not None]
                kept.append(Level([FoldedBlock(block, time) for block in blocks], deepcopy(level.resample)))
        if parts:
            self.modulation = _merged(parts)
        self.widths = [part.out_channels for part in parts]
        self.middle = FoldedMiddle(decoder.middle) if isinstance(decoder.middle, Middle) else nn.Identity()
        self.norm_out, self.conv_out = deepcopy(decoder.norm_out), deepcopy(decoder.conv_out)
        self.linear_skip = deepcopy(decoder.linear_skip)
        self.requires_grad_(False).eval()

    @property
    def prediction(self) -> Prediction:
        return "x"

    @property
    def stages(self) -> int:
        return 1

    def context_of(self, z: Tensor) -> Tensor | None:
        return None if isinstance(self.context, nn.Identity) else self.context(z)

    def predict(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None = None) -> Tensor:
        config, factor, z, context = self.config, features.factor, features.z, features.context
        modulations = iter(self.modulation(context).split(self.widths, dim=1) if self.widths else ())
        x = _to_level(z, factor, config.patch)
        if self.fixed == "gaussian":
            x = torch.cat([F.pixel_unshuffle(x_t, config.patch), x], dim=1)
        x = self.conv_in(x)
        skips = []
        for depth, level in enumerate(cast(Iterable[Level], self.down)):
            skips.append([x])
            for block in level.blocks:
                x = block(x, next(modulations, None), factor, config.patch << depth)
                skips[-1].append(x)
            if level.resample is not None:
                x = level.resample(x)
        if isinstance(self.middle, FoldedMiddle):
            x = self.middle(x, context, factor, config.token_side)
        depth = len(self.up)
        for level in cast(Iterable[Level], self.up):
            depth, kept = depth - 1, skips.pop()
            for block in level.blocks:
                x = torch.cat([x, kept.pop()], dim=1) if kept else x
                x = block(x, next(modulations, None), factor, config.patch << depth)
            if level.resample is not None:
                x = enlarged(x, level.resample, self.shuffled)
        x = F.pixel_shuffle(self.conv_out.of_silu(self.norm_out(x)), config.patch)
        if self.linear_skip is not None:
            x = x + F.pixel_shuffle(self.linear_skip(z), factor)
        if config.prediction == "v" and self.fixed == "gaussian":
            x = x + x_t  # x̂ = x_t + t·v at t = 1; with zero noise, v is the picture itself
        return x


class FoldedBlock(nn.Module):
    """`ResBlock` at a fixed time; the modulation, if any, arrives computed, scale with its 1 already added."""

    def __init__(self, block: ResBlock, time: Tensor) -> None:
        super().__init__()
        first, second = block.norm1, block.norm2
        self.groups1, self.eps1 = (first.num_groups, first.eps) if isinstance(first, nn.GroupNorm) else (0, 0.0)
        self.conv1, self.conv2, self.shortcut = deepcopy(block.conv1), deepcopy(block.conv2), deepcopy(block.shortcut)
        scale, shift = block.time(time)[0].chunk(2)
        self.norm2 = deepcopy(second)
        if isinstance(self.norm2, nn.GroupNorm):
            self.norm2.weight.copy_(self.norm2.weight * (1 + scale))
            self.norm2.bias.copy_(self.norm2.bias * (1 + scale) + shift)
        else:  # nothing between the convolution and the scale: into its weights
            self.conv1.weight.mul_((1 + scale)[:, None, None, None])
            cast(Tensor, self.conv1.bias).copy_(cast(Tensor, self.conv1.bias) * (1 + scale) + shift)

    def forward(self, x: Tensor, modulation: Tensor | None, factor: int, side: int) -> Tensor:
        h = x
        if modulation is not None:
            h = _modulated_norm(x, modulation, self.groups1, self.eps1, factor, side)
        elif self.groups1:
            h = F.group_norm(x, self.groups1, eps=self.eps1)
        h = self.conv1.of_silu(h)
        h = self.conv2.of_silu(self.norm2(h))
        return self.shortcut(x) + h


class FoldedMiddle(nn.Module):
    """`Middle` with the modulations of all its blocks as one linear map."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        blocks = cast(list[TransformerBlock], list(middle.blocks))
        self.norm, self.linear_in, self.linear_out = map(deepcopy, (middle.norm, middle.linear_in, middle.linear_out))
        self.blocks = nn.ModuleList(FoldedTransformerBlock(block) for block in blocks)
        if blocks:
            weight = torch.cat([block.context.weight for block in blocks])
            bias = torch.cat([_shift_first(block.context.bias) for block in blocks])
            self.modulation = _convolution(weight[:, :, None, None], bias)

    def forward(self, x: Tensor, context: Tensor, factor: int, side: int) -> Tensor:
        B, D, H, W = x.shape
        h = self.linear_in(normed_tokens(self.norm, x))
        if len(self.blocks):
            modulation = _to_level(self.modulation(F.silu(context)), factor, side).flatten(2).transpose(1, 2)
            for block, part in zip(self.blocks, modulation.chunk(len(self.blocks), dim=-1), strict=True):
                h = block(h, part, (H, W))
        return x + self.linear_out(h).transpose(1, 2).reshape(B, D, H, W)


class FoldedTransformerBlock(nn.Module):
    """`TransformerBlock` with one matrix for queries, keys and values."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.heads, self.attention = block.heads, block.attention
        self.norm1, self.out, self.mlp_out = map(deepcopy, (block.norm1, block.out, block.mlp_out))
        self.bias = nn.Parameter(block.bias.detach().clone())
        self.qkv = _linear(torch.cat([block.q.weight, block.k.weight, block.v.weight]), None)
        affine = block.norm2  # (n·w + b) @ M.T + c = n @ (M·w).T + (M @ b + c)
        self.mlp_in = _linear(
            block.mlp_in.weight * affine.weight, block.mlp_in.weight @ affine.bias + block.mlp_in.bias
        )
        self.norm2 = nn.LayerNorm(affine.normalized_shape, eps=affine.eps, elementwise_affine=False)

    def forward(self, x: Tensor, modulation: Tensor, grid: tuple[int, int]) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        h = torch.addcmul(shift, self.norm1(x), scale)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = windowed_attention(q, k, v, self.bias, grid, backend=self.attention)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        value, gate = self.mlp_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp_out(value * F.gelu(gate))


def _modulated_norm(x: Tensor, modulation: Tensor, groups: int, eps: float, factor: int, side: int) -> Tensor:
    """GroupNorm without an affine map, then the latent's modulation, as one pass: x·a + b, a and b at latent size.

    (x − μ)/σ·scale + shift = x·(scale/σ) + (shift − μ·scale/σ): only μ and σ are taken from x beforehand. With 0
    groups there is no norm, and only the modulation.
    """
    a, b = modulation.chunk(2, dim=1)
    if groups:
        C = x.shape[1]
        variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)).float(), dim=(2, 3, 4), correction=0)
        inverse = torch.rsqrt(variance + eps).repeat_interleave(C // groups, dim=1).to(x.dtype)[:, :, None, None]
        mean = mean.repeat_interleave(C // groups, dim=1).to(x.dtype)[:, :, None, None]
        a = a * inverse
        b = torch.addcmul(b, mean, a, value=-1)
    if side >= factor:
        return torch.addcmul(_to_level(b, factor, side), x, _to_level(a, factor, side))
    # Rows repeat: only columns are written out, a row is read factor/side times.
    ratio = factor // side
    a, b = (m.repeat_interleave(ratio, dim=3).unsqueeze(3) for m in (a, b))
    return torch.addcmul(b, x.unflatten(2, (-1, ratio)), a).flatten(2, 3)


def _to_level(x: Tensor, factor: int, side: int) -> Tensor:
    """A map at latent resolution brought to a level where one position covers `side`×`side` pixels.

    Nearest, or the mean where the level is the coarser one: `resample_to`, without asking for sizes.
    """
    if side == factor:
        return x
    if side > factor:
        return F.avg_pool2d(x, side // factor)
    return F.interpolate(x, scale_factor=float(factor // side), mode="nearest")


def _shift_first(bias: Tensor) -> Tensor:
    """Bias of a (shift, scale) modulation, its scale half plus 1."""
    shift, scale = bias.chunk(2)
    return torch.cat([shift, scale + 1])


def _merged(parts: list[nn.Conv2d]) -> nn.Conv2d:
    """1×1 convolutions of one input, each giving (scale, shift), side by side; 1 is added to every scale."""
    biases = []
    for part in parts:
        scale, shift = cast(Tensor, part.bias).chunk(2)
        biases.append(torch.cat([scale + 1, shift]))
    return _convolution(torch.cat([part.weight for part in parts]), torch.cat(biases))


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    return _filled(nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None), weight, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias)


def _filled(module: L, weight: Tensor, bias: Tensor | None) -> L:
    module.to(weight)
    module.weight.copy_(weight)
    if bias is not None:
        cast(Tensor, module.bias).copy_(bias)
    return module
