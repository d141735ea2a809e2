"""Small pieces shared by the encoder and the decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_groups(channels: int, groups: int = 32) -> int:
    """Number of groups for a GroupNorm over `channels`.

    `groups` where it divides `channels` (the papers' form: widths are multiples of 32); otherwise the largest
    divisor of `channels` that is at most `channels / 4`, so that compact widths keep ≥ 4 channels a group.
    """
    if channels % groups == 0:
        return groups
    limit = max(1, min(groups, channels // 4))
    return next(n for n in range(limit, 0, -1) if channels % n == 0)


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


def zero_init(module: nn.Module) -> nn.Module:
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
