"""Cached latents: crops with what the encoder made of them, as webdataset shards.

A cache is a folder that `monobath cache-latents` (`encoding.py`) or `monobath encode-dataset` (`bulk.py`) writes:

    latents.json            what made it: encoder, crops, counts
    latents-000000.tar …    a sample is N.webp (the crop, lossless), N.moments.npy (float16 `(2c, h, w)`, mean and
                            log-variance), N.json (facts) and, if there are labels, N.cls, with
                            N = picture × copies + copy

Those of `encode-dataset` have the pictures' own keys, as many pictures in each shard as there were, and maybe Parquet
in place of tar (`cache_shards.py`), or whole pictures of any size, of which they keep the moments alone.

Copy k of a picture is the crop that `PhotoDataset` gives in epoch k for the same seed: a run on the cache sees, in
the same order, what a run on the pictures would see, and after `copies` epochs the same crops again.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import UserError, explained_as
from ..images import check_pixels
from ..models.encoder import EncoderConfig
from ..models.frozen import ForeignEncoder, without_spread
from ..models.identity import weights_sha256
from .cache_facts import FACTS_FILE, CacheFacts, read_facts, short
from .cache_shards import Shards
from .pictures import Crops, Item
from .sources import Source, is_remote

NO_LABELS = "it was written without labels; write another with monobath cache-latents --labels, from labelled pictures"


class LatentDataset(Dataset[Item]):
    """Crops and their moments from one or more caches, at random access.

    `dataset[epoch, index]`, or `dataset[index]` for epoch 0, is a dict with `image` (uint8 `(3, size, size)`),
    `moments` (float16 `(2c, h, w)`, mean and log-variance), `index` (int) and, if the caches have labels, `label`
    (int): copy `epoch mod copies` of a picture. An epoch is one copy of every picture.

    Args:
        source: the folder, or folders, that `monobath cache-latents` wrote; all of one encoder, size, scale and flip.
        seed: of the order that `make_loader` gives.
        cache: keep every decoded sample in memory.
        window: side in pixels, a multiple of the factor: items are windows of the cached crops, and of their moments,
            at places that seed, epoch and index decide; default: the whole crops.

    Raises:
        UserError: a window that does not fit, not a finished cache, shards that are missing or cut short, or caches
            that do not go together.
    """

    augment = True
    """The crops are augmented already: this is for training."""
    through: Callable[[Tensor], Tensor] | None = None
    """Mean latents of whole crops, `(1, c, h, w)`, → features `(1, d, s·h, s·w)`, as by `Decoder.features`: items then
    have float16 `features` in place of moments. With `cache` they are computed once; called without gradients."""
    skipped_count = 0
    """Unusable pictures were replaced when the cache was written."""
    pictures = True
    """Items have an `image`."""

    def __init__(self, source: Source, *, seed: int = 0, cache: bool = False, window: int | None = None) -> None:
        self.source, self.seed, self.cache, self.window = source, seed, cache, window
        self.folders = _folders(source)
        self.caches = [_open(folder) for folder in self.folders]
        for folder, facts in zip(self.folders[1:], self.caches[1:], strict=True):
            if bool(facts.labels) != bool(self.caches[0].labels):
                raise UserError(f"only one of {self.folders[0]} and {folder} has labels: caches of one run must agree")
            for name in ("encoder_sha256", "size", "scale", "flip"):
                first, own = getattr(self.caches[0], name), getattr(facts, name)
                if first != own:
                    differ = f"{folder} has {name} {short(own)}, but {self.folders[0]} has {short(first)}"
                    raise UserError(f"{differ}: caches of one run must agree")
        if window is not None and (window % self.facts.factor or not 0 < window <= self.facts.size):
            sides = f"a multiple of {self.facts.factor} up to {self.facts.size}"
            raise UserError(f"a window of {window} pixels in {self.folders[0]}: give {sides}")
        self._starts = np.cumsum([0, *(facts.pictures for facts in self.caches)])
        self._shards = [Shards(folder, facts) for folder, facts in zip(self.folders, self.caches, strict=True)]
        self._chosen = np.arange(self._starts[-1])  # positions of the pictures that are in use
        self._kept: dict[tuple[int, int], Item] = {}

    @property
    def facts(self) -> CacheFacts:
        """Of the first cache: encoder, size, scale and flip are those of all."""
        return self.caches[0]

    @property
    def labels(self) -> list[int]:
        """Labels of the pictures, each once, sorted; empty: the caches have none."""
        return sorted({label for facts in self.caches for label in facts.labels})

    def for_generation(self, labels: Sequence[int] = ()) -> LatentDataset:
        """The same latents without their crops, of the pictures with these labels only; default: of all.

        Raises:
            UserError: the caches have no labels, or not this one.
        """
        other = copy.copy(self)
        other.pictures, other._kept = False, {}
        if labels:
            missing = sorted(set(labels) - set(self.labels))
            if missing:
                there = f"there are {', '.join(map(str, self.labels))}" if self.labels else NO_LABELS
                raise UserError(f"no picture in {self.folders[0]} has the label {missing[0]}: {there}")
            # A picture's label is its first copy's: all copies are of one picture.
            found = np.concatenate([s.labels[:: f.copies] for s, f in zip(self._shards, self.caches, strict=True)])
            other._chosen = np.flatnonzero(np.isin(found, labels))
        return other

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0…{len(self) - 1}")
        position = int(self._chosen[index])
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        copies = self.caches[number].copies
        place = (number, int(position - self._starts[number]) * copies + epoch % copies)
        item = self._kept.get(place) or self._load(*place)
        if self.cache:
            self._kept[place] = item
        return {**self._window(item, epoch, index), "index": index}

    def _window(self, item: Item, epoch: int, index: int) -> Item:
        """A part of a sample: picture and moments at the same place."""
        facts = self.facts
        if self.window in (None, facts.size):
            return item
        side, places = self.window // facts.factor, facts.size // facts.factor
        corner = np.random.default_rng((self.seed, epoch, index)).integers(places - side + 1, size=2)
        found = dict(item)
        for name in ("image", "moments", "features"):
            if name in item:
                finer = item[name].shape[1] // places  # positions behind one of the latent
                top, left = (corner * finer).tolist()
                found[name] = item[name][:, top : top + side * finer, left : left + side * finer].clone()
        return found

    def preload(self) -> None:
        """Read everything into memory now, before worker processes start; needs `cache=True`."""
        if not self.cache:
            raise UserError("preload() needs cache=True")
        for epoch in range(max(facts.copies for facts in self.caches)):
            for index in range(len(self)):
                self[epoch, index]

    def _load(self, number: int, sample: int) -> Item:
        facts, shards = self.caches[number], self._shards[number]
        path, name, shape = shards.path(shards.shard_of(sample)), shards.name_of(sample), (3, facts.size, facts.size)
        item: Item = {"label": int(shards.labels[sample])} if facts.labels else {}
        again = f"delete the shard and write it again, with the same {shards.command} command"
        with explained_as(f"{path}: sample {name} cannot be read", again):
            array, crop = shards.read(sample, picture=self.pictures)
            moments = _moments_of(array)
            if crop is not None:
                with Image.open(io.BytesIO(crop)) as picture:
                    check_pixels(*picture.size, facts.size**2)
                    pixels = np.array(picture.convert("RGB")).transpose(2, 0, 1)
                item["image"], shape = torch.from_numpy(np.ascontiguousarray(pixels)), pixels.shape
        side = facts.size // facts.factor
        expected = (2 * facts.encoder["latent_channels"], side, side)
        if shape != (3, facts.size, facts.size) or moments.shape != expected:
            raise UserError(
                f"{path}: sample {name} holds a picture {shape} and moments {moments.shape}, but "
                f"{FACTS_FILE} says {(3, facts.size, facts.size)} and {expected}: write the cache anew"
            )
        found = torch.from_numpy(moments)
        if self.through is None:
            return {**item, "moments": found}
        with torch.no_grad():
            return {**item, "features": self.through(found[None, : len(found) // 2].float())[0].half()}


def _moments_of(data: bytes) -> np.ndarray:
    """What `np.save` wrote of moments, writable; nothing is allocated for more than the data are."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a .npy file of version 1.0")
    shape, reversed_order, kind = np.lib.format.read_array_header_1_0(file)
    if kind != np.float16 or reversed_order:
        raise ValueError(f"moments of type {kind}, not in half precision")
    return np.frombuffer(data, kind, offset=file.tell()).reshape(shape).copy()


def _folders(source: Source) -> list[Path]:
    if is_remote(source):
        raise UserError(f"{source}: cached latents are read from local folders; fetch them first")
    entries = [source] if not isinstance(source, (list, tuple)) else source
    if not entries:
        raise UserError("no cached latents given: name at least one folder")
    return [Path(str(entry)).expanduser() for entry in entries]


def _open(folder: Path) -> CacheFacts:
    facts = read_facts(folder)
    if facts is None:
        raise UserError(f"{folder} holds no {FACTS_FILE}, so no cached latents: monobath cache-latents writes such")
    if not facts.complete:
        verb = "cache-latents" if facts.counts is None else "encode-dataset"
        raise UserError(f"{folder} is not finished: the same monobath {verb} command goes on")
    if not facts.size:
        raise UserError(f"{folder} holds latents of whole pictures: training needs crops; monobath encode-dataset "
                        "--size writes them")  # fmt: skip
    return facts


# ---- training from it -------------------------------------------------------------------------------------------


def open_cache(source: Source, crops: Crops, *, memory: bool = False, windows: bool = False) -> LatentDataset:
    """The data set of a recipe with `data.latents`.

    Args:
        crops: what the recipe asks for.
        memory: keep every decoded sample in memory.
        windows: the cached crops may be larger than `crops.size`: then the items are windows of them.

    Raises:
        UserError: no finished cache, or one of other crops.
    """
    dataset = LatentDataset(source, seed=crops.seed, cache=memory)
    larger = windows and crops.size < dataset.facts.size and crops.size % dataset.facts.factor == 0
    if larger:
        dataset.window = crops.size
    asked = {"size": crops.size, "scale": list(crops.lengths), "flip": crops.flip}
    for name in ("scale", "flip") if larger else asked:
        ours, theirs = asked[name], getattr(dataset.facts, name)
        if ours != theirs:
            held = f"{dataset.folders[0]} holds crops of {name} {theirs}"
            remedy = f'add --data.{name} "{json.dumps(theirs)}", or cache others'
            raise UserError(f"data.{name} is {ours}, but {held}: {remedy}")
    return dataset


def stored_moments(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Moments `(B, 2c, h, w)` that a batch of a cache has, or those of its features; None: it is of pictures alone."""
    if "features" in batch:
        return without_spread(batch["features"])
    return batch.get("moments")


def check_encoder(dataset: LatentDataset, encoder: nn.Module) -> None:
    """Refuse latents of another encoder. Without one, training from a cache needs none: then factor and channels count.

    Raises:
        UserError: the hashes differ; the message names both, and the remedy.
    """
    facts = dataset.facts
    if isinstance(encoder, ForeignEncoder) and encoder.network is None:
        cached = EncoderConfig(**facts.encoder)
        if (cached.name, cached.family) != (encoder.config.name, encoder.config.family):
            theirs = f"{dataset.folders[0]} holds latents of {cached.title}"
            raise UserError(f"{theirs}, but this run's are of {encoder.config.title}: choose another cache")
        return
    own = weights_sha256(encoder)
    if own != facts.encoder_sha256:
        raise UserError(
            f"{dataset.folders[0]} holds latents of the encoder {facts.encoder_sha256[:12]} "
            f"({facts.model or 'of an unnamed model'}), but this run's encoder is {own[:12]}: start from that model "
            "(init), or run monobath cache-latents with the model this run starts from"
        )
