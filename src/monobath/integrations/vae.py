"""The diffusers model itself: encoder, decoder and sampler in the place of `AutoencoderKL` or `AutoencoderKLFlux2`.

`autoencoder.py` adds what knows monobath's files. This module and what it imports is all that
`monobath export --for diffusers` writes into a folder, for machines without monobath (`export/remote.py`).
Pipelines scale and shift latents by `config.scaling_factor` and `config.shift_factor`; the model itself does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import resources, tiles
from ..config import TokenizerConfig
from ..decoders import make_decoder
from ..decoding import Decoding, SamplerConfig, pictures
from ..errors import UserError
from ..models.encoder import EncoderConfig
from ..models.frozen import make_encoder

try:
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise UserError(f"AutoencoderMonobath needs diffusers ({error}): pip install 'monobath[diffusers]'") from None

TILE = 512
"""Side of the tiles after `enable_tiling()`, in pixels."""


class LatentDistribution(DiagonalGaussianDistribution):
    """diffusers' diagonal Gaussian, whose KL is computed in float32: in half precision it overflows."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence in nats from `other`, or from N(0, I): `(B,)`, float32."""
        wide = DiagonalGaussianDistribution(self.parameters.float())
        return wide.kl(*([] if other is None else [DiagonalGaussianDistribution(other.parameters.float())]))


class AutoencoderMonobath(ModelMixin, ConfigMixin):
    """Encoder, decoder and sampler of one latent space, with the surface of diffusers' `AutoencoderKL`.

    Args:
        encoder_config: fields of `EncoderConfig`, as plain values.
        decoder_config: fields of `DecoderConfig`.
        sampler_config: fields of `SamplerConfig`: steps, power, noise.
        scaling_factor: what pipelines multiply latents by (1 / their standard deviation).
        shift_factor: what some pipelines (FLUX, SD3) subtract from latents before that (their mean).
        normalised: of FLUX.2's latents, as of `TokenizerConfig`; so are packed_mean, packed_variance.
        batch_norm_eps: `packed_eps`, under the name that FLUX.2's pipelines read.
        force_upcast: whether SDXL pipelines decode in float32 under float16. Not needed: activations stay small.

    `config` also says, for pipelines: `latent_channels`, and `block_out_channels`, whose length is log2(f) + 1.

    Raises:
        UserError: parts that do not fit each other, or unknown fields; the message names them.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        encoder_config: dict[str, Any] | None = None,
        decoder_config: dict[str, Any] | None = None,
        sampler_config: dict[str, Any] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        normalised: bool | None = None,
        packed_mean: Sequence[float] = (),
        packed_variance: Sequence[float] = (),
        batch_norm_eps: float = 0.0,
        force_upcast: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int | None = None,
        block_out_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        # Named apart from the modules: diffusers looks an attribute up in the config first.
        given_parts = {"encoder": encoder_config, "decoder": decoder_config, "sampler": sampler_config}
        values: dict[str, Any] = {name: dict(part or {}) for name, part in given_parts.items()}
        packed = {"packed_mean": list(packed_mean), "packed_variance": list(packed_variance)}
        values |= {"normalised": normalised, "packed_eps": batch_norm_eps, **packed}
        config = TokenizerConfig.from_dict(values)
        if config.sampler.stages > 1:
            raise UserError(
                f"a tokenizer of {config.sampler.stages} stages cannot become a diffusers model: use monobath.Tokenizer"
            )
        derived = {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": config.encoder.latent_channels,
            "block_out_channels": _widths(config.encoder),
        }
        given = (in_channels, out_channels, latent_channels, block_out_channels)
        for (name, ours), theirs in zip(derived.items(), given, strict=True):
            if theirs is not None and (list(theirs) if isinstance(theirs, Sequence) else theirs) != ours:
                raise UserError(f"{name}={theirs} does not fit the encoder, which has {ours}: leave it out")
        # The resolved values, so that a later version with other defaults builds the same network.
        self.register_to_config(**network_parts(config), **derived)
        self.encoder = make_encoder(config.encoder)
        self.decoder = make_decoder(config.decoder)
        self.sampler: SamplerConfig = config.sampler
        self.whole = config
        self.use_slicing = False
        self.tile: int | None = None
        self.overlap: int | None = None

    @property
    def bn(self) -> SimpleNamespace:
        """Statistics of packed latents, where FLUX.2's pipelines look for them.

        Raises:
            AttributeError: latents of another family.
            UserError: raw latents of FLUX.2, whose statistics the model does not know.
        """
        packing = self.whole.packing
        if packing is None:
            raise AttributeError("these are no latents of FLUX.2's: nothing packs and normalises them")
        return SimpleNamespace(running_mean=torch.tensor(packing.mean), running_var=torch.tensor(packing.variance))

    # ---- encode, decode -----------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[LatentDistribution]:
        """Images `(B, 3, H, W)` in [-1, 1] → `.latent_dist` over latents `(B, c, ceil(H/f), ceil(W/f))`, raw.

        Sides that f does not divide are padded by reflection.
        """
        x = x.to(self.dtype)
        factor = self.encoder.config.factor
        parts = x.split(1) if self.use_slicing else (x,)
        moments = [tiles.encode(self.encoder, part, factor, tile=self.tile, overlap=self.overlap) for part in parts]
        distribution = LatentDistribution(torch.cat(moments).to(self.dtype))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents `(B, c, h, w)`, raw → `.sample`, images `(B, 3, f·h, f·w)`, about [-1, 1], not clipped.

        Args:
            generator: one, or one a sample: where the seeds of the samples' noise come from. Without it every sample
                has the same noise, so that a latent gives the same image in any batch. A checkpoint that starts from
                zero noise ignores it.

        Raises:
            UserError: latents of another shape, or not a generator for each sample.
        """
        c = self.decoder.config.latent_channels
        if z.ndim != 4 or z.shape[1] != c:
            hint = resources.hint_for_channels(z.shape[1]) if z.ndim == 4 else ""
            raise UserError(f"latents are {tuple(z.shape)}: this model needs (B, {c}, h, w){hint}")
        z = z.to(self.dtype)
        seeds = self._seeds(len(z), generator)
        images: list[Tensor] = []
        step = 1 if self.use_slicing else max(1, len(z))
        for i in range(0, len(z), step):
            part = z[i : i + step]
            how = Decoding(seed=seeds[i : i + step], tile=self.tile, overlap=self.overlap)
            how = how.checked(self.decoder, self.sampler, part)
            images += pictures(self.decoder, part, how, lambda image: image.to(self.dtype))
        sample = torch.cat(images) if len(images) > 1 else images[0]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Reconstruct `(B, 3, H, W)`, from the posterior's mode or a draw from it."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        image = self.decode(z, generator=generator).sample[:, :, : sample.shape[2], : sample.shape[3]]
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _seeds(self, batch: int, generator: torch.Generator | Sequence[torch.Generator] | None) -> list[int]:
        if generator is None or self.sampler.noise == "zero":
            return [0] * batch
        generators = [generator] * batch if isinstance(generator, torch.Generator) else list(generator)
        if len(generators) != batch:
            raise UserError(f"{len(generators)} generators for a batch of {batch}: give one, or one a sample")
        return [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]

    # ---- memory -------------------------------------------------------------------------------------

    def enable_slicing(self) -> None:
        """Encode and decode one sample of a batch at a time. Same images."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch in one go again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True, *, tile: int = TILE, overlap: int | None = None) -> None:
        """Encode and decode pictures above `tile` in overlapping squares, with bounded memory; see `monobath.tiles`.

        Args:
            tile: side of a square, in pixels.
            overlap: pixels that neighbours share; default: what `monobath.tiles` finds best.
        """
        self.tile, self.overlap = (tile, overlap) if use_tiling else (None, None)

    def disable_tiling(self) -> None:
        """Encode and decode pictures whole again."""
        self.tile = self.overlap = None


def network_parts(config: TokenizerConfig) -> dict[str, Any]:
    """What a configuration says of its parts, under the names that `AutoencoderMonobath` takes."""
    return {f"{name}_config": dataclasses.asdict(getattr(config, name)) for name in ("encoder", "decoder", "sampler")}


def _widths(config: EncoderConfig) -> list[int]:
    """A width for each halving of the picture, which pipelines count; pixel-unshuffling counts as levels too."""
    if config.family:
        return [config.base] * config.factor.bit_length()  # whatever the foreign encoder's are: their number counts
    widths = [config.base * m for m in config.multipliers]
    return [widths[0]] * (config.patch.bit_length() - 1) + widths
