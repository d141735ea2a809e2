"""Small pieces shared by the encoder and the decoder."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError

M = TypeVar("M", bound=nn.Module)

Padding = Literal["zeros", "replicate"]
"""What a convolution reads beyond the edge of its map. zeros: the published networks. replicate: the nearest value, so
that a flat area looks the same at the edge as inside, and a network trained on small crops holds on large pictures."""


def check_padding(name: str, padding: str) -> None:
    """Raises UserError unless `padding` is one of `Padding`; `name` is the setting's."""
    if padding not in ("zeros", "replicate"):
        raise UserError(f'{name} is {padding!r}: choose "zeros" or "replicate"')


class Checkpointed(nn.Module):
    """What can keep fewer activations: less memory in training, one more forward pass, the same results."""

    checkpointing = False

    def _run(self, module: nn.Module, *args: Any) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)


class Conv2d(nn.Conv2d):
    """A 3×3 convolution that keeps height and width (halves them at stride 2), padded as `Padding` says."""

    def __init__(self, in_channels: int, out_channels: int, padding: Padding, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, padding_mode=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return super().forward(x)
        return F.conv2d(replicated(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)

    def of_silu(self, x: Tensor) -> Tensor:
        """`self(silu(x))`."""
        if self.padding_mode == "zeros" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self(F.silu(x))
        # In place on the padded copy: one map less to write. (Compilers fuse SiLU with what comes before it instead.)
        x = F.silu(replicated(x, (1, 1, 1, 1)), inplace=True)
        return F.conv2d(x, self.weight, self.bias, self.stride)


def replicated(x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    """`(B, C, H, W)` with its edges repeated: 0 or 1 columns to the left and right, rows above and below."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Replicate.apply(x, sides)
    return F.pad(x, sides, mode="replicate")


class _Replicate(torch.autograd.Function):
    """PyTorch's own padding, with gradients in the memory format of the map: its own, compiled for a CPU, fail
    (torch 2.14.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
        ctx.sides = sides
        return F.pad(x, sides, mode="replicate")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        left, right, top, bottom = ctx.sides
        g = _folded(_folded(grads[0], 2, top, bottom), 3, left, right)
        return g, None


def _folded(g: Tensor, dim: int, first: int, last: int) -> Tensor:
    """The gradient with the `first` and `last` rows (or columns) beyond the edges added to those at the edges."""
    inner = g.narrow(dim, first, g.shape[dim] - first - last).clone()
    if first:
        inner.narrow(dim, 0, 1).add_(g.narrow(dim, 0, 1))
    if last:
        inner.narrow(dim, inner.shape[dim] - 1, 1).add_(g.narrow(dim, g.shape[dim] - 1, 1))
    return inner


def norm_groups(channels: int, groups: int = 32) -> int:
    """Number of groups for a GroupNorm over `channels`.

    `groups` where it divides `channels` (the papers' form: widths are multiples of 32); otherwise the largest
    divisor of `channels` that is at most `channels / 4`, so that compact widths keep ≥ 4 channels a group.
    """
    if channels % groups == 0:
        return groups
    limit = max(1, min(groups, channels // 4))
    return next(n for n in range(limit, 0, -1) if channels % n == 0)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of 1000·t: `(B,)` in [0, 1] → `(B, width)`, cosines first, periods to 10 000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def resample_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a latent-resolution map `(B, C, h, w)` to a feature map's size.

    Nearest where the map is finer; area average where it is coarser, since nearest would drop most of the
    latent (low-resolution stages, f4 latents).
    """
    h, w = x.shape[-2:]
    if (h, w) == size:
        return x
    if size[0] >= h and size[1] >= w:
        return F.interpolate(x, size=size, mode="nearest")
    return F.interpolate(x, size=size, mode="area")


def zero_init(module: M) -> M:
    """Zero every parameter: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def cosine_basis(channels: int, side: int) -> Tensor:
    """Orthonormal rows `(channels, 3·side²)` that keep most of a natural picture's energy.

    Discrete cosines of low frequency times luminance and two colour differences, ordered by the energy they have
    in natural pictures: energy falls about as 1 / (1 + 19·frequency²), red − blue has 1/8 and green − magenta 1/34 of
    the luminance's (measured on 8×8 squares of photos at 128²). The first rows are therefore close to the principal
    components of `side`×`side` RGB squares. Columns are in the order of `pixel_unshuffle`. Where `channels` exceeds
    3·side², the remaining rows are zero.
    """
    with torch.device("cpu"):  # on the meta device, arithmetic imports torch.compile's machinery: two seconds
        position = torch.arange(side, dtype=torch.float64) + 0.5
        waves = torch.stack([torch.cos(math.pi * k * position / side) for k in range(side)])
        waves = waves / waves.norm(dim=1, keepdim=True)
        colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
        colours = colours / colours.norm(dim=1, keepdim=True)
        cost = [
            ((1 + 19 * (u * u + v * v)) * (1, 8, 34)[colour], colour, u, v)
            for colour in range(3)
            for u in range(side)
            for v in range(side)
        ]
        rows = [
            torch.einsum("c,i,j->cij", colours[colour], waves[u], waves[v]).flatten()
            for _, colour, u, v in sorted(cost)[:channels]
        ]
        basis = torch.zeros(channels, 3 * side * side, dtype=torch.float64)
        basis[: len(rows)] = torch.stack(rows)
    return basis.float()
