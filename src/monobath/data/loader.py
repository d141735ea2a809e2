"""Batches: the endless, seeded order of training and the single pass of evaluation.

A training run's samples depend only on the seed and their position in the run, so a run resumes at any sample, and
several processes together see what one would.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import UserError, check_least
from .cache import LatentDataset
from .pictures import Item, PhotoDataset, StreamDataset
from .transforms import mix_seed

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class SeededSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of `(epoch, index)`: epoch after epoch, each a seeded permutation, none cut short.

    Sample number k of the run, counted over all processes, is entry k mod length of permutation k // length.
    A global batch is `batch_size * world_size` consecutive samples; process `rank` takes its own slice of
    it, so that the processes together see what one process with the whole batch would see. Iterating starts
    at `start_sample` each time, at no cost.

    Args:
        length: number of samples in an epoch.
        batch_size: samples a batch and process.
        seed: of the permutations.
        start_sample: samples that all processes together have already seen.
        rank, world_size: this process, and how many there are.

    Raises:
        UserError: length or batch_size below 1, start_sample below 0, or rank outside 0…world_size-1.
    """

    length: int
    batch_size: int
    seed: int = 0
    start_sample: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_least(1, {"length": self.length, "batch_size": self.batch_size})
        check_least(0, {"start_sample": self.start_sample})
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank={self.rank} must be at least 0 and below world_size={self.world_size}")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, order = -1, torch.empty(0, dtype=torch.int64)
        first = self.start_sample + self.rank * self.batch_size
        for start in count(first, self.batch_size * self.world_size):
            batch = []
            for position in range(start, start + self.batch_size):
                epoch, place = divmod(position, self.length)
                if epoch != current:
                    generator = torch.Generator().manual_seed(mix_seed(1, self.seed, epoch))
                    current, order = epoch, torch.randperm(self.length, generator=generator)
                batch.append((epoch, int(order[place])))
            yield batch


def make_loader(
    dataset: PhotoDataset | StreamDataset | LatentDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int | None = None,
    start_sample: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Endless loader of training batches.

    Yields dicts of `image` (uint8 `(B, 3, size, size)`), `index` (int64 `(B,)`) and, if the dataset has
    labels, `label` (int64 `(B,)`); of a `LatentDataset` also `moments` (float16 `(B, 2c, h, w)`).
    Unless streamed, the batches are those of `SeededSampler`, whatever the number of workers, and a cache
    is filled before workers start. The loader is sharded by `rank` already: do not pass it to `accelerate.prepare`.
    The global random state is neither read nor changed.

    Args:
        dataset: with `augment=True`.
        batch_size: samples a batch and process.
        num_workers: decoding processes; 0 decodes in this one.
        seed: of the order; default: the dataset's.
        start_sample: samples that all processes together have already seen (steps × batch_size × world_size).
        rank, world_size: this process, and how many there are.
        pin_memory: page-locked batches, for fast copies to a GPU.

    Raises:
        UserError: an evaluation dataset, or bad numbers.
    """
    if not dataset.augment:
        raise UserError("make_loader is for training: use iterate_eval with an augment=False dataset")
    common = _workers(num_workers, mix_seed(3, dataset.seed))
    common |= {"pin_memory": pin_memory, "persistent_workers": num_workers > 0}
    if isinstance(dataset, StreamDataset):
        if start_sample:
            logger.info("streamed shards cannot resume at a sample: going on with fresh shuffles")
        dataset = dataset.placed(rank=rank, world_size=world_size, start_sample=start_sample)
        return DataLoader(dataset, batch_size=batch_size, drop_last=True, **common)
    if dataset.cache and num_workers:
        dataset.preload()
        if sys.platform == "linux":  # forked workers share the cache, spawned ones would copy it
            common["multiprocessing_context"] = "fork"
    sampler = SeededSampler(
        len(dataset),
        batch_size=batch_size,
        seed=dataset.seed if seed is None else seed,
        start_sample=start_sample,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(dataset, batch_sampler=sampler, **common)


def iterate_eval(
    dataset: PhotoDataset | StreamDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
) -> Iterator[Item]:
    """Go once through an `augment=False` dataset, in order, leaving unusable pictures out.

    Yields dicts of `image` (uint8 `(B, 3, size, size)`), `index` (int64 `(B,)`), `name` (list of B strings)
    and, if the dataset has labels, `label` (int64 `(B,)`). Every batch but the last has `batch_size` samples.
    What was left out is in `dataset.skipped`.

    Args:
        dataset: made with `augment=False`.
        batch_size: samples a batch.
        num_workers: decoding processes; a `PhotoDataset`'s batches do not depend on it.
        limit: stop after so many usable pictures.

    Raises:
        UserError: a training dataset, or no usable picture at all.
    """
    if dataset.augment:
        raise UserError("iterate_eval needs a dataset made with augment=False")
    loader: DataLoader[Any] = DataLoader(dataset, batch_size, collate_fn=_usable, **_workers(num_workers))
    items = islice((item for batch in loader for item in batch), limit)
    seen = False
    while group := list(islice(items, batch_size)):
        seen = True
        batch: Item = default_collate(group)
        yield batch
    if not seen and limit != 0:
        if isinstance(dataset, PhotoDataset):
            raise dataset.all_unusable()
        raise UserError(f"no usable picture found in {dataset.source} ({dataset.skipped_count} skipped)")


def iterate_copies(
    dataset: PhotoDataset, pictures: Sequence[int], copies: int, *, num_workers: int = 0
) -> Iterator[list[Item]]:
    """For each of the pictures, in order: its training crops of epochs 0 … copies−1, decoded once.

    Args:
        dataset: with `augment=True`.
        pictures: indices.
        copies: crops of each.
        num_workers: decoding processes; they change nothing in what comes.

    Raises:
        UserError: no picture is usable.
    """
    loader: DataLoader[Any] = DataLoader(
        _Copies(dataset, copies), batch_size=None, sampler=pictures, **_workers(num_workers)
    )
    for items in loader:
        if isinstance(items, UserError):
            raise items
        yield items


class _Copies(Dataset[list[Item] | UserError]):
    """All crops of a picture at a time. A mistake is returned: a worker that raises it adds its traceback."""

    def __init__(self, dataset: PhotoDataset, copies: int) -> None:
        self.dataset, self.copies = dataset, copies

    def __getitem__(self, index: int) -> list[Item] | UserError:
        try:
            return self.dataset.copies(index, range(self.copies))
        except UserError as error:
            return error


def _usable(items: list[Item | None]) -> list[Item]:
    return [item for item in items if item is not None]


def _workers(number: int, seed: int | None = None) -> dict[str, Any]:
    """Arguments of a `DataLoader`: how many processes, and a generator of its own for their seeds."""
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    return {"num_workers": number, "generator": generator, "worker_init_fn": _init_worker}


def _init_worker(worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which saves first
    torch.set_num_threads(1)  # decoding has no use for more, and workers must not fight for cores
