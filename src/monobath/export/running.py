"""Models on engines: from the file that `monobath export` wrote, or made for this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .. import resources
from ..data.transforms import center_crop
from ..errors import UserError
from ..images import open_image
from ..tokenizer import Tokenizer
from . import FILES, Engine
from .engines import with_engine

CALIBRATION_SIDE = 256
"""Side of the squares that int8 is calibrated on, in pixels."""


def on_engine(tokenizer: Tokenizer, model: str, engine: Engine) -> Tokenizer:
    """The tokenizer decoding with an engine, from the file beside the model where `monobath export` wrote one.

    Args:
        model: what `tokenizer` was loaded from.
        engine: see `engines.Engine`.

    Raises:
        UserError: the engine runs on the CPU, and the tokenizer is elsewhere; or as `with_engine`.
    """
    if engine not in ("torch", "compile") and tokenizer.device.type != "cpu":
        raise UserError(f"--engine {engine} runs on the CPU: add --device cpu, or choose torch or compile")
    folder = Path(model)
    written = engine in FILES and (folder / FILES[engine]).is_file()
    latents = calibration_latents(tokenizer) if engine == "openvino-int8" and not written else []
    return with_engine(tokenizer, engine, folder=folder if written else None, calibration=latents)


def calibration_latents(tokenizer: Tokenizer, pictures: Sequence[Path] = ()) -> list[Tensor]:
    """Latents of the centres of pictures (default: the packaged sample photos), 256² each."""
    squares = (center_crop(open_image(file), size=CALIBRATION_SIDE) for file in pictures or resources.sample_paths())
    return [tokenizer.encode(square).mode() for square in squares]
