"""From a generator's latents to pictures: which classes, whose decoder, which noise."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..devices import synchronize
from ..errors import UserError
from ..models.identity import weights_sha256
from ..tokenizer import Tokenizer
from .generator import Generator


def in_turn(generator: Generator, classes: Sequence[int] | None, count: int) -> list[int | None]:
    """The class of each sample: the given ones, or all that the generator knows, over and over; None where it has none.

    Raises:
        UserError: a class that the generator does not know.
    """
    known: list[int | None] = list(classes or generator.config.labels) or [None]
    generator.class_numbers(known)
    return [known[i % len(known)] for i in range(count)]


def check_fits(generator: Generator, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer of another latent space.

    Raises:
        UserError: it has another encoder than the one that made the generator's training data, or other channels.
    """
    config, encoder = generator.config, tokenizer.encoder
    made_by = config.tokenizer or "of an unnamed model"
    if tokenizer.config.encoder.latent_channels != config.dit.latent_channels:
        raise UserError(
            f"{name} decodes latents of {tokenizer.config.encoder.latent_channels} channels, but the generator makes "
            f"{config.dit.latent_channels} ({made_by}): choose another --tokenizer"
        )
    # A foreign encoder's weights need not be here: then channels are all that can be compared.
    own = weights_sha256(encoder) if next(encoder.parameters(), None) is not None else ""
    if own and config.encoder_sha256 and own != config.encoder_sha256:
        raise UserError(
            f"{name} has the encoder {own[:12]}, but the generator was trained on latents of "
            f"{config.encoder_sha256[:12]} ({made_by}): choose a --tokenizer with that encoder"
        )


def decoder_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds of the decoder's noise, for samples of such seeds: another stream than the latents'."""
    return [(seed + 2**31) % 2**32 for seed in seeds]


def sampled(
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Sequence[int | None],
    options: Mapping[str, Any],
    decoder_steps: int | None,
    *,
    seed: int,
    batch: int,
) -> tuple[Tensor, dict[str, float]]:
    """uint8 pictures `(N, 3, H, W)` on the CPU, and the seconds that generator and decoder took.

    Args:
        options: of `Generator.sample`.
        decoder_steps: sampler steps of the tokenizer's decoder; None: what it was made for.
        seed: of the first sample; the others' follow.
        batch: samples at once.
    """
    found, seconds = [], {"generator": 0.0, "decoder": 0.0}
    for start in range(0, len(labels), batch):
        own = labels[start : start + batch]
        seeds = [seed + start + i for i in range(len(own))]
        began = time.perf_counter()
        z = generator.sample(own, seed=seeds, **options)
        synchronize(generator.device)
        between = time.perf_counter()
        pictures = tokenizer.decode(z, seed=decoder_seeds(seeds), steps=decoder_steps, output="uint8")
        found.append(pictures.cpu())
        seconds["generator"] += between - began
        seconds["decoder"] += time.perf_counter() - between
    return torch.cat(found), seconds
