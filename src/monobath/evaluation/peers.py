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
from .system import PaddedSystem


class DiffusersSystem(PaddedSystem):
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

    def latents(self, x: Tensor) -> Tensor:
        """The posterior's mode, where there is one; no scaling factor."""
        coded = self.vae.encode(x, return_dict=False)[0]
        return coded if isinstance(coded, Tensor) else coded.mode()

    def pixels(self, z: Tensor, seeds: Sequence[int]) -> Tensor:
        """Only the consistency decoder draws noise."""
        options: dict[str, Any] = {}
        if self.consistency:  # a generator a sample, on the CPU: a picture depends on neither batch nor device
            options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.vae.decode(z, return_dict=False, **options)[0]


class TaesdSystem(PaddedSystem):
    """A tiny autoencoder of the TAESD family from two files of one folder.

    Args:
        family: start of the files' names: `{family}_encoder.safetensors`, `{family}_decoder.safetensors`.
        folder: where they are.

    Raises:
        UserError: a file is missing, unreadable or of another architecture.
    """

    factor = taesd.FACTOR

    def __init__(
        self, family: str, folder: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        encoder, decoder = (read_taesd(family, folder, part) for part in ("encoder", "decoder"))
        self.encoder, self.decoder = encoder.to(device, dtype), decoder.to(device, dtype)
        self.name = self.kind = self.family = family.upper()
        self.weights, self.device, self.dtype = folder, torch.device(device), dtype

    def latents(self, x: Tensor) -> Tensor:
        """The encoder takes [0, 1]."""
        assert self.encoder is not None
        return self.encoder((x + 1) / 2)

    def pixels(self, z: Tensor, seeds: Sequence[int]) -> Tensor:
        """The decoder gives [0, 1]."""
        assert self.decoder is not None
        return 2 * self.decoder(z).float() - 1
