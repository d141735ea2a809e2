"""A cache of latents to pictures, shard by shard, which `bulk.py` runs."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, check_least
from ..files import json_text
from ..images import tensor_to_pil
from ..models.frozen import ForeignEncoder
from ..models.identity import weights_sha256
from ..sampling import Noise
from ..tokenizer import Tokenizer
from .bulk import Report, ahead, digest, in_buckets
from .cache_facts import FACTS_FILE, Layout, differences, parse_facts, shard_path
from .cache_shards import Stored, read_samples
from .folders import open_folder
from .shards import fetched

FORMAT, FACTS = "monobath-decoded-1", "pictures.json"


@dataclass(frozen=True, kw_only=True)
class BulkDecoding:
    """How a data set of latents becomes pictures."""

    layout: Layout = "tar"
    model: str = ""
    """What the user calls the model that decodes."""
    steps: int | None = None
    """Sampler steps; default: what the model was made for."""
    seed: int = 0
    """Noise seed, the same for every picture."""
    noise: Noise | None = None
    """What decoding starts from; default: what the model was made for."""
    batch: int = 8
    """Pictures at once; fewer where they are larger than 512²."""
    threads: int = 1
    """Of each worker."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_least(1, {"batch": self.batch, "threads": self.threads})


@dataclass(frozen=True, kw_only=True)
class DecodedFacts:
    """What a folder of decoded pictures holds and what made it: the content of `pictures.json`."""

    model: str
    model_sha256: str
    latents_sha256: str
    """Of the `latents.json` that they were decoded from."""
    dtype: str
    steps: int | None
    seed: int
    noise: str | None
    layout: Layout
    batch: int
    threads: int
    device: str
    counts: list[int] = field(default_factory=list)
    """Pictures in each shard."""
    complete: bool = False

    def differences(self, other: DecodedFacts) -> str:
        """In words, what differs from another, this one's value first."""
        return differences(self, other, "complete", "model", "counts")


class DecodingWork:
    """See `bulk.Work`: a cache of latents to pictures, as lossless PNG, each of the size that was encoded.

    Args:
        tokenizer: that decodes.
        source: folder of a finished cache, or a URL.
        out: folder, which all workers must see, or a URL.
        how: settings.

    Raises:
        UserError: no finished cache, or one of another encoder.
    """

    suffix = "png"

    def __init__(self, tokenizer: Tokenizer, source: Path | str, out: Path | str, how: BulkDecoding) -> None:
        latents = open_folder(source)
        (content,) = latents.read([FACTS_FILE])
        facts = None if content is None else parse_facts(content, latents.join(FACTS_FILE))
        if facts is None or not facts.complete:
            state = "is not finished" if facts else f"holds no {FACTS_FILE}"
            raise UserError(f"{source} {state}: give the folder that monobath encode-dataset or cache-latents wrote")
        encoder = tokenizer.encoder
        known = not isinstance(encoder, ForeignEncoder) or encoder.network is not None
        if known and weights_sha256(encoder) != facts.encoder_sha256:
            raise UserError(
                f"{source} holds latents of the encoder {facts.encoder_sha256[:12]} ({facts.model or 'unnamed'}), but "
                f"{how.model or 'this model'} has {weights_sha256(encoder)[:12]}: choose a model that shares it"
            )
        self.sha256 = weights_sha256(tokenizer.decoder)
        self.tokenizer = copy.deepcopy(tokenizer).to(dtype=how.dtype)
        self.facts, self.how, self.threads, self.folder = facts, how, how.threads, open_folder(out)
        names = (shard_path(Path(), number, facts.layout).name for number in range(facts.shards))
        self.shards: Sequence[str] = [latents.join(name) for name in names]

    def manifest(self) -> DecodedFacts:
        how = self.how
        return DecodedFacts(
            model=how.model, model_sha256=self.sha256, latents_sha256=digest([repr(self.facts)]),
            dtype=str(how.dtype).removeprefix("torch."), steps=how.steps, seed=how.seed, noise=how.noise,
            layout=how.layout, batch=how.batch, threads=how.threads, device=how.device,
        )  # fmt: skip

    def read_manifest(self) -> DecodedFacts | None:
        (content,) = self.folder.read([FACTS])
        if content is None:
            return None
        try:
            values = json.loads(content)
            if values.pop("format") != FORMAT:
                raise ValueError(f"not {FORMAT}")
            return DecodedFacts(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            file = self.folder.join(FACTS)
            raise UserError(f"{file} is corrupt or of another version ({error}): choose another folder") from None

    def write_manifest(self, reports: Sequence[Report] | None) -> None:
        facts = self.manifest()
        if reports is not None:
            facts = replace(facts, counts=[report.pictures for report in reports], complete=True)
        self.folder.write_text(FACTS, json_text({"format": FORMAT, **asdict(facts)}))

    def file(self, number: int) -> str:
        return f"pictures-{number:06d}.{self.how.layout}"

    def name(self, number: int) -> str:
        return self.shards[number]

    def to(self, device: str) -> None:
        self.tokenizer.to(device)

    def batches(self, number: int, report: Report) -> Iterator[list[tuple[int, tuple[Stored, Tensor]]]]:
        factor = self.facts.factor

        def side(item: tuple[Stored, Tensor]) -> tuple[int, int]:
            return item[1].shape[1] * factor, item[1].shape[2] * factor

        return in_buckets(self._latents(number, report), side, self.how.batch)

    def _latents(self, number: int, report: Report) -> Iterator[tuple[Stored, Tensor]]:
        stored, channels = self._samples(number), self.facts.encoder["latent_channels"]
        while True:
            with report.timed("read"):
                sample = next(stored, None)
                if sample is None:
                    return
                found = sample, torch.from_numpy(np.load(io.BytesIO(sample.arrays))[:channels]).float()
            yield found

    def _samples(self, number: int) -> Iterator[Stored]:
        with fetched(self.shards[number]) as path:
            yield from read_samples(path)

    def results(self, batch: list[tuple[int, tuple[Stored, Tensor]]], report: Report) -> list[Stored]:
        with report.timed("network"):
            pixels = self.decode([z for _, (_, z) in batch])
        report.pictures += len(batch)
        pairs = zip((sample for _, (sample, _) in batch), pixels, strict=True)
        with report.timed("write"):  # a GPU is faster than one thread that compresses
            return list(ahead(self._stored, pairs, self.threads if self.how.device != "cpu" else 0))

    def _stored(self, pair: tuple[Stored, Tensor]) -> Stored:
        sample, image = pair
        height, width = (sample.facts.get(name, self.facts.size) for name in ("height", "width"))
        picture = io.BytesIO()
        tensor_to_pil(image[:, :height, :width]).save(picture, "PNG", compress_level=1)
        facts = {**sample.facts, "height": height, "width": width}
        return Stored(key=sample.key, arrays=b"", picture=picture.getvalue(), facts=facts)

    def decode(self, latents: Iterable[Tensor]) -> Tensor:
        """Latents `(c, h, w)` of one size → uint8 `(B, 3, H, W)` on the CPU."""
        z, how = torch.stack(list(latents)), self.how
        return self.tokenizer.decode(
            z, steps=how.steps, seed=[how.seed] * len(z), noise=how.noise, output="uint8"
        ).cpu()
