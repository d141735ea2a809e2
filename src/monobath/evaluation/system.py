"""What is compared: a system that turns images into codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
