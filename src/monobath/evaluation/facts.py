"""What a model and a machine are, as plain values."""

from __future__ import annotations

import math
import os
import platform
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import resources
from .._version import __version__
from ..config import PACKED
from ..models.encoder import FAMILIES
from ..tokenizer import Tokenizer
from ..training.recipe import only_times

OPTIONAL = ("torchvision", "torchmetrics", "scipy", "diffusers")
"""Packages that figures depend on, where they are installed."""


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
        **({"latents": "normalised" if config.takes_normalised else "raw"} if encoder.family in PACKED else {}),
        "latent_of_256": [encoder.latent_channels, side, side],
        "pixel_values_per_latent_value": round(3 * 256 * 256 / values, 2),
        "bits_kept_percent": round(100 * 16 * values / (24 * 256 * 256), 2),
    }
    training = Tokenizer.training_of(name)
    if training:
        recipe = training.get("recipe") or {}
        data, loop = recipe.get("data", {}), recipe.get("training", {})
        described["training"] = {
            "recipe": recipe.get("name"),
            "steps": training.get("step"),
            "batch_size": loop.get("batch_size"),
            "crop": data.get("size"),
            "started_from": recipe.get("init") or recipe.get("init_encoder") or None,
            **({"only_times": times} if (times := only_times(recipe)) else {}),
        }
    return described


def full_name(name: str) -> str:
    """The versioned name behind an alias of packaged weights; anything else as it is."""
    packaged = resources.weights_path(name)
    return name if packaged is None else packaged.name


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as plain values."""
    facts: dict[str, Any] = {
        "monobath": __version__,
        "torch": torch.__version__,
        "pillow": metadata.version("pillow"),
        **{name: metadata.version(name) for name in OPTIONAL if find_spec(name)},
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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
