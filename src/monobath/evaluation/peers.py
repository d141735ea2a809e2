"""What ours is compared with, by name: diffusers' autoencoders, TAESD's family, codecs. Tiling and slicing stay off."""

from __future__ import annotations

import bisect
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, features
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
from ..errors import UserError
from ..images import pil_to_tensor, tensor_to_pil, to_float, to_uint8
from ..models import taesd
from ..words import did_you_mean
from .system import Code, PaddedSystem, System

# ---- classical references: JPEG, WebP and AVIF at a budget of bytes, and bicubic scaling ------------------------


@dataclass(frozen=True)
class Format:
    """A file format as Pillow writes it."""

    name: str
    feature: str
    """What Pillow calls the library behind it."""
    lowest: int
    """Worst quality setting."""
    highest: int
    """Best quality setting."""
    options: dict[str, Any]
    """Further arguments of `Image.save`."""


FORMATS = {
    # 4:2:0, Pillow's default, said explicitly; above 95 its documentation warns of files that only grow.
    "jpeg": Format("JPEG", "jpg", 1, 95, {"optimize": True, "subsampling": "4:2:0"}),
    "webp": Format("WebP", "webp", 0, 100, {"method": 4}),  # lossy, always 4:2:0
    "avif": Format("AVIF", "avif", 0, 100, {"subsampling": "4:2:0"}),
}


class FileCodec(System):
    """Each picture as a file of the highest quality that fits a budget; the lowest quality where none fits.

    The quality is found by bisection, which takes file sizes to grow with it. Chroma is subsampled (4:2:0), nothing
    but the picture is stored, and `Code.bits` counts the real bytes, headers included.

    Args:
        kind: jpeg, webp or avif.
        bpp: budget in bits a pixel of the original.

    Raises:
        UserError: an unknown format, one that this Pillow lacks, or a budget that is not positive.
    """

    def __init__(self, kind: str, bpp: float) -> None:
        if kind not in FORMATS:
            raise UserError(f"file format {kind!r} is unknown: choose {', '.join(FORMATS)}")
        if not 0 < bpp < float("inf"):
            raise UserError(f"{kind}={bpp}: the budget is in bits a pixel and must be above 0, such as {kind}=1.0")
        self.format, self.bpp = FORMATS[kind], bpp
        if not features.check(self.format.feature):
            raise UserError(f"{kind}: this Pillow was built without {self.format.name}: pip install --upgrade pillow")
        self.kind = self.family = self.format.name
        self.name = f"{self.format.name} at {bpp:.2f} bit/pixel"

    def encode(self, images: Tensor) -> Code:
        """Float images `(B, 3, H, W)` in [-1, 1] → files."""
        size = (images.shape[2], images.shape[3])
        budget = self.bpp * size[0] * size[1]
        files = [self._best(tensor_to_pil(pixels), budget) for pixels in to_uint8(images).cpu()]
        return Code(payload=files, size=size, bits=[8 * len(file) for file in files])

    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Files → float images `(B, 3, H, W)` in [-1, 1], on the CPU."""
        return to_float(torch.stack([pil_to_tensor(Image.open(io.BytesIO(file))) for file in code.payload]))

    def _best(self, image: Image.Image, budget: float) -> bytes:
        file = functools.cache(lambda quality: self._file(image, quality))
        above = range(self.format.lowest + 1, self.format.highest + 1)
        return file(self.format.lowest + bisect.bisect(above, budget, key=lambda quality: 8 * len(file(quality))))

    def _file(self, image: Image.Image, quality: int) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, self.format.name, quality=quality, **self.format.options)
        return buffer.getvalue()


class Bicubic(PaddedSystem):
    """Keep one 8-bit RGB pixel of each factor × factor square; bicubic, with antialiasing, both ways.

    Sides are padded to multiples of the factor and cropped back. 24 bits a kept pixel.

    Raises:
        UserError: a factor below 2.
    """

    kind = "bicubic"
    bits = 8

    def __init__(self, factor: int, device: str | torch.device = "cpu") -> None:
        if factor < 2:
            raise UserError(f"bicubic={factor}: the factor must be a whole number of at least 2, such as bicubic=8")
        self.factor, self.device = factor, torch.device(device)
        self.name, self.family = f"bicubic ÷{factor} ×{factor}", "bicubic"

    def latents(self, x: Tensor) -> Tensor:
        """Small uint8 pictures."""
        return to_uint8(_scaled(x, x.shape[2] // self.factor, x.shape[3] // self.factor))

    def pixels(self, z: Tensor, seeds: Sequence[int]) -> Tensor:
        """Small pictures, enlarged."""
        return _scaled(to_float(z), z.shape[2] * self.factor, z.shape[3] * self.factor)


def _scaled(x: Tensor, *size: int) -> Tensor:
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)


# ---- networks ---------------------------------------------------------------------------------------------------


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


PEERS = {
    **{kind: f"diffusers' {known.name}: a folder, a Hub id, or random" for kind, known in ARCHITECTURES.items()},
    "taef2": "TAEF2: the folder with taef2_encoder.safetensors and taef2_decoder.safetensors",
    **{kind: f"{known.name}: bits a pixel" for kind, known in FORMATS.items()},
    "bicubic": "scaling down and up: the factor",
}
"""Kinds of peers, and what follows the equals sign."""


def make_peer(spec: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> System:
    """`KIND=WHERE` → a system: `taef2=FOLDER`, `kl=FOLDER`, `kl=user/repository`, `kl=random`, `jpeg=1.0`, ….

    Raises:
        UserError: an unknown kind (the message names the nearest), or what the kind says about the rest.
    """
    kind, _, where = spec.partition("=")
    kind, where = kind.strip(), where.strip()
    if kind not in PEERS:
        hint = did_you_mean(kind, PEERS, f"choose {', '.join(PEERS)}", most=2)
        raise UserError(f"peer {spec!r} is of an unknown kind: {hint}")
    if not where:
        raise UserError(f"peer {spec!r} lacks what follows {kind}=: {PEERS[kind]}")
    numbers: dict[str, type] = {"bicubic": int, **dict.fromkeys(FORMATS, float)}
    if kind in numbers:
        try:
            number = numbers[kind](where)
        except ValueError:
            raise UserError(f"peer {spec!r}: {where!r} is not a number as it should be ({PEERS[kind]})") from None
        return Bicubic(number, device) if kind == "bicubic" else FileCodec(kind, number)
    if kind == "taef2":
        return TaesdSystem(kind, where, device, dtype)
    return DiffusersSystem(kind, where, device, dtype)


@torch.no_grad()
def make_baselines(systems: Sequence[System], size: int, bits: float | None, rates: Sequence[float]) -> list[System]:
    """Bicubic, and the codecs at the first system's bits a pixel and at further rates; none that is there already.

    Args:
        systems: what is compared.
        size: side of the pictures, in pixels.
        bits: a pixel; None: the first system's.
        rates: more of them.
    """
    if bits is None:
        bits = systems[0].encode(torch.zeros(1, 3, size, size, device=systems[0].device)).bits[0] / size**2
    codecs = [codec for codec, found in FORMATS.items() if features.check(found.feature)]
    specs = ["bicubic=8"] + [f"{codec}={rate:g}" for codec in codecs for rate in dict.fromkeys([bits, *rates])]
    found = {system.name: system for system in (make_peer(spec, systems[0].device) for spec in specs)}
    return [found[name] for name in found if name not in {system.name for system in systems}]
