"""Figures and pictures of single reconstructions, and what a model and a machine are."""

from __future__ import annotations

import html
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from torch import Tensor

from .. import resources
from .._version import __version__
from ..images import tensor_to_pil
from ..models.encoder import FAMILIES
from ..sampling import Noise
from ..tokenizer import Tokenizer
from .page import picture_uri

T = TypeVar("T")


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


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB; infinite if they are equal."""
    assert a.dtype == b.dtype == torch.uint8, (a.dtype, b.dtype)
    assert a.shape == b.shape, (a.shape, b.shape)
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def timed(work: Callable[[], T], device: torch.device, repeats: int = 1) -> tuple[T, float]:
    """(result, milliseconds) of a call, the median over `repeats`; waits for the device."""
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        result = work()
        _synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(times)


def reconstruct(
    tokenizer: Tokenizer,
    original: Tensor,
    name: str,
    *,
    repeats: int = 1,
    steps: int | None = None,
    seed: int = 0,
    noise: Noise | None = None,
    tile: int | None = None,
    decode: Callable[..., Tensor] | None = None,
    max_pixels: int,
) -> Reconstruction:
    """Encode and decode one uint8 `(3, H, W)` picture, timed.

    Args:
        decode: takes the arguments of `Tokenizer.decode`, and is called instead of it.
    """
    device = tokenizer.device
    posterior, encode_ms = timed(
        lambda: tokenizer.encode(original, tile=tile, max_pixels=max_pixels), device, repeats
    )  # fmt: skip
    latent = posterior.mode()
    options: dict[str, Any] = {"size": posterior.size, "steps": steps, "seed": [seed], "noise": noise}
    if tile is not None:
        options["tile"] = tile
    pixels, decode_ms = timed(
        lambda: (decode or tokenizer.decode)(latent, output="uint8", **options), device, repeats
    )  # fmt: skip
    output = pixels[0].cpu()
    return Reconstruction(
        name=name,
        original=original,
        output=output,
        psnr=psnr(original, output),
        encode_ms=encode_ms,
        decode_ms=decode_ms,
        bits_kept=16 * latent.numel() / (24 * original.shape[1] * original.shape[2]),
    )


def describe(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """What a model is, as plain values; `name` is what the user called it."""
    config = tokenizer.config
    encoder, decoder, sampler = config.encoder, config.decoder, config.sampler
    side = math.ceil(256 / encoder.factor)
    values = encoder.latent_channels * side * side
    described = {
        "name": full_name(name),
        "encoder": encoder.name,
        **({"encoder_of": FAMILIES[encoder.family], "encoder_source": encoder.source} if encoder.family else {}),
        "decoder": decoder.title,
        **({"decoder_patch": decoder.patch} if hasattr(decoder, "patch") else {}),
        "padding": decoder.padding if encoder.family else {"encoder": encoder.padding, "decoder": decoder.padding},
        "prediction": decoder.prediction,
        "encoder_parameters": sum(p.numel() for p in tokenizer.encoder.parameters()),
        "decoder_parameters": sum(p.numel() for p in tokenizer.decoder.parameters()),
        "sampler": {"steps": sampler.steps, "noise": sampler.noise, "power": sampler.power}
        | ({"stages": sampler.stages} if sampler.stages > 1 else {}),
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "latent_of_256": [encoder.latent_channels, side, side],
        "pixel_values_per_latent_value": round(3 * 256 * 256 / values, 2),
        "bits_kept_percent": round(100 * 16 * values / (24 * 256 * 256), 2),
    }
    training = _training(name)
    if training:
        recipe = training.get("recipe") or {}
        data, loop = recipe.get("data", {}), recipe.get("training", {})
        described["training"] = {
            "recipe": recipe.get("name"),
            "steps": training.get("step"),
            "batch_size": loop.get("batch_size"),
            "crop": data.get("size"),
            "started_from": recipe.get("init") or None,
        }
    return described


def _training(name: str) -> dict[str, Any]:
    """What `save_pretrained(extra=)` stored with a model that `from_pretrained(name)` just read."""
    path = resources.weights_path(name) or Path(name)
    if path.is_file():
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get("config", "{}")
    else:
        found = path / "config.json" if path.is_dir() else try_to_load_from_cache(name, "config.json")
        text = Path(found).read_text(encoding="utf-8") if isinstance(found, (str, Path)) else "{}"
    training = json.loads(text).get("training")
    return training if isinstance(training, dict) else {}


def full_name(name: str) -> str:
    """The versioned name behind an alias of packaged weights; anything else as it is."""
    packaged = resources.weights_path(name)
    return name if packaged is None else packaged.name


def is_preview(name: str) -> bool:
    """Whether a model's own name says that it is a preview."""
    return "preview" in full_name(name)


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as plain values."""
    facts: dict[str, Any] = {
        "monobath": __version__,
        "torch": torch.__version__,
        "pillow": metadata.version("pillow"),
        **{
            name: version
            for name in ("torchvision", "torchmetrics", "scipy", "diffusers")
            if (version := _version(name))
        },
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def comparison(rows: Sequence[Reconstruction]) -> Image.Image:
    """original | reconstruction | difference × 5 of every picture, labelled; pixels are shown one to one.

    Pictures flow from left to right and wrap, so that two small ones share a line with room for a wide one.
    """
    gap, label, font = 8, 24, ImageFont.load_default(14)
    widths = [3 * (row.size[1] + gap) for row in rows]
    limit = max(max(widths), 2 * min(widths))
    places, x, y, line = [], 0, 0, 0
    for row, width in zip(rows, widths, strict=True):
        if x + width > limit:
            x, y, line = 0, y + line, 0
        places.append((gap + x, gap + y))
        x, line = x + width, max(line, row.size[0] + label + gap)
    page = Image.new("RGB", (gap + limit, gap + y + line), "white")
    draw = ImageDraw.Draw(page)
    for row, (x, y) in zip(rows, places, strict=True):
        titles = (row.name, f"reconstruction, {decibels(row.psnr)}", "absolute difference, times 5")
        for title, pixels in zip(titles, (row.original, row.output, row.difference), strict=True):
            draw.text((x, y + 2), title, fill="black", font=font)
            page.paste(tensor_to_pil(pixels), (x, y + label))
            x += row.size[1] + gap
    return page


def decibels(value: float) -> str:
    """A PSNR for people."""
    return "identical" if math.isinf(value) else f"{value:.2f} dB"


def html_pictures(row: Reconstruction) -> str:
    """Escaped figure of one picture: original, reconstruction, difference × 5."""
    parts = {"original": row.original, "reconstruction": row.output, "difference × 5": row.difference}
    h, w = row.size
    figures = "".join(
        f'<figure><img src="{picture_uri(pixels)}" width="{w}" height="{h}" alt="{html.escape(f"{row.name}, {what}")}">'
        f"<figcaption>{what}</figcaption></figure>"
        for what, pixels in parts.items()
    )
    title = f"{html.escape(row.name)} <small>{w} × {h}, {decibels(row.psnr)}</small>"
    return f'<h3>{title}</h3>\n<div class="row">{figures}</div>'


def _version(package: str) -> str:
    """Of an installed package; "" if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
