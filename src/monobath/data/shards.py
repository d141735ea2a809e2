"""What bulk work reads: shards of pictures, wherever they lie.

`find_shards` cuts a source into `InputShard`s, the units of work: a tar shard, a Parquet file, or so many pictures of
a folder. `read_pictures` gives the undecoded pictures of one, in an order that depends on the shard alone. A shard
behind a URL (s3://, gs://, hf://, https://, whatever fsspec opens) is fetched whole, read, and removed.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .sources import (
    IMAGE_EXTENSIONS,
    Sample,
    check_labels,
    expand_braces,
    expand_paths,
    folder_files,
    label_by_folder,
    parse_label,
    shard_samples,
    sibling_label,
    split_key,
)

PARQUET_NEEDS = "Parquet needs pyarrow: pip install 'monobath[ray]'"
PICTURE_COLUMNS = ("image", "picture", *IMAGE_EXTENSIONS, "img", "bytes", "data")
"""Where pictures are looked for in Parquet, in this order: bytes, or a struct that has `bytes`."""
KEY_COLUMNS, LABEL_COLUMNS = ("key", "__key__", "id"), ("label", "cls")
FAR = 2**32
"""Pictures that no shard of unknown length has: the next one's are numbered from there."""


@dataclass(frozen=True)
class InputShard:
    """A unit of work."""

    kind: Literal["files", "tar", "parquet"]
    path: str
    """The tar or Parquet file, or what messages call some pictures of a folder."""
    first: int = 0
    """Number of its first picture in the source, which decides its crops."""
    samples: tuple[Sample, ...] = ()
    """The pictures of a folder."""

    @property
    def name(self) -> str:
        """What results call it."""
        return without_query(self.path)

    @property
    def remote(self) -> bool:
        """Behind a URL."""
        return "://" in self.path


@dataclass(frozen=True)
class RawPicture:
    """A picture as it lies in its shard."""

    key: str
    """webdataset's: the name up to the first dot of its last part; unique in the shard."""
    name: str
    """For messages."""
    number: int
    """In the source."""
    data: bytes | None
    """None: it cannot be read."""
    label: int | None = None


def find_shards(
    source: str | Sequence[str], *, pictures_a_shard: int = 1000, labels: bool = False, count: bool = False
) -> list[InputShard]:
    """Cut a source into units of work, always the same.

    Args:
        source: folders, pictures, .tar and .parquet files, patterns of these, or URLs of any, or a list.
        pictures_a_shard: of pictures that lie in folders.
        labels: also find the labels of these, as `sources.find_samples` does.
        count: number pictures as `sources.find_samples` orders them, which takes a look into every local shard.

    Raises:
        UserError: nothing there, something that cannot be listed, or two pictures in folders with one key.
    """
    entries = [source] if isinstance(source, str) else list(source)
    if not entries:
        raise UserError("no data given: name at least one folder, shard, Parquet file or URL")
    shards: list[InputShard] = []
    loose: list[Sample] = []
    for entry in entries:
        files = list(_listed(entry))
        if not files:
            raise UserError(f"no pictures found in {entry}: expected .jpg, .png, .webp …, .tar or .parquet files")
        if labels:
            of_pictures = [file for file in files if not _kind(file)]
            labelled = iter(_labelled(of_pictures))
            files = [next(labelled) if not _kind(file) else file for file in files]
        for file in files:
            kind = _kind(file)
            if kind:
                shards += _chunks(loose, pictures_a_shard)
                loose = []
                shards.append(InputShard(kind, file.path))
            else:
                loose.append(file)
        shards += _chunks(loose, pictures_a_shard)
        loose = []
    _check_keys(shards)
    return _numbered(shards, count)


def _listed(entry: str) -> Iterator[Sample]:
    """Every picture, tar and Parquet file that an entry names, sorted within each folder."""
    kinds = (*IMAGE_EXTENSIONS, "tar", "parquet")
    if "://" in entry:
        for url in expand_braces(entry):
            yield from _listed_url(url, kinds)
        return
    for path in expand_paths(entry):
        if path.is_dir():
            for name in folder_files(path, kinds):
                yield Sample(name, str(path / name))
        elif path.suffix.lower().lstrip(".") in kinds:
            yield Sample(path.name, str(path))
        else:
            raise UserError(f"{path} is neither a folder, a picture, nor a .tar or .parquet file")


def _listed_url(url: str, kinds: Sequence[str]) -> Iterator[Sample]:
    if not glob.has_magic(without_query(url)) and _suffix(url) in kinds:
        yield Sample(base_name(url), url)
        return
    with _explained(url):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        found = system.glob(path) if glob.has_magic(path) else system.find(path)
        # What a pattern's own folder is called is no part of the names.
        root = path[: path.index("*")].rpartition("/")[0] if "*" in path else path.rstrip("/")
        for file in sorted(found):
            name = file.removeprefix(root).lstrip("/")
            if _suffix(file) in kinds and not any(part.startswith(".") for part in name.split("/")):
                yield Sample(name, system.unstrip_protocol(file))


def _suffix(name: str) -> str:
    return without_query(name).rpartition(".")[2].lower()


def _kind(file: Sample) -> Literal["tar", "parquet"] | None:
    suffix = _suffix(file.path)
    return "tar" if suffix == "tar" else "parquet" if suffix == "parquet" else None


def _labelled(pictures: list[Sample]) -> list[Sample]:
    found = [replace(p, label=None if "://" in p.path else sibling_label(Path(p.path))) for p in pictures]
    if all(sample.label is None for sample in found):
        found = label_by_folder(found)
    check_labels(found)
    return found


def _chunks(loose: list[Sample], size: int) -> list[InputShard]:
    parts = [tuple(loose[i : i + size]) for i in range(0, len(loose), size)]
    return [InputShard("files", part[0].path, 0, part) for part in parts]


def _check_keys(shards: Sequence[InputShard]) -> None:
    seen: dict[str, str] = {}
    for sample in (sample for shard in shards for sample in shard.samples):
        key = split_key(sample.name)[0]
        if key in seen:
            raise _twice(key, f"{seen[key]} and {sample.path}")
        seen[key] = sample.path


def _twice(key: str, where: str) -> UserError:
    return UserError(f"the key {key} comes twice ({where}): a key names one picture of a shard; rename one of them")


def _numbered(shards: list[InputShard], count: bool) -> list[InputShard]:
    if not count or any(shard.remote for shard in shards):
        return [replace(shard, first=number * FAR) for number, shard in enumerate(shards)]
    found, first = [], 0
    for shard in shards:
        found.append(replace(shard, first=first))
        first += len(shard.samples) or _length(shard)
    return found


def _length(shard: InputShard) -> int:
    if shard.kind == "tar":
        return sum(1 for _ in shard_samples(Path(shard.path), False))
    with _explained(shard.path):
        return parquet().read_metadata(shard.path).num_rows


# ---- reading one ------------------------------------------------------------------------------------------------


def read_pictures(shard: InputShard, *, labels: bool = False) -> Iterator[RawPicture]:
    """The pictures of a shard, undecoded, in its own order.

    Raises:
        UserError: the shard is gone or no shard of its kind, a key comes twice, or a label is missing.
    """
    with _explained(shard.path):
        if shard.kind == "files":
            yield from _from_files(shard)
        else:
            with fetched(shard.path) as path:
                yield from (_from_tar if shard.kind == "tar" else _from_parquet)(shard, path, labels)


def _from_files(shard: InputShard) -> Iterator[RawPicture]:
    for number, sample in enumerate(shard.samples, shard.first):
        try:
            data = _bytes(sample.path)
        except FileNotFoundError:
            raise  # it was there when the source was listed: the source is going
        except OSError:
            data = None
        yield RawPicture(split_key(sample.name)[0], without_query(sample.path), number, data, sample.label)


def _from_tar(shard: InputShard, path: Path, labels: bool) -> Iterator[RawPicture]:
    with open(path, "rb") as file:
        for number, sample in enumerate(shard_samples(path, labels, unique=True), shard.first):
            name = f"{shard.name}:{sample.name}"
            if labels and sample.label is None:
                raise UserError(f"{name} has no label: each picture needs a .cls member that holds an integer")
            file.seek(sample.offset)
            data = file.read(sample.size)
            yield RawPicture(
                split_key(sample.name)[0], name, number, data if len(data) == sample.size else None, sample.label
            )


def _from_parquet(shard: InputShard, path: Path, labels: bool) -> Iterator[RawPicture]:
    file = parquet().ParquetFile(path)
    schema, names = file.schema_arrow, file.schema_arrow.names
    pictures = next((name for name in PICTURE_COLUMNS if name in names and _holds_bytes(schema.field(name).type)), None)
    key_column, label_column = (next((n for n in some if n in names), None) for some in (KEY_COLUMNS, LABEL_COLUMNS))
    if pictures is None:
        raise UserError(
            f"{shard.path} has no pictures: its columns are {', '.join(names)}; call that of the bytes image"
        )
    if labels and label_column is None:
        raise UserError(f"{shard.path} has no labels: its columns are {', '.join(names)}; add label")
    columns = [name for name in (pictures, key_column, label_column if labels else None) if name]
    seen: set[str] = set()
    rows = (row for batch in file.iter_batches(batch_size=64, columns=columns) for row in batch.to_pylist())
    for place, row in enumerate(rows):
        key = f"{place:09d}" if key_column is None else str(row[key_column])
        if key in seen:
            raise _twice(key, shard.path)
        seen.add(key)
        value = row[pictures]
        data = value.get("bytes") if isinstance(value, dict) else value
        label = parse_label(str(row[label_column]).encode(), f"{shard.name}:{key}") if labels else None
        yield RawPicture(key, f"{shard.name}:{key}", shard.first + place, data, label)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def parquet() -> Any:
    """pyarrow's Parquet module.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(PARQUET_NEEDS) from None
    return pyarrow.parquet


def _bytes(path: str) -> bytes:
    if "://" not in path:
        return Path(path).read_bytes()
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read()


@contextmanager
def fetched(path: str) -> Iterator[Path]:
    """A file on this machine, fetched for the time of the block if it is behind a URL.

    Raises:
        UserError: it cannot be.
    """
    if "://" not in path:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="monobath-") as folder:
        copy = Path(folder, base_name(path))
        with _explained(path):
            from fsspec.core import url_to_fs

            system, name = url_to_fs(path)
            system.get_file(name, str(copy))
        yield copy


def without_query(path: str) -> str:
    """Of an https:// address, without what follows a `?`, such as a signature, which changes and is nobody's matter."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def base_name(path: str) -> str:
    """The last part of a path or URL."""
    return without_query(path).rstrip("/").rpartition("/")[2]


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Within: what readers of files raise is a mistake that names the source."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        gone = without_query(path) if "://" in path else error.filename or path
        raise UserError(f"{gone} is not there: check the source, and run the same command again") from None
    except ImportError as error:
        raise UserError(f"{path} cannot be opened ({error}): install the package that it names") from None
    except Exception as error:
        # pyarrow's errors are ValueErrors; file systems behind URLs raise classes of their own.
        if "://" not in path and not isinstance(error, (OSError, ValueError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): fetch it again, or check the address") from None
