"""Other people's autoencoders: diffusers' classes and the TAESD family. Tiling and slicing stay off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autoencoders import (
    ARCHITECTURES,
    autoencoder_factor,
    coding_parts,
    load_autoencoder,
    placed,
    random_autoencoder,
    read_taesd,
)
from ..models import taesd
from ..tiles import pad_to_multiple
from .system import Code, System


class DiffusersSystem(System):
    """An autoencoder of diffusers: mode of the posterior in, its plain `decode` out.

    Images are padded by reflection to multiples of the factor and cropped back.

    Args:
        kind: key of `ARCHITECTURES`.
        where: a folder that `save_pretrained` wrote (or one that holds it as `vae`), `user/repository` on the Hub
            (`user/repository/subfolder` works too), or "random": the standard shape with random weights, of which
            only the speed means anything.

    Raises:
        UserError: diffusers is not installed, nothing of that name, or another architecture.
    """

    def __init__(
        self, kind: str, where: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if where == "random":
            vae, self.weights = random_autoencoder(kind), "random"
            self.name = f"{ARCHITECTURES[kind].name}, random weights"
        else:
            vae, self.weights = load_autoencoder(kind, where), where
            self.name = f"{ARCHITECTURES[kind].name} ({where.rstrip('/').rpartition('/')[2]})"
        self.vae = placed(vae, device, dtype)
        self.kind = self.family = ARCHITECTURES[kind].name
        self.device, self.dtype = torch.device(device), dtype
        self.factor = autoencoder_factor(vae)
        self.encoder, self.decoder = coding_parts(vae)
        self.consistency = kind == "consistency"
        if self.consistency:
            self.steps = 2  # the published decoder's, and diffusers' default

    @torch.no_grad()
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → raw latents (no scaling factor)."""
        size = (images.shape[2], images.shape[3])
        x = pad_to_multiple(images.to(self.device), self.factor).to(self.dtype)
        coded = self.vae.encode(x, return_dict=False)[0]
        z = coded if isinstance(coded, Tensor) else coded.mode()
        return Code(payload=z, size=size, bits=latent_bits(z))

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]. Only the consistency decoder draws noise."""
        options: dict[str, Any] = {}
        if self.consistency:  # a generator a sample, on the CPU: a picture depends on neither batch nor device
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = self.vae.decode(code.payload, return_dict=False, **options)[0]
        return x[:, :, : code.size[0], : code.size[1]].float().clamp(-1, 1)


class TaesdSystem(System):
    """A tiny autoencoder of the TAESD family from two files of one folder.

    Args:
        family: start of the files' names: `{family}_encoder.safetensors`, `{family}_decoder.safetensors`.
        folder: where they are.

    Raises:
        UserError: a file is missing, unreadable or of another architecture.
    """

    def __init__(
        self, family: str, folder: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        encoder, decoder = (read_taesd(family, folder, part) for part in ("encoder", "decoder"))
        self.encoder, self.decoder = encoder.to(device, dtype), decoder.to(device, dtype)
        self.name = self.kind = self.family = family.upper()
        self.weights, self.device, self.dtype = folder, torch.device(device), dtype

    @torch.no_grad()
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → raw latents."""
        assert self.encoder is not None
        size = (images.shape[2], images.shape[3])
        x = pad_to_multiple(images.to(self.device), taesd.FACTOR).to(self.dtype)
        z = self.encoder((x + 1) / 2)  # the network takes [0, 1]
        return Code(payload=z, size=size, bits=latent_bits(z))

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]."""
        assert self.decoder is not None
        x = 2 * self.decoder(code.payload).float() - 1
        return x[:, :, : code.size[0], : code.size[1]].clamp(-1, 1)


def latent_bits(z: Tensor) -> list[int]:
    """Bits of each sample's latent `(B, c, h, w)`: 16 a value, the precision that latents are stored in."""
    return [16 * z[0].numel()] * len(z)
