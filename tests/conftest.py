"""Tiny real models and a fixed seed, shared by all tests. No test reaches the network."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from torch import Tensor, nn

from monobath import resources
from monobath.decoders import DecoderConfig, PixelDecoder, decoder_config, make_decoder
from monobath.decoding import Decoding, SamplerConfig, pictures
from monobath.models.encoder import Encoder, EncoderConfig
from monobath.tokenizer import Tokenizer, TokenizerConfig
from monobath.training import Recipe
from monobath.training.objectives.base import Batch, Draws, Judge, Losses


def pytest_configure(config: pytest.Config) -> None:
    """Several processes of several threads each would fight for the cores: those of `-n` share them."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Random values for every parameter, so that zero-initialised branches take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
            std = min(1.0, 1.5 / fan_in**0.5) if parameter.ndim in (2, 4) else scale
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0))
    return module


def tiny_encoder_config(**changes) -> EncoderConfig:
    # Widths 16, 24, …: at least 4 channels a group, so that no bias before a norm is dead.
    shape = {"factor": 8, "latent_channels": 4, "base": 8, "patch": 2, "multipliers": [2, 3, 3], "blocks": 1}
    return EncoderConfig(**(shape | changes))


def tiny_decoder_config(**changes) -> DecoderConfig:
    shape = {
        "size": "custom", "patch": 4, "channels": [16, 24], "middle_blocks": 2, "heads": 2,
        "reach": 2, "down_blocks": 1,
    }  # fmt: skip
    return decoder_config(shape | changes)


def tiny_encoder(seed: int = 0, **changes) -> Encoder:
    return randomise(Encoder(tiny_encoder_config(**changes)), seed).eval()  # type: ignore[return-value]


def tiny_decoder(seed: int = 0, **changes) -> PixelDecoder:
    return randomise(make_decoder(tiny_decoder_config(**changes)), seed).eval()  # type: ignore[return-value]


def tiny_tokenizer(seed: int = 0, *, encoder: dict | None = None, decoder: dict | None = None, **sampler) -> Tokenizer:
    config = TokenizerConfig(
        encoder=tiny_encoder_config(**(encoder or {})),
        decoder=tiny_decoder_config(**(decoder or {})),
        sampler=SamplerConfig(**sampler),
    )
    return randomise(Tokenizer(config), seed).eval()  # type: ignore[return-value]


def previews(decoder: PixelDecoder, z: Tensor, seeds: list[int], **options) -> list[Tensor]:
    """The pictures that a decoder makes of latents, by `monobath.decoding`, not clipped: all stages'."""
    how = Decoding(seed=seeds, **({"stages": decoder.stages} | options))
    with torch.no_grad():
        return list(pictures(decoder, z, how.checked(decoder, SamplerConfig(noise=decoder.fixed or "gaussian"), z)))


def sample(decoder: PixelDecoder, z: Tensor, seeds: list[int], **options) -> Tensor:
    """The same at full resolution at once."""
    (picture,) = previews(decoder, z, seeds, stages=1, **options)
    return picture


def record_calls(decoder: PixelDecoder) -> list[tuple]:
    """(state, noise level, stage) of each prediction that the decoder makes from now on."""
    calls, predict = [], decoder.predict

    def recorded(x_t, t, features, stage=None):
        calls.append((x_t, t, stage))
        return predict(x_t, t, features, stage)

    decoder.predict = recorded  # type: ignore[method-assign]
    return calls


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> None:
    """What is packaged, in this test: a model of 16 channels, `default`, and one of 4, `f8c4`."""
    for name, channels in (("wide", 16), ("narrow", 4)):
        shape = {"latent_channels": channels}
        tiny_tokenizer(encoder=shape, decoder=shape).save_pretrained(tmp_path / "packaged/weights" / name)
    aliases = '{"default": {"weights": "wide"}, "f8c4": {"weights": "narrow"}}'
    (tmp_path / "packaged/weights/aliases.json").write_text(aliases)
    monkeypatch.setattr(resources, "_ROOT", tmp_path / "packaged")


def losses_of(
    objective: nn.Module, x: Tensor, t: Tensor, noise: Tensor, latent_noise: Tensor, moments: Tensor | None = None,
    *, judge: Judge | None = None, **draws: Any,
) -> Losses:  # fmt: skip
    """What an objective makes of images, times and noises."""
    drawn = Draws(t, noise, latent_noise, **draws)
    return objective(Batch(images=x, draws=drawn, moments=moments, judge=judge))


def of_kind(kind: type[Recipe], recipe: Recipe, **more: Any) -> Any:
    """A recipe as one of another kind, with what that one has besides."""
    return kind(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)} | more)


def rand_images(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2, height: int = 16, width: int = 24, channels: int = 4, factor: int = 8, seed: int = 0):
    """x_t, t, z for a decoder."""
    x_t, z = randn(batch, 3, height, width, seed=seed), randn(batch, channels, height // factor, width // factor)
    return x_t, torch.linspace(0.3, 1, batch), z


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def dead_parameters(module: nn.Module, run) -> list[str]:
    """Parameters that get no gradient (the gradient of a dead one is rounding), or do not move `run()`."""
    with torch.no_grad():
        before = run()
    module.zero_grad()
    (run() * randn(*before.shape, seed=9)).sum().backward()
    dead = []
    for name, parameter in module.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-4:
            dead.append(f"{name}: no gradient")
            continue
        with torch.no_grad():
            original = parameter.clone()
            parameter.add_(randn(*parameter.shape, seed=5), alpha=0.3)
            moved = (run() - before).abs().max()
            parameter.copy_(original)
        if moved < 1e-6:
            dead.append(f"{name}: does not move the output")
    return dead
