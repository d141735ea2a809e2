"""What is compared: a system that turns images into codes and back. Ours; `peers` has the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..autoencoders import Foreign, as_encoder
from ..errors import UserError
from ..models.frozen import ForeignEncoder
from ..sampling import Noise
from ..tiles import pad_to_multiple
from ..tokenizer import Tokenizer
from ..words import count
from .facts import full_name


@dataclass(kw_only=True)
class Code:
    """What travels from `encode` to `decode`."""

    payload: Any
    """Latents `(B, c, h, w)`, or a list of B files as bytes."""
    size: tuple[int, int]
    """(H, W) of the images."""
    bits: list[int]
    """Size of each image's code in bits: real bytes of files; latent values at 16 bit each."""


class System(ABC):
    """An encoder and a decoder of images, with what the tables say about them."""

    name: str
    kind: str
    weights: str = ""
    family: str = ""
    steps: int | None = None
    encoder: nn.Module | None = None
    """The network that encodes, for its parameters; None if there is none."""
    decoder: nn.Module | None = None
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1], any H and W → code. Deterministic: a posterior's mode."""

    @abstractmethod
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Code → float images `(B, 3, H, W)` in [-1, 1], clipped. `seeds`: one a picture, for those that draw noise."""


class PaddedSystem(System):
    """Its code is a tensor, and it takes sides divisible by `factor`: padded by reflection, cropped back."""

    factor: int
    dtype = torch.float32
    bits = 16
    """Of a value of the code: the precision that latents are stored in."""

    @abstractmethod
    def latents(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1], of type `dtype` → raw latents `(B, c, H/f, W/f)`."""

    @abstractmethod
    def pixels(self, z: Tensor, seeds: Sequence[int]) -> Tensor:
        """Raw latents → images `(B, 3, H, W)`, not clipped."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → raw latents."""
        z = self.latents(pad_to_multiple(images.to(self.device), self.factor).to(self.dtype))
        return Code(payload=z, size=(images.shape[2], images.shape[3]), bits=[self.bits * z[0].numel()] * len(z))

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]."""
        return self.pixels(code.payload, seeds)[:, :, : code.size[0], : code.size[1]].float().clamp(-1, 1)


class TokenizerSystem(System):
    """One of our tokenizers.

    Args:
        name: packaged weights, a path, or a Hub id.
        steps: Euler steps; default: what the checkpoint was made for.
        noise: "gaussian" or "zero"; default: what the checkpoint was made for.
        encoder: of a model of foreign latents: what makes them; see `Tokenizer.attach_encoder`.
        label: what tables call it; default: `name`.
    """

    kind = "monobath"

    def __init__(
        self,
        name: str,
        *,
        steps: int | None = None,
        noise: Noise | None = None,
        encoder: Foreign | None = None,
        label: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps is {steps}: sampling needs at least one step")
        self.tokenizer = Tokenizer.from_pretrained(name, encoder=encoder, device=device, dtype=dtype)
        sampler = self.tokenizer.config.sampler
        self.steps = sampler.steps if steps is None else steps
        self.noise: Noise = sampler.noise if noise is None else noise
        self.weights = full_name(name)
        # A curve over steps joins what differs in nothing else.
        label = label or name
        self.family = label if noise in (None, sampler.noise) else f"{label}, {noise} noise"
        self.name = self.family if steps in (None, sampler.steps) else f"{self.family}, {count(steps, 'step')}"
        self.encoder = _network(self.tokenizer)
        self.decoder, self.device = self.tokenizer.decoder, self.tokenizer.device

    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → the posterior's mode."""
        posterior = self.tokenizer.encode(images)
        z = posterior.mode()
        return Code(payload=z, size=posterior.size, bits=[16 * z[0].numel()] * len(z))

    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]."""
        return self.tokenizer.decode(code.payload, size=code.size, steps=self.steps, seed=list(seeds), noise=self.noise)


def _network(tokenizer: Tokenizer) -> nn.Module | None:
    """What encodes, for its parameters; None: no module, or there is nothing that encodes."""
    encoder = tokenizer.encoder
    if not isinstance(encoder, ForeignEncoder):
        return encoder
    return encoder.network if isinstance(encoder.network, nn.Module) else None


def make_models(
    names: Sequence[str],
    steps: Sequence[int] | None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    encoder: str | None = None,
) -> list[TokenizerSystem]:
    """Tokenizers as systems, named briefly, each step count a system of its own.

    Args:
        names: packaged names, folders or Hub ids.
        steps: sampler steps; None: what each was made for.
        device: of the networks.
        dtype: arithmetic.
        encoder: KIND=WHERE: what makes the latents of models of foreign latents.

    Raises:
        UserError: an encoder that no model needs, or as `TokenizerSystem`.
    """
    labels = [_label(name) for name in names]
    shared = None if encoder is None else as_encoder(encoder)
    systems: list[TokenizerSystem] = []
    for name, label in zip(names, labels, strict=True):
        for number in dict.fromkeys(steps) if steps else [None]:
            short = label if labels.count(label) == 1 else None
            system = TokenizerSystem(name, steps=number, label=short, device=device, dtype=dtype)
            if shared is not None and system.tokenizer.config.encoder.family:
                system.encoder = _network(system.tokenizer.attach_encoder(shared))
            systems.append(system)
    if shared is not None and not any(system.tokenizer.config.encoder.family for system in systems):
        raise UserError(f"--encoder {encoder}: {', '.join(names)} has an encoder of its own; leave it out")
    return systems


def _label(name: str) -> str:
    """What tables call a model: a folder's own name, or its run's if that says more."""
    path = Path(name)
    if not path.exists():
        return name
    path = path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.name
