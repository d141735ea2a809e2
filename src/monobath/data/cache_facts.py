"""What a cache of latents holds and what made it: `latents.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import check_types, config_of
from ..errors import UserError, reason
from ..models.encoder import EncoderConfig

FORMAT = "monobath-latents-1"
Layout = Literal["tar", "parquet"]
"""Kind of the shards."""
FACTS_FILE = "latents.json"


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What a cache holds and what made it: the content of `latents.json`."""

    encoder: dict[str, Any]
    """The encoder's configuration."""
    encoder_sha256: str
    """Of the encoder's weights: see `models.identity.weights_sha256`."""
    model: str
    """What the user called the model."""
    dtype: str
    """Arithmetic of the encoder."""
    factor: int
    """Side of the pixel square behind one latent position."""
    size: int
    """Side of the square crops, in pixels; 0: whole pictures, which are not kept."""
    scale: list[int]
    """Range of the short side before cropping, in pixels."""
    flip: bool
    """Half of the crops are mirrored."""
    seed: int
    """Of the crops."""
    max_pixels: int
    """Larger pictures were replaced by their neighbours."""
    min_side: int
    """Pictures with a shorter side likewise."""
    copies: int
    """Crops of each picture."""
    pictures: int
    """Pictures; the cache holds `pictures × copies` samples."""
    pictures_sha256: str
    """Of the pictures' names, in order."""
    pictures_a_shard: int
    """In every shard but the last, where `counts` does not say; of `encode-dataset`, of those that lie in folders."""
    labels: list[int] = field(default_factory=list)
    """Labels of the pictures, each once, sorted; empty: none were kept."""
    complete: bool = False
    """All shards are written."""
    layout: Layout = "tar"
    """Of the shards."""
    counts: list[int] | None = None
    """Pictures in each shard, as `encode-dataset` found them."""
    labelled: bool = False
    """`encode-dataset` keeps labels."""
    batch: int = 0
    """Pictures at once in `encode-dataset`, whose last bits depend on it; so do the next two."""
    threads: int = 0
    """Of each of its workers."""
    device: str = ""
    """Kind of its workers' devices."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.pictures // self.pictures_a_shard) if self.counts is None else len(self.counts)

    def shard_path(self, folder: Path, number: int) -> Path:
        """File of a shard."""
        return shard_path(folder, number, self.layout)

    def pictures_of(self, shard: int) -> range:
        """The pictures in a shard."""
        if self.counts is not None:
            return range(sum(self.counts[:shard]), sum(self.counts[: shard + 1]))
        first = shard * self.pictures_a_shard
        return range(first, min(first + self.pictures_a_shard, self.pictures))

    def differences(self, other: CacheFacts) -> str:
        """In words, what differs from another cache, this one's value first; empty if nothing but `complete` does."""
        return differences(self, other, "complete", "model")


def shard_path(folder: Path, number: int, layout: str = "tar") -> Path:
    """File of a shard."""
    return folder / f"latents-{number:06d}.{layout}"


def read_facts(folder: Path) -> CacheFacts | None:
    """What `latents.json` says, or None where there is none.

    Raises:
        UserError: the file is corrupt or of another version.
    """
    file = folder / FACTS_FILE
    try:
        return parse_facts(file.read_bytes(), str(file)) if file.is_file() else None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error}): write the cache anew") from None


def parse_facts(content: bytes, name: str) -> CacheFacts:
    """What a `latents.json` says.

    Raises:
        UserError: it is corrupt or of another version; the message names `name`.
    """
    try:
        values = json.loads(content)
        if values.pop("format") != FORMAT:
            raise ValueError(f"not {FORMAT}")
        facts = check_types(CacheFacts(**values))
        config_of(EncoderConfig, facts.encoder | {"latent_channels": facts.encoder["latent_channels"]}, {}, "encoder")
        if min(facts.factor, facts.copies, facts.pictures_a_shard) < 1 or facts.size < 0:
            raise ValueError("its numbers cannot be")
        if facts.counts is None:
            right = facts.pictures > 0
        else:  # empty before the first shard is written
            right = min(facts.counts, default=0) >= 0 and sum(facts.counts) == facts.pictures
        if not right:
            raise ValueError(f"it cannot hold {facts.pictures} pictures")
        return facts
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name} is corrupt or of another version ({reason(error)}): write the cache anew") from None


def differences(one: Any, other: Any, *beside: str) -> str:
    """In words, what differs between two dataclasses, one's value first; fields named in `beside` do not count."""
    return ", ".join(
        f"{field.name} {short(getattr(one, field.name))} instead of {short(getattr(other, field.name))}"
        for field in dataclasses.fields(one)
        if field.name not in beside and getattr(one, field.name) != getattr(other, field.name)
    )


def short(value: object) -> str:
    """A hash is known by its first digits."""
    text = str(value)
    return text[:12] if len(text) == 64 else text
