"""What is done with one batch of pictures, here or by another process: reconstruct, and measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..data import PhotoDataset
from ..data.pictures import Item
from ..data.transforms import centre
from ..errors import UserError
from ..images import to_float, to_uint8
from .metrics import Metric, PictureMetric, SetMetric
from .system import System


@dataclass(kw_only=True)
class Measured:
    """What is found about one batch of usable pictures."""

    names: list[str]
    indices: list[int]
    bits: list[int]
    original: Tensor
    """uint8 `(B, 3, H, W)`; `output` likewise."""
    output: Tensor
    figures: dict[str, list[Any]]
    """By key of a metric of pictures: one a picture."""
    features: dict[str, tuple[Tensor, Tensor | None]]
    """By key of a metric of sets: features `(B, n, dim)` of outputs and, if wanted, of originals."""
    skipped: dict[int, int] = field(default_factory=dict)
    """Pictures that cannot be used, where another process looked for them: see `PhotoDataset.unusable`."""

    def first(self, count: int) -> Measured:
        """The same of the first pictures."""
        if len(self.names) <= count:
            return self
        cut = slice(count)
        return dataclasses.replace(
            self, names=self.names[cut], indices=self.indices[cut], bits=self.bits[cut], original=self.original[cut],
            output=self.output[cut], figures={key: values[cut] for key, values in self.figures.items()},
            features={k: (a[cut], None if b is None else b[cut]) for k, (a, b) in self.features.items()},
        )  # fmt: skip


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
    dataset: PhotoDataset | None = None
    """For numbers in place of a batch."""

    @torch.no_grad()
    def __call__(self, given: Item | list[int]) -> Measured:
        dataset = self.dataset
        if isinstance(given, dict):
            return self.measured(given)
        assert dataset is not None
        items = [item for item in (dataset[index] for index in given) if item is not None]
        if items:
            found = self.measured(default_collate(items))
            found.original, found.output = found.original.cpu(), found.output.cpu()
        else:
            none = torch.zeros(0, dtype=torch.uint8)
            found = Measured(names=[], indices=[], bits=[], original=none, output=none, figures={}, features={})
        found.skipped = {index: code for index, code in dataset.unusable.items() if index in given}
        return found

    def measured(self, batch: Item) -> Measured:
        """A batch of `iterate_eval`."""
        names, indices = batch["name"], batch["index"].tolist()
        images = centre(batch["image"], self.size)
        output, bits = reconstruct(self.system, images, names, [self.seed + index for index in indices])
        original, output = images.to(self.device), output.to(self.device)
        figures: dict[str, list[Any]] = {}
        features: dict[str, tuple[Tensor, Tensor | None]] = {}
        for metric in self.metrics:
            if isinstance(metric, PictureMetric):
                figures[metric.info.key] = metric.measure(output, original).tolist()
            elif isinstance(metric, SetMetric):
                others = metric.features(original, indices) if self.references else None
                features[metric.info.key] = metric.features(output, indices), others
        return Measured(
            names=names, indices=indices, bits=bits, original=original, output=output, figures=figures,
            features=features,
        )  # fmt: skip


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
