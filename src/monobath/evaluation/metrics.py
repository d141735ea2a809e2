"""Metrics of reconstructions, and the text that says what each of them is.

A metric of pictures gives a figure for each (output, original) pair, a metric of channels a signed one for each of its
channels; a metric of sets gives features, of which `frechet` makes one figure. All take 8-bit pictures: outputs are
quantised before anything is measured. A metric whose package or weights are absent is reported as absent, with the
reason; it never has a figure.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import huggingface_hub.constants
import torch
from torch import Tensor

from .. import images
from ..errors import UserError
from ..images import tensor_to_pil, to_float
from ..losses.grid import grid_energy
from ..losses.perceptual import SIDES, EffLiteDistance, LpipsDistance
from ..words import did_you_mean
from .frechet import CROP_SIDE, CROPS, HALVES, CropFeatures
from .results import MetricInfo

logger = logging.getLogger(__name__)

RESAMPLES = 2000
"""Bootstrap resamples behind the interval of a mean."""
MAX_PSNR = 100.0
"""Identical pictures have an infinite PSNR, which no mean survives: figures are cut here, in dB."""
SSIM_WINDOW = 11
CHANNELS = ("red", "green", "blue")


Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class PictureMetric:
    """A figure for each picture, or a signed one for each of its channels (`MetricInfo.kind`)."""

    info: MetricInfo
    measure: Measure
    """(output, original), uint8 `(B, 3, H, W)` → float `(B,)`, or `(B, 3)`, as `CHANNELS`, of whose means over pictures
    the farthest from 0 counts."""


@dataclass(kw_only=True)
class SetMetric:
    """A Fréchet distance between all outputs and all originals."""

    info: MetricInfo
    features: Callable[[Tensor, Sequence[int]], Tensor]
    """(images, indices), uint8 `(B, 3, H, W)` and one int a picture → float `(B, n, dim)`, n vectors a picture."""
    dim: int


Metric = PictureMetric | SetMetric


@dataclass(kw_only=True)
class Setting:
    """What loading a metric depends on."""

    device: torch.device
    seed: int
    download: bool
    """Weights that are in no cache may be downloaded."""


def load_metrics(
    keys: Sequence[str | Metric] | None = None, *, device: torch.device, seed: int = 0
) -> tuple[list[MetricInfo], list[Metric]]:
    """Load metrics.

    Args:
        keys: of `METRICS`, or metrics of your own, which are copied. None: all that can be had without a download;
            metrics named here download weights that are in no cache, unless HF_HUB_OFFLINE is set.
        device: of the networks.
        seed: of the crops.

    Returns:
        (all asked for, those that can be measured); the others' `absent` says why they cannot.

    Raises:
        UserError: an unknown key, or nothing can be measured.
    """
    setting = Setting(
        device=device, seed=seed, download=keys is not None and not huggingface_hub.constants.HF_HUB_OFFLINE
    )
    infos: list[MetricInfo] = []
    loaded: list[Metric] = []
    chosen = list(METRICS) if keys is None else keys
    for place, key in enumerate(chosen):
        if isinstance(key, Metric):
            loaded.append(dataclasses.replace(key, info=dataclasses.replace(key.info)))
            infos.append(loaded[-1].info)
            continue
        if key in chosen[:place]:
            continue
        if key not in METRICS:
            hint = did_you_mean(key, METRICS, f"there are {', '.join(METRICS)}")
            raise UserError(f"metric {key!r} is unknown: {hint}")
        info, load = METRICS[key]
        info = dataclasses.replace(info)
        try:
            loaded.append(load(info, setting))
        # Absent packages, files and networks; RuntimeError: damaged weight files.
        except (UserError, ImportError, OSError, RuntimeError) as error:
            info.absent = " ".join(str(error).split()) or type(error).__name__
            logger.info("%s is left out: %s", info.label, info.absent)
        infos.append(info)
    if not loaded:
        reasons = "; ".join(f"{info.key}: {info.absent}" for info in infos)
        raise UserError(f"no metric to measure ({reasons or 'none was asked for'})")
    return infos, loaded


# ---- what they are ----------------------------------------------------------------------------------------------


Loader = Callable[[MetricInfo, Setting], Metric]
METRICS: dict[str, tuple[MetricInfo, Loader]] = {}
"""By key: what a metric is, and the function that loads it."""

_MEAN = f"95 % percentile bootstrap interval of the mean over pictures, {RESAMPLES:,} resamples; differences are paired"
_INTERVALS = {
    "picture": _MEAN,
    "channels": f"{_MEAN}; cut at 0",
    "set": f"± 2 standard deviations over {HALVES} half-samples of the pictures, drawn without replacement, whose "
    "spread estimates the standard error of the whole set's figure; differences are paired half-sample by half-sample",
}


def _metric(**of_info: Any) -> Callable[[Loader], Loader]:
    """Enter the decorated function into `METRICS`; arguments as in `MetricInfo`."""
    info = MetricInfo(**of_info)
    info.interval = _INTERVALS[info.kind]

    def enter(load: Loader) -> Loader:
        METRICS[info.key] = (info, load)
        return load

    return enter


def _plain(measure: Measure) -> Loader:
    """A loader of what needs neither weights nor packages."""
    return lambda info, setting: PictureMetric(info=info, measure=measure)


def psnr(output: Tensor, original: Tensor) -> Tensor:
    """`images.psnr` of each uint8 pair `(B, 3, H, W)`, in dB, at most `MAX_PSNR`: float `(B,)`."""
    return images.psnr(output, original).clamp(max=MAX_PSNR)


def ssim(output: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004), mean over channels: float `(B,)`.

    Averaged over positions whose window lies inside the picture, as in the paper and in scikit-image; torchmetrics'
    own average also has windows that reach into reflected borders. Float32 arithmetic: exact to four digits.

    Raises:
        UserError: pictures smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(output.shape[2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, these are {output.shape[2:]}")
    _, positions = structural_similarity_index_measure(
        output.float() / 255,
        original.float() / 255,
        sigma=1.5,
        kernel_size=SSIM_WINDOW,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    edge = SSIM_WINDOW // 2
    return positions[..., edge:-edge, edge:-edge].mean((1, 2, 3))


def mean_error(output: Tensor, original: Tensor) -> Tensor:
    """Mean of output − original over each channel of each uint8 pair, in units of [-1, 1]: float `(B, 3)`."""
    return (output.float() - original.float()).mean((2, 3)) / 127.5


def grid(output: Tensor, original: Tensor, period: int) -> Tensor:
    """How much of each uint8 pair's error repeats every `period` pixels, such as a decoder's patches: float `(B,)`.

    The error e of a channel, averaged over all places of the same phase modulo p, is a p×p map; less the map's own
    mean, its mean square over the p² phases, times H·W/p², over the mean of e², is the channel's figure. The picture's
    is the mean over channels. White error has 1 − 1/p² in expectation, an error that only repeats H·W/p² at most, a
    constant one 0: compare it at one size only. A channel without error counts 0. Rows and columns beyond the largest
    multiple of p are left out.

    Raises:
        UserError: pictures smaller than the period.
    """
    p, (height, width) = period, (side // period * period for side in output.shape[2:])
    if not height or not width:
        raise UserError(f"grid{p} needs pictures of at least {p} pixels a side, these are {output.shape[2:]}")
    error = (output.float() - original.float())[:, :, :height, :width]
    return (grid_energy(error, p) / error.square().mean((2, 3)).clamp(min=torch.finfo(error.dtype).tiny)).mean(1)


def _need(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"needs the package {module}: pip install {package}")


def _need_weights(file: str, setting: Setting, key: str) -> None:
    if not setting.download and not (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file():
        raise UserError(f"the weights {file} are not in the torch hub cache: {_remedy(key)}")


def _remedy(key: str) -> str:
    return f"name the metric (--metrics {key}) while online to download them"


_metric(
    key="psnr",
    label="PSNR (dB)",
    better="higher",
    details="8-bit RGB, data range 255, no network, features: pixel values; mean of the pictures' own figures; "
    f"cut at {MAX_PSNR:g} dB, since identical pictures would be infinite",
)(_plain(psnr))


@_metric(
    key="ssim",
    label="SSIM",
    better="higher",
    details="8-bit RGB, data range 1 (in [0, 1]), no network, features: Gaussian windows of "
    f"{SSIM_WINDOW}×{SSIM_WINDOW} pixels, σ = 1.5, wholly inside the picture; mean over channels",
)
def _load_ssim(info: MetricInfo, setting: Setting) -> Metric:
    _need("torchmetrics", "'monobath[eval]'")
    return PictureMetric(info=info, measure=ssim)


_metric(
    key="mean_error",
    label="mean error (in [-1, 1])",
    kind="channels",
    details="output − original, 8-bit RGB, data range [-1, 1], no network, features: pixel values; mean over "
    "places and pictures of the channel whose mean is farthest from 0, without its sign",
)(_plain(mean_error))

for _p in (4, 8):
    _metric(
        key=f"grid{_p}",
        label=f"grid {_p}×{_p} (white: {1 - 1 / _p**2:.2f})",
        details="8-bit RGB, any data range, no network, features: pixel values; the share of the error that repeats "
        f"every {_p} pixels, times the number of {_p}×{_p} squares: 1 − 1/{_p}² if the error is white, 0 if there is "
        "none; mean over channels; what repeats counts the more, the larger the pictures are",
    )(_plain(functools.partial(grid, period=_p)))


@_metric(
    key="efflite",
    label="EffLite distance (EfficientNet-Lite2)",
    details="8-bit RGB, data range [-1, 1] scaled to the network's, network: EfficientNet-Lite2 (ImageNet), "
    "features: after the stem and the last blocks at strides 4, 8, 16, channel-normalised",
)
def _load_efflite(info: MetricInfo, setting: Setting) -> Metric:
    network = EffLiteDistance("lite2").to(setting.device).to(memory_format=torch.channels_last)
    return PictureMetric(info=info, measure=lambda a, b: network(to_float(a), to_float(b)))


@_metric(
    kind="set",
    key="fd_efflite",
    label="FD-EffLite (EfficientNet-Lite2)",
    details="Fréchet distance; not FID. 8-bit RGB, data range [0, 1] scaled to the network's, network: "
    f"EfficientNet-Lite2 (ImageNet), features: 1280, pooled, of {CROPS} random {CROP_SIDE}² crops a picture "
    f"(smaller pictures: their short side) resized to {SIDES['lite2']}², bicubic with antialias",
)
def _load_fd_efflite(info: MetricInfo, setting: Setting) -> Metric:
    features = CropFeatures(setting.device, setting.seed)
    return SetMetric(info=info, features=features, dim=features.dim)


_LPIPS = (
    "8-bit RGB, data range [-1, 1], network: {} (ImageNet) with LPIPS 0.1's linear layers, features: five ReLU layers, "
    "channel-normalised"
)


@_metric(key="lpips", label="LPIPS (VGG)", details=_LPIPS.format("VGG-16"))
def _load_lpips(info: MetricInfo, setting: Setting) -> Metric:
    return _lpips(info, setting, "vgg", "vgg16-397923af.pth")


@_metric(key="lpips_alex", label="LPIPS (Alex)", details=_LPIPS.format("AlexNet"))
def _load_lpips_alex(info: MetricInfo, setting: Setting) -> Metric:
    return _lpips(info, setting, "alex", "alexnet-owt-7be5be79.pth")


def _lpips(info: MetricInfo, setting: Setting, backbone: Literal["vgg", "alex"], weights: str) -> Metric:
    _need("lpips", "lpips")
    _need_weights(weights, setting, info.key)
    network = LpipsDistance(backbone).to(setting.device)
    return PictureMetric(info=info, measure=lambda a, b: network(to_float(a), to_float(b)))


@_metric(
    kind="set",
    key="rfid",
    label="rFID (Inception-v3)",
    details="Fréchet distance. 8-bit RGB, data range 255, network: Inception-v3 (torch-fidelity's weights, "
    "through torchmetrics), features: 2048, pooled, of whole pictures resized to 299² as torchmetrics does",
)
def _load_rfid(info: MetricInfo, setting: Setting) -> Metric:
    _need("torchmetrics", "'monobath[eval]'")
    _need("torch_fidelity", "torch-fidelity")
    _need_weights("weights-inception-2015-12-05-6726825d.pth", setting, "rfid")
    from torchmetrics.image.fid import FrechetInceptionDistance

    network: Any = FrechetInceptionDistance(feature=2048).inception.to(setting.device)
    return SetMetric(info=info, features=lambda images, indices: network(images)[:, None], dim=2048)


@_metric(
    key="dreamsim",
    label="DreamSim (ensemble)",
    details="8-bit RGB, data range [0, 1], network: DreamSim's ensemble of DINO, CLIP and OpenCLIP ViT-B/16, "
    "features: embeddings of the whole picture resized to 224², bicubic; cosine distance",
)
def _load_dreamsim(info: MetricInfo, setting: Setting) -> Metric:
    _need("dreamsim", "dreamsim")
    folder = Path(torch.hub.get_dir()) / "dreamsim"
    if not (folder / "ensemble_lora").is_dir() and not setting.download:
        raise UserError(f"the weights are not in the torch hub cache (folder dreamsim): {_remedy('dreamsim')}")
    folder.mkdir(parents=True, exist_ok=True)
    from dreamsim import dreamsim

    network, preprocess = dreamsim(pretrained=True, device=str(setting.device), cache_dir=str(folder))

    def prepare(images: Tensor) -> Tensor:
        return torch.cat([preprocess(tensor_to_pil(image)) for image in images]).to(setting.device)

    return PictureMetric(info=info, measure=lambda a, b: network(prepare(a), prepare(b)))
