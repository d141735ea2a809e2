"""Laws of a comparison: paired, seeded, the same for one process and for several."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rand_images, tiny_tokenizer
from torch import nn
from torchvision.transforms.v2.functional import gaussian_blur

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from monobath.data.transforms import center_crop
from monobath.errors import UserError
from monobath.evaluation import processes
from monobath.evaluation.compare import Settings, evaluate, half_sample_estimate, mean_estimate
from monobath.evaluation.frechet import FeatureStatistics, frechet_distance
from monobath.evaluation.metrics import PictureMetric, SetMetric
from monobath.evaluation.results import MetricInfo
from monobath.evaluation.system import Code, System, TokenizerSystem
from monobath.images import open_image, tensor_to_pil, to_float, to_uint8


class Blur(System):
    """Codes are the pictures themselves; decoding blurs, and adds a little of each picture's own noise."""

    kind = "blur"

    def __init__(self, name: str, sigma: float, noise: float = 0.0) -> None:
        self.name, self.sigma, self.noise = name, sigma, noise

    def encode(self, images):
        return Code(payload=images, size=tuple(images.shape[2:]), bits=[100 + i for i in range(len(images))])

    def decode(self, code, seeds):
        x = gaussian_blur(code.payload, [5, 5], [self.sigma, self.sigma])
        draws = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return (x + self.noise * torch.stack(draws)).clamp(-1, 1)


class Model(System):
    """A tiny real tokenizer."""

    kind = "monobath"

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.tokenizer = name, tiny_tokenizer(seed)
        self.encoder, self.decoder = self.tokenizer.encoder, self.tokenizer.decoder

    def encode(self, images):
        latents = self.tokenizer.encode(images)
        return Code(payload=latents.mode(), size=latents.size, bits=[16 * z.numel() for z in latents.mode()])

    def decode(self, code, seeds):
        return self.tokenizer.decode(code.payload, size=code.size, seed=seeds)


class Tint(System):
    """Adds a colour."""

    kind = "tint"

    def __init__(self, name: str, *colour: float) -> None:
        self.name, self.colour = name, torch.tensor(colour)[:, None, None]

    def encode(self, images):
        return Code(payload=images, size=tuple(images.shape[2:]), bits=[1] * len(images))

    def decode(self, code, seeds):
        return 0.5 * code.payload + self.colour  # halving alone shifts these photos' colours less


class Broken(Blur):
    def decode(self, code, seeds):
        x = super().decode(code, seeds)
        x[-1, 0, 3, 4] = math.nan
        return x


def colours() -> SetMetric:
    """Fréchet distance of mean colours of quarters, on two crops a picture."""
    info = MetricInfo(
        key="fd_colours",
        label="FD of colours",
        better="lower",
        kind="set",
        details="12 mean colours",
        interval="± 2 sd",
    )

    def features(images, indices):
        pooled = nn.functional.adaptive_avg_pool2d(images.double() / 255, 4).unflatten(2, (2, 2)).permute(0, 2, 1, 3, 4)
        return pooled.flatten(2)[..., :12]

    return SetMetric(info=info, features=features, dim=12)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """13 small pictures of several sizes, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(13):
        coarse = nn.functional.interpolate(rand_images(1, 3, 5, 6, seed=i), size=(32 + i, 45), mode="bicubic")
        tensor_to_pil((coarse[0] + 0.1 * rand_images(3, 32 + i, 45, seed=50 + i)).clamp(-1, 1)).save(
            folder / f"{i:02}.png"
        )
    (folder / "05.png").write_bytes(b"not a picture")
    return folder


def compare(photos, systems=None, **changes):
    systems = systems or [Model("tiny"), Blur("sharp", 0.5, 0.02), Blur("soft", 2.0)]
    settings = {"size": 32, "metrics": ["psnr", "ssim", "mean_error", colours()], "batch_size": 3, "keep": 4} | changes
    return evaluate(systems, photos, Settings(**settings))


def test_a_comparison_is_complete_and_in_order(photos):
    seen = []
    evaluation, kept = compare(photos, progress=lambda *step: seen.append(step), command="monobath eval …")
    assert evaluation.names == [f"{i:02}.png" for i in range(13) if i != 5]
    assert evaluation.skipped == 1
    assert evaluation.command == "monobath eval …"
    assert seen[:4] == [("tiny", done, 13) for done in (3, 6, 9, 12)]
    tiny, sharp, soft = evaluation.systems
    for result in evaluation.systems:
        assert set(result.figures) == {"psnr", "ssim", "mean_error", "fd_colours"}
        assert {key: len(values) for key, values in result.pictures.items()} == {"psnr": 12, "ssim": 12}
        for key in ("psnr", "ssim"):
            assert result.figures[key].value == pytest.approx(np.mean(result.pictures[key]))
            assert result.figures[key].low < result.figures[key].value < result.figures[key].high
    assert sharp.figures["psnr"].value > soft.figures["psnr"].value
    assert sharp.figures["fd_colours"].value < soft.figures["fd_colours"].value
    assert tiny.encoder_parameters == sum(p.numel() for p in tiny_tokenizer().encoder.parameters())
    assert sharp.encoder_parameters is None
    assert tiny.bits_per_pixel == 16 * 4 / 64
    assert sharp.bits_per_pixel == pytest.approx(101 / 32**2)
    info = evaluation.metrics[3]
    assert "n = 24" in info.label
    assert "24 feature vectors of 12 pictures" in info.details
    assert "tiny 0." in info.details
    json.dumps(evaluation.as_dict(), allow_nan=False)

    assert kept.originals.shape == (4, 3, 32, 32)
    assert kept.originals.dtype == torch.uint8
    assert kept.positions == sorted(kept.positions)
    assert kept.names == [evaluation.names[p] for p in kept.positions]
    assert list(kept.outputs) == ["tiny", "sharp", "soft"]
    from monobath.evaluation.metrics import psnr

    figures = psnr(kept.outputs["soft"], kept.originals).tolist()
    assert figures == pytest.approx([soft.pictures["psnr"][p] for p in kept.positions])


def test_the_figure_of_a_set_is_that_of_all_its_features_at_once(photos):
    evaluation, kept = compare(photos, keep=99)
    metric = colours()
    sides = []
    for images in (kept.originals, kept.outputs["soft"]):
        sides.append(FeatureStatistics(12))
        sides[-1].update(metric.features(images, []).flatten(0, 1))
    expected = frechet_distance(*(s.gaussian() for s in sides))
    assert expected > 1e-3
    assert evaluation.systems[2].figures["fd_colours"].value == pytest.approx(expected, rel=1e-9)


def test_outputs_are_quantised_before_any_metric(photos):
    types = set()

    def measure(output, original):
        types.update((output.dtype, original.dtype))
        return torch.zeros(len(output))

    info = MetricInfo(key="own", label="own", better="lower", kind="picture", details="", interval="")
    evaluation, _ = compare(photos, metrics=[PictureMetric(info=info, measure=measure)])
    assert types == {torch.uint8}
    assert evaluation.systems[0].figures["own"].value == 0


def test_figures_do_not_depend_on_the_batch_and_noise_follows_the_index(photos):
    a, _ = compare(photos, [Blur("noisy", 0.5, 0.1)])
    b, _ = compare(photos, [Blur("noisy", 0.5, 0.1)], batch_size=5)
    c, _ = compare(photos, [Blur("noisy", 0.5, 0.1)], seed=100)
    for key in ("psnr", "ssim"):
        assert a.systems[0].pictures[key] == pytest.approx(b.systems[0].pictures[key], rel=1e-5)
    assert a.systems[0].pictures["psnr"] != pytest.approx(c.systems[0].pictures["psnr"], rel=1e-5)


def test_an_identical_system_differs_by_nothing(photos):
    evaluation, _ = compare(photos, [Blur("a", 1.0, 0.1), Blur("same", 1.0, 0.1), Blur("other", 1.2, 0.1)])
    first, same, other = evaluation.systems
    assert first.differences == {}
    for estimate in same.differences.values():
        assert (estimate.low, estimate.value, estimate.high) == (0, 0, 0)
    for key, estimate in other.differences.items():
        assert estimate.value == pytest.approx(other.figures[key].value - first.figures[key].value)
        own = other.figures[key].high - other.figures[key].low
        assert 0 < estimate.high - estimate.low < 0.5 * own, f"{key}: pairing takes out what pictures have in common"


def test_the_mean_error_is_that_of_the_channel_farthest_from_zero(photos):
    systems = [Tint("red", 0.2, -0.1, 0), Tint("blue", 0, 0, -0.4)]
    evaluation, kept = compare(photos, systems, keep=99)
    red, blue = evaluation.systems
    for system, channel, sign in ((red, "red", 1), (blue, "blue", -1)):
        errors = to_float(kept.outputs[system.name]) - to_float(kept.originals)
        for place, (name, found) in enumerate(system.channels["mean_error"].items()):
            assert name == ("red", "green", "blue")[place]
            assert found.pictures == pytest.approx(errors[:, place].mean((1, 2)).tolist(), abs=1e-6)
            assert found.mean.value == pytest.approx(np.mean(found.pictures))
        mean, figure = system.channels["mean_error"][channel].mean, system.figures["mean_error"]
        ends = sorted((sign * mean.low, sign * mean.high))
        assert [figure.value, figure.low, figure.high] == pytest.approx([sign * mean.value, *ends])
        assert "mean_error" not in system.pictures
    gap = blue.differences["mean_error"]
    assert gap.value == pytest.approx(blue.figures["mean_error"].value - red.figures["mean_error"].value)
    assert gap.low < gap.value < gap.high


def test_a_smaller_size_is_the_centre_of_the_same_pictures_decoded_on_its_own(photos, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    system = TokenizerSystem(str(tmp_path / "model"))
    evaluation, kept = compare(photos, [system], size=16, short_side=32, metrics=["psnr"], keep=99)
    assert (evaluation.size, evaluation.short_side) == (16, 32)
    for index, name, original, output in zip(
        [i for i in range(13) if i != 5], kept.names, kept.originals, kept.outputs[system.name], strict=True
    ):
        square = center_crop(open_image(photos / name), size=32)[:, 8:24, 8:24]
        assert original.equal(square)
        alone = system.decode(system.encode(to_float(square[None])), [index])
        assert (output.int() - to_uint8(alone)[0].int()).abs().max() <= 1
    assert evaluation.systems[0].bits_per_pixel == 1
    with pytest.raises(UserError, match="short_side=16 holds no square of size=32"):
        compare(photos, short_side=16)


def test_limit_and_too_few_pictures(photos):
    evaluation, _ = compare(photos, limit=6)
    assert len(evaluation.names) == 6
    with pytest.raises(UserError, match=r"3 usable pictures .* at least 4"):
        compare(photos, limit=3)


def test_nan_from_a_system_is_an_error_that_names_it(photos):
    with pytest.raises(UserError, match=r"broken one turned 02\.png into NaN"):
        compare(photos, [Blur("good", 1.0), Broken("broken one", 1.0)])


def test_bad_requests(photos):
    with pytest.raises(UserError, match="a name of its own"):
        compare(photos, [Blur("a", 1.0), Blur("a", 2.0)])
    with pytest.raises(UserError, match="at least 1"):
        compare(photos, batch_size=0)


def test_an_absent_metric_has_no_figure_anywhere(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    evaluation, _ = compare(photos, [Blur("a", 1.0), Blur("b", 2.0)], metrics=["psnr", "lpips", "rfid", "dreamsim"])
    assert [bool(info.absent) for info in evaluation.metrics] == [False, True, True, True]
    for result in evaluation.systems:
        for found in (result.pictures, result.figures, result.differences):
            assert set(found) <= {"psnr"}


def test_the_interval_of_a_mean_covers_it_and_shrinks_with_the_sample():
    draws = np.random.default_rng(0).normal(5, 2, 4000)
    small, large = mean_estimate(draws[:40].tolist()), mean_estimate(draws.tolist())
    assert large.high - large.low == pytest.approx(2 * 1.96 * 2 / math.sqrt(4000), rel=0.1)
    assert small.high - small.low == pytest.approx(10 * (large.high - large.low), rel=0.3)
    assert mean_estimate([3.0] * 5) == mean_estimate([3.0] * 5, seed=1)


def test_the_interval_of_a_set_uses_the_spread_of_half_samples_not_their_level():
    estimate = half_sample_estimate(np.array([1.0, 11.0, 13.0]))
    assert estimate.value == 1
    assert estimate.high - 1 == 1 - estimate.low == pytest.approx(2 * math.sqrt(2))


# ---- several processes ------------------------------------------------------------------------------


def _one_of_two(rank: int, port: int, photos: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with processes.group(torch.device("cpu")) as device:
        assert (device.type, processes.rank(), processes.world_size()) == ("cpu", rank, 2)
        found = compare(photos, batch_size=5)
    Path(out, f"{rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over spawned processes is tested on Unix")
def test_two_processes_give_the_figures_of_one(photos, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, (port, str(photos), str(tmp_path)), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two
    try:
        one, kept_by_one = compare(photos, batch_size=5)
    finally:
        torch.set_num_threads(threads)
    for rank in range(2):
        two, kept_by_two = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert two.names == one.names
        assert two.skipped == one.skipped
        for a, b in zip(one.systems, two.systems, strict=True):
            assert a.pictures == b.pictures
            assert a.channels == b.channels
            assert a.bits_per_pixel == b.bits_per_pixel
            for key in a.figures:
                assert b.figures[key].value == pytest.approx(a.figures[key].value, rel=1e-6)
                assert b.figures[key].high == pytest.approx(a.figures[key].high, rel=1e-6)
            for key in a.differences:
                assert b.differences[key].low == pytest.approx(a.differences[key].low, rel=1e-6)
        assert kept_by_two.positions == kept_by_one.positions
        assert all((kept_by_two.outputs[name] == kept_by_one.outputs[name]).all() for name in kept_by_one.outputs)


def test_one_process_alone_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    value = torch.tensor([1.5])
    with processes.group(torch.device("cpu")):
        processes.sum_over_processes(value)
        assert processes.gather("x") == ["x"]
        assert processes.rank() == 0
    assert value.item() == 1.5
