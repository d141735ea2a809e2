"""Datasets of local and streamed pictures.

The crop of an item depends on (seed, epoch, index) alone; `loader` decides the order.

A picture that cannot be used (unreadable, tiny, above `max_pixels`) is never fatal: it is logged once by
name, counted in `skipped`, and, in training, replaced by the next usable one.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import random
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..errors import UserError, imported
from ..images import MAX_PIXELS, ImageTooLarge, open_image
from .sources import Source, find_samples, is_remote, parse_label, picture_extension, remote_urls
from .transforms import Place, center_crop, cut, draw_place, mix_seed, sample_generator, shrink

logger = logging.getLogger(__name__)

REASONS = ("", "unreadable", "too large", "tiny")
"""Why a picture is skipped; the position in this tuple is the code that worker processes share."""

Item = dict[str, Any]


class Unusable(Exception):
    """A picture that is to be skipped: a position in `REASONS`, and words."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """How a picture becomes a square crop, and which pictures are skipped.

    Raises:
        UserError: a size below 1, not `size <= low <= high`, or a scale without augmentation.
    """

    size: int
    """Side of the crops, in pixels."""
    scale: tuple[int, int] | None = None
    """The short side is first resized to a random integer in [low, high], low >= size. None: to `size` exactly."""
    augment: bool = True
    """Random scale, crop and flip; False: the centre crop (docs/evaluation.md)."""
    flip: bool = True
    """Mirror half of the crops."""
    seed: int = 0
    """Of scale, crop and flip."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are skipped."""
    min_side: int = 16
    """Pictures with a shorter side than this many pixels are skipped; other small ones are upsampled."""

    def __post_init__(self) -> None:
        if self.scale is not None and not self.augment:
            raise UserError(f"scale={tuple(self.scale)} has no effect with augment=False: leave one of them out")
        if self.size < 1:
            raise UserError(f"size={self.size} must be at least 1 pixel")
        low, high = self.lengths
        if not self.size <= low <= high:
            raise UserError(
                f"scale=({low}, {high}) does not fit size={self.size}: the short side is resized to lo…hi pixels "
                "before the crop, so size <= lo <= hi must hold"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        """Range of the short side before cropping, in pixels."""
        return self.scale or (self.size, self.size)

    def centred(self) -> Crops:
        """The centre crops of the same pictures."""
        return replace(self, augment=False, scale=None)

    def decode(self, data: bytes, name: str) -> Image.Image:
        """The picture in a file's bytes; raises `Unusable` for one that is to be skipped."""
        try:
            image = open_image(io.BytesIO(data), max_pixels=self.max_pixels, name=name)
        except UserError as error:
            raise Unusable(2 if isinstance(error, ImageTooLarge) else 1, str(error)) from None
        if min(image.size) < self.min_side:
            raise Unusable(3, f"{name} is {image.width}x{image.height}, below min_side={self.min_side}")
        return image

    def cut(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        """uint8 `(3, size, size)`."""
        if not self.augment:
            return center_crop(image, size=self.size)
        return cut(image, self.place(*image.size, epoch, index), self.size)

    def place(self, width: int, height: int, epoch: int, index: int) -> Place:
        """Where the crop of an epoch lies in picture `index`, of that size in pixels."""
        generator = sample_generator(seed=self.seed, epoch=epoch, index=index)
        return draw_place(width, height, size=self.size, scale=self.lengths, flip=self.flip, generator=generator)


class _Pictures:
    """What map-style and streamed data sets share."""

    def __init__(self, source: Source, crops: Crops, labels: bool, slots: int) -> None:
        self.source, self.crops, self.labels = source, crops, labels
        self.augment, self.seed = crops.augment, crops.seed
        # Positions in REASONS, in memory shared with worker processes.
        self._codes = torch.zeros(slots, dtype=torch.uint8).share_memory_()

    @property
    def skipped_count(self) -> int:
        """Number of pictures (and shards, if streamed) found unusable so far, by any worker of this process."""
        return int(torch.count_nonzero(self._codes))

    def _skip(self, slot: int, error: Unusable, what: str = "skipped") -> None:
        code, message = error.args
        if not self._codes.numpy()[slot]:
            self._codes[slot] = code
            logger.warning("%s (%s): %s", what, REASONS[code], message)

    def _finished(self, content: Item, index: int, label: int | None, name: str) -> Item:
        item = {**content, "index": index}
        if self.labels:
            item["label"] = label
        if not self.augment:
            item["name"] = name
        return item


class PhotoDataset(_Pictures, Dataset[Item | None]):
    """Pictures of local folders and tar shards, at random access.

    `dataset[epoch, index]`, or `dataset[index]` for epoch 0, is a dict with `image` (uint8 `(3, size, size)`,
    for `images.to_float` on the device), `index` (int, of the picture in `samples`) and, if `labels`,
    `label` (int).

    With `augment=False` the item is the evaluation view (docs/evaluation.md), has a `name` too, and is None where the
    picture cannot be used: go through `iterate_eval`, which leaves those out.

    Args:
        source: folders, shards, patterns, or a list of them: see `sources.Source`.
        crops: how pictures are cropped, and which are skipped.
        cache: keep every decoded picture in memory, as uint8. Its short side is then first reduced to
            `crops.scale[1]` (bicubic, antialias) if it is longer, so that a random crop of a large picture is
            resampled twice and a little softer than without; the evaluation view stays the same within
            rounding. Call `preload` before worker processes start, or each of them fills a cache of its own.
        labels: read class labels: see `sources.find_samples`.

    Raises:
        UserError: as `sources.find_samples`, or settings that contradict each other.
    """

    places = False
    """Items say where a crop lies; see `release`."""

    def __init__(self, source: Source, crops: Crops, *, cache: bool = False, labels: bool = False) -> None:
        self.samples = find_samples(source, labels=labels)
        super().__init__(source, crops, labels, slots=len(self.samples))
        self.cache = cache
        self._pictures: list[np.ndarray | None] = [None] * len(self.samples) if cache else []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Item | None:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0…{len(self) - 1}")
        if not self.augment:
            picture = self._picture(index)
            return None if picture is None else self._item(picture, epoch, index, index)
        return self.copies(index, [epoch])[0]

    def copies(self, index: int, epochs: Iterable[int]) -> list[Item]:
        """`[dataset[epoch, index] for epoch in epochs]` of a training dataset, decoding the picture once."""
        for used in (*range(index, len(self)), *range(index)):
            picture = self._picture(used)
            if picture is not None:
                return [self._item(picture, epoch, index, used) for epoch in epochs]
        raise self.all_unusable()

    @property
    def skipped(self) -> dict[str, str]:
        """Pictures found unusable so far, by any process: location → reason (one of `REASONS`)."""
        return {self.samples[index].location: REASONS[code] for index, code in self.unusable.items()}

    @property
    def unusable(self) -> dict[int, int]:
        """Pictures found unusable so far: index → position in `REASONS`. What other processes found can be set."""
        return {i: int(self._codes[i]) for i in torch.nonzero(self._codes).flatten().tolist()}

    @unusable.setter
    def unusable(self, found: dict[int, int]) -> None:
        self._codes[list(found)] = torch.tensor(list(found.values()), dtype=torch.uint8)

    def preload(self, *, threads: int | None = None) -> None:
        """Decode everything into the cache now, with a pool of threads (default: one per core).

        Raises:
            UserError: the dataset was made with `cache=False`, or no picture is usable.
        """
        if not self.cache:
            raise UserError("preload() needs cache=True")
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for _ in pool.map(self._fill, range(len(self))):
                pass
        if self.skipped_count == len(self):
            raise self.all_unusable()
        memory = sum(picture.nbytes for picture in self._pictures if picture is not None)
        logger.info("cached %d pictures, %.0f MiB", len(self) - self.skipped_count, memory / 2**20)

    def release(self) -> list[np.ndarray | None]:
        """Hand over the cached pictures, uint8 `(H, W, 3)` each, None for an unusable one. From here on items have
        `place` (int64 `(5,)`: picture, short side, left, top, mirrored; see `transforms.Place`) in place of `image`."""
        pictures, self.places = self._pictures, True
        # Their sizes are all that is needed from here on: such arrays hold no memory.
        self._pictures = [None if p is None else np.broadcast_to(np.uint8(0), p.shape) for p in pictures]
        return pictures

    def _item(self, picture: Image.Image | tuple[int, int], epoch: int, index: int, used: int) -> Item:
        sample = self.samples[used]
        if isinstance(picture, Image.Image):
            content = {"image": self.crops.cut(picture, epoch, index)}
        else:
            content = {"place": torch.tensor([used, *self.crops.place(*picture, epoch, index)])}
        return self._finished(content, used, sample.label, sample.name)

    def _picture(self, index: int) -> Image.Image | tuple[int, int] | None:
        """The decoded picture, or its width and height where others hold the pixels; None if it is unusable."""
        if self._codes.numpy()[index]:
            return None
        if self.cache:
            pixels = self._fill(index)
            if pixels is None or self.places:
                return None if pixels is None else (pixels.shape[1], pixels.shape[0])
            return Image.fromarray(pixels)
        return self._load(index)

    def _fill(self, index: int) -> np.ndarray | None:
        if self._pictures[index] is None and (picture := self._load(index)) is not None:
            self._pictures[index] = np.asarray(shrink(picture, short=self.crops.lengths[1]))
        return self._pictures[index]

    def _load(self, index: int) -> Image.Image | None:
        sample = self.samples[index]
        try:
            return self.crops.decode(sample.read(), sample.location)
        except OSError as error:
            unusable = Unusable(1, f"{sample.location} cannot be read ({error})")
        except Unusable as error:
            unusable = error
        self._skip(index, unusable, "picture skipped")
        return None

    def all_unusable(self) -> UserError:
        crops, (first, reason) = self.crops, next(iter(self.skipped.items()))
        return UserError(
            f"none of the {len(self):,} pictures of {self.source} can be used "
            f"(min_side={crops.min_side}, max_pixels={crops.max_pixels:,}); the first one, {first}, is {reason}"
        )


class StreamDataset(_Pictures, IterableDataset[Item]):
    """Pictures streamed from remote tar shards (`https://`, `s3://`, `gs://`, `hf://`, `pipe:`, `file:`).

    Items as `PhotoDataset`'s, with `index` = CRC-32 of the sample's key. With `augment` it never ends: shards
    are shuffled each epoch and samples through a buffer, both seeded; a sample's crop depends on
    (seed, start, epoch, key) alone. With `augment=False` it is one pass in shard order.

    Shards are dealt out to processes and workers; where there are fewer shards than readers, each reader
    goes through all of them and keeps its share. Unlike `PhotoDataset`, the order depends on the number of
    workers, and a resumed run goes on with fresh shuffles rather than at the same sample.

    Args:
        source: shard URLs, with braces or as a list.
        buffer: number of samples, undecoded, in the shuffle buffer of each worker.
        crops, labels: as in `PhotoDataset`.

    Raises:
        UserError: bad settings; while iterating: a whole pass had no usable picture.
    """

    _SLOTS = 2**20

    def __init__(self, source: Source, crops: Crops, *, labels: bool = False, buffer: int = 1000) -> None:
        # A hash set of names, so that those that several workers meet are counted once.
        super().__init__(source, crops, labels, slots=self._SLOTS)
        self.urls = remote_urls(source)
        self.buffer = buffer
        self.skipped: dict[str, str] = {}
        """Pictures and shards found unusable by this process: name → reason (workers log theirs)."""
        self._rank, self._world_size, self._start = 0, 1, 0

    def placed(self, *, rank: int, world_size: int, start_sample: int = 0) -> StreamDataset:
        """This dataset as process `rank` of `world_size` sees it; `start_sample` gives fresh shuffles."""
        other = copy.copy(self)
        other._rank, other._world_size, other._start = rank, world_size, start_sample
        return other

    def __iter__(self) -> Iterator[Item]:
        for epoch in count() if self.augment else (0,):
            found = False
            for item in self._epoch(epoch):
                found = True
                yield item
            if not found and self.augment:
                raise UserError(
                    f"no usable picture found in {self.source}: expected tar shards with .jpg, .png, .webp … "
                    f"members that can be fetched, at least one for each process and worker "
                    f"({self.skipped_count} skipped, see the log)"
                )

    def _epoch(self, epoch: int) -> Iterator[Item]:
        wds = imported("webdataset", "streaming shards needs webdataset: pip install 'monobath[train]'")
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        parts, part = self._world_size * workers, self._rank * workers + number
        order = random.Random(mix_seed(2, self.seed, self._start, epoch))
        urls = list(self.urls)
        if self.augment:
            order.shuffle(urls)
        whole = len(urls) >= parts  # shards enough for everyone; else everyone thins out all of them
        shards: Iterable[dict[str, str]] = ({"url": url} for url in (urls[part::parts] if whole else urls))
        samples: Iterator[dict[str, Any]] = iter(wds.tariterators.tarfile_samples(shards, handler=self._shard_failed))
        if not whole:
            samples = islice(samples, part, None, parts)
        if self.augment:
            samples = iter(wds.filters._shuffle(samples, self.buffer, self.buffer // 4, rng=order))
        for sample in samples:
            item = self._item(sample, epoch)
            if item is not None:
                yield item

    def _item(self, sample: dict[str, Any], epoch: int) -> Item | None:
        key = sample["__key__"].removeprefix("./")
        extension = picture_extension(name for name in sample if not name.startswith("__"))
        if extension is None or key.rpartition("/")[2].startswith((".", "__")):
            return None
        name = f"{sample['__url__']}:{key}.{extension}"
        try:
            picture = self.crops.decode(sample[extension], name)
        except Unusable as error:
            self._skip_name(name, error)
            return None
        index = zlib.crc32(key.encode())
        label = None
        if self.labels:
            if "cls" not in sample:
                raise UserError(f"{name} has no label: each sample needs a .cls member that holds an integer")
            label = parse_label(sample["cls"], name)
        crop = self.crops.cut(picture, mix_seed(self._start, epoch), index)
        return self._finished({"image": crop}, index, label, f"{key}.{extension}")

    def _skip_name(self, name: str, error: Unusable) -> None:
        self._skip(zlib.crc32(name.encode()) % self._SLOTS, error)
        self.skipped[name] = REASONS[error.args[0]]

    def _shard_failed(self, error: Exception) -> bool:
        url = next((str(arg) for arg in reversed(error.args) if str(arg) in self.urls), "a shard")
        reason = error.args[0] if error.args else type(error).__name__
        self._skip_name(url, Unusable(1, f"{url} ({reason})"))
        return True


def make_dataset(
    source: Source, crops: Crops, *, cache: bool = False, labels: bool = False
) -> PhotoDataset | StreamDataset:
    """`StreamDataset` for shard URLs, `PhotoDataset` for local paths; arguments and errors as theirs."""
    if not is_remote(source):
        return PhotoDataset(source, crops, cache=cache, labels=labels)
    if cache:
        raise UserError(f"cache=True cannot be used with streamed shards ({source}): leave it out")
    return StreamDataset(source, crops, labels=labels)
