"""Laws of the fast family's context: what the whole picture says, read beside the latent; all else is local."""

from __future__ import annotations

import pytest
import torch
from conftest import randn, randomise
from test_training import photos as photos  # the fixture
from test_trunk import folder as folder  # likewise

from monobath import Tokenizer, UserError
from monobath.autoencoders import as_encoder
from monobath.data import Crops
from monobath.data.encoding import cache_latents
from monobath.decoders import ConvConfig, decoder_config, make_decoder
from monobath.decoders.context import Context
from monobath.export.engines import with_engine
from monobath.tokenizer import TokenizerConfig
from monobath.training import Run, load_recipe

SMALL = {"kind": "conv", "size": "custom", "patch": 4, "channels": [8, 8], "down": [0, 0], "up": [1, 1], "context": 6,
         "latent_channels": 5, "standardise": True, "padding": "replicate"}  # fmt: skip


def tokenizer_with(**decoder: object) -> Tokenizer:
    """Random weights, whose pictures need no clipping."""
    config = {"encoder": {"family": "taef2", "factor": 8, "latent_channels": 5}, "decoder": SMALL | decoder}
    made = randomise(Tokenizer(TokenizerConfig.from_dict(config | {"sampler": {"noise": "zero"}})), scale=0.12).eval()
    with torch.no_grad():
        decoder = made.decoder
        decoder.latent_scale.fill_(0.5)
        size = decoder(torch.zeros(1, 3, 72, 112), torch.ones(1), randn(1, 5, 9, 14, seed=3)).abs().max()
        for layer in filter(None, (decoder.conv_out, decoder.linear_skip)):
            layer.weight.mul_(0.5 / size)
            layer.bias.mul_(0.5 / size)
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("form", [{}, {"stages": 2}, {"linear_skip": False}, {"padding": "zeros"}])
def test_tiles_and_folded_are_the_whole(noise, form):
    tokenizer = tokenizer_with(**form)
    z = randn(2, 5, 26, 19)
    whole = tokenizer.decode(z, noise=noise)
    assert whole.std() > 0.03
    assert (whole.abs() < 1).float().mean() > 0.99
    assert tokenizer.decoder.reach() is not None
    for one in (tokenizer, tokenizer.optimize(noise=noise)):
        for tile in (None, 128):
            found = one.decode(z, noise=noise, tile=tile, overlap=None if tile is None else 96)
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_the_far_side_is_seen_through_the_context_alone():
    decoder = tokenizer_with().decoder
    z, x, t = randn(1, 5, 9, 14), torch.zeros(1, 3, 72, 112), torch.ones(1)
    far = z.clone()
    far[:, :, -1, -1] += 2
    plain = make_decoder(decoder_config(SMALL | {"context": 0})).eval()
    randomise(plain, scale=0.3)
    with torch.no_grad():
        assert (decoder(x, t, far) - decoder(x, t, z))[:, :, :8, :8].abs().max() > 1e-4
        assert plain(x, t, far)[:, :, :8, :8].equal(plain(x, t, z)[:, :, :8, :8])


def test_a_constant_picture_has_one_context_at_any_size():
    context = randomise(Context(3, 4, "replicate"), scale=0.5)
    z = randn(2, 3, 1, 1)
    with torch.no_grad():
        small, large = context(z.expand(-1, -1, 3, 5)), context(z.expand(-1, -1, 12, 7))
    torch.testing.assert_close(large, small[:, :, :1, :1].expand_as(large), atol=1e-4, rtol=1e-5)
    assert small.std() > 0.01
    assert not small[0].allclose(small[1])


def test_every_weight_moves_the_output():
    decoder = tokenizer_with().decoder
    decoder(randn(1, 3, 24, 40), torch.ones(1), randn(1, 5, 3, 5)).square().mean().backward()
    parameters = dict(decoder.context.named_parameters())
    assert len(parameters) == 2 + 3 * 8
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())


def test_engines_have_it_too():
    tokenizer, z = tokenizer_with(), randn(2, 5, 4, 6)
    found = with_engine(tokenizer, "torch-export").decode(z)
    torch.testing.assert_close(found, tokenizer.decode(z), atol=1e-4, rtol=0)
    assert with_engine(tokenizer, "torch-export").decoder.reach() is None  # its tiles have their own


def test_without_a_context_decoders_are_what_they_were():
    decoder = make_decoder(decoder_config({"size": "CM/4"}))
    assert decoder.config.context == 0
    assert not [name for name in decoder.state_dict() if name.startswith("context")]
    assert decoder.features(randn(1, 4, 3, 2)).z.shape == (1, 4, 3, 2)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"context": -1}, "give its channels"),
        ({"context": 8, "trunk": 6, "latent_channels": 6}, "set one of them to 0"),
    ],
)
def test_mistakes(values, words):
    with pytest.raises(UserError, match=words):
        ConvConfig(**values)


def test_training_sees_whole_pictures(photos, folder, tmp_path):
    """It starts as the linear map alone, learns from whole cached crops, and refuses windows of them."""
    encoder = as_encoder(f"taef2={folder}")
    cache_latents(encoder, str(photos), tmp_path / "latents", Crops(size=64, scale=(64, 80)))
    small = [f"run={tmp_path / 'run'}", "model.decoder.size=custom", "model.decoder.channels=[8,8]",
             "model.decoder.up=[1,1]", "model.decoder.patch=4", "model.decoder.context=6", "model.encoder.family=taef2",
             f"model.encoder.source={folder}", "data.latents=true", f"data.source=[{tmp_path / 'latents'}]",
             "data.scale=[64,80]", "data.workers=0", "loss.perceptual=0", "training.steps=4", "training.batch_size=4",
             "training.precision=fp32"]  # fmt: skip
    with pytest.raises(UserError, match=r"data\.size is 32, but"):
        Run(load_recipe("flux2", [*small, "data.size=32"]))
    run = Run(load_recipe("flux2", [*small, "data.size=64"]))
    skip, before = run.model.decoder.linear_skip, run.model.decoder.context[1].linear2.weight.clone()
    assert skip.weight[:, 6:].abs().max() == 0 < skip.weight[:, :6].abs().max()
    for _ in range(4):
        run.step()
    assert skip.weight[:, 6:].abs().max() > 0
    assert not run.model.decoder.context[1].linear2.weight.equal(before)
