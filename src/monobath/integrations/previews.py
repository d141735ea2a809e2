"""`LatentPreviews`: pictures of a diffusers pipeline at work, one a step, by a small decoder of its latents.

    previews = LatentPreviews("runs/retrofit/model")
    pipe("a teal square", callback_on_step_end=previews)  # previews/step-000.png, …; in a notebook, in place

It reads the latents that the pipeline hands to its callback and changes nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import is_notebook
from PIL import Image
from torch import Tensor

from ..config import PATCH
from ..errors import UserError, check_least
from ..files import write_file
from ..images import tensor_to_pil
from ..tokenizer import Tokenizer


class LatentPreviews:
    """A `callback_on_step_end` for diffusers pipelines that decodes their running latents.

    Args:
        decoder: a tokenizer whose latents are the pipeline's, or the name of one; it decodes on its own device.
        out: folder for the pictures, step-000.png and so on, as PNG; those of a batch side by side.
        every: a picture every so many steps.
        size: (H, W) of the pictures in pixels, for pipelines that hand over rows of packed latents (FLUX, FLUX.2),
            which do not say it; default: they are square.
        notebook: show each picture in the place of the last one instead of writing files; default: where a notebook
            runs this.

    Attributes:
        latest: the last picture, PIL; None before the first.

    Raises:
        UserError: `every` below 1; when called: latents that are not the decoder's.
    """

    def __init__(
        self,
        decoder: Tokenizer | str | os.PathLike[str],
        *,
        out: str | os.PathLike[str] = "previews",
        every: int = 1,
        size: tuple[int, int] | None = None,
        notebook: bool | None = None,
    ) -> None:
        check_least(1, {"every": every})
        self.tokenizer = decoder if isinstance(decoder, Tokenizer) else Tokenizer.from_pretrained(decoder)
        self.out, self.every, self.size = Path(out), every, size
        self.notebook = is_notebook() if notebook is None else notebook
        self.latest: Image.Image | None = None
        self._shown: Any = None

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What pipelines call after each step; nothing is handed back to them."""
        if step % self.every == 0:
            pictures = self.tokenizer.decode(self.raw(callback_kwargs["latents"]), output="uint8")
            self.latest = tensor_to_pil(torch.cat(list(pictures), dim=2))
            self._show(step, self.latest)
        return {}

    def raw(self, latents: Tensor) -> Tensor:
        """What `Tokenizer.decode` takes, from what a pipeline holds: `(B, c, h, w)`, or packed rows `(B, h·w/4, 4c)`.

        Raises:
            UserError: latents of another number of channels, or rows that are no picture of `size`.
        """
        config, c = self.tokenizer.config, self.tokenizer.config.encoder.latent_channels
        latents = latents.detach().float()
        packed = latents.ndim == 3
        if latents.ndim not in (3, 4) or latents.shape[2 if packed else 1] != (PATCH * c if packed else c):
            raise UserError(
                f"the pipeline's latents are {tuple(latents.shape)}, and the previews' decoder takes {c} channels "
                f"({config.encoder.title}): give a decoder of the pipeline's latents"
            )
        if packed:
            latents = latents.transpose(1, 2).unflatten(2, self._grid(latents.shape[1]))
            if config.packing is not None:
                return config.packing.unpack(latents)
            latents = F.pixel_shuffle(latents, 2)
        return latents / config.scaling_factor + config.shift_factor

    def _grid(self, rows: int) -> tuple[int, int]:
        """Height and width, in packed positions, of so many of them."""
        side = 2 * self.tokenizer.factor
        height, width = (math.isqrt(rows),) * 2 if self.size is None else (pixels // side for pixels in self.size)
        if height * width != rows:
            given = "they are not square" if self.size is None else f"size={self.size} makes {height} × {width}"
            raise UserError(f"the pipeline's latents are {rows} positions of {side}×{side} pixels, and {given}: "
                            "give size=(height, width)")  # fmt: skip
        return height, width

    def _show(self, step: int, picture: Image.Image) -> None:
        if not self.notebook:
            write_file(self.out / f"step-{step:03d}.png", picture.save)
            return
        from IPython.display import display

        if step == 0 or self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)
