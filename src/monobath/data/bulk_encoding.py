"""Pictures to latents, shard by shard, which `bulk.py` runs.

The result is a cache of latents (`cache.py`), of crops to train from or of whole pictures of any size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, check_least
from ..files import json_text
from ..images import MAX_PIXELS, pil_to_tensor, to_float
from ..models.encoder import Encoder
from ..models.frozen import ForeignEncoder, missing_encoder
from ..models.identity import weights_sha256
from ..tiles import pad_to_multiple
from ..tokenizer import Tokenizer
from .bulk import Report, ahead, digest, in_buckets
from .cache_facts import FACTS_FILE, CacheFacts, Layout, parse_facts, shard_path
from .cache_shards import Stored, npy
from .encoding import encode_images, encoder_facts, lossless, plain_facts
from .folders import open_folder
from .pictures import REASONS, Crops, Unusable
from .shards import InputShard, RawPicture, base_name, find_shards, read_pictures


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture, or a crop of one, on its way through the network."""

    key: str
    name: str
    pixels: Tensor
    """uint8 `(3, H, W)`."""
    label: int | None = None
    copy: int = 0
    kept: bytes | None = None
    """A crop's file. Who reads makes it too: there, threads share the work."""

    def padded(self, factor: int) -> Tensor:
        """Float `(1, 3, H, W)`, its sides multiples of the factor."""
        return pad_to_multiple(to_float(self.pixels)[None], factor)

    def sides(self, factor: int) -> tuple[int, int]:
        """Those of `padded`."""
        height, width = self.pixels.shape[1:]
        return -(-height // factor) * factor, -(-width // factor) * factor


@dataclass(frozen=True, kw_only=True)
class BulkEncoding:
    """How pictures become a data set of latents.

    Raises:
        UserError: a number that cannot be.
    """

    crops: Crops | None = None
    """Training crops, which are kept beside their latents; None: whole pictures, of which only the latents are kept."""
    copies: int = 1
    """Crops of each picture: those of the first `copies` epochs of a run with the crops' seed."""
    labels: bool = False
    """Also keep every picture's label."""
    layout: Layout = "tar"
    model: str = ""
    """What the user calls the encoder's model."""
    batch: int = 32
    """Pictures at once; fewer where they are larger than 512²."""
    threads: int = 1
    """Of each worker, for the network; on a GPU they decode pictures."""
    pictures_a_shard: int = 1000
    """Of pictures that lie in folders; tar and Parquet files are shards by themselves."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are skipped."""
    min_side: int = 16
    """Pictures with a shorter side, in pixels, likewise."""
    dtype: torch.dtype = torch.float32
    """Arithmetic of the encoder."""
    device: str = "cpu"
    """Of the workers: cpu or cuda."""

    def __post_init__(self) -> None:
        check_least(1, {name: getattr(self, name) for name in ("copies", "batch", "threads", "pictures_a_shard")})
        if self.crops is None and self.copies > 1:
            raise UserError(f"copies is {self.copies}, but whole pictures have one: give a size too")


class EncodingWork:
    """See `bulk.Work`: pictures to a cache of latents.

    Args:
        tokenizer: with float32 weights, whose hash identifies the encoder; or a foreign encoder alone.
        source: see `shards.find_shards`.
        out: folder, which all workers must see, or a URL.
        how: settings.

    Raises:
        UserError: no encoder, a size that the factor does not divide, or as `find_shards`.
    """

    suffix = "webp"

    def __init__(
        self,
        tokenizer: Tokenizer | ForeignEncoder,
        source: str | Sequence[str],
        out: Path | str,
        how: BulkEncoding,
    ) -> None:
        encoder = tokenizer.encoder if isinstance(tokenizer, Tokenizer) else tokenizer
        config, crops = encoder.config, how.crops
        if isinstance(encoder, ForeignEncoder) and encoder.network is None:
            raise UserError(missing_encoder(config))
        if crops is not None and crops.size % config.factor:
            raise UserError(f"size={crops.size} must be divisible by the encoder's factor {config.factor}")
        self.sha256 = weights_sha256(encoder)
        self.encoder: Encoder | ForeignEncoder = copy.deepcopy(encoder).to(how.dtype).eval()
        self.folder, self.how, self.threads = open_folder(out), how, how.threads
        self.whole = Crops(size=1, augment=False, max_pixels=how.max_pixels, min_side=how.min_side)
        self.crops = crops and replace(
            crops, scale=crops.scale or (crops.size, 2 * crops.size), max_pixels=how.max_pixels, min_side=how.min_side
        )
        self.shards: Sequence[InputShard] = find_shards(
            source, pictures_a_shard=how.pictures_a_shard, labels=how.labels, count=crops is not None
        )

    def manifest(self) -> CacheFacts:
        how, crops, config = self.how, self.crops, self.encoder.config
        names = [name for shard in self.shards for name in ([s.name for s in shard.samples] or [base_name(shard.path)])]
        return CacheFacts(
            encoder=encoder_facts(config),
            encoder_sha256=self.sha256,
            model=how.model,
            dtype=str(how.dtype).removeprefix("torch."),
            factor=config.factor,
            size=crops.size if crops else 0,
            scale=list(crops.lengths) if crops else [],
            flip=crops.flip if crops else False,
            seed=crops.seed if crops else 0,
            max_pixels=how.max_pixels,
            min_side=how.min_side,
            copies=how.copies,
            pictures=0,
            pictures_sha256=digest(names),
            pictures_a_shard=how.pictures_a_shard,
            layout=how.layout,
            counts=[],
            labelled=how.labels,
            batch=how.batch,
            threads=how.threads,
            device=how.device,
        )

    def read_manifest(self) -> CacheFacts | None:
        (content,) = self.folder.read([FACTS_FILE])
        found = None if content is None else parse_facts(content, self.folder.join(FACTS_FILE))
        # What was found out by doing it is no difference.
        return found if found is None or found.counts is None else replace(found, pictures=0, counts=[], labels=[])

    def write_manifest(self, reports: Sequence[Report] | None) -> None:
        facts = self.manifest()
        if reports is not None:
            counts = [report.pictures for report in reports]
            labels = sorted({label for report in reports for label in report.labels})
            facts = replace(facts, counts=counts, pictures=sum(counts), labels=labels, complete=True)
        self.folder.write_text(FACTS_FILE, json_text(plain_facts(facts)))

    def file(self, number: int) -> str:
        return shard_path(Path(), number, self.how.layout).name

    def name(self, number: int) -> str:
        return self.shards[number].name

    def to(self, device: str) -> None:
        self.encoder.to(device)

    def batches(self, number: int, report: Report) -> Iterator[list[tuple[int, Entry]]]:
        factor = self.encoder.config.factor
        return in_buckets(self._entries(self.shards[number], report), lambda e: e.sides(factor), self.how.batch)

    def results(self, batch: list[tuple[int, Entry]], report: Report) -> Iterator[Stored]:
        with report.timed("network"):
            images = torch.cat([entry.padded(self.encoder.config.factor) for _, entry in batch])
            moments = encode_images(self.encoder, images, self.how.dtype).half().numpy()
        for (_, entry), own in zip(batch, moments, strict=True):
            height, width = entry.pixels.shape[1:]
            facts: dict[str, Any] = {"picture": entry.name, "height": height, "width": width}
            facts |= {"copy": entry.copy} | ({} if entry.label is None else {"label": entry.label})
            report.pictures += entry.copy == 0
            yield Stored(key=entry.key, arrays=npy(own), picture=entry.kept, facts=facts)

    def _entries(self, shard: InputShard, report: Report) -> Iterator[Entry]:
        pictures = read_pictures(shard, labels=self.how.labels)
        results = ahead(self._read, pictures, self.threads if self.how.device != "cpu" else 0)
        while True:
            with report.timed("read"):
                found = next(results, None)
            if found is None:
                return
            if isinstance(found, dict):
                report.skipped.append({"shard": base_name(shard.path), **found})
            else:
                yield from found

    def _read(self, raw: RawPicture) -> list[Entry] | dict[str, str]:
        """The picture's entries, or why there are none."""
        try:
            if raw.data is None:
                raise Unusable(1, f"{raw.name} cannot be read")
            image = (self.crops or self.whole).decode(raw.data, raw.name)
        except Unusable as error:
            code, message = error.args
            return {"picture": raw.name, "reason": REASONS[code], "message": message}
        if self.crops is None:
            return [Entry(key=raw.key, name=raw.name, pixels=pil_to_tensor(image), label=raw.label)]
        cuts = [(epoch, self.crops.cut(image, epoch, raw.number)) for epoch in range(self.how.copies)]
        return [
            Entry(key=f"{raw.key}@{epoch}" if len(cuts) > 1 else raw.key, name=raw.name, label=raw.label, copy=epoch,
                  pixels=pixels, kept=lossless(pixels))
            for epoch, pixels in cuts
        ]  # fmt: skip
