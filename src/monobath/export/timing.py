"""Engines in `monobath bench`: networks as its table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..decoders import decoder_config, make_decoder
from ..decoders.folded import OneStepCall, folded
from ..evaluation.bench import CHANNELS, TINY, Maker, maker, random_latents, tokenizer_maker
from ..evaluation.peers import random_autoencoder
from ..tokenizer import Tokenizer
from . import Engine
from .engines import engine_call
from .running import CALIBRATION_SIDE, on_engine


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
            run = engine_call(network, inputs, engine, samples)
            make = maker(lambda z, run=run: run({"latent": z.numpy()}))
            found[f"{name}, {engine}"] = (networks.get(name, peer), make)
    return found
