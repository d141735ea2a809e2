"""Single reconstructions, and `monobath demo`: a model on the packaged sample photos.

A demo writes comparison.png, results.json and report.html.
"""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .. import resources
from ..errors import UserError
from ..files import write_file
from ..images import MAX_PIXELS, open_image, pil_to_tensor, psnr, tensor_to_pil
from ..tokenizer import Tokenizer
from ..words import in_words, numbered
from .facts import describe, machine
from .page import render, sheet, write_all
from .results import plain
from .speed import measure
from .tables import decibels

T = TypeVar("T")

HEAD = ("picture", "size", "PSNR", "encode ms", "decode ms", "bits kept")
REPEATS = 3

PREVIEW = (
    "Preview weights, as their name says: a small model after a short training. They show that everything works; "
    "they are not a tokenizer to build on."
)


@dataclass(kw_only=True)
class Reconstruction:
    """A picture, what became of it, and the figures."""

    name: str
    original: Tensor
    """uint8 `(3, H, W)`."""
    output: Tensor
    """uint8 `(3, H, W)`."""
    psnr: float
    """dB, over 8-bit values; infinite where both are equal."""
    encode_ms: float
    decode_ms: float
    bits_kept: float
    """Latent numbers at 16 bit each, as a fraction of 24 bit a pixel."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.original.shape[1], self.original.shape[2]

    @property
    def difference(self) -> Tensor:
        """Absolute difference × 5, clipped: uint8 `(3, H, W)`."""
        gap = (self.original.int() - self.output.int()).abs()
        return (5 * gap).clamp(max=255).to(torch.uint8)


def timed(work: Callable[[], T], device: torch.device, repeats: int = 1) -> tuple[T, float]:
    """(result, milliseconds) of a call, the median over `repeats`; waits for the device."""
    results: list[T] = []
    timings = measure({"": lambda: results.append(work())}, repeats=repeats, warmup=0, device=device)
    return results[-1], timings[""].median


def reconstruct(
    tokenizer: Tokenizer,
    original: Tensor,
    name: str,
    *,
    repeats: int = 1,
    tile: int | None = None,
    decode: Callable[..., Tensor] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Reconstruction:
    """Encode and decode one uint8 `(3, H, W)` picture, timed.

    Args:
        repeats: timed calls.
        tile: as in `Tokenizer.encode`.
        decode: takes the arguments of `Tokenizer.decode`, and is called instead of it.
        max_pixels: larger pictures are refused.
    """
    decode, device = decode or partial(tokenizer.decode, seed=[0]), tokenizer.device
    posterior, encode_ms = timed(
        lambda: tokenizer.encode(original, tile=tile, max_pixels=max_pixels), device, repeats
    )  # fmt: skip
    latent = posterior.mode()
    pixels, decode_ms = timed(lambda: decode(latent, size=posterior.size, output="uint8"), device, repeats)
    output = pixels[0].cpu()
    return Reconstruction(
        name=name,
        original=original,
        output=output,
        psnr=psnr(output[None], original[None]).item(),
        encode_ms=encode_ms,
        decode_ms=decode_ms,
        bits_kept=16 * latent.numel() / (24 * original.shape[1] * original.shape[2]),
    )


def comparison(rows: Sequence[Reconstruction]) -> Image.Image:
    """original | reconstruction | difference × 5 of every picture, labelled; pixels are shown one to one.

    Pictures flow from left to right and wrap, so that two small ones share a line with room for a wide one.
    """
    widths = [row.size[1] for row in rows]
    limit = max(max(widths), 2 * min(widths))
    lines: list[list[tuple[str, Image.Image]]] = []
    room = 0
    for row in rows:
        if row.size[1] > room:
            lines.append([])
            room = limit
        room -= row.size[1]
        titles = (row.name, f"reconstruction, {decibels(row.psnr)}", "absolute difference, times 5")
        pictures = map(tensor_to_pil, (row.original, row.output, row.difference))
        lines[-1] += zip(titles, pictures, strict=True)
    return sheet(lines, label=24)


@dataclass(kw_only=True)
class Demo:
    """What a demo run found, and where it wrote it."""

    rows: list[Reconstruction]
    files: list[Path]
    seconds: float
    preview: bool


def run_demo(out: Path, model: str = "default", *, pictures: Sequence[Path] | None = None) -> Demo:
    """Reconstruct the sample photos and write `comparison.png`, `results.json` and `report.html` to `out`.

    Args:
        out: folder.
        model: name or path, as for `Tokenizer.from_pretrained`.
        pictures: instead of the sample photos.
    """
    began = time.perf_counter()
    tokenizer = Tokenizer.from_pretrained(model, device="cuda" if torch.cuda.is_available() else "cpu")
    photos = [(path.stem, pil_to_tensor(open_image(path))) for path in pictures or resources.sample_paths()]
    reconstruct(tokenizer, photos[0][1], "warm-up")
    rows = [reconstruct(tokenizer, photo, name, repeats=REPEATS) for name, photo in photos]
    command = shlex.join(["monobath", "demo", "--model", model, "--out", str(out)])
    described = describe(tokenizer, model)
    facts: dict[str, Any] = {
        "command": command,
        "model": described,
        "preview": "preview" in described["name"],
        "machine": machine(tokenizer.device),
        "timing": f"median of {REPEATS} after one warm-up; one picture at a time",
        "mean_psnr": round(mean_psnr(rows), 4),
        "pictures": [
            {
                "name": row.name,
                "height": row.size[0],
                "width": row.size[1],
                "psnr": round(row.psnr, 4),
                "encode_ms": round(row.encode_ms, 2),
                "decode_ms": round(row.decode_ms, 2),
                "bits_kept_percent": round(100 * row.bits_kept, 3),
            }
            for row in rows
        ],
    }
    page = _report(rows, facts)
    files = write_all(out, {"comparison.png": comparison(rows), "results.json": plain(facts), "report.html": page})
    return Demo(rows=rows, files=files, seconds=time.perf_counter() - began, preview=facts["preview"])


def mean_psnr(rows: Sequence[Reconstruction]) -> float:
    """Mean of the per-picture figures, in dB."""
    return statistics.fmean(row.psnr for row in rows)


def mean_line(rows: Sequence[Reconstruction]) -> tuple[str, ...]:
    """The last line of the table."""
    return ("mean", "", decibels(mean_psnr(rows)), "", "", "")


def cells(row: Reconstruction) -> tuple[str, ...]:
    """One line of the table, as text under `HEAD`."""
    h, w = row.size
    return (
        row.name,
        f"{w}×{h}",
        decibels(row.psnr),
        f"{row.encode_ms:.1f}",
        f"{row.decode_ms:.1f}",
        f"{100 * row.bits_kept:.2f} %",
    )


def _report(rows: Sequence[Reconstruction], facts: dict[str, Any]) -> str:
    model = dict(facts["model"])
    training = model.pop("training", {})
    model |= {f"training: {key}": value for key, value in training.items() if value is not None}
    shown = facts | {"model": {key: in_words(value) for key, value in model.items()}}
    return render(
        "demo.html",
        title=f"monobath demo: {model['name']}",
        note=PREVIEW if facts["preview"] else "",
        head=HEAD,
        lines=[cells(row) for row in rows],
        foot=mean_line(rows),
        rows=rows,
        **shown,
    )


# ---- previews of a multi-scale decoder -----------------------------------------------------------------------------


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
    label = str(width) if width == height else f"{width}x{height}"
    paths = (target.with_name(f"{name}{target.suffix}") for name in numbered(f"{target.stem}.{label}"))
    path = next(path for path in paths if path.resolve() not in used)
    used.add(path.resolve())
    return path
