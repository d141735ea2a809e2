"""Models on engines: from the file that `monobath export` wrote, or made for this run; and as rows of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import resources
from ..data.transforms import center_crop
from ..decoders import decoder_config, make_decoder
from ..decoders.folded import OneStepCall, folded
from ..errors import UserError
from ..evaluation.bench import CHANNELS, TINY, Maker, maker, random_latents, tokenizer_maker
from ..evaluation.peers import random_autoencoder
from ..images import open_image
from ..tokenizer import Tokenizer
from . import FILES, Engine
from .engines import Run, engine_call, with_engine

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


def engine_networks(
    models: Sequence[str], engines: Sequence[Engine], decoders: Sequence[str] = ()
) -> dict[str, tuple[Any, Maker]]:
    """For `monobath bench`: models, decoders and AutoencoderTiny with random weights, under each engine.

    Returns:
        By name: the network whose parameters count, and (batch, side) → a call that decodes that.
    """
    found: dict[str, tuple[Any, Maker]] = {}
    shapes = {name: decoder_config({"size": name, "latent_channels": CHANNELS}) for name in decoders}
    networks = {name: make_decoder(shape).eval() for name, shape in shapes.items()}
    calls = {name: OneStepCall(folded(network, "zero")).eval() for name, network in networks.items()}
    peer = random_autoencoder("tiny").eval().decoder
    inputs = {"latent": torch.zeros(2, CHANNELS, 18, 26)}
    samples = [{"latent": random_latents(1, CALIBRATION_SIDE).numpy()}]
    for engine in engines:
        for model in models:
            tokenizer = Tokenizer.from_pretrained(model, device="cpu", dtype=torch.float32)
            found[f"{model}, {engine}"] = (tokenizer.decoder, tokenizer_maker(on_engine(tokenizer, model, engine)))
        for name, network in [*calls.items(), (TINY, peer)]:
            make = _maker(engine_call(network, inputs, engine, samples))
            found[f"{name}, {engine}"] = (networks.get(name, peer), make)
    return found


def _maker(run: Run) -> Maker:
    return maker(lambda z: run({"latent": z.numpy()}))
