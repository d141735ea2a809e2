"""The decoder at t = 1, with everything that is constant there folded away: latent (and noise) → picture.

`folded(decoder)` computes what one Euler step from pure noise computes, x̂ = D(ε, 1, z) (SSDD, arXiv 2510.04961,
section 3), to rounding. At a fixed time the time network and every time scale and shift are constants: they go into the
second norm's affine map. With ε = 0 the noise half of the input convolution does nothing: it goes. Normalisation and
modulation are one pass over a feature map instead of two; queries, keys and values are one matrix product; a
LayerNorm's affine map goes into the linear layer behind it. No branch depends on the picture's size, so that the module
exports with free H and W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from copy import deepcopy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import windowed_attention
from ..models.blocks import Conv2d
from ..sampling import Noise
from .base import Features, PixelDecoder
from .unet import Level, ResBlock, UNet
from .uvit import Middle, TransformerBlock, normed_tokens


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

    @torch.no_grad()
    def __init__(self, decoder: UNet, noise: Noise) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(deepcopy(decoder).__dict__)
        weight = self.conv_in.weight
        time = self.time_of(weight.new_ones(1), weight.dtype)  # of the last stage
        # At t = 1 the noisy image says nothing.
        self.config = dataclasses.replace(decoder.config, residual=0.0, stages=1, null_latent=False)
        self.prediction, self.stages = "x", 1
        self.trains, self.fixed, self.norm, self.shuffled = False, noise, decoder.norm, decoder.shuffled
        del self.time
        for name in ("stage_embedding", "null_latent"):
            self.register_parameter(name, None)
        factor, depths = self.feature_side, range(len(self.down))
        for levels, order in ((self.down, depths), (self.up, reversed(depths))):
            for level, depth in zip(cast(Iterable[Level], levels), order, strict=True):
                side = self.config.patch << depth
                level.blocks = nn.ModuleList(FoldedBlock(cast(ResBlock, b), time, factor, side) for b in level.blocks)
        if isinstance(self.middle, Middle):
            self.middle = FoldedMiddle(self.middle, factor, self.unit)
        if noise == "zero":
            kept, bias = weight[:, 3 * self.config.patch**2 :], self.conv_in.bias
            self.conv_in = Conv2d(kept.shape[1], kept.shape[0], self.config.padding).to(kept)
            self.conv_in.load_state_dict({"weight": kept, "bias": bias})
        self.requires_grad_(False).eval()

    def predict(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None = None) -> Tensor:
        x = super().predict(x_t, t, features, stage)
        # x̂ = x_t + t·v at t = 1; with zero noise, v is the picture itself.
        return x + x_t if self.config.prediction == "v" and self.fixed == "gaussian" else x

    def start(self, x_t: Tensor, features: Features) -> Tensor:
        x = _to_level(features.z, features.factor, self.config.patch)
        return self.conv_in(
            torch.cat([F.pixel_unshuffle(x_t, self.config.patch), x], dim=1) if self.fixed == "gaussian" else x
        )

    def time_of(self, t: Tensor, dtype: torch.dtype, stage: int | None = None) -> Tensor:
        return super().time_of(t, dtype, stage) if hasattr(self, "time") else t  # which nothing reads


class FoldedBlock(nn.Module):
    """`ResBlock` at a fixed time.

    Args:
        factor: side of the pixel square behind one position of the context.
        side: the same of the feature map.
    """

    def __init__(self, block: ResBlock, time: Tensor, factor: int, side: int) -> None:
        super().__init__()
        first, self.norm2 = block.norm1, block.norm2
        self.groups1, self.eps1 = (first.num_groups, first.eps) if isinstance(first, nn.GroupNorm) else (0, 0.0)
        self.conv1, self.conv2, self.shortcut = block.conv1, block.conv2, block.shortcut
        self.context, self.factor, self.side = block.context, factor, side
        if self.context is not None:
            cast(Tensor, self.context.bias)[: self.context.out_channels // 2] += 1  # of the scale
        scale, shift = block.time(time)[0].chunk(2)
        if isinstance(self.norm2, nn.GroupNorm):
            self.norm2.weight.mul_(1 + scale)
            self.norm2.bias.copy_(self.norm2.bias * (1 + scale) + shift)
        else:  # nothing between the convolution and the scale: into its weights
            self.conv1.weight.mul_((1 + scale)[:, None, None, None])
            cast(Tensor, self.conv1.bias).copy_(cast(Tensor, self.conv1.bias) * (1 + scale) + shift)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        h = x
        if self.context is not None:
            h = _modulated_norm(x, self.context(context), self.groups1, self.eps1, self.factor, self.side)
        elif self.groups1:
            h = F.group_norm(x, self.groups1, eps=self.eps1)
        return self.shortcut(x) + self.conv2.of_silu(self.norm2(self.conv1.of_silu(h)))


class FoldedMiddle(nn.Module):
    """`Middle` with the modulations of all its blocks as one linear map; `factor` and `side` as of `FoldedBlock`."""

    def __init__(self, middle: Middle, factor: int, side: int) -> None:
        super().__init__()
        blocks = cast(list[TransformerBlock], list(middle.blocks))
        self.norm, self.linear_in, self.linear_out = middle.norm, middle.linear_in, middle.linear_out
        self.blocks = nn.ModuleList(FoldedTransformerBlock(block) for block in blocks)
        self.modulation = _linear(
            torch.cat([block.context.weight for block in blocks]), torch.cat([block.context.bias for block in blocks])
        )
        self.modulation.bias.view(len(blocks), 2, -1)[:, 1] += 1  # of the scale
        self.factor, self.side = factor, side

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        B, D, H, W = x.shape
        h = self.linear_in(normed_tokens(self.norm, x))
        modulation = self.modulation(F.silu(context).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        modulation = _to_level(modulation, self.factor, self.side).flatten(2).transpose(1, 2)
        for block, part in zip(self.blocks, modulation.chunk(len(self.blocks), dim=-1), strict=True):
            h = block(h, part, (H, W))
        return x + self.linear_out(h).transpose(1, 2).reshape(B, D, H, W)


class FoldedTransformerBlock(nn.Module):
    """`TransformerBlock` with one matrix for queries, keys and values."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.heads, self.attention = block.heads, block.attention
        self.norm1, self.out, self.mlp_out, self.bias = block.norm1, block.out, block.mlp_out, block.bias
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


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
    module.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return module
