"""Tokenizer = encoder + decoder + sampler: encode, decode, save, load. Most users stop here.

    tok = Tokenizer.from_pretrained("default")
    z = tok.encode(images).mode()          # (B, c, H/f, W/f)
    pictures = tok.decode(z, output="pil")

SSDD (arXiv 2510.04961): the encoder is shared by all decoders; the decoder is a flow-matching model in pixel space
that was trained or distilled to need a single step.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn

from . import decoding, resources
from ._version import __version__
from .autoencoders import Foreign, fitting_encoder
from .decoders.folded import OneStep, OneStepDecoder
from .decoders.kl import KLDecoder
from .decoders.uvit import Decoder, DecoderConfig
from .errors import UserError
from .images import MAX_PIXELS, Images, images_to_tensor, tensor_to_pil, to_uint8
from .models.encoder import EncoderConfig, Posterior
from .models.frozen import make_encoder
from .models.loading import load_strictly
from .sampling import Noise, seeds_for
from .store import config_of, read_checkpoint, write_checkpoint

FORMAT = "monobath-tokenizer-1"


@dataclass(kw_only=True)
class SamplerConfig:
    """How a checkpoint is meant to be decoded."""

    steps: int = 1
    """Euler steps; of a multi-scale checkpoint, at each stage."""
    power: float = 2.0
    """Exponent of the time grid: above 1 puts more steps near the image."""
    noise: Literal["gaussian", "zero"] = "gaussian"
    """Where sampling starts: a seeded random image, or all zeros (deterministic, higher PSNR)."""
    stages: int = 1
    """Scales that `decode` goes through, coarse to fine (`monobath.scales`): all of the decoder's, or 1, the full
    resolution at once."""
    guidance: float = 1.0
    """Scale of classifier-free guidance on the latent; 1: none. Another needs `decoder.null_latent`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.power <= 0:
            raise UserError(f"sampler: steps={self.steps} must be at least 1 and power={self.power} above 0")
        if self.noise not in ("gaussian", "zero"):
            raise UserError(f'sampler.noise is {self.noise!r}: choose "gaussian" or "zero"')


@dataclass(kw_only=True)
class TokenizerConfig:
    """Everything needed to build a tokenizer; stored with its weights."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    scaling_factor: float = 1.0
    """1 / std of the latents. Published for generators and diffusers pipelines; `encode` and `decode` ignore it."""
    shift_factor: float = 0.0
    """Mean of the latents, likewise."""
    latent_mean: list[float] = field(default_factory=list)
    """Mean of each channel of the latents, likewise; empty: never measured (`monobath stats` does)."""
    latent_std: list[float] = field(default_factory=list)
    """Standard deviation of each channel, likewise."""
    kl_decoder: list[int] = field(default_factory=list)
    """Channels of a KL-VAE decoder (diffusers'), finest first, in place of ours: the baseline; empty: ours."""

    def __post_init__(self) -> None:
        for name in ("factor", "latent_channels"):
            a, b = getattr(self.encoder, name), getattr(self.decoder, name)
            if a != b:
                raise UserError(f"encoder.{name}={a} and decoder.{name}={b} must be equal")
        if self.sampler.stages not in (1, self.decoder.stages):
            raise UserError(
                f"sampler.stages={self.sampler.stages} with decoder.stages={self.decoder.stages}: it must be equal to "
                "that, or 1"
            )
        if self.sampler.guidance != 1 and not self.decoder.null_latent:
            raise UserError(
                f"sampler.guidance={self.sampler.guidance} needs decoder.null_latent; without it, leave it at 1"
            )
        if self.sampler.guidance != 1 and self.sampler.stages == 1:
            raise UserError(f"sampler.guidance={self.sampler.guidance} needs sampler.stages above 1: leave it at 1")
        if self.kl_decoder and self.decoder.stages > 1:
            raise UserError("kl_decoder has one scale: leave decoder.stages at 1")
        if self.kl_decoder and self.decoder.trunk:
            raise UserError(f"kl_decoder runs behind no trunk: leave decoder.trunk at 0, not {self.decoder.trunk}")
        for name, given in (("kl_decoder", self.kl_decoder), ("decoder.slim", self.decoder.slim)):
            if given and (self.sampler.steps, self.sampler.noise) != (1, "zero"):
                raise UserError(f'{name} needs sampler.steps 1 and sampler.noise "zero": it takes no noise')
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.encoder.latent_channels):
                raise UserError(
                    f"{name} is {getattr(self, name)}: give one number for each of the "
                    f"{self.encoder.latent_channels} latent channels, or none"
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TokenizerConfig:
        """Build from plain values; an unknown key is a `UserError` that names it."""
        parts = {"encoder": EncoderConfig, "decoder": DecoderConfig, "sampler": SamplerConfig}
        return config_of(cls, values, parts, "tokenizer")


class Tokenizer(nn.Module, ModelHubMixin, library_name="monobath", tags=["image-tokenizer", "autoencoder"]):
    """Encoder, decoder and sampler of one latent space.

    Attributes:
        config: `TokenizerConfig`.
        encoder: image `(B, 3, H, W)` → moments; `encode` is the friendly form. A model fitted to other people's latents
            is loaded without: see `attach_encoder`.
        decoder: `(x_t, t, z)` → raw prediction; `decode` samples with it.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config.encoder)
        self.decoder: Decoder | OneStep
        if config.kl_decoder:
            self.decoder = KLDecoder(config.decoder, config.kl_decoder)
        else:
            self.decoder = Decoder(config.decoder)

    @property
    def factor(self) -> int:
        """f: side of the pixel square behind one latent position."""
        return self.config.encoder.factor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and of the arithmetic."""
        return self.encoder.anchor.dtype

    @torch.no_grad()
    def encode(
        self, images: Images, *, tile: int | None = None, overlap: int | None = None, max_pixels: int = MAX_PIXELS
    ) -> Posterior:
        """Images → distribution over latents.

        Args:
            images: float tensor in [-1, 1] or uint8 tensor, `(B, 3, H, W)` or `(3, H, W)`; uint8 array `(H, W, 3)`
                or `(B, H, W, 3)`; a PIL image of any mode; or a list of equally sized ones. Any H and W: sides are
                padded to a multiple of f by reflection (replication where reflection cannot).
            tile: encode in squares of this many pixels a side, one at a time, which bounds the memory of a large
                picture; default: at once. A tile that covers the picture changes nothing.
            overlap: pixels that neighbouring tiles share, over which they are blended; default: `monobath.decoding`.
            max_pixels: largest accepted H × W.

        Returns:
            The posterior; `.mode()` is `(B, c, ceil(H/f), ceil(W/f))`, `.size` is (H, W) for `decode`.

        Raises:
            UserError: another type, range, shape, too many pixels, or a tile that cannot be, and the message says what
                was given; or a model of foreign latents without its encoder.
        """
        # One memory layout for all forms, so that the same picture takes the same kernels: equal to the last bit.
        x = images_to_tensor(images, max_pixels=max_pixels).contiguous()
        moments = decoding.encode(
            lambda part: self.encoder(part.to(self.device).to(self.dtype)), x, self.factor, tile=tile, overlap=overlap
        )
        return Posterior(moments, (x.shape[2], x.shape[3]))

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
        guidance: float | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        output: Literal["tensor", "pil", "uint8"] = "tensor",
    ) -> Any:
        """Latents → images.

        Args:
            z: `(B, c, h, w)`, raw (not scaled by `scaling_factor`).
            size: (H, W) to crop to, such as the posterior's `.size`; default h·f, w·f.
            steps: Euler steps, of a multi-scale checkpoint at each stage; default: what the checkpoint was made for.
            seed: one int a sample, or an int s meaning s, s + 1, …. Noise is drawn per sample on the CPU, so an image
                depends on neither its batch nor the device.
            noise: "gaussian" or "zero"; default: what the checkpoint was made for.
            guidance: scale of classifier-free guidance, 1 for none; default: what the checkpoint was made for. Another
                takes twice the time, and a checkpoint with a null latent.
            tile: decode in squares of this many pixels a side, one at a time, which bounds the memory of a large
                picture; default: at once. A tile that covers the picture changes nothing. All tiles share one noise
                field.
            overlap: pixels that neighbouring tiles share, over which they are blended. Tiles of a decoder without
                statistics over the picture (`norm: local`) are exactly the whole where the overlap suffices, which is
                then the default. See `monobath.decoding`.
            output: "tensor", float32 `(B, 3, H, W)` clipped to [-1, 1]; "uint8", the same in 0…255; "pil", a list.

        Raises:
            UserError: latents of another shape, non-finite latents, a size that does not fit, a tile that cannot be, or
                an unknown option.
        """
        if self.config.sampler.stages > 1:
            if tile is not None or overlap is not None:
                raise UserError("a multi-scale tokenizer cannot decode in tiles: leave out tile and overlap")
            *_, picture = self.decode_progressive(
                z, size=size, steps=steps, seed=seed, noise=noise, guidance=guidance, output=output
            )
            return picture
        size, steps, noise = self._options(z, size, steps, noise, guidance, output)
        if guidance is not None and guidance != 1:
            raise UserError(f"guidance={guidance}: this tokenizer decodes at full resolution at once, without guidance")
        try:
            pixels = decoding.sample(
                self.decoder,
                z.to(self.device, self.dtype),
                seeds_for(seed, len(z)),
                steps=steps,
                power=self.config.sampler.power,
                noise=noise,
                size=size,
                tile=tile,
                overlap=overlap,
                finish=_clipped if output == "tensor" else to_uint8,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return [tensor_to_pil(p) for p in pixels] if output == "pil" else pixels

    def decode_progressive(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
        guidance: float | None = None,
        output: Literal["tensor", "pil", "uint8"] = "tensor",
    ) -> Iterator[Any]:
        """Latents → images, coarse to fine: each stage's picture as soon as it exists.

            for preview in tok.decode_progressive(z):  # 64², 128², 256²
                ...

        Arguments are those of `decode`. Previews are clean images, not noisy states. Of a size that the stages do not
        divide, sides are rounded up: 500 × 375 comes as 125 × 94, 250 × 188, 500 × 375. The last picture is exactly
        what `decode` gives if that goes through the stages too (`sampler.stages` above 1); a tokenizer whose decoder
        has one scale, or is optimized, yields what `decode` gives alone.

        Raises:
            UserError: as `decode`, when called.
        """
        if self.config.decoder.stages == 1 or isinstance(self.decoder, OneStep):
            image = self.decode(z, size=size, steps=steps, seed=seed, noise=noise, guidance=guidance, output=output)
            return iter([image])
        size, steps, noise = self._options(z, size, steps, noise, guidance, output)
        sampler = self.config.sampler
        assert isinstance(self.decoder, Decoder)
        try:
            images = decoding.previews(
                self.decoder,
                z.to(self.device, self.dtype),
                seeds_for(seed, len(z)),
                steps=steps,
                power=sampler.power,
                noise=noise,
                guidance=sampler.guidance if guidance is None else guidance,
                size=size,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return _finished(images, output)

    def _options(
        self,
        z: Tensor,
        size: tuple[int, int] | None,
        steps: int | None,
        noise: Noise | None,
        guidance: float | None,
        output: str,
    ) -> tuple[tuple[int, int], int, Noise]:
        """Checked size, steps and noise of a decoding."""
        c, f, sampler = self.config.encoder.latent_channels, self.factor, self.config.sampler
        if not isinstance(z, Tensor) or z.ndim != 4 or z.shape[1] != c or 0 in z.shape:
            shape = tuple(z.shape) if hasattr(z, "shape") else type(z).__name__
            message = f"latents are {shape}: this tokenizer ({self.config.encoder.name}) needs (B, {c}, h, w)"
            other = isinstance(z, Tensor) and z.ndim == 4 and z.shape[1] != c
            raise UserError(message + (resources.hint_for_channels(z.shape[1]) if other else ""))
        if not torch.isfinite(z).all():
            raise UserError("latents contain NaN or infinity: check what produced them")
        full = (z.shape[2] * f, z.shape[3] * f)
        size = size or full
        if not all(0 < s <= limit for s, limit in zip(size, full, strict=True)):
            raise UserError(f"size={tuple(size)} does not fit latents of {tuple(z.shape)}: at most {full}")
        if output not in ("tensor", "pil", "uint8"):
            raise UserError(f'output={output!r}: choose "tensor", "pil" or "uint8"')
        steps = sampler.steps if steps is None else steps
        noise = sampler.noise if noise is None else noise
        if isinstance(self.decoder, OneStep) and (steps != 1 or noise != self.decoder.noise):
            raise UserError(
                f"this tokenizer was optimized for 1 step from {self.decoder.noise} noise, not {steps} from {noise}: "
                "use the original one"
            )
        if guidance is not None and guidance != 1 and not self.config.decoder.null_latent:
            raise UserError(
                f"guidance={guidance}: this tokenizer was trained without a null latent (decoder.null_latent), "
                "so leave it out"
            )
        return size, steps, noise

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct `(B, 3, H, W)` in [-1, 1] with the posterior's mode."""
        posterior = self.encode(images)
        return self.decode(posterior.mode(), size=posterior.size)

    def optimize(self, *, noise: Noise | None = None, compile: bool = False) -> Tokenizer:
        """The one-step inference form: the same pictures (to rounding) with fewer operations.

        Everything that is constant at t = 1 is folded into the weights (see `decoders/folded.py`), and images are
        kept channels-last. It is what `monobath export` writes; by itself it is hardly faster on a CPU.

        Args:
            noise: what decoding will start from; default: what the checkpoint was made for.
            compile: also `torch.compile` the decoder: a wait at each new size, faster decoding after it.

        Returns:
            A new tokenizer with the same encoder, shared, whose `decode` takes one step from that noise and nothing
            else; it can be neither trained nor saved. This one stays as it is.

        Raises:
            UserError: it is optimized already, or decodes in several stages.
        """
        if isinstance(self.decoder, OneStep):
            why = "has a KL-VAE decoder" if self.decoder.trains else "is optimized already"
            raise UserError(f"this tokenizer {why}: use it as it is")
        if self.config.sampler.stages > 1:
            raise UserError(
                f"this tokenizer decodes in {self.config.sampler.stages} stages, which cannot be folded into one step: "
                "use it as it is"
            )
        decoder = OneStepDecoder(self.decoder, noise or self.config.sampler.noise)
        decoder.to(memory_format=torch.channels_last)
        if compile:
            decoder.compile()
        return self.with_decoder(decoder)

    def with_decoder(self, decoder: OneStep) -> Tokenizer:
        """A tokenizer with the same encoder, shared, which decodes with `decoder`."""
        other = copy.copy(self)
        other._modules = {"encoder": self.encoder, "decoder": decoder}
        other.config = dataclasses.replace(self.config, sampler=SamplerConfig(steps=1, noise=decoder.noise))
        other.training = False  # not eval(): the encoder is shared, and its mode is this one's affair
        return other

    def attach_encoder(self, encoder: Foreign) -> Tokenizer:
        """Give a model of foreign latents what makes them, so that `encode` works; it is never stored with the model.

        Args:
            encoder: "KIND=WHERE", an autoencoder of diffusers, or a callable; see `autoencoders.as_encoder`. It
                is moved to this tokenizer's device and type. Another encoder of the same latents will do.

        Returns:
            This tokenizer.

        Raises:
            UserError: it cannot be read, does not fit, or this model has an encoder of its own.
        """
        self.encoder = fitting_encoder(encoder, self.config.encoder).to(self.device, self.dtype)
        return self

    # ---- files ----------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        extra: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> None:
        """Write `config.json` and `model.safetensors` (config inside) to a folder, atomically; never pickle.

        Args:
            dtype: type of the stored weights, such as torch.bfloat16 for a file of half the size.
            extra: plain values kept in the config under "training", such as the recipe.
            push_to_hub: also upload; further arguments are those of `push_to_hub`, such as repo_id.

        Raises:
            UserError: the folder cannot be written (what was there stays as it was), or the tokenizer is optimized.
            TypeError: upload arguments without push_to_hub.
        """
        if push_to_hub_kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained got {sorted(push_to_hub_kwargs)}, which need push_to_hub=True")
        if isinstance(self.decoder, OneStep) and not self.decoder.trains:
            raise UserError("an optimized tokenizer cannot be saved: save the original, and optimize after loading")
        write_checkpoint(Path(save_directory), self, FORMAT, dataclasses.asdict(self.config), extra, dtype)
        if push_to_hub:
            repo_id = push_to_hub_kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id=repo_id, **push_to_hub_kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike[str] = "default",
        *,
        encoder: Foreign | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Tokenizer:
        """Load a tokenizer: packaged weights by name, else an existing folder or file, else a Hub repository.

        Args:
            name: such as "default", "runs/mine/model", or "user/repository".
            encoder: of a model of foreign latents: what makes them; see `attach_encoder`. Decoding needs none.
            device: where to put it; default: the CPU.
            dtype: of the weights and the arithmetic; default: float32, whatever the file holds.

        Returns:
            The tokenizer, in evaluation mode.

        Raises:
            UserError: nothing of that name, a corrupt file, or one that does not fit its configuration; an encoder that
                does not fit.
        """
        folder = resources.weights_path(str(name))
        if folder is None and Path(name).exists():
            folder = Path(name)
        if folder is None:
            folder = _download(str(name), revision, token, cache_dir, local_files_only)
        config, state = read_checkpoint(folder, FORMAT, "tokenizer")
        stages = resources.weights_stages(str(name))
        if stages:
            config = config | {"sampler": config["sampler"] | {"stages": stages}}
        tokenizer = cls(TokenizerConfig.from_dict(config))
        load_strictly(tokenizer, state, str(folder))
        if encoder is not None:
            tokenizer.attach_encoder(encoder)
        return tokenizer.to(device=device, dtype=dtype or torch.float32).eval()


def _clipped(x: Tensor) -> Tensor:
    return x.float().clamp(-1, 1)


@torch.no_grad()
def _finished(images: Iterator[Tensor], output: str) -> Iterator[Any]:
    """Each image in the form that `decode` gives, computed when it is asked for."""
    for image in images:
        pixels = _clipped(image) if output == "tensor" else to_uint8(image)
        yield [tensor_to_pil(p) for p in pixels] if output == "pil" else pixels


def _download(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    known = ", ".join(resources.weights_names())
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=["config.json", "model.safetensors"],
                library_name="monobath",
                library_version=__version__,
            )
        )
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no tokenizer {name!r}: it is not packaged ({known}), not an existing path, and could not be fetched "
            f"from the Hub ({reason})"
        ) from None
