"""Figures of a reconstruction, and latents as a picture."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from .. import images
from ..images import tensor_to_pil, to_uint8

BITS = 16
"""Of a stored number: latents are kept in half precision."""


def psnr(original: Tensor, output: Tensor) -> float:
    """Of an 8-bit picture uint8 `(3, H, W)` and one in [-1, 1], rounded to 8 bits, in dB; infinite if equal."""
    return images.psnr(to_uint8(output)[None], original[None]).item()


def bits_per_pixel(z: Tensor, size: tuple[int, int]) -> float:
    """Of latents `(1, c, h, w)` in half precision, for a picture of (H, W)."""
    return z.numel() * BITS / (size[0] * size[1])


def latent_picture(z: Tensor, factor: int) -> Image.Image:
    """Latents `(1, c, h, w)` as colours: three principal components; a position is a square of `factor` pixels."""
    values = z[0].flatten(1).double()
    values = values - values.mean(dim=1, keepdim=True)
    _, directions = torch.linalg.eigh(values @ values.T)  # ascending
    directions = directions * directions.sum(dim=0).sign()  # eigenvectors have no sign of their own
    components = (directions[:, -3:].T @ values).flip(0)
    components = components[torch.arange(3) % len(components)]
    scale = components.abs().quantile(0.98, dim=1, keepdim=True).clamp(min=1e-6)
    image = tensor_to_pil((components / scale).float().unflatten(1, z.shape[2:]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
