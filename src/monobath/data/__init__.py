"""Pictures for training and evaluation: where they lie, how they are cropped, in which order they come."""

from __future__ import annotations

from .cache import LatentDataset
from .loader import SeededSampler, iterate_copies, iterate_eval, make_loader
from .pictures import Crops, PhotoDataset, StreamDataset, make_dataset
from .sources import Sample, Source, find_samples, is_remote

__all__ = [
    "Crops",
    "LatentDataset",
    "PhotoDataset",
    "Sample",
    "SeededSampler",
    "Source",
    "StreamDataset",
    "find_samples",
    "is_remote",
    "iterate_copies",
    "iterate_eval",
    "make_dataset",
    "make_loader",
]
