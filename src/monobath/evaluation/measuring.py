"""What is done with one batch of pictures, here or by another process: reconstruct, and measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..data import PhotoDataset, StreamDataset
from ..data.pictures import Item
from ..data.transforms import centre
from ..errors import UserError
from ..images import to_float, to_uint8
from .metrics import Metric, PictureMetric
from .system import System


@dataclass(kw_only=True)
class Row:
    """What is found about one usable picture."""

    position: int = 0
    """In `Evaluation.names`."""
    index: int
    """In the data set."""
    name: str
    bits: int
    figures: dict[str, Any]
    """By key of a metric of pictures; a list where the metric is of channels."""
    features: dict[str, Tensor]
    """By key of a metric of sets: `(n, dim)` of the output."""
    references: dict[str, Tensor]
    """Likewise of the original, where wanted."""
    pair: tuple[Tensor, Tensor] | None
    """Original and output, uint8 `(3, H, W)`, on the CPU; None: not kept."""


@dataclass(kw_only=True)
class Measuring:
    """What is done with a batch; it travels to other processes."""

    system: System
    metrics: Sequence[Metric]
    size: int
    seed: int
    references: bool
    """Features of the originals are wanted too."""
    device: torch.device
    dataset: PhotoDataset | StreamDataset

    @torch.no_grad()
    def __call__(self, numbers: list[int]) -> tuple[list[Row], dict[int, int]]:
        """Rows of pictures of the data set, by number; and which cannot be used: see `PhotoDataset.unusable`."""
        assert isinstance(self.dataset, PhotoDataset)
        items = [item for item in (self.dataset[index] for index in numbers) if item is not None]
        rows = self.measured(default_collate(items)) if items else []
        return rows, {index: code for index, code in self.dataset.unusable.items() if index in numbers}

    @torch.no_grad()
    def measured(self, batch: Item) -> list[Row]:
        """What is found about a batch of `iterate_eval`."""
        names, indices = batch["name"], batch["index"].tolist()
        images = centre(batch["image"], self.size)
        output, bits = reconstruct(self.system, images, names, [self.seed + index for index in indices])
        original, output = images.to(self.device), output.to(self.device)
        figures, features, references = {}, {}, {}
        for metric in self.metrics:
            key = metric.info.key
            if isinstance(metric, PictureMetric):
                figures[key] = metric.measure(output, original).tolist()
                continue
            features[key] = metric.features(output, indices)
            if self.references:
                references[key] = metric.features(original, indices)
        return [
            Row(
                index=index, name=names[i], bits=bits[i],
                figures={key: values[i] for key, values in figures.items()},
                features={key: values[i].clone() for key, values in features.items()},  # or all would travel
                references={key: values[i].clone() for key, values in references.items()},
                pair=(original[i].to("cpu", copy=True), output[i].to("cpu", copy=True)),
            )
            for i, index in enumerate(indices)
        ]  # fmt: skip


def reconstruct(system: System, images: Tensor, names: list[str], seeds: list[int]) -> tuple[Tensor, list[int]]:
    """uint8 `(B, 3, H, W)` → (output, uint8 of the same shape; bits of each picture's code)."""
    code = system.encode(to_float(images.to(system.device)))
    output = system.decode(code, seeds)
    assert output.shape == images.shape, (system.name, output.shape, images.shape)
    bad = ~torch.isfinite(output).flatten(1).all(1)
    if bad.any():
        name = names[int(bad.nonzero()[0])]
        raise UserError(
            f"{system.name} turned {name} into NaN or infinity: check its weights, or run it in a wider number type"
        )
    return to_uint8(output), code.bits
