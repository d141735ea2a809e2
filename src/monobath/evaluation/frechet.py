"""Fréchet distance of features, streamed, with its uncertainty from half-samples.

FD² of two Gaussians (Dowson & Landau 1982), as in FID (Heusel et al. 2017, arXiv 1706.08500):

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½)

torchmetrics computes the same from the general eigenvalues of Σ₁ Σ₂, and a test holds this file to its figures. It is
computed here because each figure needs 20 half-samples more: with L Lᵀ = Σ₁, the eigenvalues of the symmetric Lᵀ Σ₂ L
are the same and take from a half (full rank) to a ninth (fewer vectors than features) of the time, and L is found once
for all systems that are compared with one reference.

Uncertainty: half-sample replication (McCarthy 1969, "Pseudo-replication: half samples"). Half-sample j takes one
picture of each pair of consecutive ones. Since it is drawn without replacement from the set itself, the standard
deviation of a smooth statistic over half-samples estimates the standard error of the *whole* set's figure as it stands:
for a mean, (σ²/(n/2))·(1 − ½) = σ²/n, so nothing is divided by √2. The half-samples' own distances are biased upwards
(fewer samples): only their spread is used. A picture's membership depends on (seed, j, position) alone: halves are the
same for every system, which makes differences paired, and for any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..data.transforms import mix_seed
from ..images import to_float
from ..losses.perceptual import SIDES, folded_efficientnet_lite, pooled_features
from .processes import sum_over_processes

HALVES = 20
"""Half-samples behind an uncertainty."""


@dataclass(frozen=True)
class Gaussian:
    """Mean `(d,)` and covariance `(d, d)`, float64."""

    mean: Tensor
    covariance: Tensor
    count: int
    """Vectors behind them."""

    @cached_property
    def factor(self) -> Tensor:
        """L `(d, rank)` with L Lᵀ = Σ, by pivoted Cholesky decomposition, which takes singular matrices too."""
        from scipy.linalg.lapack import dpstrf

        lower, order, rank, _ = dpstrf(self.covariance.cpu().numpy(), lower=1)
        factor = np.empty((len(lower), rank))
        factor[order - 1] = np.tril(lower)[:, :rank]
        return torch.from_numpy(factor).to(self.covariance.device)


class FeatureStatistics:
    """Count, sum and sum of outer products of feature vectors, in float64: memory does not grow with their number.

    Args:
        dim: length d of a vector.
        device: where the sums are kept, which must know float64.
    """

    def __init__(self, dim: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add vectors `(N, d)`."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of what all processes have seen, at least two vectors. Call it once."""
        for tensor in (self.count, self.total, self.outer):
            sum_over_processes(tensor)
        assert self.count >= 2, self.count
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance, int(self.count))


class HalfSampled:
    """Feature statistics of a set of pictures and of its half-samples.

    Args:
        dim: length of a feature vector.
        seed: of the half-samples; equal for the sets that are to be compared.
        device: as in `FeatureStatistics`.
    """

    def __init__(self, dim: int, *, seed: int = 0, device: torch.device | None = None) -> None:
        self.seed = seed
        self.whole = FeatureStatistics(dim, device)
        self.halves = [FeatureStatistics(dim, device) for _ in range(HALVES)]

    def update(self, features: Tensor, positions: Sequence[int]) -> None:
        """Add features `(B, n, d)`, n of each picture; `positions`: each picture's place in the set, from 0."""
        features = features.to(self.whole.total)
        self.whole.update(features.flatten(0, 1))
        for half, member in zip(self.halves, half_members(positions, self.seed), strict=True):
            half.update(features[torch.from_numpy(member).to(features.device)].flatten(0, 1))

    def gaussians(self) -> list[Gaussian]:
        """The whole set's, then one for each half-sample, over all processes. Uses the sums up: call it once."""
        found = []
        for statistics in (self.whole, *self.halves):
            found.append(statistics.gaussian())
            del statistics.outer  # the larger part of the memory
        return found


def half_members(positions: Sequence[int], seed: int = 0) -> np.ndarray:
    """Which of the pictures at `positions` belong to each half-sample: bool `(HALVES, B)`.

    Of positions 2k and 2k + 1 exactly one belongs to half-sample j, by bit (j, k) of a hash; a last picture without a
    partner belongs to about half of them.
    """
    place = np.asarray(positions, dtype=np.uint64)
    half = np.arange(HALVES, dtype=np.uint64)[:, None]
    chosen = _mix(_mix(_mix(np.array([[seed % 2**64]], np.uint64)) ^ half) ^ (place >> np.uint64(1)))
    return (chosen & np.uint64(1)) == (place & np.uint64(1))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's step and finaliser (Steele et al. 2014): a bijection of 64-bit integers that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance, the figure known as FID when the features are Inception's.

    The trace of (Σ₁^½ Σ₂ Σ₁^½)^½ is that of (Lᵀ Σ₂ L)^½ for any L Lᵀ = Σ₁: the eigenvalues other than 0 are the same.
    `a.factor` is computed once and kept: let `a` be the one that is compared with several others.
    """
    middle = a.factor.T @ b.covariance @ a.factor
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())  # below 0 only by rounding


# ---- features -----------------------------------------------------------------------------------------------------


CROPS, CROP_SIDE = 8, 128
"""Random crops a picture, and their side in pixels."""


def random_crops(images: Tensor, indices: Sequence[int], *, seed: int = 0) -> Tensor:
    """`CROPS` crops of each picture: `(B, 3, H, W)` → `(B, CROPS, 3, side, side)`, side = min(CROP_SIDE, H, W).

    Where they lie depends on (seed, index, H, W) alone: an output is cropped as its original is.
    """
    height, width = images.shape[2:]
    side = min(CROP_SIDE, height, width)
    crops = []
    for image, index in zip(images, indices, strict=True):
        generator = np.random.default_rng(mix_seed(4, seed, index))
        tops = generator.integers(0, height - side + 1, CROPS)
        lefts = generator.integers(0, width - side + 1, CROPS)
        crops += [image[:, y : y + side, x : x + side] for y, x in zip(tops, lefts, strict=True)]
    return torch.stack(crops).unflatten(0, (len(images), CROPS))


class CropFeatures:
    """Pooled features of ImageNet-trained EfficientNet-Lite2 of random crops, for FD-EffLite."""

    dim = 1280

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.network = folded_efficientnet_lite("lite2").to(device, memory_format=torch.channels_last)
        for module in self.network.modules():
            if isinstance(module, torch.nn.ReLU6):
                module.inplace = True  # the same numbers, less memory
        self.chunk = 8 if device.type == "cpu" else 128  # crops at once: on a CPU, what its caches hold
        self.seed = seed

    def __call__(self, images: Tensor, indices: Sequence[int]) -> Tensor:
        """uint8 `(B, 3, H, W)` → float32 `(B, CROPS, 1280)`."""
        crops = random_crops(images, indices, seed=self.seed).flatten(0, 1)
        found = [self.pooled(part) for part in crops.split(self.chunk)]
        return torch.cat(found).unflatten(0, (len(images), CROPS))

    @torch.no_grad()
    def pooled(self, crops: Tensor) -> Tensor:
        """uint8 `(B, 3, H, W)`, taken whole → float32 `(B, 1280)`."""
        return pooled_features(self.network, to_float(crops), SIDES["lite2"])
