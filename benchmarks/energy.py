"""An energy score: training that keeps texture in one step, without a teacher and without a discriminator.

Two pictures x̂₁, x̂₂ from different noise for each latent, ½(d(x̂₁, x) + d(x̂₂, x)) − ½ d(x̂₁, x̂₂): a strictly proper
scoring rule (Gneiting and Raftery 2007; "engression", Shen and Meinshausen 2023). d is the unsquared distance of
patches of 4, 8 and 16 pixels, plus `loss.perceptual` times that of EfficientNet-Lite0's maps, averaged over places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monobath import UserError, flow
from monobath.training.objectives.base import AutoencoderObjective, Batch, Losses

PATCHES = (4, 8, 16)


def noise_like(image: Tensor, step: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Where sampling starts: `(B, 3, H, W)`, unit variance, the same within blocks of `step`² pixels."""
    shape = (*image.shape[:2], image.shape[2] // step, image.shape[3] // step)
    noise = torch.randn(shape, generator=generator, device=generator.device if generator else image.device)
    return noise.to(image.device).repeat_interleave(step, 2).repeat_interleave(step, 3)


def distance(a: Tensor, b: Tensor, maps: Callable[[Tensor], list[Tensor]], weight: float) -> Tensor:
    """Unsquared, of patches (root mean square) and feature maps (norm), averaged over places, sizes and the batch."""
    error = a - b
    parts = [F.avg_pool2d(error.square().mean(1, keepdim=True), p).add(1e-8).sqrt().mean() for p in PATCHES]
    of_maps = [(p - q).square().sum(1).add(1e-8).sqrt().mean() for p, q in zip(maps(a), maps(b), strict=True)]
    return torch.stack(parts).mean() + weight * torch.stack(of_maps).mean()


def energy_losses(step: int = 1) -> Callable[[AutoencoderObjective, Batch, Tensor], Losses]:
    """What stands in for an objective's `_decoder_losses`: the energy score of one step at full resolution.

    Args:
        step: see `noise_like`.
    """

    def of_decoder(self: AutoencoderObjective, batch: Batch, z: Tensor) -> Losses:
        if self.perceptual is None:
            raise UserError("an energy score needs a weight of its feature maps above 0")
        x, decoder, weight = batch.images.float(), self.tokenizer.decoder, self.loss.perceptual
        noise, ones = torch.cat([noise_like(x, step) for _ in range(2)]), torch.ones(2 * len(x), device=x.device)
        prediction = decoder(noise, ones, z.repeat(2, 1, 1, 1)).float()
        first, second = flow.to_clean(prediction, noise, ones, decoder.prediction).chunk(2)
        maps = self.perceptual.features
        with torch.autocast(x.device.type, enabled=False):  # distances of near pictures need float32
            to_image = (distance(first, x, maps, weight) + distance(second, x, maps, weight)) / 2
            apart = distance(first, second, maps, weight)
        parts = {"to_image": to_image, "apart": apart}
        return Losses(total=to_image - apart / 2, parts=parts, clean=first.detach(), target=x)

    return of_decoder
