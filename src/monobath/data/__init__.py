"""Pictures for training and evaluation: where they lie, how they are cropped, in which order they come."""

from __future__ import annotations

from .cache import LatentDataset
from .loader import SeededSampler, iterate_eval, make_loader
from .pictures import Crops, PhotoDataset, StreamDataset, make_dataset
from .sources import Source, find_samples

__all__ = [
    "Crops",
    "LatentDataset",
    "PhotoDataset",
    "SeededSampler",
    "Source",
    "StreamDataset",
    "find_samples",
    "iterate_eval",
    "make_dataset",
    "make_loader",
]
