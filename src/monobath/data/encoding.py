"""Encode the crops of a data set once and write the cache that `cache.LatentDataset` reads.

    facts = cache_latents(tokenizer, "photos", Path("cache"), Crops(size=64, scale=(64, 128)))
    train(recipe with data.source = ["cache"], data.latents = True, training.train_encoder = False)

SSDD (arXiv 2510.04961) shares one frozen encoder between all its decoders, so that its latents can be computed once.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..files import write_file, write_json
from ..images import to_float
from ..models.encoder import Encoder, EncoderConfig, Posterior
from ..models.frozen import ForeignEncoder, missing_encoder
from ..models.identity import weights_sha256
from ..tokenizer import Tokenizer
from .cache_facts import FACTS_FILE, FORMAT, CacheFacts, read_facts, shard_path
from .cache_shards import npy
from .loader import iterate_copies
from .pictures import Crops, PhotoDataset
from .sources import Source, is_remote
from .statistics import Progress

HALF_MAX = 65504.0
"""Largest number in half precision."""
BULK = ("layout", "counts", "labelled", "batch", "threads", "device")
"""What only `encode-dataset` says of a cache: left out of the file where it says nothing."""
TAR_END = 10 * 1024
"""Bytes that tar fills the end of an archive with, at most."""


@dataclass(frozen=True, kw_only=True)
class Caching:
    """How a cache is written.

    Raises:
        UserError: a number that cannot be.
    """

    copies: int = 1
    """Crops of each picture: those of the first `copies` epochs of a run with the crops' seed."""
    labels: bool = False
    """Also keep every picture's label, for generators of classes: see `sources.find_samples`."""
    model: str = ""
    """What the user calls the encoder's model, for messages."""
    shard_mb: float = 256
    """No shard is larger, in MiB (unless one picture's copies are)."""
    batch_size: int = 32
    """Crops at once."""
    workers: int = 0
    """Processes that read and crop pictures; they change nothing in what is written."""
    dtype: torch.dtype = torch.float32
    """Arithmetic of the encoder."""
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name, least in (("copies", 1), ("shard_mb", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value < least or not value:
                raise UserError(f"{name} is {value}: it must be {f'at least {least}' if least else 'above 0'}")


def cache_latents(
    tokenizer: Tokenizer | ForeignEncoder, source: Source, out: Path, crops: Crops, options: Caching | None = None
) -> CacheFacts:
    """Encode augmented crops of every picture once and write them to shards: see `cache`.

    The same call goes on where it stopped, and writes the same bytes as if it had not: finished shards are kept.

    Args:
        tokenizer: with float32 weights, whose hash identifies the encoder; or a foreign encoder alone.
        source: folders, shards, patterns, or a list of them; no URLs.
        out: folder for the shards and `latents.json`.
        crops: as in training; a multiple of the tokenizer's factor, their default scale (size, 2·size), as in recipes.
            Pictures that they skip are replaced by their neighbours.
        options: default: `Caching()`.

    Returns:
        The facts of the finished cache.

    Raises:
        UserError: bad settings, no usable picture, latents that half precision cannot hold, or a folder that holds a
            cache made otherwise.
    """
    options = options or Caching()
    encoder = tokenizer.encoder if isinstance(tokenizer, Tokenizer) else tokenizer
    config = encoder.config
    if isinstance(encoder, ForeignEncoder) and encoder.network is None:
        raise UserError(missing_encoder(config))
    size, (low, high) = crops.size, crops.scale or (crops.size, 2 * crops.size)
    if size % config.factor:
        raise UserError(f"size={size} must be divisible by the encoder's factor {config.factor}")
    if is_remote(source):
        raise UserError(f"{source}: latents of streamed shards cannot be cached; give local folders or shards")
    dataset = PhotoDataset(source, replace(crops, scale=(low, high)), labels=options.labels)
    found = {sample.label for sample in dataset.samples if sample.label is not None}
    if found and min(found) < 0:
        raise UserError(f"label {min(found)}: labels that are kept must be at least 0")
    values = 2 * config.latent_channels * (size // config.factor) ** 2
    # At most: the crop, its moments in half precision, and what tar and the small files add.
    bytes_per_picture = options.copies * (3 * size**2 + 2 * values + 6 * 1024)
    facts = CacheFacts(
        encoder=encoder_facts(config),
        encoder_sha256=weights_sha256(encoder),
        model=options.model,
        dtype=str(options.dtype).removeprefix("torch."),
        factor=config.factor,
        scale=[low, high],
        **{name: getattr(crops, name) for name in ("size", "flip", "seed", "max_pixels", "min_side")},
        copies=options.copies,
        pictures=len(dataset),
        pictures_sha256=hashlib.sha256("\n".join(sample.name for sample in dataset.samples).encode()).hexdigest(),
        pictures_a_shard=max(1, int((options.shard_mb * 2**20 - TAR_END) / bytes_per_picture)),
        labels=sorted(found),
    )
    before = read_facts(out)
    if before and facts.differences(before):
        raise UserError(f"{out} holds a cache made otherwise ({facts.differences(before)}): choose another folder")
    _write_shards(encoder, dataset, facts, out, options)
    facts = replace(facts, complete=True)
    write_facts(out, facts)
    return facts


@torch.no_grad()
def _write_shards(
    encoder: Encoder | ForeignEncoder, dataset: PhotoDataset, facts: CacheFacts, out: Path, options: Caching
) -> None:
    """Write the shards that are missing."""
    missing = [shard for shard in range(facts.shards) if not shard_path(out, shard).is_file()]
    encoder = copy.deepcopy(encoder).to(options.dtype).eval()
    wanted = [picture for shard in missing for picture in facts.pictures_of(shard)]
    pictures = iterate_copies(dataset, wanted, facts.copies, num_workers=options.workers)
    total = facts.pictures * facts.copies
    done = before = total - len(wanted) * facts.copies

    def samples(shard: int) -> Iterator[tuple[int, Tensor, Tensor, dict[str, Any]]]:
        # A batch never reaches into the next shard: what a shard holds does not depend on where the run began.
        nonlocal done
        own = facts.pictures_of(shard)
        crops = (
            (index, number, item)
            for index, items in zip(own, islice(pictures, len(own)), strict=True)
            for number, item in enumerate(items)
        )
        while batch := list(islice(crops, options.batch_size)):
            images = torch.stack([item["image"] for _, _, item in batch])
            moments = encode_images(encoder, to_float(images), options.dtype)
            if done == before:  # it works: from here on the folder is a cache, finished or not
                write_facts(out, facts)
            for (index, number, item), own_moments in zip(batch, moments, strict=True):
                own_facts = {"picture": dataset.samples[item["index"]].name, "copy": number}
                own_facts |= {"label": item["label"]} if "label" in item else {}
                yield index * facts.copies + number, item["image"], own_moments, own_facts
            done += len(batch)
            if options.progress:
                options.progress(done, total)

    for shard in missing:
        write_shard(shard_path(out, shard), samples(shard))


def encoder_facts(config: EncoderConfig) -> dict[str, Any]:
    """Shape and family; not where it was read from, which may move. The hash tells whether it is the same."""
    facts = asdict(config)
    del facts["source"]
    return facts if config.family else {name: value for name, value in facts.items() if name != "family"}


@torch.no_grad()
def encode_images(encoder: Encoder | ForeignEncoder, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Float `(B, 3, H, W)` in [-1, 1] → float32 means and clamped log-variances `(B, 2c, h, w)`, on the CPU.

    Raises:
        UserError: half precision cannot hold them.
    """
    x = images.to(encoder.anchor.device).to(dtype)
    posterior = Posterior(encoder(x), (x.shape[2], x.shape[3]))
    moments = torch.cat([posterior.mean, posterior.logvar], dim=1).cpu()
    largest = moments.abs().max().item()
    if not largest <= HALF_MAX:  # written so that NaN fails too
        raise UserError(
            f"latents reach {largest:.3g}, which half precision cannot hold: this encoder's cannot be cached"
        )
    return moments


def lossless(crop: Tensor) -> bytes:
    """uint8 `(3, H, W)` → a WebP file."""
    picture = io.BytesIO()
    # Effort 0 of 6 costs a tenth of the time of the default, for files 8 % larger.
    Image.fromarray(crop.permute(1, 2, 0).numpy()).save(picture, "WEBP", lossless=True, quality=0, method=0)
    return picture.getvalue()


def write_facts(folder: Path, facts: CacheFacts) -> None:
    """Write `latents.json`, atomically."""
    write_json(folder / FACTS_FILE, plain_facts(facts))


def plain_facts(facts: CacheFacts) -> dict[str, Any]:
    """What `latents.json` holds."""
    plain = asdict(facts)
    own = {f.name for f in fields(facts) if f.name in BULK and plain[f.name] == f.default}
    return {"format": FORMAT} | {k: v for k, v in plain.items() if k not in own}


def write_shard(path: Path, samples: Iterable[tuple[int, Tensor, Tensor, dict[str, Any]]]) -> None:
    """Write a shard, atomically and the same to the byte for the same samples.

    Args:
        path: of the `.tar` file.
        samples: (number, crop uint8 `(3, size, size)`, moments `(2c, h, w)` to be stored in half precision, facts);
            the fact "label", if there is one, is also written as webdataset has it, in N.cls.

    Raises:
        UserError: the file cannot be written, or the webdataset package is missing.
    """
    try:
        from webdataset import TarWriter
    except ImportError:
        raise UserError("writing shards needs webdataset: pip install 'monobath[train]'") from None

    def write(partial: Path) -> None:
        with open(partial, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, crop, moments, facts in samples:
                label = {"cls": str(facts["label"]).encode()} if "label" in facts else {}
                tar.write(
                    {
                        "__key__": f"{number:09d}",
                        "webp": lossless(crop),
                        "moments.npy": npy(moments.half().numpy()),
                        "json": json.dumps(facts, ensure_ascii=False).encode(),
                        **label,
                    }
                )

    write_file(path, write)
