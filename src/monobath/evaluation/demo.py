"""`monobath demo`: a model on the packaged sample photos → table, comparison.png, results.json, report.html."""

from __future__ import annotations

import html
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import resources
from ..files import write_file, write_text
from ..images import MAX_PIXELS, open_image, pil_to_tensor
from ..tokenizer import Tokenizer
from .page import html_facts, html_table, page
from .report import (
    Reconstruction,
    comparison,
    decibels,
    describe,
    full_name,
    html_pictures,
    is_preview,
    machine,
    reconstruct,
)

HEAD = ("picture", "size", "PSNR", "encode ms", "decode ms", "bits kept")
REPEATS = 3

PREVIEW = (
    "Preview weights, as their name says: a small model after a short training. They show that everything works; "
    "they are not a tokenizer to build on."
)
LIMITS = (
    "A handful of pictures is a demonstration, not an evaluation: compare models on a large held-out set. "
    "A reconstruction is a guess: small text, faces and fine texture may come out plausible but wrong, so do not use "
    "it where details are evidence. Times depend on the machine named below and on what else it was doing."
)


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
    photos = [
        (path.stem, pil_to_tensor(open_image(path)))
        for path in (resources.sample_paths() if pictures is None else pictures)
    ]
    reconstruct(tokenizer, photos[0][1], "warm-up", max_pixels=MAX_PIXELS)
    rows = [reconstruct(tokenizer, photo, name, repeats=REPEATS, max_pixels=MAX_PIXELS) for name, photo in photos]
    command = shlex.join(["monobath", "demo", "--model", model, "--out", str(out)])
    facts = {
        "command": command,
        "model": describe(tokenizer, model),
        "preview": is_preview(model),
        "machine": machine(tokenizer.device),
        "timing": f"median of {REPEATS} after one warm-up; one picture at a time",
        "mean_psnr": _json_number(mean_psnr(rows)),
        "pictures": [
            {
                "name": row.name,
                "height": row.size[0],
                "width": row.size[1],
                "psnr": _json_number(row.psnr),
                "encode_ms": round(row.encode_ms, 2),
                "decode_ms": round(row.decode_ms, 2),
                "bits_kept_percent": round(100 * row.bits_kept, 3),
            }
            for row in rows
        ],
    }
    image, report = comparison(rows), _report(rows, facts)
    files = [out / "comparison.png", out / "results.json", out / "report.html"]
    write_file(files[0], image.save)
    write_text(files[1], json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_text(files[2], report)
    return Demo(rows=rows, files=files, seconds=time.perf_counter() - began, preview=is_preview(model))


def mean_psnr(rows: Sequence[Reconstruction]) -> float:
    """Mean of the per-picture figures, in dB."""
    return sum(row.psnr for row in rows) / len(rows)


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
    model, name = dict(facts["model"]), full_name(facts["model"]["name"])
    training = model.pop("training", None)
    if training:
        model |= {f"training: {k}": v for k, v in training.items() if v is not None}
    shown = {key.replace("_", " "): _shown(value) for key, value in model.items()}
    note = f'<p class="note">{html.escape(PREVIEW)}</p>' if facts["preview"] else ""
    foot = ("mean", "", decibels(mean_psnr(rows)), "", "", "")
    return page(
        f"monobath demo: {name}",
        [
            note,
            html_table(HEAD, [cells(row) for row in rows], foot),
            f"<p><small>PSNR over 8-bit values. Times: {html.escape(facts['timing'])}. Bits kept: latent values at "
            "16 bit each, relative to 24 bit a pixel.</small></p>",
            "<h2>Pictures</h2>",
            *(html_pictures(row) for row in rows),
            "<h2>What the model is</h2>",
            html_facts(shown),
            "<h2>Limits</h2>",
            f"<p>{html.escape(LIMITS)}</p>",
            "<h2>How this was made</h2>",
            f"<pre>{html.escape(facts['command'])}</pre>",
            html_facts({key.replace("_", " "): value for key, value in facts["machine"].items()}),
            "<p><small>The sample photos are CC0 or in the public domain; samples/SOURCES.md in the package says "
            "whose they are.</small></p>",
        ],
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _json_number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None  # JSON has no infinity
