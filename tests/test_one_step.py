"""The folded one-step decoder is the decoder at t = 1, and nothing else."""

import pytest
import torch
from conftest import tiny_decoder, tiny_tokenizer

from monobath import UserError
from monobath.decoders.folded import FoldedDecoder, OneStepCall, folded
from monobath.decoders.unet import ResBlock

SHAPES = {
    "finer than the latent": {"patch": 2},
    "linear skip": {"linear_skip": True},
    "mixed with the noisy image": {"residual": 0.1},
    "deepest level coarser than the latent": {"channels": [16, 16, 32], "factor": 4},
    "token larger than two latents": {"patch": 8, "factor": 4},
    "no transformer": {"middle_blocks": 0},
    "velocity at patch 1": {"patch": 1, "factor": 4},
    "x at patch 1": {"patch": 1, "factor": 4, "prediction": "x"},
    "several blocks, other groups": {"channels": [24, 40], "down_blocks": 2},
    "without global norms": {"norm": "local", "patch": 2, "linear_skip": True},
    "convolutions only": {"norm": "local", "middle_blocks": 0, "modulation": False, "down": [0, 2], "up": [2, 3]},
    "shuffled up": {"channels": [16, 24, 32], "upsampling": "shuffle", "patch": 2},
    "group norms, not modulated": {"modulation": False},
    "fewer blocks up than down": {"down": [2, 1], "up": [1, 1]},
    "narrow reach": {"factor": 4, "reach": 1},
    "replicate padding": {"padding": "replicate", "linear_skip": True},
    "replicate padding, convolutions only": {
        "padding": "replicate",
        "norm": "local",
        "middle_blocks": 0,
        "modulation": False,
        "upsampling": "shuffle",
        "linear_skip": True,
    },
}


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folded_decoder_gives_the_same_picture(shape, noise):
    same_picture(tiny_decoder(**shape), noise, (4, 8))


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("shape", [name for name in SHAPES if name.startswith("replicate")])
def test_of_one_latent_too(shape, noise):
    same_picture(tiny_decoder(**SHAPES[shape]), noise, (1, 1))


def same_picture(decoder, noise, size):
    f = decoder.config.factor
    z = torch.randn(2, 4, *size)
    start = torch.randn(2, 3, size[0] * f, size[1] * f) * (noise == "gaussian")
    with torch.no_grad():
        expected = decoder(start, torch.ones(2), z)
        if decoder.config.prediction == "v":
            expected = expected + start
        got = OneStepCall(folded(decoder, noise))(z, start if noise == "gaussian" else None)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_folding_leaves_the_decoder_alone_and_shares_nothing():
    decoder = tiny_decoder(linear_skip=True)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    one_step = folded(decoder, "zero")
    with torch.no_grad():
        for parameter in one_step.parameters():
            parameter.zero_()
    after = decoder.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in one_step.parameters())


def test_what_the_time_and_the_noise_needed_is_gone():
    decoder = tiny_decoder()
    zero, gaussian = (_size(folded(decoder, noise)) for noise in ("zero", "gaussian"))
    assert gaussian - zero == 9 * 3 * decoder.config.patch**2 * decoder.config.channels[0]
    blocks = [m for m in decoder.modules() if isinstance(m, ResBlock)]
    time = _size(decoder.time) + sum(_size(block.time) for block in blocks)
    layer_norms = sum(_size(block.norm2) for block in decoder.middle.blocks)
    assert gaussian == _size(decoder) - time - layer_norms


def _size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(params=["zero", "gaussian"])
def tokenizer(request):
    return tiny_tokenizer(noise=request.param)


def test_optimized_tokenizer_decodes_the_same_pictures(tokenizer):
    z = torch.randn(2, 4, 5, 9)
    for size in (None, (17, 33)):
        expected = tokenizer.decode(z, size=size, seed=3)
        torch.testing.assert_close(tokenizer.optimize().decode(z, size=size, seed=3), expected, atol=1e-4, rtol=0)


def test_optimized_tokenizer_encodes_too_and_is_a_new_one(tokenizer):
    tokenizer.train()
    fast = tokenizer.optimize()
    assert tokenizer.encoder.training
    tokenizer.eval()
    images = torch.rand(1, 3, 22, 30) * 2 - 1
    assert torch.equal(fast.encode(images).mode(), tokenizer.encode(images).mode())
    assert fast(images).shape == images.shape
    assert not isinstance(tokenizer.decoder, FoldedDecoder)
    assert isinstance(fast.decoder, FoldedDecoder)


def test_optimized_tokenizer_says_what_it_cannot_do(tokenizer, tmp_path):
    fast, z = tokenizer.optimize(), torch.zeros(1, 4, 2, 4)
    with pytest.raises(UserError, match="optimized for 1 step"):
        fast.decode(z, steps=2)
    other = "zero" if tokenizer.config.sampler.noise == "gaussian" else "gaussian"
    with pytest.raises(UserError, match=f"not 1 from {other}"):
        fast.decode(z, noise=other)
    with pytest.raises(UserError, match="cannot be saved"):
        fast.save_pretrained(tmp_path / "fast")
    with pytest.raises(UserError, match="optimized already"):
        fast.optimize()
    assert not (tmp_path / "fast").exists()


def test_noise_of_the_optimized_form_can_be_chosen(tokenizer):
    z = torch.randn(1, 4, 2, 4)
    for noise in ("zero", "gaussian"):
        expected = tokenizer.decode(z, noise=noise)
        torch.testing.assert_close(tokenizer.optimize(noise=noise).decode(z), expected, atol=1e-4, rtol=0)
