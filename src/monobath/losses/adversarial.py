"""Adversarial loss of KL-VAE decoders: a patch discriminator, hinge losses, adaptive weight. Off by default.

The recipe of VQGAN (Esser et al. 2021, arXiv 2012.09841, section 3.3), which latent diffusion's KL-VAEs follow: a
discriminator judges overlapping patches (Isola et al. 2017, arXiv 1611.07004), and its gradient at the decoder's last
layer is scaled to the reconstruction loss's. SSDD needs none of it; it is here for the KL-VAE baseline, for MSD's
variant, and for those who want it. What we changed: GroupNorm for BatchNorm, so that a picture's score depends on
neither its batch nor the number of processes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import norm_groups


class PatchDiscriminator(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1] → scores of patches `(B, 1, h, w)`, positive where they look real.

    Args:
        base: channels of the first layer.
        layers: layers of stride 2; a score then sees patches of 70 pixels for 3.
    """

    def __init__(self, base: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, base, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base
        for index in range(1, layers + 1):
            wider = base * min(2**index, 8)
            stride = 2 if index < layers else 1
            parts += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(norm_groups(wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """½·E[max(0, 1 − D(real))] + ½·E[max(0, 1 + D(fake))], a float32 scalar: 0 once both are on the far side of ±1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """−E[D(fake)], a float32 scalar."""
    return -fake.float().mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-4) at the decoder's last weights, in [0, limit], no gradient.

    With it both losses pull equally hard at the last layer (VQGAN, equation 7).

    Args:
        reconstruction, adversarial: scalars that depend on `last_layer`; their graphs are kept.
    """
    first, second = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    )
    return (first / (second + 1e-4)).clamp(0, limit).detach()
