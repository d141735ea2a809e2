"""`AutoencoderMonobath`: a tokenizer as a diffusers model, for the place of `AutoencoderKL` in a pipeline.

    pipe.vae = AutoencoderMonobath.from_monobath("default")

Needs diffusers (`pip install 'monobath[diffusers]'`); `monobath.integrations.diffusers` hands the class out.
Pipelines scale and shift latents by `config.scaling_factor` and `config.shift_factor`; the model itself does not.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import resources, tiles
from ..autoencoders import Foreign, fitting_encoder
from ..decoders import make_decoder
from ..decoding import Decoding, SamplerConfig, pictures
from ..errors import UserError
from ..models.encoder import EncoderConfig
from ..models.frozen import make_encoder
from ..tokenizer import Tokenizer, TokenizerConfig

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
        force_upcast: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int | None = None,
        block_out_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        # Named apart from the modules: diffusers looks an attribute up in the config first.
        given_parts = {"encoder": encoder_config, "decoder": decoder_config, "sampler": sampler_config}
        config = TokenizerConfig.from_dict({name: dict(values or {}) for name, values in given_parts.items()})
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
        self.register_to_config(**_parts(config), **derived)
        self.encoder = make_encoder(config.encoder)
        self.decoder = make_decoder(config.decoder)
        self.sampler: SamplerConfig = config.sampler
        self.use_slicing = False
        self.tile: int | None = None
        self.overlap: int | None = None

    # ---- from and to files --------------------------------------------------------------------------

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> AutoencoderMonobath:
        """The same network as a diffusers model, of the same type and on the same device; it shares no memory.

        A model of foreign latents takes the encoder along if it is attached; decoding needs none.

        Raises:
            UserError: the tokenizer is optimized; give the original one.
        """
        if tokenizer.config.decoder.kind == "kl" or not tokenizer.decoder.trains:
            why = "with a KL-VAE decoder" if tokenizer.decoder.trains else "that is optimized"
            raise UserError(f"a tokenizer {why} cannot become a diffusers model: give an original monobath one")
        config = tokenizer.config
        model = cls(**_parts(config), scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)
        model.load_state_dict(tokenizer.state_dict())
        if config.encoder.family:
            model.encoder = copy.deepcopy(tokenizer.encoder)
        model.to(tokenizer.device)
        if tokenizer.dtype != model.dtype:  # diffusers 0.42 warns at every change of type
            model.to(tokenizer.dtype)
        return model.eval()

    @classmethod
    def from_monobath(cls, name: str | os.PathLike[str] = "default", **options: Any) -> AutoencoderMonobath:
        """Load what `Tokenizer.save_pretrained` wrote; names and options are those of `Tokenizer.from_pretrained`."""
        return cls.from_tokenizer(Tokenizer.from_pretrained(name, **options))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> AutoencoderMonobath:
        """Load a model: a packaged monobath name, a folder of either form, or a Hub repository in diffusers form.

        Options are diffusers'. Of them, monobath's own form knows torch_dtype.

        Raises:
            UserError: other options with monobath's own form, or files that cannot be read.
        """
        name = pretrained_model_name_or_path
        if not _in_own_form(name, options.get("subfolder")):
            return super().from_pretrained(name, **options)
        dtype = options.pop("torch_dtype", None)
        if options:
            raise UserError(
                f"{name} is in monobath's form, which does not know {', '.join(sorted(options))}: leave it out, "
                "or use from_monobath"
            )
        return cls.from_monobath(name, dtype=dtype)

    def attach_encoder(self, encoder: Foreign) -> None:
        """Give a model of foreign latents what makes them; see `Tokenizer.attach_encoder`. It is stored with neither.

        Raises:
            UserError: it cannot be read, does not fit, or this model has an encoder of its own.
        """
        self.encoder = fitting_encoder(encoder, self.encoder.config).to(self.device, self.dtype)

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


def _parts(config: TokenizerConfig) -> dict[str, Any]:
    return {f"{name}_config": dataclasses.asdict(getattr(config, name)) for name in ("encoder", "decoder", "sampler")}


def _widths(config: EncoderConfig) -> list[int]:
    """A width for each halving of the picture, which pipelines count; pixel-unshuffling counts as levels too."""
    if config.family:
        return [config.base] * config.factor.bit_length()  # whatever the foreign encoder's are: their number counts
    widths = [config.base * m for m in config.multipliers]
    return [widths[0]] * (config.patch.bit_length() - 1) + widths


def _in_own_form(name: str | os.PathLike[str], subfolder: str | None) -> bool:
    """Whether a name is packaged, or a file or folder that `Tokenizer.save_pretrained` wrote."""
    if resources.weights_path(str(name)) is not None:
        return True
    path = Path(name, subfolder or "")
    return path.is_file() or (path / "model.safetensors").is_file()
