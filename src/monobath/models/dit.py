"""DiT: a transformer over the positions of a noisy latent, (x_t, time t, class) → velocity.

Peebles & Xie 2022, arXiv 2212.09748: patches of the latent grid are tokens; time and class modulate every block through
adaLN-Zero (figure 3), so that a block starts as the identity and the network as the velocity zero. `S/2` … `XL/2` are
table 1's. What differs: the flow-matching velocity is predicted (no variances: c channels out, not 2c), q, k and v have
no bias (a key's bias changes nothing), and patch 1 exists, for the small grids of small pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, check_least
from .blocks import Checkpointed, split_size, timestep_embedding, zero_init

# arXiv 2212.09748, table 1: layers N, hidden size d, heads; and the parameters that it states, with patch 2, c = 4.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),  # 33 M
    "B": (12, 768, 12),  # 130 M
    "L": (24, 1024, 16),  # 458 M
    "XL": (28, 1152, 16),  # 675 M
}
TIME_WIDTH = 256
"""Width of the sinusoidal embedding of the time."""


@dataclass(kw_only=True)
class DiTConfig:
    """The shape of a DiT. `size` fills in what is left at 0; every field can be set by hand."""

    size: str = "S/2"
    """`SIZE/PATCH`: S, B, L, XL and 1, 2, 4, 8; or `custom`: give patch, width, depth and heads."""
    latent_channels: int = 4
    """c: channels of the latent."""
    classes: int = 0
    """Number of classes; one more, the null class, stands for none. 0: no classes at all. A recipe leaves it at 0: the
    labels of the data decide."""
    patch: int = 0
    """Side of the square of latent positions that is one token."""
    width: int = 0
    """Channels of a token."""
    depth: int = 0
    """Transformer blocks."""
    heads: int = 0
    """Attention heads."""

    def __post_init__(self) -> None:
        if self.size != "custom":
            name, patch = split_size("dit", self.size, SIZES)
            depth, width, heads = SIZES[name]
            self.patch, self.depth = self.patch or patch, self.depth or depth
            self.width, self.heads = self.width or width, self.heads or heads
        for name in ("patch", "width", "depth", "heads", "latent_channels"):
            if getattr(self, name) < 1:
                raise UserError(f"dit.{name} is {getattr(self, name)}: with dit.size {self.size} give at least 1")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"dit.width={self.width} must be divisible by dit.heads={self.heads} and by 4")
        check_least(0, {"dit.classes": self.classes})


def positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed sinusoids of a grid's rows and columns: `(height · width, dim)`, half of them for each.

    Of any grid: a larger one continues the rows and columns of a smaller one.
    """
    # The embedding of a time t is that of the number 1000·t.
    rows, columns = (timestep_embedding(torch.arange(n, device=device) / 1000, dim // 2) for n in (height, width))
    shape = (height, width, dim // 2)
    return torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=-1).flatten(0, 1)


class Block(nn.Module):
    """adaLN-Zero block (figure 3): self-attention, then an MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # x (B, N, D), condition (B, D) after SiLU
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.out(h))
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.mlp(h))


class DiT(Checkpointed):
    """`dit(x_t (B, c, h, w), t (B,) in [0, 1], labels (B,))` → velocity `(B, c, h, w)`; any h and w that patch divides.

    Labels are 0 … classes − 1, or `null` for none; a network of no classes takes no labels.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        c, patch, width = config.latent_channels, config.patch, config.width
        self.patches = nn.Linear(c * patch**2, width)
        self.time = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, c * patch**2)
        self._initialise()

    def _initialise(self) -> None:
        """Section 3.2 and the paper's code: Xavier, 0.02 for what makes the condition, zero for what it makes."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.time[0], self.time[2], *([self.classes] if self.classes is not None else [])):
            nn.init.normal_(cast(Tensor, embedding.weight), std=0.02)
        for block in cast(Iterable[Block], self.blocks):
            zero_init(block.modulation)
        zero_init(self.modulation_out)
        zero_init(self.out)

    @property
    def null(self) -> int:
        """The label that stands for no class."""
        return self.config.classes

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        self._check(x_t, t, labels)
        patch, grid = self.config.patch, (x_t.shape[2] // self.config.patch, x_t.shape[3] // self.config.patch)
        x = self.patches(F.pixel_unshuffle(x_t, patch).flatten(2).transpose(1, 2))
        x = x + positions(*grid, self.config.width, x.device).to(x.dtype)
        condition = self.time(timestep_embedding(t, TIME_WIDTH).to(x.dtype))
        if self.classes is not None:
            condition = condition + self.classes(labels)
        condition = F.silu(condition)
        for block in self.blocks:
            x = self._run(block, x, condition)
        shift, scale = self.modulation_out(condition)[:, None].chunk(2, dim=-1)
        x = self.out(torch.addcmul(shift, self.norm_out(x), 1 + scale))
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), patch)

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        c, patch = self.config.latent_channels, self.config.patch
        if x_t.ndim != 4 or x_t.shape[1] != c or x_t.shape[2] % patch or x_t.shape[3] % patch:
            raise ValueError(f"x_t is {tuple(x_t.shape)}: expected (B, {c}, h, w) with sides divisible by {patch}")
        if t.shape != (len(x_t),):
            raise ValueError(f"t is {tuple(t.shape)}: expected ({len(x_t)},), one time a sample")
        if (labels is None) != (self.classes is None) or (labels is not None and labels.shape != t.shape):
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"labels are {found}: this network has {self.config.classes} classes, one label a sample")
