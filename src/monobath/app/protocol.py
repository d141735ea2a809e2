"""Bytes ↔ tensors and pictures, as diffusers' remote VAE client sends and reads them (`diffusers.utils.remote_utils`).

A tensor is its raw storage; shape and type travel in the query, or in the headers of a reply. What we add: `height` and
`width` with unpacked latents crop the picture, as `size` of `Tokenizer.decode` does; `steps`, `seed`.
"""

from __future__ import annotations

import io
import json
import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from fastapi import Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from .. import images
from ..errors import UserError
from ..images import images_to_tensor, open_image, pil_to_tensor, tensor_to_pil, to_float, to_uint8

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "uint8": torch.uint8}
Side = Annotated[int, Field(ge=1, le=1 << 20)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]
Steps = Annotated[int, Field(ge=1, le=1000)]
ImageFormat = Literal["png", "jpg"]
BINARY = "tensor/binary"
BITS = 16
"""Of a stored number: latents are kept in half precision."""


class ReconstructQuery(BaseModel):
    """The query of a reconstruction, whose body is a picture file."""

    model_config = ConfigDict(extra="forbid")
    image_format: ImageFormat = "jpg"
    steps: Steps | None = None
    """Sampler steps; default: what the model was made for."""
    seed: Seed = 0
    """Noise seed, the same for every sample, so that a latent gives the same picture in any batch."""


class Scaling(BaseModel):
    """Which numbers lie between the client's latents and raw ones: raw = given / scaling_factor + shift_factor."""

    model_config = ConfigDict(extra="forbid")
    scaling_factor: FiniteFloat | None = None
    """1 / standard deviation of raw latents; default: latents are raw."""
    shift_factor: FiniteFloat | None = None
    """Mean of raw latents; default: 0."""

    @model_validator(mode="after")
    def _not_zero(self) -> Self:
        if self.scaling_factor == 0:
            raise ValueError("scaling_factor is 0: give 1 / the standard deviation of the latents, or leave it out")
        return self

    def factors(self, otherwise: tuple[float, float] = (1.0, 0.0)) -> tuple[float, float]:
        """(scaling, shift), of `otherwise` what is not given."""
        return self.scaling_factor or otherwise[0], otherwise[1] if self.shift_factor is None else self.shift_factor


class DecodeQuery(Scaling, ReconstructQuery):
    """The query of a decoding, which draws and sends pictures as a reconstruction does."""

    shape: Annotated[list[Side], Field(min_length=3, max_length=4)]
    """(B, c, h, w), or packed in squares of 2×2 positions, as FLUX pipelines do: (B, h·w / 4, 4·c)."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    output_type: Literal["pil", "pt"] = "pil"
    """pil: a picture file; pt: a tensor (B, 3, H, W) in [-1, 1] of the type that was sent."""
    partial_postprocess: bool = False
    """With pt: a uint8 tensor (B, H, W, 3)."""
    do_scaling: bool = False
    """Take the factors that are not given from the model (deprecated in diffusers)."""
    height: Side | None = None
    """Of the picture, with `width`: needed for packed latents; others are cropped to it."""
    width: Side | None = None
    progressive: bool = False
    """Previews as parts of multipart/mixed, coarsest first, the finished picture last."""

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height={self.height} and width={self.width} belong together: give both, or neither")
        if len(self.shape) == 3 and self.height is None:
            raise ValueError(f"packed latents {tuple(self.shape)} need height and width: those of the picture")
        return self

    def latents(self, body: bytes, factor: int, published: tuple[float, float]) -> tuple[Tensor, tuple[int, int]]:
        """(raw latents `(B, c, h, w)` float32, (H, W) of the picture).

        Args:
            factor: f of the model.
            published: the model's scaling and shift factors, for `do_scaling`.

        Raises:
            UserError: a body of another length than the shape says, or packed latents that do not fit the picture.
        """
        z = tensor_of(body, self.shape, self.dtype).float()
        scaling, shift = self.factors(published) if self.do_scaling else self.factors()
        z = z / scaling + shift
        if z.ndim == 4:
            return z, (self.height or z.shape[2] * factor, self.width or z.shape[3] * factor)
        assert self.height
        assert self.width
        rows, columns = self.height // (2 * factor), self.width // (2 * factor)
        if z.shape[1] != rows * columns or z.shape[2] % 4:
            raise UserError(
                f"packed latents are {tuple(self.shape)}: a picture of height={self.height} and width={self.width} has "
                f"(B, {rows * columns}, 4·c) with this model"
            )
        # As FluxPipeline._unpack_latents: channels are (c, dy, dx).
        z = F.pixel_shuffle(z.transpose(1, 2).unflatten(2, (rows, columns)), 2)
        return z, (z.shape[2] * factor, z.shape[3] * factor)

    def reply(self, pictures: Tensor, accept: str) -> Response:
        """Pictures `(B, 3, H, W)` in [-1, 1] as the client wants them.

        Args:
            accept: the header. A client with a processor asks for a picture and accepts a tensor: float32
                `(B, 3, H, W)` in [0, 1].

        Raises:
            UserError: several pictures in one picture file.
        """
        if self.output_type == "pt":
            if self.partial_postprocess:
                return tensor_reply(to_uint8(pictures).permute(0, 2, 3, 1))
            return tensor_reply(pictures.to(DTYPES[self.dtype]))
        if accept == BINARY:
            return tensor_reply(pictures.float() / 2 + 0.5)
        if len(pictures) != 1:
            raise UserError(f"a {self.image_format} holds one picture, and these are {len(pictures)}: output_type=pt")
        return picture_reply(pictures[0], self.image_format)


class EncodeQuery(Scaling):
    """The query of an encoding: without a shape, the body is a picture file."""

    shape: Annotated[list[Side], Field(min_length=3, max_length=4)] | None = None
    """Of a tensor: (B, 3, H, W) or (3, H, W), float in [-1, 1] or uint8."""
    dtype: Literal["float16", "bfloat16", "float32", "uint8"] = "float32"

    def images(self, body: bytes, max_pixels: int) -> Tensor:
        """Float32 `(B, 3, H, W)` in [-1, 1].

        Raises:
            UserError: not a readable picture (`ImageTooLarge`: above `max_pixels`), or a tensor that cannot be one.
        """
        if self.shape is None:
            return to_float(picture_of(body, max_pixels))[None]
        return images_to_tensor(tensor_of(body, self.shape, self.dtype), max_pixels=max_pixels)

    def reply(self, latents: Tensor) -> Response:
        """Raw latents `(B, c, h, w)`, scaled as asked, in the type that was sent, float32 for a picture."""
        scaling, shift = self.factors()
        sent = torch.float32 if self.shape is None or self.dtype == "uint8" else DTYPES[self.dtype]
        return tensor_reply(((latents - shift) * scaling).to(sent))


def tensor_of(body: bytes, shape: list[int], dtype: str) -> Tensor:
    """A tensor from its storage.

    Raises:
        UserError: the body has another length than shape and type say.
    """
    kind = DTYPES[dtype]
    expected = math.prod(shape) * kind.itemsize
    if len(body) != expected:
        raise UserError(f"the body has {len(body):,} bytes, but shape={shape} of {dtype} has {expected:,}: send both")
    return torch.frombuffer(bytearray(body), dtype=kind).reshape(shape)


def picture_of(body: bytes, max_pixels: int) -> Tensor:
    """A picture file as uint8 `(3, H, W)`.

    Raises:
        UserError: see `open_image`.
    """
    return pil_to_tensor(open_image(io.BytesIO(body), max_pixels=max_pixels, name="the body"))


def tensor_reply(tensor: Tensor) -> Response:
    """The storage, with shape and type as headers."""
    tensor = tensor.contiguous().cpu()
    headers = {"shape": json.dumps(list(tensor.shape)), "dtype": str(tensor.dtype).removeprefix("torch.")}
    return Response(tensor.view(torch.uint8).numpy().tobytes(), media_type=BINARY, headers=headers)


def picture_reply(picture: Tensor, image_format: ImageFormat) -> Response:
    """A file of one picture `(3, H, W)` in [-1, 1]; a JPEG of quality 95, colour at full resolution."""
    file, kind = io.BytesIO(), image_format.replace("jpg", "jpeg")
    # Pillow ignores what is not the format's own.
    tensor_to_pil(picture).save(file, kind, compress_level=1, quality=95, subsampling=0)
    return Response(file.getvalue(), media_type=f"image/{kind}")


# ---- figures of a reconstruction, and latents as a picture --------------------------------------------------------


def psnr(original: Tensor, output: Tensor) -> float:
    """Of an 8-bit picture uint8 `(3, H, W)` and one in [-1, 1], rounded to 8 bits, in dB; infinite if equal."""
    return images.psnr(to_uint8(output)[None], original[None]).item()


def bits_per_pixel(z: Tensor, size: tuple[int, int]) -> float:
    """Of latents `(1, c, h, w)` in half precision, for a picture of (H, W)."""
    return z.numel() * BITS / (size[0] * size[1])


def latent_picture(z: Tensor, factor: int) -> Image.Image:
    """Latents `(1, c, h, w)` as colours: three principal components; a position is a square of `factor` pixels."""
    values = z[0].flatten(1).double()
    values = values - values.mean(dim=1, keepdim=True)
    _, directions = torch.linalg.eigh(values @ values.T)  # ascending
    directions = directions * directions.sum(dim=0).sign()  # eigenvectors have no sign of their own
    components = (directions[:, -3:].T @ values).flip(0)
    components = components[torch.arange(3) % len(components)]
    scale = components.abs().quantile(0.98, dim=1, keepdim=True).clamp(min=1e-6)
    image = tensor_to_pil((components / scale).float().unflatten(1, z.shape[2:]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
