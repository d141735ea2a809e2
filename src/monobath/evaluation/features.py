"""What FD-EffLite compares: features of random crops of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.transforms import mix_seed
from ..images import to_float
from ..losses.perceptual import SIDES, load_efficientnet_lite, pooled_features

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
        self.network = load_efficientnet_lite("lite2").to(device, memory_format=torch.channels_last)
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
