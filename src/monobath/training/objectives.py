"""What is minimised: one `nn.Module` per objective, so that DDP and compile wrap exactly what runs.

SSDD (arXiv 2510.04961), section 3: total = L_FM + λ·perceptual(x̂₀, x) + 1e-6·KL, without a discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import flow
from ..losses.perceptual import perceptual_distance
from ..models.encoder import Posterior
from ..tokenizer import Tokenizer
from .config import LossConfig, TimesConfig


@dataclass
class Draws:
    """The random numbers of one batch of B images `(B, 3, H, W)`."""

    t: Tensor  # (B,)
    noise: Tensor  # (B, 3, H, W)
    latent_noise: Tensor  # (B, c, H/f, W/f)

    @classmethod
    def make(
        cls,
        seed: int,
        images: tuple[int, ...],
        latents: tuple[int, ...],
        times: TimesConfig,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> Draws:
        """Draw for a global batch of `world · B` and keep the slice of this rank.

        Nothing is carried from step to step: the numbers depend on `seed` alone, so a resumed run sees the same ones,
        and two processes see those of one.

        Args:
            images, latents: shapes of this process' batch.
        """
        generator = torch.Generator(device).manual_seed(seed)
        batch = images[0]
        total, own = batch * world, slice(rank * batch, (rank + 1) * batch)
        t = flow.sample_times(total, generator=generator, ones=times.ones)
        noise = torch.randn(total, *images[1:], generator=generator, device=device)
        # Of the samples at t = 1, every (1 / zero_noise)-th starts from zero.
        order = (t == 1).cumsum(0) * times.zero_noise
        zero = (t == 1) & (order.floor() > (order - times.zero_noise).floor())
        noise = torch.where(zero[:, None, None, None], 0.0, noise)
        latent_noise = torch.randn(total, *latents[1:], generator=generator, device=device)
        return cls(t[own], noise[own], latent_noise[own])


class AutoencoderObjective(nn.Module):
    """Flow matching + perceptual distance + KL for a whole tokenizer, or for its decoder alone.

    Args:
        tokenizer: what trains.
        loss: weights.
        train_encoder: False runs the encoder without gradients and leaves out the KL.
    """

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, *, train_encoder: bool) -> None:
        super().__init__()
        self.tokenizer, self.loss, self.train_encoder = tokenizer, loss, train_encoder
        self.perceptual = perceptual_distance(loss.perceptual_backbone) if loss.perceptual else None
        tokenizer.encoder.requires_grad_(train_encoder)

    def forward(self, x: Tensor, t: Tensor, noise: Tensor, latent_noise: Tensor) -> dict[str, Tensor]:
        """Losses of a batch: float32 scalars `loss` (the weighted sum), `flow`, `perceptual`, `kl`.

        Args:
            x: images `(B, 3, H, W)` in [-1, 1].
            t, noise, latent_noise: see `Draws`.
        """
        config = self.tokenizer.config
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            posterior = Posterior(self.tokenizer.encoder(x), (x.shape[2], x.shape[3]))
            z = posterior.mean + posterior.std * latent_noise
        kind = config.decoder.prediction
        x_t = flow.interpolate(x, noise, t)
        prediction = self.tokenizer.decoder(x_t, t, z)
        space = self.loss.space or kind
        losses = {"flow": flow.flow_loss(prediction, x, noise, x_t, t, kind, space)}  # type: ignore[arg-type]
        total = self.loss.flow * losses["flow"]
        if self.perceptual is not None:
            clean = flow.to_clean(prediction.float(), x_t, t, kind)  # type: ignore[arg-type]
            losses["perceptual"] = self.perceptual(clean, x).mean()
            total = total + self.loss.perceptual * losses["perceptual"]
        if self.train_encoder:
            losses["kl"] = posterior.kl().mean()
            total = total + self.loss.kl * losses["kl"]
        return {"loss": total, **losses}
