"""Pictures that stay on the device: where a GPU learns faster than loader processes can crop.

All decoded pictures lie on the device as one row of pixels; a batch of crops is cut and resampled there, at the places
and, within rounding, with the values that `PhotoDataset` gives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .pictures import PhotoDataset


class ResidentPictures:
    """The pictures of a training dataset, on a device; its items then have a `place` instead of an `image`.

    Memory: 3 bytes a pixel of the cached pictures, whose short side is at most `crops.scale[1]`.

    Args:
        dataset: with `cache=True`. Its own copy of the pixels is given up.
        device: where the pictures stay.

    Raises:
        UserError: see `PhotoDataset.preload`.
    """

    def __init__(self, dataset: PhotoDataset, device: torch.device | str) -> None:
        dataset.preload()
        arrays, self.size = dataset.release(), dataset.crops.size
        self.sides = torch.tensor([(a.shape[1], a.shape[0]) if a is not None else (1, 1) for a in arrays])
        ends = torch.cumsum(torch.tensor([0 if a is None else a.shape[0] * a.shape[1] for a in arrays]), 0)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
        self.starts = starts.to(device)
        self.pixels = torch.empty(int(ends[-1]), 3, dtype=torch.uint8, device=device)
        for array, start, end in zip(arrays, starts.tolist(), ends.tolist(), strict=True):
            if array is not None:
                self.pixels[start:end] = torch.from_numpy(np.array(array)).view(-1, 3)

    def crops(self, places: Tensor) -> Tensor:
        """The crops at places of the dataset's items.

        Args:
            places: int64 `(B, 5)`: picture, short side, left, top, mirrored.

        Returns:
            uint8 `(B, 3, size, size)` on the device.
        """
        sides, device = self.sides[places[:, 0]], self.pixels.device
        step = sides.amin(1) / places[:, 1]
        # Known here, so that nothing waits for the device.
        count = math.ceil(float(((self.size + 1) * step + 4 * step.clamp_min(1)).max())) + 2
        places, sides = places.to(device, non_blocking=True), sides.to(device, non_blocking=True)
        picture, short, left, top, mirrored = places.T
        resized = sides * short[:, None] // sides.amin(1, keepdim=True)
        x, across = _weights(sides[:, 0], resized[:, 0], left, self.size, count)
        y, down = _weights(sides[:, 1], resized[:, 1], top, self.size, count)
        across = torch.where((mirrored == 1)[:, None, None], across.flip(1), across)
        index = y[:, :, None] * sides[:, :1, None] + x[:, None, :] + self.starts[picture, None, None]
        windows = self.pixels[index].float()  # (B, rows, columns, 3)
        rows = torch.einsum("bsy,byxc->bsxc", down, windows)
        crops = torch.einsum("btx,bsxc->bcst", across, rows)
        return crops.round_().clamp_(0, 255).to(torch.uint8)


def _weights(side: Tensor, resized: Tensor, offset: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """One side of antialiased bicubic resampling, as Pillow's: what each pixel of a crop reads, and how much of it.

    Args:
        side, resized, offset: int64 `(B,)`: the picture's side, the same after resizing, and the crop's first pixel.
        size: pixels of the crop.
        count: n, at least as many as a crop reads.

    Returns:
        int64 `(B, n)`, the pixels of the picture that the crop reads; float32 `(B, size, n)`, their weights.
    """
    step = side.double() / resized
    first = offset * step
    step = (torch.minimum((offset + size) * step, side.double()) - first) / size
    wide = step.clamp_min(1)  # enlarging keeps the kernel's width
    reach = 2 * wide
    centres = first[:, None] + (torch.arange(size, device=side.device) + 0.5) * step[:, None]
    low = (centres - reach[:, None] + 0.5).floor().clamp_min(0)
    high = torch.minimum((centres + reach[:, None] + 0.5).floor(), side[:, None].double())
    pixels = low.amin(1, keepdim=True) + torch.arange(count, device=side.device)  # (B, n)
    distance = ((pixels[:, None] + 0.5 - centres[:, :, None]) / wide[:, None, None]).abs()
    near = (1.5 * distance - 2.5) * distance.square() + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    inside = (pixels[:, None] >= low[:, :, None]) & (pixels[:, None] < high[:, :, None])
    weights = torch.where(inside, weights, 0.0)
    weights = weights / weights.sum(2, keepdim=True)
    return torch.minimum(pixels.long(), side[:, None] - 1), weights.float()
