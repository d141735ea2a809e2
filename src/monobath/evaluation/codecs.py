"""Classical references: JPEG, WebP and AVIF at a budget of bytes, and bicubic scaling."""

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

from ..errors import UserError
from ..images import pil_to_tensor, tensor_to_pil, to_float, to_uint8
from .system import Code, PaddedSystem, System


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
