"""Previews of a multi-scale decoder: every stage's picture is written as soon as it exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import write_file
from ..images import tensor_to_pil
from ..tokenizer import Tokenizer


def check_progressive(tokenizer: Tokenizer, model: str) -> None:
    """Refuse what previews cannot be had with.

    Raises:
        UserError: the model has one stage, or --engine is given.
    """
    if tokenizer.config.decoder.stages == 1:
        raise UserError(f"--progressive needs a multi-scale model, and {model} has one stage: leave it out")
    if tokenizer.decoder.fixed is not None:
        raise UserError("--engine with --progressive: engines run one step at full resolution; leave one of them out")


def with_previews(tokenizer: Tokenizer, target: Path, taken: set[Path]) -> Callable[..., Tensor]:
    """`Tokenizer.decode` that writes previews beside `target` while it works.

    Args:
        taken: resolved paths that no preview may have: the inputs, all finished pictures, and previews so far, to
            which this picture's are added.
    """

    def decode(z: Tensor, **options: Any) -> Tensor:
        last = tokenizer.config.decoder.stages - 1
        for stage, image in enumerate(tokenizer.decode_progressive(z, **options)):
            if stage < last:
                path = _preview_path(target, image.shape[-2], image.shape[-1], taken)
                write_file(path, tensor_to_pil(image[0].cpu()).save)
        return image

    return decode


def _preview_path(target: Path, height: int, width: int, used: set[Path]) -> Path:
    """TARGET.64.png or TARGET.64x48.png, with -2, -3 … where that name is used; it counts as used from then on."""
    label, number = str(width) if width == height else f"{width}x{height}", 1
    path = target.with_name(f"{target.stem}.{label}{target.suffix}")
    while path.resolve() in used:
        number += 1
        path = target.with_name(f"{target.stem}.{label}-{number}{target.suffix}")
    used.add(path.resolve())
    return path
