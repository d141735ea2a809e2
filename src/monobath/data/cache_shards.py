"""Shards of cached latents, as tar or Parquet: writing them the same to the byte, and reading samples at random.

A sample has a key, its moments (an .npy file of float16 `(2c, h, w)`), maybe its crop (lossless WebP), facts and maybe
a label. In a tar these are the members KEY.moments.npy, KEY.webp, KEY.json and KEY.cls, in Parquet the columns key,
moments, image, height, width, picture, copy and label, which `datasets` reads as they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError, explained_as, imported
from .shards import parquet
from .sources import Sample, parse_label, shard_members

if TYPE_CHECKING:
    from .cache_facts import CacheFacts

SMALLEST = 128
"""Bytes of a sample at least: the header of its moments."""
ROWS = 32
"""Rows of a Parquet row group, which is read whole for any of them."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A sample as it lies in a shard."""

    key: str
    arrays: bytes
    """An .npy file: moments."""
    picture: bytes | None = None
    """A picture file."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values, among them height, width and maybe label."""


# ---- writing ----------------------------------------------------------------------------------------------------


def write_samples(path: Path, samples: Iterable[Stored], *, suffix: str = "webp") -> None:
    """Write a shard of either kind, by its name's ending, to the given path.

    Args:
        suffix: of the pictures.

    Raises:
        UserError: the package that writes such shards is not installed.
    """
    (_write_parquet if path.suffix == ".parquet" else _write_tar)(path, samples, suffix)


def _write_tar(path: Path, samples: Iterable[Stored], suffix: str) -> None:
    wds = imported("webdataset", "writing shards needs webdataset: pip install 'monobath[train]'")
    with open(path, "wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            label = sample.facts.get("label")
            tar.write(
                {"__key__": sample.key}
                | ({} if sample.picture is None else {suffix: sample.picture})
                | ({"moments.npy": sample.arrays} if sample.arrays else {})
                | {"json": json.dumps(sample.facts, ensure_ascii=False).encode()}
                | ({} if label is None else {"cls": str(label).encode()})
            )


def _write_parquet(path: Path, samples: Iterable[Stored], suffix: str) -> None:
    pq = parquet()
    import pyarrow as pa

    columns = {
        "key": pa.string(), "moments": pa.binary(), "height": pa.int32(), "width": pa.int32(), "picture": pa.string(),
        "copy": pa.int32(), "label": pa.int64(), "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    }  # fmt: skip
    # What `datasets` writes of its own files: it then shows the column as pictures.
    kinds = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in columns.items()}
    kinds["image"] = {"_type": "Image"}
    schema = pa.schema(columns).with_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for sample in samples:
            image = None if sample.picture is None else {"bytes": sample.picture, "path": f"{sample.key}.{suffix}"}
            rows.append({"key": sample.key, "moments": sample.arrays or None, "image": image, **sample.facts})
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


# ---- reading ----------------------------------------------------------------------------------------------------


def read_samples(path: Path) -> Iterator[Stored]:
    """All samples of a shard that `write_samples` wrote, in order.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    with explained_as(f"{path} cannot be read", "delete it and run the command that wrote it again"):
        if path.suffix == ".parquet":
            for batch in parquet().ParquetFile(path).iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    image = row.pop("image")
                    yield Stored(
                        key=row.pop("key"), arrays=row.pop("moments"), picture=image and image["bytes"],
                        facts={name: value for name, value in row.items() if value is not None},
                    )  # fmt: skip
            return
        for key, members in shard_members(path).items():
            picture = members["webp"].read() if "webp" in members else None
            facts = json.loads(members["json"].read())
            yield Stored(key=key, arrays=members["moments.npy"].read(), picture=picture, facts=facts)


class Shards:
    """The samples of a finished cache, at random access.

    Args:
        folder: the cache.
        facts: what its `latents.json` says.

    Attributes:
        labels: int64 `(samples,)`; −1 where there are none.

    Raises:
        UserError: a shard is missing, cut short, or lacks samples.
    """

    def __init__(self, folder: Path, facts: CacheFacts) -> None:
        self.folder, self.facts = folder, facts
        self.command = "monobath cache-latents" if facts.counts is None else "monobath encode-dataset"
        held = sum(path.stat().st_size for path in folder.glob(f"latents-*.{facts.layout}")) // SMALLEST
        if facts.shards > 1 + held or (facts.pictures * facts.copies > held and facts.shard_path(folder, 0).is_file()):
            lacking = f"lacks shards for {facts.pictures:,} pictures, or they are cut short"
            raise UserError(f"{folder} {lacking}: run the same {self.command} command again")
        counts = np.array([len(facts.pictures_of(n)) for n in range(facts.shards)], dtype=np.int64) * facts.copies
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self._places = np.full((int(self.starts[-1]), 5), -1, dtype=np.int64)
        """In tars: offset and size of each picture, offset and size of its moments, and its label; else the last."""
        for number in range(facts.shards):
            path = self.path(number)
            with explained_as(f"{path} cannot be read", f"delete it and run the same {self.command} command again"):
                (self._index_parquet if facts.layout == "parquet" else self._index_tar)(number, path)

    @property
    def labels(self) -> np.ndarray:
        return self._places[:, 4]

    def path(self, number: int) -> Path:
        """File of a shard."""
        return self.facts.shard_path(self.folder, number)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def name_of(self, sample: int) -> str:
        """For messages."""
        return f"{sample:09d}" if self.facts.counts is None else f"{sample}"

    def read(self, sample: int, *, picture: bool) -> tuple[bytes, bytes | None]:
        """(.npy file of the moments, file of the crop, if asked for).

        Raises:
            OSError, ValueError: it cannot be read.
        """
        number = self.shard_of(sample)
        path = self.path(number)
        if self.facts.layout == "parquet":
            group, place = divmod(int(sample - self.starts[number]), ROWS)
            row = _group(path, group, path.stat().st_mtime_ns)[place]
            return row["moments"], row["image"]["bytes"] if picture else None
        offset, size, offset_moments, size_moments, _ = self._places[sample].tolist()
        arrays = Sample(self.name_of(sample), str(path), offset_moments, size_moments).read()
        if not picture:
            return arrays, None
        return arrays, Sample(self.name_of(sample), str(path), offset, size).read()

    def _index_tar(self, number: int, path: Path) -> None:
        first, last = self.starts[number : number + 2].tolist()
        for place, (key, members) in enumerate(shard_members(path).items(), first):
            row = self._places[place if self.facts.counts is not None else int(key)]  # keys are numbers
            for column, kind in ((0, "webp"), (2, "moments.npy")):
                if kind in members:
                    row[column : column + 2] = members[kind].offset, members[kind].size
            if "cls" in members:
                row[4] = parse_label(members["cls"].read(), f"{path}:{key}.cls")
        needed = [*range(0 if self.facts.size else 2, 4), *([4] if self.facts.labels else [])]
        self._check(path, int((self._places[first:last][:, needed] < 0).any(1).sum()), last - first)

    def _index_parquet(self, number: int, path: Path) -> None:
        first, last = self.starts[number : number + 2].tolist()
        column = parquet().read_table(path, columns=["label"])["label"]
        self._check(path, last - first - len(column), last - first)
        if self.facts.labels:
            self._places[first:last, 4] = column.to_numpy()

    def _check(self, path: Path, lacking: int, count: int) -> None:
        if lacking:
            raise UserError(f"{path} lacks {lacking} of {count} samples: delete it, and run the same {self.command}")


@lru_cache(maxsize=64)
def _group(path: Path, number: int, written: int) -> list[dict[str, Any]]:
    """A row group of a Parquet shard; the time when it was written tells it from one that had its name before."""
    with parquet().ParquetFile(path) as file:
        return file.read_row_group(number, columns=["moments", "image"]).to_pylist()


def npy(array: np.ndarray) -> bytes:
    """The file that `np.load` reads."""
    found = io.BytesIO()
    np.save(found, array)
    return found.getvalue()
