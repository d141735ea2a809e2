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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from . import store, tiles
from .autoencoders import Foreign, fitting_encoder
from .config import TokenizerConfig
from .decoders import PixelDecoder, make_decoder
from .decoders.folded import folded
from .decoding import Decoding, Output, SamplerConfig, pictures
from .errors import UserError
from .images import MAX_PIXELS, Images, images_to_tensor, tensor_to_pil, to_uint8
from .models.encoder import Posterior
from .models.frozen import make_encoder
from .models.loading import built
from .sampling import Noise

FORMAT = "monobath-tokenizer-1"
HALF_MAX = 256.0
"""Larger latents, which no encoder makes, are taken as this in float16: from 1000 on, the packaged decoders' first
convolution, their first one between levels and their sums overflow."""


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
        self.decoder: PixelDecoder = make_decoder(config.decoder)

    @property
    def factor(self) -> int:
        """Side of the pixel square behind one latent position, f."""
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
            overlap: pixels that neighbouring tiles share, over which they are blended; default: `monobath.tiles`.
            max_pixels: largest accepted H × W.

        Returns:
            The posterior; `.mode()` is `(B, c, ceil(H/f), ceil(W/f))`, `.size` is (H, W) for `decode`.

        Raises:
            UserError: another type, range, shape, too many pixels, or a tile that cannot be, and the message says what
                was given; or a model of foreign latents without its encoder.
        """
        # One memory layout for all forms, so that the same picture takes the same kernels: equal to the last bit.
        x = images_to_tensor(images, max_pixels=max_pixels).contiguous()
        moments = tiles.encode(
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
        output: Output = "tensor",
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
        how = Decoding(size=size, steps=steps, seed=seed, noise=noise, guidance=guidance, tile=tile, overlap=overlap,
                       output=output)  # fmt: skip
        *_, picture = self._decoded(z, how)
        return picture

    def decode_progressive(
        self,
        z: Tensor,
        *,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        noise: Noise | None = None,
        guidance: float | None = None,
        tile: int | None = None,
        output: Output = "tensor",
    ) -> Iterator[Any]:
        """Latents → images, coarse to fine: each stage's picture as soon as it exists.

            for preview in tok.decode_progressive(z):  # 64², 128², 256²
                ...

        Arguments are those of `decode`; tiles overlap as they do by default. Previews are clean images, not noisy
        states. Of a size that the stages do not divide, sides are rounded up: 500 × 375 comes as 125 × 94, 250 × 188,
        500 × 375. The last picture is exactly what `decode` gives if that goes through the stages too
        (`sampler.stages` above 1); a tokenizer whose decoder has one scale, or is optimized, yields what `decode`
        gives alone.

        Raises:
            UserError: as `decode`, when called.
        """
        how = Decoding(size=size, steps=steps, seed=seed, noise=noise, guidance=guidance, stages=self.decoder.stages,
                       tile=tile, output=output)  # fmt: skip
        return self._decoded(z, how)

    def _decoded(self, z: Tensor, how: Decoding) -> Iterator[Any]:
        """Pictures in the form that `how` asks for, coarse to fine, each computed when it is asked for."""
        how = how.checked(self.decoder, self.config.sampler, z, self.config.encoder.name)
        finish = _clipped if how.output == "tensor" else to_uint8
        if self.dtype == torch.float16:
            z = z.clamp(-HALF_MAX, HALF_MAX)
        found = pictures(self.decoder, z.to(self.device, self.dtype), how, finish)
        return _finished(found, how.output)

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
        if not self.decoder.trains or self.config.decoder.kind == "kl":
            why = "is optimized already" if not self.decoder.trains else "has a KL-VAE decoder"
            raise UserError(f"this tokenizer {why}: use it as it is")
        if self.config.sampler.stages > 1:
            stages = f"{self.config.sampler.stages} stages, which cannot be folded into one step"
            raise UserError(f"this tokenizer decodes in {stages}: use it as it is")
        decoder = folded(self.decoder, noise or self.config.sampler.noise)
        decoder.to(memory_format=torch.channels_last)
        if compile:
            decoder.predict = torch.compile(decoder.predict)  # type: ignore[method-assign]
        return self.with_decoder(decoder)

    def with_decoder(self, decoder: PixelDecoder) -> Tokenizer:
        """A tokenizer with the same encoder, shared, which decodes in one step with `decoder`, a fixed one."""
        other = copy.copy(self)
        other._modules = {"encoder": self.encoder, "decoder": decoder}
        other.config = dataclasses.replace(self.config, sampler=SamplerConfig(steps=1, noise=decoder.fixed or "zero"))
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
        self.encoder = fitting_encoder(encoder, self.config).to(self.device, self.dtype)
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
        if not self.decoder.trains:
            raise UserError("an optimized tokenizer cannot be saved: save the original, and optimize after loading")
        store.write(Path(save_directory), self, FORMAT, dataclasses.asdict(self.config), extra, dtype)
        if push_to_hub:
            repo_id = push_to_hub_kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id=repo_id, **push_to_hub_kwargs)

    @classmethod
    def config_of(cls, name: str | os.PathLike[str]) -> TokenizerConfig:
        """What `from_pretrained(name)` would be, without its weights; raises likewise."""
        folder, stages = store.locate(name)
        return TokenizerConfig.from_dict(store.read_config(folder, FORMAT, "tokenizer"), stages)

    @staticmethod
    def training_of(name: str | os.PathLike[str]) -> dict[str, Any]:
        """What `save_pretrained(extra=)` stored with the model `name`, such as its recipe; raises as `config_of`."""
        training = store.stored(store.locate(name)[0], FORMAT, "tokenizer").get("training")
        return training if isinstance(training, dict) else {}

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
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder, stages = store.locate(name, **hub)
        config, state = store.read(folder, FORMAT, "tokenizer")
        how = TokenizerConfig.from_dict(config, stages)
        tokenizer = built(lambda: cls(how), state, str(folder))
        if encoder is not None:
            tokenizer.attach_encoder(encoder)
        return tokenizer.to(device=device, dtype=dtype or torch.float32).eval()


def _clipped(x: Tensor) -> Tensor:
    return x.float().clamp(-1, 1)


@torch.no_grad()
def _finished(found: Iterator[Tensor], output: Output) -> Iterator[Any]:
    """Each picture in its form, computed when it is asked for."""
    for pixels in found:
        yield [tensor_to_pil(p) for p in pixels] if output == "pil" else pixels
