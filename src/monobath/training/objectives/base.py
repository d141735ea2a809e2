"""What a tokenizer learns. One `nn.Module` per objective, so that DDP and compile wrap exactly what runs:

    losses = objective(batch)           # Batch → Losses; losses.total.backward()

SSDD (arXiv 2510.04961), section 3: total = L_FM + λ·perceptual(x̂₀, x) + μ·REPA + 1e-6·KL, without a
discriminator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ... import flow
from ...decoders import PixelDecoder
from ...errors import UserError
from ...losses.grid import grid_energy
from ...losses.perceptual import PooledDistance, perceptual_distance
from ...models.encoder import Posterior
from ...tokenizer import Tokenizer
from ..config import LossConfig, TimesConfig

if TYPE_CHECKING:
    from ...losses.alignment import Alignment

Judge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(generated, other losses, last weights)` → the adversarial loss of generated images (see `adversarial.py`)."""


def draw_seed(seed: int, position: int) -> int:
    """The generator's seed for one batch of a run: below 2³², since a CPU generator reads no more of it.

    Distinct for the 2³² positions of a run; runs whose seeds are near each other are far apart in it (2³² divided by
    the golden ratio, per seed).
    """
    return (seed * 0x9E3779B1 + position) % 2**32


@dataclass
class Draws:
    """The random numbers of one batch of B images `(B, 3, H, W)`; what `Objective.draw` adds has defaults."""

    t: Tensor  # (B,)
    noise: Tensor  # (B, 3, H, W)
    latent_noise: Tensor  # (B, c, H/f, W/f)
    stages: Sequence[int] = ()
    """Each sample's stage; default: all at the first."""
    dropped: Sequence[bool] = ()
    """Whether each sample's latent is dropped; default: none is."""
    level: float = 1.0
    """Noise level in (0, 1] of the batch, the same for all processes; see `StagedDistillation`."""

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


@dataclass(kw_only=True)
class Batch:
    """What an objective learns from: B samples of this process."""

    draws: Draws
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    """`(B, 3, H, W)` in [-1, 1]; a generator has none."""
    moments: Tensor | None = None
    """`(B, 2c, H/f, W/f)`, mean and log-variance that the frozen encoder found before; default: it runs."""
    target: Tensor | None = None
    """What the decoder should give, like `images`, where the teacher was sampled before."""
    judge: Judge | None = None
    """Gives the adversarial loss; None: there is none."""
    classes: Tensor | None = None
    """The network's number of each sample's class, int64 `(B,)`, for a generator that has classes."""


@dataclass(kw_only=True)
class Losses:
    """Losses of a batch, float32 scalars, and what others need to go on from them."""

    total: Tensor
    """The weighted sum, to be minimised."""
    parts: dict[str, Tensor]
    """Each loss by its name in the log, without its weight."""
    clean: Tensor | None = None
    """The predicted clean images, without gradients."""
    target: Tensor | None = None
    """What they should have been."""
    real: Tensor | None = None
    """The images that they come from."""

    @property
    def named(self) -> dict[str, Tensor]:
        """All of them, as they are logged."""
        return {"loss": self.total, **self.parts}


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
    from ...losses.alignment import Alignment, alignment_features

    features = alignment_features(loss.repa_features, loss.repa_model)
    return Alignment(decoder, features, loss.repa_block, loss.repa_hidden)


def tap(alignment: Alignment | None, decoder: PixelDecoder) -> contextlib.AbstractContextManager[None]:
    """`alignment.tap(decoder)`, or nothing where there is no alignment."""
    if alignment is None:
        return contextlib.nullcontext()
    return alignment.tap(decoder)


class AutoencoderObjective(nn.Module):
    """What a tokenizer, or its decoder alone, learns from images: flow matching + perceptual distance + REPA + KL.

    A KL-VAE decoder has no flow: it learns the image from the latent by L1 instead.

    Args:
        tokenizer: what trains.
        loss: weights.
        train_encoder: False runs the encoder without gradients and leaves out the KL.

    Attributes:
        grid: the only times that it trains at; empty: those of the recipe's `times`.
        perceptual_to_image: the perceptual distance is to the image even where the target is another.
    """

    grid: Sequence[float] = ()
    perceptual_to_image: bool = False

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, *, train_encoder: bool) -> None:
        super().__init__()
        self.tokenizer, self.loss, self.train_encoder = tokenizer, loss, train_encoder
        self.perceptual = perceptual_distance(loss.perceptual_backbone) if loss.perceptual else None
        self.pooled = PooledDistance() if loss.pooled else None
        self.repa = make_alignment(tokenizer.decoder, loss)
        tokenizer.encoder.requires_grad_(train_encoder)

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch: `flow` or `l1`, and those of `LossConfig`."""
        posterior, z = self._encoded(batch)
        losses = self._decoder_losses(batch, z)
        if self.train_encoder:
            losses.parts["kl"] = posterior.kl().mean()
            losses.total = losses.total + self.loss.kl * losses.parts["kl"]
        return losses

    def draw(self, draws: Draws, seed: int, rank: int, world: int) -> None:
        """Add to a batch's draws what only this objective draws; like them, from the seed."""

    def _encoded(self, batch: Batch) -> tuple[Posterior, Tensor]:
        """The posterior of images, and latents drawn from it."""
        x = batch.images
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            encoded = self.tokenizer.encoder(x) if batch.moments is None else batch.moments
            posterior = Posterior(encoded, (x.shape[2], x.shape[3]))
            return posterior, posterior.mean + posterior.std * batch.draws.latent_noise

    def target_of(self, batch: Batch, z: Tensor) -> Tensor:
        """What the decoder should give from (noise, z): the image itself."""
        return batch.images

    def _decoder_losses(self, batch: Batch, z: Tensor) -> Losses:
        decoder, t, noise, target = self.tokenizer.decoder, batch.draws.t, batch.draws.noise, self.target_of(batch, z)
        if decoder.config.kind == "kl":
            clean = decoder(noise, t, z).float()
            parts = {"l1": (clean - target.float()).abs().mean()}
            total = self.loss.flow * parts["l1"]
        else:
            kind = decoder.prediction
            x_t = flow.interpolate(target, noise, t)
            with tap(self.repa, decoder):
                prediction = decoder(x_t, t, z)
            space, power = self.loss.space or kind, self.loss.time_power
            parts = {"flow": flow.flow_loss(prediction, target, noise, x_t, t, kind, space, power)}
            clean = flow.to_clean(prediction.float(), x_t, t, kind)
            total = self.loss.flow * parts["flow"]
        losses = Losses(total=total, parts=parts, clean=clean, target=target, real=batch.images)
        return self._with_others(losses, batch.judge)

    def _with_others(
        self, losses: Losses, judge: Judge | None, *, tapped: Tensor | None = None, share: float = 1.0
    ) -> Losses:
        """Perceptual, adversarial loss and REPA are added.

        Args:
            losses: those so far; its clean images have gradients still.
            tapped: images of the decoder's tapped call; default: `losses.real`.
            share: what the losses that are added are multiplied by.
        """
        clean, target, real, parts = losses.clean, losses.target, losses.real, losses.parts
        assert clean is not None and target is not None and real is not None  # noqa: PT018
        pattern = real if self.perceptual_to_image else target

        def add(name: str, value: Tensor, weight: float) -> None:
            parts[name] = value
            losses.total = losses.total + share * weight * value

        for name, distance in (("perceptual", self.perceptual), ("pooled", self.pooled)):
            if distance is not None:
                add(name, distance(clean, pattern).mean(), getattr(self.loss, name))
        if self.loss.grid:
            add("grid", grid_energy(clean - pattern.float(), self.tokenizer.factor).mean(), self.loss.grid)
        if judge is not None:
            add("adversarial", judge(clean, losses.total, self.tokenizer.decoder.last_layer.weight), 1.0)
        if self.repa is not None:
            add("repa", self.repa(real if tapped is None else tapped).mean(), self.loss.repa)
        losses.clean, losses.target = clean.detach(), target.detach()
        return losses
