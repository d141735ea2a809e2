"""The one edge between pictures and tensors.

Inside monobath an image is a float tensor `(B, 3, H, W)` in [-1, 1]. Files, PIL images and uint8 arrays
are converted here, in both directions, and nowhere else. `to_uint8(to_float(u)) == u` for every uint8 value.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError, explained_as

logger = logging.getLogger(__name__)

Images = Tensor | np.ndarray | Image.Image | Sequence[Any]
"""Pictures in the forms that users have; see `Tokenizer.encode`."""

MAX_PIXELS = 64_000_000
"""Largest picture accepted by default, in pixels (`max_pixels` everywhere it can be set)."""


class ImageTooLarge(UserError):
    """A picture above `max_pixels`."""


def check_pixels(width: int, height: int, max_pixels: int, name: str = "image") -> None:
    """Raise `ImageTooLarge`, a `UserError`, if `width * height` is above `max_pixels`, which it names."""
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name} is {width}x{height} = {width * height:,} pixels, above max_pixels={max_pixels:,}: "
            "make it smaller, or raise max_pixels if the memory suffices"
        )


def open_image(
    source: str | os.PathLike[str] | BinaryIO, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> Image.Image:
    """Read a picture file as an upright 8-bit RGB PIL image; of an animation, the first frame.

    Handles every mode PIL reads: see `to_rgb`. The size is checked from the header, before any pixel is
    decoded, so that a decompression bomb costs nothing.

    Args:
        source: a path, or an open binary file.
        max_pixels: the largest accepted width x height.
        name: what messages call the picture; default: its path.

    Raises:
        UserError: the file is missing, is not a readable picture, is cut short, or (`ImageTooLarge`) is above
            `max_pixels`.
    """
    if isinstance(source, (str, os.PathLike)):
        name = name or str(source)
        if not Path(source).is_file():
            kind = "is a folder" if Path(source).is_dir() else "does not exist"
            raise UserError(f"{name} {kind}: give the path of a picture file")
    else:
        name = name or str(getattr(source, "name", "image"))
    # Broken files make PIL's many plugins raise nearly anything.
    with explained_as(f"{name} cannot be read as a picture", "give a JPEG, PNG, WebP … file"):
        try:
            with Image.open(source) as image:
                check_pixels(image.width, image.height, max_pixels, name)
                image.load()
                return to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            # Pillow refuses about 179 Mpx before we see the size (a warning at half of it can be made an error).
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and max_pixels > limit:
                remedy = f"Pillow's own limit comes before max_pixels={max_pixels:,}: raise PIL.Image.MAX_IMAGE_PIXELS"
            else:
                remedy = f"make it smaller, or raise max_pixels={max_pixels:,} if the memory suffices"
            raise ImageTooLarge(f"{name} is far too large ({error}); {remedy}") from None
        except UnidentifiedImageError:
            raise UserError(f"{name} is not a picture that can be read: give a JPEG, PNG, WebP … file") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB version of any PIL image.

    EXIF orientation is applied; palettes, greyscale, CMYK and YCbCr are converted; transparency is composited
    over white; 16- and 32-bit integer greyscale is scaled from 16 bits to 8 (PIL alone would clip it);
    float greyscale is taken as [0, 1] if it fits there, as 0…255 otherwise.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block must not cost the picture
        logger.warning("EXIF orientation ignored: %s", error)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(np.round(values / 257.0), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        values = values * 255 if values.size and values.min() >= 0 and values.max() <= 1 else values
        image = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    if image.mode == "La":
        image = image.convert("LA")  # Pillow's only way out of premultiplied greyscale
    if image.mode in ("RGBA", "LA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0…255 → float32 [-1, 1]. Inverse of `to_uint8`."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Tensor) -> Tensor:
    """Float [-1, 1] → uint8 0…255, rounded to nearest, clipped. Inverse of `to_float`."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """PIL image of any mode → uint8 tensor `(3, H, W)`."""
    return torch.from_numpy(np.array(to_rgb(image), dtype=np.uint8)).permute(2, 0, 1).contiguous()


def tensor_to_pil(image: Tensor) -> Image.Image:
    """`(3, H, W)`, uint8 or float in [-1, 1] → PIL RGB image."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def psnr(output: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair over all its 8-bit values, in dB, infinite where they are equal.

    Args:
        output, original: uint8 `(B, 3, H, W)`.

    Returns:
        float32 `(B,)`, equal to torchmetrics' to the last bit.
    """
    assert output.shape == original.shape, (output.shape, original.shape)
    assert output.dtype == original.dtype == torch.uint8, (output.dtype, original.dtype)
    gap = output.float() - original.float()
    peak, ten = torch.tensor([255.0, 10.0]).log()
    return (2 * peak - ((gap * gap).sum((1, 2, 3)) / gap[0].numel()).log()) * (10 / ten)


def images_to_tensor(images: Images, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Pictures in any accepted form → float32 `(B, 3, H, W)` in [-1, 1]; see `Tokenizer.encode`."""
    if isinstance(images, Image.Image):
        check_pixels(images.width, images.height, max_pixels)
        return to_float(pil_to_tensor(images))[None]
    if isinstance(images, (list, tuple)):
        if not images:
            raise UserError("an empty list of images: give at least one")
        parts = [images_to_tensor(image, max_pixels=max_pixels) for image in images]
        sizes = {tuple(p.shape[2:]) for p in parts}
        if len(sizes) > 1:
            raise UserError(f"images of different sizes in one batch ({sorted(sizes)}): encode them one by one")
        return torch.cat(parts)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
            raise UserError(f"array is {images.dtype} {images.shape}: expected uint8 (H, W, 3) or (B, H, W, 3)")
        images = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3)
    if not isinstance(images, Tensor):
        raise UserError(f"images are {type(images).__name__}: give a tensor, a uint8 array, a PIL image or a list")
    x = images[None] if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        raise UserError(f"images are {tuple(images.shape)}: expected (B, 3, H, W) or (3, H, W)")
    check_pixels(x.shape[3], x.shape[2], max_pixels)
    if x.dtype == torch.uint8:
        return to_float(x)
    if not x.is_floating_point():
        raise UserError(f"images are {x.dtype}: expected uint8, or float in [-1, 1]")
    x = x.float()
    low, high = x.min().item(), x.max().item()
    if not (low >= -1.01 and high <= 1.01):  # written so that NaN fails too
        raise UserError(f"float images span [{low:.3g}, {high:.3g}]: expected [-1, 1] (0…255 belongs in uint8)")
    return x
