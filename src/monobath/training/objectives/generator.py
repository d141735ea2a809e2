"""What a latent generator learns: flow matching in normalised latents.

DiT (arXiv 2212.09748) with SSDD's flow-matching objective (arXiv 2510.04961, section 3).
"""

from __future__ import annotations

from torch import nn

from ... import flow
from ...generation import Generator
from .base import Batch, Losses


class GenerationObjective(nn.Module):
    """Flow matching of a generator's network, in normalised latents."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, batch: Batch) -> Losses:
        """The flow loss of a batch's `moments`, with the class numbers `classes`, if there are any."""
        draws = batch.draws
        assert batch.moments is not None
        mean, logvar = batch.moments.float().chunk(2, dim=1)
        z = self.generator.normalise(mean + (0.5 * logvar).exp() * draws.latent_noise)
        x_t = flow.interpolate(z, draws.noise, draws.t)
        loss = flow.flow_loss(self.generator.dit(x_t, draws.t, batch.classes), z, draws.noise, x_t, draws.t, "v", "v")
        return Losses(total=loss, parts={"flow": loss})
