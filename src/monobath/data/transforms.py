"""Crops. Resizing and cropping are one step: only the pixels of the crop are ever computed.

Pillow's bicubic resampling is antialiased, and its `box` argument gives the pixels that resizing the whole
picture and cropping afterwards would give (within rounding, at most 2 of 255: Pillow holds boxes in float32),
so a 20 000 × 30 picture costs no more than a square one.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def mix_seed(*values: int) -> int:
    """One 63-bit seed from several integers, the same on every machine."""
    packed = struct.pack(f"<{len(values)}Q", *(value & (2**64 - 1) for value in values))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def sample_generator(*, seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random stream of one sample in one epoch; it depends on nothing else."""
    return np.random.default_rng(mix_seed(0, seed, epoch, index))


def resized_size(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) after the short side has become `short`; torchvision's rounding of the long side."""
    if width <= height:
        return short, short * height // width
    return short * width // height, short


def crop_resized(image: Image.Image, *, short: int, size: int, left: int, top: int) -> Image.Image:
    """Resize the short side to `short` (bicubic, antialias) and crop size × size at (left, top), in one step.

    `left` and `top` count pixels of the resized picture. Small pictures are upsampled.
    """
    width, height = resized_size(*image.size, short)
    assert 0 <= left <= width - size, (image.size, short, size, left)
    assert 0 <= top <= height - size, (image.size, short, size, top)
    x, y = image.width / width, image.height / height
    box = (
        left * x,
        top * y,
        min((left + size) * x, image.width),
        min((top + size) * y, image.height),
    )
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class Place(NamedTuple):
    """Where a training crop lies: the picture's short side is resized to `short`, then the crop is cut."""

    short: int
    left: int
    top: int
    mirrored: bool


def draw_place(
    width: int, height: int, *, size: int, scale: tuple[int, int], flip: bool, generator: np.random.Generator
) -> Place:
    """A random place in a picture of that size, in pixels.

    The short side is resized to an integer drawn uniformly from `scale` (both ends included), a size × size
    crop is drawn uniformly, and, if `flip`, mirrored left-right half of the time. Always four draws, so that
    switching the flip off leaves the crops where they were.
    """
    lo, hi = scale
    draws = generator.random(4)
    short = lo + int(draws[0] * (hi - lo + 1))
    width, height = resized_size(width, height, short)
    left, top = int(draws[1] * (width - size + 1)), int(draws[2] * (height - size + 1))
    return Place(short, left, top, flip and bool(draws[3] < 0.5))


def cut(image: Image.Image, place: Place, size: int) -> Tensor:
    """The crop at a place of an RGB image: uint8 `(3, size, size)`."""
    crop = crop_resized(image, short=place.short, size=size, left=place.left, top=place.top)
    return _to_tensor(crop, mirrored=place.mirrored)


def center_crop(image: Image.Image, *, size: int) -> Tensor:
    """Evaluation transform (docs/evaluation.md): RGB image → uint8 `(3, size, size)`.

    Short side to `size`, bicubic with antialias, then the centre crop; geometry as torchvision's
    `Resize(size)` and `CenterCrop(size)`.
    """
    width, height = resized_size(*image.size, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _to_tensor(crop_resized(image, short=size, size=size, left=left, top=top))


def centre(images: Tensor, size: int) -> Tensor:
    """The centre `(…, size, size)` of pictures `(…, H, W)` that are at least that large."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    assert top >= 0 <= left, (images.shape, size)
    return images[..., top : top + size, left : left + size]


def shrink(image: Image.Image, *, short: int) -> Image.Image:
    """The picture with its short side at most `short` (bicubic, antialias); smaller ones come back as is."""
    if min(image.size) <= short:
        return image
    return image.resize(resized_size(*image.size, short), Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image, *, mirrored: bool = False) -> Tensor:
    pixels = np.asarray(image)  # (H, W, 3)
    if mirrored:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
