"""What is minimised: one `nn.Module` per objective, so that DDP and compile wrap exactly what runs.

SSDD (arXiv 2510.04961), section 3: total = L_FM + λ·perceptual(x̂₀, x) + μ·REPA + 1e-6·KL, without a
discriminator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import flow
from ..decoders import PixelDecoder
from ..errors import UserError
from ..losses.alignment import Alignment, alignment_features
from ..losses.grid import grid_energy
from ..losses.perceptual import PooledDistance, perceptual_distance
from ..models.encoder import Posterior
from ..tokenizer import Tokenizer
from .config import LossConfig, TimesConfig


def draw_seed(seed: int, position: int) -> int:
    """The generator's seed for one batch of a run: below 2³², since a CPU generator reads no more of it.

    Distinct for the 2³² positions of a run; runs whose seeds are near each other are far apart in it (2³² divided by
    the golden ratio, per seed).
    """
    return (seed * 0x9E3779B1 + position) % 2**32


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
        grid: Sequence[float] = (),
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> Draws:
        """Draw for a global batch of `world · B` and keep the slice of this rank.

        Nothing is carried from step to step: the numbers depend on `seed` alone, so a resumed run sees the same ones,
        and two processes see those of one.

        Args:
            images, latents: shapes of this process' batch.
            grid: the only times there are, each as likely; default: logit-normal ones and those of `times`.
        """
        generator = torch.Generator(device).manual_seed(seed)
        batch = images[0]
        total, own = batch * world, slice(rank * batch, (rank + 1) * batch)
        if grid:
            chosen = torch.randint(len(grid), (total,), generator=generator, device=device)
            t = torch.tensor(grid, device=device)[chosen]
        else:
            t = flow.sample_times(total, generator=generator, ones=times.ones, mean=times.mean, std=times.std)
        noise = torch.randn(total, *images[1:], generator=generator, device=device)
        # Of the samples at t = 1, every (1 / zero_noise)-th starts from zero.
        order = (t == 1).cumsum(0) * times.zero_noise
        zero = (t == 1) & (order.floor() > (order - times.zero_noise).floor())
        noise = torch.where(zero[:, None, None, None], 0.0, noise)
        latent_noise = torch.randn(total, *latents[1:], generator=generator, device=device)
        return cls(t[own], noise[own], latent_noise[own])


def make_alignment(decoder: PixelDecoder, loss: LossConfig) -> Alignment | None:
    """REPA for a decoder, as the recipe says; None at weight 0.

    Use: call the decoder within `tap(alignment, decoder)`, then `alignment(images).mean()`.

    Raises:
        UserError: the decoder has no such block, or the frozen network cannot be loaded.
    """
    if not loss.repa:
        return None
    if decoder.config.kind == "kl":
        raise UserError(f"loss.repa is {loss.repa}, but a KL-VAE decoder has no block to align: set it to 0")
    return Alignment(decoder, alignment_features(loss.repa_features, loss.repa_model), loss.repa_block)


def tap(alignment: Alignment | None, decoder: PixelDecoder) -> contextlib.AbstractContextManager[None]:
    """`alignment.tap(decoder)`, or nothing where there is no alignment."""
    if alignment is None:
        return contextlib.nullcontext()
    return alignment.tap(decoder)


class AutoencoderObjective(nn.Module):
    """What a tokenizer, or its decoder alone, learns from images: flow matching + perceptual distance + REPA + KL.

    A KL-VAE decoder (`TokenizerConfig.kl_decoder`) has no flow: it learns the image from the latent by L1 instead.

    Args:
        tokenizer: what trains.
        loss: weights.
        train_encoder: False runs the encoder without gradients and leaves out the KL.

    Attributes:
        grid: the only times that it trains at; empty: those of the recipe's `times`.
        perceptual_to_image: the perceptual distance is to the image even where the target is another.
        judge: gives the adversarial loss of generated images (see `adversary.py`); None: there is none.
        generated: the last batch's predicted clean images, without gradients.
        target: what they should have been.
        real: the images they come from.
    """

    judge: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    grid: Sequence[float] = ()
    perceptual_to_image: bool = False
    generated: Tensor
    target: Tensor
    real: Tensor

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, *, train_encoder: bool) -> None:
        super().__init__()
        self.tokenizer, self.loss, self.train_encoder = tokenizer, loss, train_encoder
        self.perceptual = perceptual_distance(loss.perceptual_backbone) if loss.perceptual else None
        self.pooled = PooledDistance() if loss.pooled else None
        self.repa = make_alignment(tokenizer.decoder, loss)
        tokenizer.encoder.requires_grad_(train_encoder)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        latent_noise: Tensor,
        moments: Tensor | None = None,
        target: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch: float32 scalars `loss` (the weighted sum), `flow` or `l1`, and those of `LossConfig`.

        Args:
            x: images `(B, 3, H, W)` in [-1, 1].
            t, noise, latent_noise: see `Draws`.
            moments: `(B, 2c, H/f, W/f)`, what the frozen encoder made of x before; default: it runs.
            target: what the decoder should give; default: x.
        """
        posterior, z = self._encoded(x, latent_noise, moments)
        target = self.target_of(x, noise, z) if target is None else target
        return self._with_kl(self._decoder_losses(x, target, t, noise, z), posterior)

    def more_draws(self, seed: int, batch: int, rank: int, world: int) -> tuple[Any, ...]:
        """Further arguments of `forward` that are drawn for a batch, as plain values; like `Draws`, from the seed."""
        return ()

    def _encoded(self, x: Tensor, latent_noise: Tensor, moments: Tensor | None) -> tuple[Posterior, Tensor]:
        """The posterior of images, and latents drawn from it."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            encoded = self.tokenizer.encoder(x) if moments is None else moments
            posterior = Posterior(encoded, (x.shape[2], x.shape[3]))
            return posterior, posterior.mean + posterior.std * latent_noise

    def _with_kl(self, losses: dict[str, Tensor], posterior: Posterior) -> dict[str, Tensor]:
        if self.train_encoder:
            losses["kl"] = posterior.kl().mean()
            losses["loss"] = losses["loss"] + self.loss.kl * losses["kl"]
        return losses

    def target_of(self, x: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """What the decoder should give from (noise, z): the image itself."""
        return x

    def _decoder_losses(self, x: Tensor, target: Tensor, t: Tensor, noise: Tensor, z: Tensor) -> dict[str, Tensor]:
        decoder = self.tokenizer.decoder
        if decoder.config.kind == "kl":
            clean = decoder(noise, t, z).float()
            losses = {"l1": (clean - target.float()).abs().mean()}
            total = self.loss.flow * losses["l1"]
        else:
            kind = decoder.prediction
            x_t = flow.interpolate(target, noise, t)
            with tap(self.repa, decoder):
                prediction = decoder(x_t, t, z)
            space = self.loss.space or kind
            power = self.loss.time_power
            losses = {"flow": flow.flow_loss(prediction, target, noise, x_t, t, kind, space, power)}
            clean = flow.to_clean(prediction.float(), x_t, t, kind)
            total = self.loss.flow * losses["flow"]
        return self._with_others(losses, total, clean, target, x)

    def _with_others(
        self,
        losses: dict[str, Tensor],
        total: Tensor,
        clean: Tensor,
        target: Tensor,
        x: Tensor,
        *,
        tapped: Tensor | None = None,
        share: float = 1.0,
    ) -> dict[str, Tensor]:
        """The weighted sum and all losses of a batch, once perceptual, adversarial loss and REPA are added.

        Args:
            losses: those so far.
            total: their weighted sum.
            clean: predicted clean images, float32.
            target: what they should have been.
            x: the images they come from.
            tapped: images of the decoder's tapped call; default: x.
            share: what the losses that are added are multiplied by.
        """
        pattern = x if self.perceptual_to_image else target
        for name, distance in (("perceptual", self.perceptual), ("pooled", self.pooled)):
            if distance is not None:
                losses[name] = distance(clean, pattern).mean()
                total = total + share * getattr(self.loss, name) * losses[name]
        if self.loss.grid:
            error = clean - pattern.float()
            losses["grid"] = grid_energy(error, self.tokenizer.factor).mean()
            total = total + share * self.loss.grid * losses["grid"]
        if self.judge is not None:
            weight = self.tokenizer.decoder.last_layer.weight
            losses["adversarial"] = self.judge(clean, total, weight)
            total = total + share * losses["adversarial"]
        if self.repa is not None:
            losses["repa"] = self.repa(x if tapped is None else tapped).mean()
            total = total + share * self.loss.repa * losses["repa"]
        self.generated, self.target, self.real = clean.detach(), target.detach(), x
        return {"loss": total, **losses}
