"""What convolutions read beyond the edge: replicate keeps flat flat, and what holds on crops holds on pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    losses_of,
    of_kind,
    rand_images,
    randn,
    randomise,
    tiny_decoder,
    tiny_decoder_config,
    tiny_encoder,
    tiny_encoder_config,
    tiny_tokenizer,
)
from torch import Tensor, nn

from monobath import Tokenizer, UserError
from monobath.decoders import KLConfig, make_decoder
from monobath.decoders.folded import OneStepCall, folded
from monobath.losses.grid import grid_energy
from monobath.models.blocks import Conv2d, replicated
from monobath.tokenizer import TokenizerConfig
from monobath.training.config import LossConfig
from monobath.training.initialise import start_from
from monobath.training.objectives.base import AutoencoderObjective
from monobath.training.recipe import DecoderRecipe, TokenizerRecipe

CONVOLUTIONS = {
    "norm": "local", "modulation": False, "middle_blocks": 0, "upsampling": "shuffle", "down": [0, 1], "up": [1, 1],
    "linear_skip": True,
}  # fmt: skip
"""The form of CM/4."""

# ---- the operation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 3), (2, 1), (1, 1)])
def test_replicated_is_pytorchs_padding_with_its_gradient(size, layout, dtype):
    for sides in itertools.product((0, 1), repeat=4):
        leaves = [randn(2, 3, *size).to(dtype).to(memory_format=layout).requires_grad_() for _ in range(2)]
        outs = [replicated(leaves[0], sides), F.pad(leaves[1], sides, mode="replicate")]
        assert torch.equal(*outs)
        assert outs[0].is_contiguous(memory_format=layout)
        weight = randn(*outs[0].shape).to(dtype)
        for out in outs:
            (out * weight).sum().backward()
        rounding = 0.05 if dtype == torch.bfloat16 else 1e-12  # of up to nine values that are added
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=rounding)
        assert leaves[0].grad.is_contiguous(memory_format=layout)
        with torch.no_grad():
            assert torch.equal(replicated(leaves[0], sides), outs[1])


def test_its_gradient_is_the_numerical_one():
    x = randn(1, 2, 3, 2).double().requires_grad_()
    for sides in ((1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 0, 0)):
        assert torch.autograd.gradcheck(lambda x, sides=sides: replicated(x, sides), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_is_pytorchs(stride):
    for padding in ("zeros", "replicate"):
        ours = Conv2d(3, 5, padding, stride)
        theirs = nn.Conv2d(3, 5, 3, stride, padding=1, padding_mode=padding)
        theirs.load_state_dict(ours.state_dict())
        for size in ((7, 4), (1, 1)):
            x = randn(2, 3, *size)
            before = x.clone()
            torch.testing.assert_close(ours(x), theirs(x))
            with torch.no_grad():
                torch.testing.assert_close(ours.of_silu(x), theirs(F.silu(x)))
            assert torch.equal(x, before)


# ---- flat stays flat --------------------------------------------------------------------------------


def network(name: str, padding: str) -> nn.Module:
    """A network of one input, with random weights."""
    if name == "encoder":
        return tiny_encoder(padding=padding)
    if name == "kl":
        pytest.importorskip("diffusers")
        return OneStepCall(randomise(make_decoder(KLConfig(channels=[8, 8, 16, 16], padding=padding)))).eval()  # type: ignore[arg-type]
    # Not shuffled up: with random weights that draws a pattern, whose pixel at the edge is no flat area.
    shape = CONVOLUTIONS | {"upsampling": "nearest"} if name == "convolutions" else {"linear_skip": True}
    return OneStepCall(folded(tiny_decoder(padding=padding, **shape), "zero"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["encoder", "convolutions", "transformer", "kl"])
def test_flat_gives_the_same_at_any_size_and_place(name):
    """Beside the pattern within a cell, of 4 or 8 pixels, that random weights of a patched decoder draw."""
    channels, side = (3, 8) if name == "encoder" else (4, 1)
    colour = randn(1, channels, 1, 1).double()
    for padding in ("zeros", "replicate"):
        net, outs = network(name, padding).double(), []
        for h, w in ((1, 1), (3, 2), (6, 9)):
            out = net(colour.expand(1, channels, h * side, w * side).contiguous())
            outs.append(F.pixel_unshuffle(out, out.shape[3] // w))
        far = [((out - outs[0]).abs().max() / outs[0].abs().max()).item() for out in outs[1:]]
        assert max(far) < 1e-5 if padding == "replicate" else min(far) > 0.1


# ---- trained on crops, right on pictures ------------------------------------------------------------


def flat_and_noisy(batch: int, height: int, width: int, seed: int) -> Tensor:
    """Pictures of one colour and white noise, from none to a tenth of the range."""
    colours, amount = rand_images(batch, 3, 1, 1, seed=seed), rand_images(batch, 1, 1, 1, seed=seed + 1)
    return (0.8 * colours + 0.1 * (1 + amount) * randn(batch, 3, height, width, seed=seed + 2)).clamp(-1, 1)


def error_after_training(padding: str, steps: int) -> Tensor:
    """Of 128×160 pictures, after training on crops of 32²."""
    torch.manual_seed(0)
    encoder = {"patch": 4, "multipliers": [2, 3], "linear_skip": True, "padding": padding}
    shape = TokenizerConfig(
        encoder=tiny_encoder_config(**encoder), decoder=tiny_decoder_config(padding=padding, **CONVOLUTIONS)
    )
    tokenizer, batch = Tokenizer(shape), 4
    objective = AutoencoderObjective(tokenizer, LossConfig(perceptual=0.0), train_encoder=True)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        x = flat_and_noisy(batch, 32, 32, seed=3 * step)
        latent_noise = randn(batch, 4, 4, 4, seed=step)
        loss = losses_of(objective, x, torch.ones(batch), torch.zeros_like(x), latent_noise).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x = flat_and_noisy(16, 128, 160, seed=10_000)
    with torch.no_grad():
        return tokenizer.eval().decode(tokenizer.encode(x).mode(), steps=1, noise="zero") - x


def test_what_learned_on_crops_neither_shifts_nor_patterns_large_pictures():
    found = {}
    for padding, steps in (("zeros", 200), ("replicate", 200), ("replicate", 600)):
        error = error_after_training(padding, steps)
        offset = error.mean((0, 2, 3)).abs().max().item()
        # White noise has about 1.
        patterns = [(grid_energy(error, period).mean() / error.square().mean()).item() for period in (4, 8)]
        found[padding, steps] = (offset, *patterns)
    assert found["replicate", 200][0] < 0.01
    assert max(found["replicate", 200][1:]) < 4
    # What is left dies out.
    assert found["replicate", 600][0] < 0.005
    assert max(found["replicate", 600][1:]) < 2
    # What it was about: the same with zero padding.
    assert found["zeros", 200][0] > 0.03
    assert min(found["zeros", 200][1:]) > 8


# ---- the grid's energy ------------------------------------------------------------------------------


def test_energy_of_a_constant_of_a_pattern_and_of_white_noise():
    height, width, p = 48, 80, 8
    flat = randn(2, 3, 1, 1).expand(2, 3, height, width)
    assert grid_energy(flat, p).max() < 1e-9
    stripes = 0.3 * (1 - 2 * (torch.arange(width) % 2)).float().expand(1, 1, height, width)
    places = (height // p) * (width // p)
    torch.testing.assert_close(grid_energy(stripes, p), torch.full((1, 1), 0.09 * places))
    torch.testing.assert_close(grid_energy(stripes.double() + 0.7, p).float(), torch.full((1, 1), 0.09 * places))
    torch.testing.assert_close(grid_energy(F.pad(stripes, (0, 3, 0, 5), value=9.0), p), grid_energy(stripes, p))
    noise = 0.5 * randn(500, 2, height, width)
    for period in (4, 8):
        torch.testing.assert_close(
            grid_energy(noise, period).mean(), torch.tensor(0.25 * (1 - 1 / period**2)), rtol=0.02, atol=0
        )
    with pytest.raises(ValueError, match="a period of 8 needs sides of at least 8"):
        grid_energy(noise[:, :, :7], 8)


def test_the_objective_counts_it():
    tokenizer = tiny_tokenizer(decoder=CONVOLUTIONS, noise="zero")
    x, latent_noise = rand_images(2, 3, 16, 24), randn(2, 4, 2, 3)

    def losses(grid: float) -> dict[str, Tensor]:
        objective = AutoencoderObjective(tokenizer, LossConfig(perceptual=0.0, grid=grid), train_encoder=False)
        return losses_of(objective, x, torch.ones(2), torch.zeros_like(x), latent_noise).named

    without, counted = losses(0.0), losses(0.3)
    posterior = tokenizer.encode(x)
    error = tokenizer.decoder(torch.zeros_like(x), torch.ones(2), posterior.mean + posterior.std * latent_noise) - x
    assert "grid" not in without
    torch.testing.assert_close(counted["grid"], grid_energy(error, 8).mean())
    torch.testing.assert_close(counted["loss"], without["loss"] + 0.3 * counted["grid"])
    counted["loss"].backward()


# ---- models that exist ------------------------------------------------------------------------------


def test_a_model_without_the_setting_means_zeros(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for part in ("encoder", "decoder"):
        assert config[part].pop("padding") == "zeros"
    file.write_text(json.dumps(config))
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    z = randn(1, 4, 3, 5)
    assert torch.equal(loaded.decode(z), tokenizer.decode(z))


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_files_and_the_diffusers_model_keep_it(tmp_path, padding):
    pytest.importorskip("diffusers")
    from monobath.integrations.diffusers import AutoencoderMonobath

    tokenizer = tiny_tokenizer(encoder={"padding": padding}, decoder={"padding": padding, **CONVOLUTIONS})
    tokenizer.save_pretrained(tmp_path / "own")
    AutoencoderMonobath.from_tokenizer(tokenizer).save_pretrained(tmp_path / "theirs")
    own, theirs = (
        Tokenizer.from_pretrained(tmp_path / "own"),
        AutoencoderMonobath.from_pretrained(tmp_path / "theirs"),
    )
    x, z = rand_images(1, 3, 24, 40), randn(1, 4, 3, 5)
    assert torch.equal(own.encode(x).mode(), tokenizer.encode(x).mode())
    assert torch.equal(own.decode(z), tokenizer.decode(z))
    assert theirs.config.decoder_config["padding"] == padding
    assert torch.equal(theirs.encode(x).latent_dist.mode(), tokenizer.encode(x).mode())
    assert torch.equal(theirs.decode(z).sample.clamp(-1, 1), tokenizer.decode(z))


def test_training_starts_from_a_model_of_other_padding_where_it_trains(tmp_path):
    source = tiny_tokenizer(seed=1)
    source.save_pretrained(tmp_path)
    ours = tiny_tokenizer(encoder={"padding": "replicate"}, decoder={"padding": "replicate"})
    recipe = TokenizerRecipe(model=ours.config, init=str(tmp_path))
    assert start_from(ours, recipe)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in ours.state_dict().items())
    assert ours.decoder.conv_in.padding_mode == ours.encoder.conv_in.padding_mode == "replicate"
    frozen = of_kind(DecoderRecipe, recipe, training=dataclasses.replace(recipe.training, train_encoder=False))
    with pytest.raises(UserError, match=r"init: the encoder of .* is .*'zeros'.* but the recipe says .*'replicate'"):
        start_from(ours, frozen)
    own_encoder = dataclasses.replace(ours.config, encoder=source.config.encoder)
    assert start_from(Tokenizer(own_encoder), dataclasses.replace(frozen, model=own_encoder))


def test_what_cannot_be_is_explained():
    for name, kind in (("decoder", tiny_decoder_config), ("encoder", tiny_encoder_config)):
        with pytest.raises(UserError, match=f'{name}.padding is \'reflect\': choose "zeros" or "replicate"'):
            kind(padding="reflect")
    assert tiny_decoder_config(slim=8, latent_channels=32, padding="replicate").padding == "zeros"  # TAEF2's own
