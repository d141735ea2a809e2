"""Pixel-space U-ViT decoder: (noisy image x_t, time t, latent z) → velocity or clean image.

SSDD (arXiv 2510.04961), section 3.1 and table 1: a U-Net over pixels whose deepest level, 8× down, is a
transformer with windowed attention; every block is conditioned on the latent and on the time. `S/1` … `H/1` are the
paper's networks, weight for weight. What we add: patch p (pixel-unshuffle the input, pixel-shuffle the output,
drop the first log2(p) levels) and x-prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.attention import Backend, windowed_attention
from ..models.blocks import Checkpointed, Conv2d, norm_groups, resample_to, split_size, zero_init
from .unet import UNet, UNetShape

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


@dataclass(kw_only=True)
class UViTConfig(UNetShape):
    """The shape of a U-ViT."""

    kind: Literal["uvit"] = "uvit"
    size: str = "S/1"
    """`SIZE/PATCH`: XS, S, B, M, L, XL, H and 1, 2, 4, 8; or `custom`: give patch, channels, middle_blocks, heads."""
    prediction: Literal["", "v", "x"] = ""
    """What the network returns: velocity or clean image. Default: v at patch 1 (the paper's), x at patch ≥ 2."""
    middle_blocks: int = -1
    """Transformer blocks in the middle, at the deepest level."""
    heads: int = 0
    """Attention heads."""
    down_blocks: int = 2
    """Residual blocks a level on the way down, where `down` does not say; one more on the way up."""
    reach: int = 7
    """A token attends to tokens at most this many rows and columns away."""
    norm: Literal["group", "local"] = "group"
    """group: GroupNorm throughout (the paper's). local: no statistics over the picture, so that a pixel depends on its
    neighbourhood only: no norm in residual blocks, whose first weights keep the activations' scale instead, LayerNorm
    of single tokens before the transformer. Faster."""
    modulation: bool = True
    """The latent modulates every residual block. False: it reaches them through the input only. Faster."""
    upsampling: Literal["nearest", "shuffle"] = "nearest"
    """Between levels on the way up. nearest: enlarged, then a convolution (the paper's). shuffle: a convolution of the
    coarse map, whose channels become pixels: half the operations, and each of the four pixels has its own weights."""
    attention: Backend = "auto"
    """Windowed attention backend: auto, dense or blocked. All give the same result."""

    def __post_init__(self) -> None:
        if self.down_blocks < 1 or self.reach < 0:
            raise UserError("decoder: down_blocks must be at least 1, reach at least 0")
        if str(self.attention) == "flex":  # FlexAttention, which earlier versions had
            self.attention = "auto"
        super().__post_init__()
        if self.channels[-1] % max(1, self.heads):
            raise UserError(f"decoder.heads={self.heads} does not divide the deepest width {self.channels[-1]}")

    def _fill_from_size(self) -> None:
        name, patch = split_size("decoder", self.size, SIZES, "one of CS/4, CM/4, CL/4, ")
        base, multipliers, middle_blocks = SIZES[name]
        self.patch = self.patch or patch
        dropped = patch.bit_length() - 1  # the transformer stays at 8×8 pixels
        self.channels = self.channels or [math.ceil(base * m / 32) * 32 for m in multipliers][dropped:]
        self.middle_blocks = middle_blocks if self.middle_blocks < 0 else self.middle_blocks
        dim = self.channels[-1]
        self.heads = self.heads or (4 if name in ("XS", "S") else min(16, max(4, dim // 64)))

    def _complete(self) -> None:
        if self.middle_blocks < 0:
            raise UserError("decoder.size is custom: give decoder.middle_blocks too")
        if self.middle_blocks and self.heads < 1:
            raise UserError("decoder.size is custom: give decoder.heads too")
        self.down = self.down or [self.down_blocks] * len(self.channels)
        if self.prediction == "":
            self.prediction = "v" if self.patch == 1 else "x"
        if self.prediction == "v" and self.patch > 1:
            raise UserError(
                f'decoder.prediction is "v" with patch {self.patch}: a patched decoder must predict "x" '
                "(the velocity forces full-resolution noise through a narrow network)"
            )


class TransformerBlock(nn.Module):
    """AdaLN → windowed self-attention → +; LayerNorm → GEGLU MLP → +. Tokens `(B, N, D)`."""

    def __init__(self, dim: int, heads: int, reach: int, context: int, attention: Backend) -> None:
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


class Middle(Checkpointed):
    """The transformer at the deepest level, between two linear maps, added to its input `(B, D, h, w)`."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        dim, context = config.channels[-1], config.channels[0]
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

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3])
        context = F.silu(context).permute(0, 2, 3, 1)
        h = self.linear_in(normed_tokens(self.norm, x))
        for block in self.blocks:
            h = self._run(block, h, context, grid)
        return x + self.linear_out(h).transpose(1, 2).reshape(x.shape)


def normed_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """Feature map `(B, D, h, w)` → normalised tokens `(B, h·w, D)`."""
    if isinstance(norm, nn.LayerNorm):
        return norm(x.flatten(2).transpose(1, 2))
    return norm(x).flatten(2).transpose(1, 2)


class UViT(UNet):
    """The U-Net with a transformer in the middle and blocks that the latent modulates; see `PixelDecoder`."""

    def __init__(self, config: UViTConfig) -> None:
        self.norm, self.shuffled = config.norm == "group", config.upsampling == "shuffle"
        super().__init__(config)

    def add_context(self) -> int:
        width = self.config.channels[0]
        if not (self.config.modulation or self.config.middle_blocks):  # only what reads the context makes it
            return super().add_context()
        self.context = nn.Sequential(
            Conv2d(self.config.read_channels, width, self.config.padding),
            nn.SiLU(),
            Conv2d(width, width, self.config.padding),
        )
        return int(width) if self.config.modulation else 0

    def add_middle(self) -> None:
        self.middle = Middle(self.config) if self.config.middle_blocks else None
        self.middle_reach = self.config.middle_blocks * self.config.reach
