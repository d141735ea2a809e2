"""Laws of the KL encoder and its posterior."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    dead_parameters,
    gradients,
    rand_images,
    randn,
    tiny_encoder,
    tiny_encoder_config,
)
from torch.distributions import Independent, Normal, kl_divergence

from monobath.errors import UserError
from monobath.models.blocks import cosine_basis, norm_groups
from monobath.models.encoder import Encoder, EncoderConfig, Posterior


@pytest.mark.parametrize(("factor", "channels"), [(8, 4), (16, 4), (16, 16), (32, 32)])
def test_every_latent_shape(factor, channels):
    encoder = Encoder(EncoderConfig(factor=factor, latent_channels=channels, base=8, blocks=1))
    assert encoder.config.name == f"f{factor}c{channels}"
    assert len(encoder.config.multipliers) == factor.bit_length()
    x = rand_images(2, 3, factor, 3 * factor)
    assert encoder(x).shape == (2, 2 * channels, 1, 3)


def test_f8c4_has_the_papers_parameters():
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 34_163_664


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch": 4, "multipliers": [2, 3]},
        {"patch": 8, "multipliers": [3]},
        {"base": 20, "multipliers": [1, 2, 2], "middle_attention": False},
        {"linear_skip": True, "middle_attention": False},
    ],
)
def test_compact_forms(changes):
    encoder = tiny_encoder(**changes)
    x = rand_images(2, 3, 16, 40)
    assert encoder(x).shape == (2, 8, 2, 5)
    # one picture does not see the other
    assert torch.allclose(encoder(x[1:]), encoder(x)[1:], atol=1e-5)


def test_checkpointing_changes_nothing():
    encoder, x = tiny_encoder(), rand_images(2, 3, 16, 24)
    results = []
    for enabled in (False, True):
        encoder.checkpointing = enabled
        encoder.zero_grad()
        out = encoder(x)
        out.square().sum().backward()
        results.append((out.detach(), gradients(encoder)))
    (out, grads), (out_again, grads_again) = results
    assert torch.equal(out, out_again)
    assert grads.keys() == grads_again.keys()
    assert all(torch.allclose(grads[k], grads_again[k], rtol=1e-5, atol=1e-6) for k in grads)


def test_every_parameter_takes_part():
    encoder, x = tiny_encoder(linear_skip=True), rand_images(2, 3, 16, 24)
    # The softmax does not see a constant added to all keys: this one cannot matter, in any such network.
    assert dead_parameters(encoder, lambda: encoder(x)) == ["middle_attention.k.bias: no gradient"]


def test_mean_has_the_linear_shortcut_and_the_log_variance_has_not():
    encoder = tiny_encoder(linear_skip=True)
    x = rand_images(1, 3, 16, 24)
    before = encoder(x)
    with torch.no_grad():
        encoder.linear_skip.bias += 1
    mean, logvar = (encoder(x) - before).chunk(2, dim=1)
    assert torch.allclose(mean, torch.ones_like(mean), atol=1e-5)
    assert torch.equal(logvar, torch.zeros_like(logvar))


def test_posterior_kl_is_that_of_torch():
    posterior = Posterior(randn(3, 8, 2, 5), (16, 40))
    normal = Independent(Normal(posterior.mean, posterior.std), 3)
    standard = Independent(Normal(torch.zeros(3, 4, 2, 5), torch.ones(3, 4, 2, 5)), 3)
    assert posterior.kl().shape == (3,)
    assert torch.allclose(posterior.kl(), kl_divergence(normal, standard), rtol=1e-5)
    assert Posterior(torch.zeros(1, 8, 2, 5), (16, 40)).kl().item() == 0


def test_posterior_clamps_the_log_variance_and_is_float32():
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[-100.0, 100.0]]]])], dim=1)
    posterior = Posterior(moments.half(), (8, 16))
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.mean.dtype == posterior.sample().dtype == posterior.kl().dtype == torch.float32
    assert torch.isfinite(posterior.kl()).all()


def test_posterior_samples():
    mean, logvar = randn(1, 3, 2, 2), randn(1, 3, 2, 2, seed=1)
    posterior = Posterior(torch.cat([mean, logvar], dim=1), (16, 16))
    first = posterior.sample(torch.Generator().manual_seed(4))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(4)))
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(5)))
    assert torch.equal(posterior.mode(), mean)
    many = Posterior(torch.cat([mean, logvar], dim=1).expand(20_000, -1, -1, -1), (16, 16))
    samples = many.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(samples.mean(0), mean[0], atol=0.06)
    assert torch.allclose(samples.std(0), posterior.std[0], rtol=0.03)


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 3, 16, 20), (1, 4, 16, 16), (3, 16, 16)])
def test_bad_input_prints_its_shape(shape):
    with pytest.raises(ValueError, match="divisible by 8") as error:
        tiny_encoder()(torch.zeros(shape))
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factor": 6}, ["factor", "6"]),
        ({"patch": 3}, ["patch", "3"]),
        ({"patch": 16, "factor": 8}, ["patch=16", "factor=8"]),
        ({"multipliers": [1, 2]}, ["[1, 2]", "factor=8", "patch=2", "3"]),
        ({"base": 0}, ["base", "0"]),
        ({"latent_channels": 0}, ["latent_channels", "0"]),
        ({"blocks": 0}, ["blocks", "0"]),
    ],
)
def test_config_cross_checks(changes, named):
    with pytest.raises(UserError) as error:
        tiny_encoder_config(**changes)
    assert all(word in str(error.value) for word in named)


def test_norm_groups():
    assert [norm_groups(c) for c in (32, 64, 128, 512)] == [32] * 4
    for channels in range(1, 200):
        groups = norm_groups(channels)
        assert channels % groups == 0
        assert channels % 32 == 0 or groups == 1 or channels // groups >= 4


@pytest.mark.parametrize(("channels", "side"), [(4, 8), (16, 8), (48, 4), (60, 4)])
def test_cosine_basis_is_orthonormal(channels, side):
    basis = cosine_basis(channels, side)
    kept = min(channels, 3 * side**2)
    expected = torch.zeros(channels, channels)
    expected[:kept, :kept] = torch.eye(kept)
    assert torch.allclose(basis @ basis.T, expected, atol=1e-6)
