"""Encoders of latent spaces that exist already, frozen, in the place of our own `Encoder`.

SSDD (arXiv 2510.04961) shares one encoder between all decoders, so a decoder can be fitted to anybody's latents. What
encodes is any callable: images `(B, 3, H, W)` in [-1, 1] → latents `(B, c, H/f, W/f)` if it is deterministic, else
their mean and log-variance. `ForeignEncoder` gives it the contract of ours; `monobath.autoencoders` reads files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .encoder import FAMILIES, Encoder, EncoderConfig, check_images

Encoding = Tensor | tuple[Tensor, Tensor]
"""Latents `(B, c, h, w)`, or their mean and log-variance."""
NO_SPREAD = -30.0
"""Log-variance of a deterministic encoder: the least that `Posterior` knows, a standard deviation of 3e-7."""


def without_spread(mean: Tensor) -> Tensor:
    """Moments `(B, 2c, h, w)` of what is certain: `mean` `(B, c, h, w)`."""
    return torch.cat([mean, torch.full_like(mean, NO_SPREAD)], dim=1)


class ForeignEncoder(nn.Module):
    """Image `(B, 3, H, W)` in [-1, 1], sides divisible by `config.factor` → moments `(B, 2c, H/f, W/f)`.

    Whatever happens to the model around it, it stays in evaluation mode and its weights stay what they are. They are
    no part of that model: neither among its parameters nor in its files. They run without autocast, in their own type,
    so that the latents are the family's own in any training. Devices and types reach them.

    Args:
        config: family, source, factor and channels.
        network: what encodes; a module is frozen in place and put into evaluation mode. None: nothing, which a model
            that only decodes has.
        published: fields of `TokenizerConfig` that the family publishes, such as scaling_factor.
    """

    anchor: Tensor

    def __init__(
        self,
        config: EncoderConfig,
        network: Callable[[Tensor], Encoding] | None = None,
        published: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.published = config, dict(published or {})
        self.checkpointing = False  # as of `Encoder`; without gradients there is nothing to keep
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # remembers device and type
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()
        elif network is not None:  # copies of a model share a function, since what it calls may not be copied
            call = network
            network = lambda x: call(x)  # noqa: E731
        self._network = (network,)  # in a tuple: no submodule

    @property
    def network(self) -> Callable[[Tensor], Encoding] | None:
        """What encodes; None: nothing."""
        return self._network[0]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Moments; see the class.

        Raises:
            UserError: there is no encoder, or it gives something else than its configuration says.
            ValueError: images of another shape.
        """
        network, config = self.network, self.config
        if network is None:
            raise UserError(missing_encoder(config))
        check_images(x, config.factor)
        if isinstance(network, nn.Module) and network.training:
            network.eval()
        with torch.autocast(x.device.type, enabled=False):
            encoded = network(x)
        mean, logvar = encoded if isinstance(encoded, tuple) else (encoded, None)
        expected = (len(x), config.latent_channels, x.shape[2] // config.factor, x.shape[3] // config.factor)
        for name, part in (("latents", mean), ("a log-variance", logvar)):
            if part is not None and tuple(part.shape) != expected:
                given = f"{name} {tuple(part.shape)} for images {tuple(x.shape)}"
                raise UserError(f"the {config.family} encoder gave {given}: expected {expected}")
        return without_spread(mean) if logvar is None else torch.cat([mean, logvar], dim=1)

    def _apply(self, fn: Any, recurse: bool = True) -> ForeignEncoder:
        if isinstance(self.network, nn.Module):
            self.network._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


class GaussianMoments(nn.Module):
    """The encoder of a KL-VAE and its 1×1 convolution: images in [-1, 1] → mean and log-variance."""

    def __init__(self, encoder: nn.Module, quant_conv: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.quant_conv = encoder, quant_conv or nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar


class UnitRange(nn.Module):
    """A deterministic encoder that takes images in [0, 1], fed with [-1, 1]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder((x + 1) / 2)


def make_encoder(config: EncoderConfig) -> Encoder | ForeignEncoder:
    """An encoder of ours with random weights, or the empty place of a foreign one."""
    return ForeignEncoder(config) if config.family else Encoder(config)


def missing_encoder(config: EncoderConfig) -> str:
    """Why a model that only decodes cannot encode, and what to do."""
    spec = f"{config.family}={config.source or 'WHERE'}"
    return (
        f"this model decodes the latents of {FAMILIES[config.family]} and holds no encoder: attach it with "
        f'Tokenizer.from_pretrained(NAME, encoder="{spec}"), tokenizer.attach_encoder("{spec}") or --encoder {spec}'
    )
