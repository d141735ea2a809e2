"""The systems there are, by name: our tokenizers, and the peers they are compared with."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import resources
from ..autoencoders import Foreign
from ..errors import UserError
from ..models.frozen import ForeignEncoder
from ..sampling import Noise
from ..tokenizer import Tokenizer
from .system import Code, System

T = TypeVar("T")


class TokenizerSystem(System):
    """One of our tokenizers.

    Args:
        name: packaged weights, a path, or a Hub id.
        steps: Euler steps; default: what the checkpoint was made for.
        noise: "gaussian" or "zero"; default: what the checkpoint was made for.
        encoder: of a model of foreign latents: what makes them; see `Tokenizer.attach_encoder`.
    """

    kind = "monobath"

    def __init__(
        self,
        name: str,
        *,
        steps: int | None = None,
        noise: Noise | None = None,
        encoder: Foreign | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if steps is not None and steps < 1:
            raise UserError(f"steps is {steps}: sampling needs at least one step")
        self.tokenizer = Tokenizer.from_pretrained(name, encoder=encoder, device=device, dtype=dtype)
        sampler = self.tokenizer.config.sampler
        self.steps = sampler.steps if steps is None else steps
        self.noise: Noise = sampler.noise if noise is None else noise
        packaged = resources.weights_path(name)
        self.weights = name if packaged is None else packaged.name
        # A curve over steps joins what differs in nothing else.
        self.family = name if noise in (None, sampler.noise) else f"{name}, {noise} noise"
        self.name = self.family if steps in (None, sampler.steps) else f"{self.family}, {_count(steps)}"
        self.encoder = _network(self.tokenizer)
        self.decoder, self.device = self.tokenizer.decoder, self.tokenizer.device

    def attach_encoder(self, encoder: Foreign) -> None:
        """See `Tokenizer.attach_encoder`."""
        self.encoder = _network(self.tokenizer.attach_encoder(encoder))

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


def make_model(
    name: str,
    steps: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    noise: Noise | None = None,
) -> TokenizerSystem:
    """A tokenizer as a system; see `TokenizerSystem`."""
    return TokenizerSystem(name, steps=steps, noise=noise, device=device, dtype=dtype)


PEERS = {
    "kl": "diffusers' AutoencoderKL: a folder, a Hub id, or random",
    "tiny": "diffusers' AutoencoderTiny: likewise",
    "dc": "diffusers' AutoencoderDC: likewise",
    "consistency": "diffusers' ConsistencyDecoderVAE: likewise",
    "flux2": "diffusers' AutoencoderKLFlux2: likewise",
    "taef2": "TAEF2: the folder with taef2_encoder.safetensors and taef2_decoder.safetensors",
    "jpeg": "JPEG: bits a pixel",
    "webp": "WebP: bits a pixel",
    "avif": "AVIF: bits a pixel",
    "bicubic": "scaling down and up: the factor",
}
"""Kinds of peers, and what follows the equals sign."""


def make_peer(spec: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> System:
    """`KIND=WHERE` → a system: `taef2=FOLDER`, `kl=FOLDER`, `kl=user/repository`, `kl=random`, `jpeg=1.0`, ….

    Raises:
        UserError: an unknown kind (the message names the nearest), or what the kind says about the rest.
    """
    from .codecs import FORMATS, Bicubic, FileCodec
    from .peers import DiffusersSystem, TaesdSystem

    kind, _, where = spec.partition("=")
    kind, where = kind.strip(), where.strip()
    if kind not in PEERS:
        near = difflib.get_close_matches(kind, PEERS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(PEERS)}"
        raise UserError(f"peer {spec!r} is of an unknown kind: {hint}")
    if not where:
        raise UserError(f"peer {spec!r} lacks what follows {kind}=: {PEERS[kind]}")
    if kind in FORMATS:
        return FileCodec(kind, _number(float, spec))
    if kind == "bicubic":
        return Bicubic(_number(int, spec), device)
    if kind == "taef2":
        return TaesdSystem(kind, where, device, dtype)
    return DiffusersSystem(kind, where, device, dtype)


def _number(kind: Callable[[str], T], spec: str) -> T:
    name, _, value = spec.partition("=")
    try:
        return kind(value.strip())
    except ValueError:
        raise UserError(f"peer {spec!r}: {value!r} is not a number as it should be ({PEERS[name.strip()]})") from None


def _count(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
