"""Laws of the U-ViT decoder."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import dead_parameters, gradients, inputs, rand_images, randn, tiny_decoder, tiny_decoder_config

from monobath.decoders import decoder_config, make_decoder
from monobath.decoders.base import mixed
from monobath.decoders.unet import modulate
from monobath.decoders.uvit import SIZES
from monobath.errors import UserError
from monobath.models.blocks import PATCHES, resample_to, timestep_embedding
from monobath.models.encoder import Encoder, EncoderConfig
from monobath.scales import ScaleSchedule

PAPER = {
    "S": 14_057_059,
    "B": 21_140_459,
    "M": 50_280_147,
    "L": 90_759_939,
    "XL": 161_272_835,
    "H": 362_688_003,
}
# one network per patch, all with a token of 8×8 pixels
FORMS = [
    {"patch": 1, "channels": [16, 16, 16, 24]},
    {"patch": 2, "channels": [16, 16, 24]},
    {"patch": 4, "channels": [16, 24]},
    {"patch": 8, "channels": [24]},
    {"patch": 4, "channels": [16, 24], "norm": "local"},
]


@pytest.mark.parametrize("size", PAPER)
def test_paper_parameter_counts(size):
    with torch.device("meta"):
        decoder = make_decoder(decoder_config({"size": f"{size}/1"}))
    assert decoder.config.prediction == "v"
    assert sum(p.numel() for p in decoder.parameters()) == PAPER[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", PATCHES)
def test_every_size_and_patch(size, patch):
    config = decoder_config({"size": f"{size}/{patch}"})
    assert config.token_side == 8
    assert config.prediction == ("v" if patch == 1 else "x")
    with torch.device("meta"):
        decoder = make_decoder(config)
        out = decoder(torch.zeros(1, 3, 16, 24), torch.zeros(1), torch.zeros(1, 4, 2, 3))
    assert out.shape == (1, 3, 16, 24)


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form):
    decoder = tiny_decoder(**form)
    x_t, t, z = inputs(2, 16, 40)
    out = decoder(x_t, t, z)
    assert out.shape == x_t.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("grid", [(2, 3), (8, 12), (1, 2), (3, 2), (4, 3)])
def test_latents_of_another_resolution(grid):
    """As in low-resolution stages (a finer latent than the tokens) and in f16, f32 (a coarser one)."""
    decoder = tiny_decoder(prediction="x", linear_skip=True)
    x_t, t, _ = inputs(2, 16, 24)
    z = randn(2, 4, *grid, seed=3)
    out = decoder(x_t, t, z)
    assert out.shape == x_t.shape
    for row in range(grid[0]):  # every latent position counts: an average drops none
        for column in range(grid[1]):
            changed = z.clone()
            changed[:, :, row, column] += 1
            assert (decoder(x_t, t, changed) - out).abs().max() > 1e-4


def test_resampling_rule():
    x = randn(1, 2, 4, 6)
    assert resample_to(x, (4, 6)) is x
    assert torch.equal(resample_to(x, (8, 12)), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.allclose(resample_to(x, (2, 3)), F.avg_pool2d(x, 2))
    assert resample_to(x, (2, 12)).shape == (1, 2, 2, 12)
    ones = torch.ones(1, 1, 3, 5)
    for size in ((2, 7), (7, 2), (6, 10), (1, 1)):
        assert torch.allclose(resample_to(ones, size), torch.ones(1, 1, *size))


@pytest.mark.parametrize("form", [FORMS[0], {"linear_skip": True}])
def test_every_parameter_takes_part(form):
    decoder = tiny_decoder(**form, middle_blocks=1)
    x_t, t, z = inputs(2, 16, 24)
    assert dead_parameters(decoder, lambda: decoder(x_t, t, z)) == []


def test_every_input_takes_part():
    decoder = tiny_decoder()
    x_t, t, z = (x.requires_grad_() for x in inputs())
    decoder(x_t, t, z).square().sum().backward()
    for tensor in (x_t, t, z):
        assert (tensor.grad.flatten(1) if tensor.ndim > 1 else tensor.grad[:, None]).abs().amax(1).min() > 0


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
def test_checkpointing_changes_nothing(form):
    decoder = tiny_decoder(**form, dropout=0.3).train()
    x_t, t, z = inputs()
    results = []
    for enabled in (False, True):
        decoder.set_checkpointing(enabled)
        decoder.zero_grad()
        torch.manual_seed(1)  # dropout: recomputed with the same mask
        out = decoder(x_t, t, z)
        out.square().sum().backward()
        results.append((out.detach(), gradients(decoder)))
    (out, grads), (out_again, grads_again) = results
    assert torch.equal(out, out_again)
    assert grads.keys() == grads_again.keys()
    assert all(torch.allclose(grads[k], grads_again[k], rtol=1e-4, atol=1e-5) for k in grads)


def test_a_sample_does_not_depend_on_its_neighbours():
    decoder = tiny_decoder()
    x_t, t, z = inputs(3, 16, 24)
    alone = torch.cat([decoder(x_t[i : i + 1], t[i : i + 1], z[i : i + 1]) for i in range(3)])
    assert torch.allclose(alone, decoder(x_t, t, z), atol=1e-5)


def test_attention_backends_agree_inside_the_decoder():
    dense, blocked = tiny_decoder(attention="dense"), tiny_decoder(attention="blocked")
    blocked.load_state_dict(dense.state_dict())
    x_t, t, z = inputs(2, 88, 136)  # 11 × 17 tokens: several blocks, none whole
    assert torch.allclose(dense(x_t, t, z), blocked(x_t, t, z), atol=1e-5)


def test_time_embedding_by_hand():
    t, width = torch.tensor([0.0, 0.25, 1.0]), 6
    expected = []
    for value in t.tolist():
        angles = [1000 * value / 10_000 ** (i / 3) for i in range(3)]
        expected.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    assert torch.allclose(timestep_embedding(t, width), torch.tensor(expected), atol=1e-4)
    assert timestep_embedding(t.half(), width).dtype == torch.float32


def test_output_depends_on_time():
    decoder = tiny_decoder()
    x_t, _, z = inputs()
    outputs = [decoder(x_t, torch.full((2,), t), z) for t in (0.0, 0.5, 0.9, 1.0)]
    for a, b in pairwise(outputs):
        assert (a - b).abs().max() > 1e-3


def test_channels_last_is_the_same_function():
    decoder = tiny_decoder(channels=[32, 64])
    x_t, t, z = inputs()
    expected = decoder(x_t, t, z)
    decoder = decoder.to(memory_format=torch.channels_last)
    x_t, z = (x.contiguous(memory_format=torch.channels_last) for x in (x_t, z))
    assert torch.allclose(decoder(x_t, t, z), expected, atol=1e-5)


def test_untrained_residual_branches_are_the_identity():
    decoder = make_decoder(tiny_decoder_config())
    assert all(not p.any() for n, p in decoder.named_parameters() if ".conv2." in n or ".mlp_out." in n)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("factor", [4, 8])
def test_linear_skips_start_as_a_low_pass(channels, factor):
    """Encoder's shortcut, then the decoder's, is a projection to low frequencies that keeps grey constants."""
    encoder = Encoder(EncoderConfig(base=8, factor=factor, latent_channels=channels, linear_skip=True))
    decoder = make_decoder(tiny_decoder_config(latent_channels=channels, factor=factor, linear_skip=True))
    with torch.no_grad():  # silence everything but the shortcuts
        for parameter in (*encoder.moments.parameters(), *decoder.conv_out.parameters()):
            parameter.zero_()

    def around(x):
        z = encoder(x).chunk(2, dim=1)[0]
        return decoder(torch.zeros_like(x), torch.ones(len(x)), z)

    grey = torch.full((1, 3, 16, 24), 0.37)
    assert torch.allclose(around(grey), grey, atol=1e-5)
    x = rand_images(2, 3, 16, 24)
    once = around(x)
    assert torch.allclose(around(once), once, atol=1e-5)
    assert once.square().sum() < x.square().sum()
    assert torch.allclose(((x - once) * once).sum(), torch.tensor(0.0), atol=1e-3)  # orthogonal projection
    assert torch.allclose(once.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5)
    if channels == 16:  # enough rows for the colours
        red = torch.zeros(1, 3, 16, 24)
        red[:, 0] = 0.8
        assert torch.allclose(around(red), red, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "S"}, ["'S'", "SIZE/PATCH", "XL"]),
        ({"size": "Q/2"}, ["Q/2", "custom"]),
        ({"size": "CM/2"}, ["CM/2", "CM/4"]),
        ({"size": "S/3"}, ["S/3", "1, 2, 4, 8"]),
        ({"size": "S/2", "prediction": "v"}, ["patch 2", '"x"']),
        ({"size": "S/1", "linear_skip": True}, ["linear_skip", '"x"']),
        ({"size": "custom"}, ["custom", "patch"]),
        ({"size": "custom", "patch": 2, "middle_blocks": 1, "heads": 2}, ["channels"]),
        ({"size": "S/2", "heads": 7}, ["heads=7", "160"]),
        ({"size": "S/2", "factor": 6}, ["factor", "6"]),
        ({"size": "S/2", "norm": "batch"}, ["norm", "'batch'", "local"]),
        ({"size": "S/2", "reach": -1}, ["reach"]),
        ({"size": "S/2", "down_blocks": 0}, ["down_blocks"]),
        ({"size": "S/2", "down": [1]}, ["decoder.down", "[1]", "3 numbers"]),
        ({"size": "S/2", "up": [1, 0, 1]}, ["decoder.up", "[1, 0, 1]", "at least 1"]),
    ],
)
def test_config_cross_checks(changes, words):
    with pytest.raises(UserError) as error:
        decoder_config(changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("x_t", "t", "z"),
    [
        ((1, 3, 12, 16), (1,), (1, 4, 2, 2)),
        ((1, 4, 16, 16), (1,), (1, 4, 2, 2)),
        ((1, 3, 16, 16), (2,), (1, 4, 2, 2)),
        ((1, 3, 16, 16), (), (1, 4, 2, 2)),
        ((1, 3, 16, 16), (1,), (1, 5, 2, 2)),
        ((2, 3, 16, 16), (2,), (1, 4, 2, 2)),
    ],
)
def test_bad_inputs_print_their_shape(x_t, t, z):
    with pytest.raises(ValueError, match=r"is \([\d, ]*\): expected"):
        tiny_decoder()(torch.zeros(x_t), torch.zeros(t), torch.zeros(z))


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (8, 12), (1, 1), (4, 12), (3, 6), (8, 3)])
def test_modulation_is_the_plain_formula(grid):
    """Finer, equal, coarser and mixed grids, and no full-size scale: values and gradients of x·(1 + scale) + shift."""
    x = randn(2, 3, 8, 12).requires_grad_()
    modulation = randn(2, 6, *grid, seed=1).requires_grad_()
    scale, shift = resample_to(modulation, (8, 12)).chunk(2, dim=1)
    expected, out = x * (1 + scale) + shift, modulate(x, modulation)
    assert torch.allclose(out, expected, atol=1e-6)
    weights = randn(2, 3, 8, 12, seed=2)
    grads = [torch.autograd.grad((y * weights).sum(), (x, modulation)) for y in (expected, out)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))
    last = [y.detach().contiguous(memory_format=torch.channels_last) for y in (x, modulation)]
    out = modulate(*last)
    if grid != (1, 1):  # whose layout is ambiguous
        assert out.is_contiguous(memory_format=torch.channels_last)  # no hidden change of layout
    assert torch.allclose(out, expected, atol=1e-6)


def test_local_norm_bounds_what_a_pixel_depends_on():
    """One block of reach 2 on 8-pixel tokens and a few convolutions: a far corner cannot matter."""
    shape = {"middle_blocks": 1, "reach": 2}
    x_t, t, z = inputs(1, 16, 160)
    other = z.clone()
    other[..., -1] += 1
    for norm, depends in (("local", False), ("group", True)):
        decoder = tiny_decoder(norm=norm, **shape)
        with torch.no_grad():
            change = (decoder(x_t, t, other) - decoder(x_t, t, z)).abs()
        assert change[..., -8:].max() > 1e-3
        assert bool(change[..., :8].max() > 0) is depends


def test_convolutions_alone_have_no_context_and_only_what_they_use():
    """Without transformer and modulation nothing computes a context; every weight that is left matters."""
    decoder = tiny_decoder(norm="local", middle_blocks=0, modulation=False, down=[0, 2], up=[2, 3])
    assert not any("context" in name or "middle" in name for name in decoder.state_dict())
    assert [len(level.blocks) for level in (*decoder.down, *decoder.up)] == [0, 2, 3, 2]
    decoder(*inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())


@pytest.mark.parametrize(("down", "up"), [([0, 1], [2, 2]), ([2, 1], [1, 1]), ([1, 3], [4, 2])])
def test_levels_take_any_number_of_blocks(down, up):
    x_t, t, z = inputs()
    decoder = tiny_decoder(down=down, up=up)
    assert decoder(x_t, t, z).shape == x_t.shape
    assert not torch.equal(decoder(x_t, t, z), decoder(x_t, t, z + 1))


@pytest.mark.parametrize(("name", "channels"), [("CS/4", [64, 128]), ("CM/4", [96, 192]), ("CL/4", [128, 256])])
def test_convolutional_presets(name, channels):
    config = decoder_config({"size": name})
    assert (config.patch, config.channels, config.prediction, config.token_side) == (4, channels, "x", 8)
    assert (config.kind, config.linear_skip) == ("conv", True)
    assert decoder_config(dataclasses.asdict(config)) == config  # as stored with the weights
    kinds = {type(module).__name__ for module in make_decoder(config).modules()}
    assert not kinds & {"GroupNorm", "LayerNorm", "TransformerBlock"}


@pytest.mark.parametrize("upsampling", ["nearest", "shuffle"])
def test_decoders_without_norms_start_with_activations_near_one(upsampling):
    """From zero noise and latents of the usual size, at every convolution on the way."""
    torch.manual_seed(0)
    decoder = make_decoder(
        tiny_decoder_config(
        channels=[48, 64, 96], prediction="x", linear_skip=True, norm="local", modulation=False, middle_blocks=0,
        down=[0, 1, 2], up=[2, 2, 3], upsampling=upsampling,
        )
    )  # fmt: skip
    found = {}
    for name, module in decoder.named_modules():
        if name.endswith(("conv1", "resample", "shortcut")) or name == "conv_in":
            module.register_forward_hook(lambda m, i, out, name=name: found.update({name: out.std().item()}))
    z = 0.5 * randn(2, 4, 12, 12)
    with torch.no_grad():
        out = decoder(torch.zeros(2, 3, 96, 96), torch.ones(2), z)
    assert len(found) > 10
    assert all(0.6 < std < 1.6 for std in found.values()), found
    assert torch.equal(out, F.pixel_shuffle(decoder.linear_skip(z), 8))  # and the picture starts at the linear skip


def test_mixing_with_the_noisy_image_is_the_best_linear_estimate():
    """Of an output with an error of σᵣ and a noisy image: no other share is better; at t = 1 all is the output's."""
    x = rand_images(1, 3, 64, 96)
    output, noise = x + 0.1 * randn(1, 3, 64, 96, seed=1), randn(1, 3, 64, 96, seed=2)
    for time in (0.02, 0.09, 0.3):
        t = torch.tensor([time])
        x_t = (1 - time) * x + time * noise
        best = (mixed(output, x_t, t, 0.1) - x).square().mean()
        assert best < (mixed(output, x_t, t, 0.13) - x).square().mean()
        assert best < (mixed(output, x_t, t, 0.07) - x).square().mean()
        variance = 1 / (1 / 0.01 + ((1 - time) / time) ** 2)
        assert abs(best / variance - 1) < 0.03
    assert torch.equal(mixed(output, noise, torch.ones(1), 0.1), output)
    assert torch.equal(mixed(output, noise, torch.ones(1), 2**62), output)
    assert torch.allclose(mixed(output, x, torch.zeros(1), 0.1), x, atol=1e-6)


def test_mixing_in_a_later_stage_is_the_best_linear_estimate_there():
    """Its noisy image holds (1−τ)(1−e) of the fine detail, less than the flow's 1 − ν; coarse means as the flow."""
    x = 10 * rand_images(4, 3, 64, 96)  # so that it does not pay to shrink the estimate
    noise, output = randn(4, 3, 64, 96, seed=1), x + 0.1 * randn(4, 3, 64, 96, seed=2)
    for stage in ScaleSchedule(3):
        for tau in (0.2, 0.7, 1.0):
            level = stage.level(torch.full((4,), tau))
            state = stage.state(x, noise, torch.full((4,), tau))
            error = (mixed(output, state, level, 0.1, stage) - x).square().mean()
            for share, part in ((1 - level[0], 0.25), (stage.detail_share(level[0]), 0.75)):
                error = error - part / (1 / 0.01 + (share / level[0]) ** 2)
            assert abs(error) < 0.03 * 0.01
            flow = (mixed(output, state, level, 0.1) - x).square().mean()
            own = (mixed(output, state, level, 0.1, stage) - x).square().mean()
            assert torch.equal(flow, own) if stage.index == 0 else own < flow
        assert torch.allclose(stage.detail_share(level), torch.full((4,), 0.0), atol=1e-6)  # all of it is at the start


def test_decoders_mix_by_the_shares_that_they_learned():
    x_t, t, z = inputs(2, 16, 40)
    old, new = (tiny_decoder(residual=0.1, stages=3, residual_shares=shares) for shares in ("flow", "stage"))
    plain = make_decoder(dataclasses.replace(old.config, residual=0.0))
    plain.load_state_dict(old.state_dict())
    t = t * 0.5  # a last stage's
    expected = mixed(plain(x_t, t, z, 2), x_t, t, 0.1, ScaleSchedule(3)[2])
    assert torch.allclose(new(x_t, t, z, 2), expected, atol=1e-6)
    assert torch.allclose(old(x_t, t, z, 2), mixed(plain(x_t, t, z, 2), x_t, t, 0.1), atol=1e-6)
    assert not torch.allclose(new(x_t, t, z, 2), old(x_t, t, z, 2), atol=1e-3)
    assert torch.equal(new(x_t, t, z), old(x_t, t, z))  # on the path of one scale
    assert decoder_config({"size": "CM/4", "residual": 0.1}).residual_shares == "flow"  # as saved before


def test_mixing_is_asked_for_with_sense():
    decoder = tiny_decoder(residual=0.1)
    x_t, t, z = inputs(2, 16, 40)
    plain = make_decoder(dataclasses.replace(decoder.config, residual=0.0))
    plain.load_state_dict(decoder.state_dict())  # no weight of its own
    assert torch.allclose(decoder(x_t, t, z), mixed(plain(x_t, t, z), x_t, t, 0.1), atol=1e-6)
    with pytest.raises(UserError, match=r"residual is -1"):
        tiny_decoder_config(residual=-1.0)
    with pytest.raises(UserError, match='prediction "x"'):
        tiny_decoder_config(patch=1, prediction="v", residual=0.1)
