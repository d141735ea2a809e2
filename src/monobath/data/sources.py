"""Finding pictures: image folders, webdataset tar shards, remote shards.

`find_samples` turns whatever the user named into a flat, deterministic list of `Sample`; a local tar shard is
indexed once (member name, offset, size), so that its pictures are then read at random like files.
Remote shards cannot be indexed: `remote_urls` recognises them, `StreamDataset` streams them.
"""

from __future__ import annotations

import glob
import logging
import os
import shlex
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError, explained_as, imported

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif", "avif"),
    *("ppm", "pgm", "pbm", "jp2"),
)
"""File name extensions taken for pictures, lower case; matched in any case."""

REMOTE_PREFIXES = ("http://", "https://", "s3://", "gs://", "hf://", "pipe:", "file:")
"""What a streamed source begins with (`file:` streams a local shard as if it were remote)."""

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A folder, a picture, a `.tar` shard, a brace or glob pattern of these, a shard URL, or a list of any."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one picture lies."""

    name: str
    """Path below the folder that was given, or member name inside the shard; `/`-separated."""
    path: str
    """The picture file, or the tar shard that holds it."""
    offset: int = 0
    """First byte within the shard."""
    size: int = -1
    """Number of bytes within the shard; -1: `path` is the picture file itself."""
    label: int | None = None
    """Integer class from the `.cls` sibling or the sub-folder, if labels were asked for."""

    @property
    def location(self) -> str:
        """Full name for messages: `path`, or `shard.tar:member`."""
        return self.path if self.size < 0 else f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """The bytes of the picture file.

        Raises:
            OSError: the file or shard cannot be read, or ends before the sample does.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.path} ends inside {self.name}")
        return data


def is_remote(source: Source) -> bool:
    """True if `source` (or the first entry of a list) is a URL to be streamed rather than a local path."""
    first = next(iter(_as_list(source)), "")
    return str(first).startswith(REMOTE_PREFIXES)


def remote_urls(source: Source) -> list[str]:
    """Shard URLs that webdataset can open, braces expanded.

    `s3://` becomes a pipe through `aws s3 cp`; `file:` becomes a plain path.

    Raises:
        UserError: a local path among URLs, or nothing named at all.
    """
    urls = []
    for entry in map(str, _as_list(source)):
        if not entry.startswith(REMOTE_PREFIXES):
            raise UserError(f"{entry} is a local path among shard URLs: give either URLs or local paths")
        for url in expand_braces(entry):
            if url.startswith("s3://"):
                url = f"pipe:aws s3 cp {shlex.quote(url)} -"
            elif url.startswith("file:"):
                url = url.removeprefix("file:")
                url = url.removeprefix("//") if url.startswith("///") else url
            urls.append(url)
    if not urls:
        raise UserError("no data given: name at least one shard URL")
    return urls


def find_samples(source: Source, *, labels: bool = False) -> list[Sample]:
    """List the pictures of a local source, in a deterministic order.

    Folders are read recursively and sorted by path, hidden files left out; a `.tar` found in a folder counts
    as a shard. A shard gives one sample per webdataset key (the name up to the first dot), in tar order.

    Args:
        source: see `Source`.
        labels: also find an integer label for every picture: its `.cls` sibling (in shards and folders), or,
            for a single folder without any, the position of its sub-folder among the sorted sub-folders.

    Raises:
        UserError: a path is missing, nothing is found under it, a shard cannot be read, or a
                label is missing.
    """
    entries = _as_list(source)
    if not entries:
        raise UserError("no data given: name at least one image folder or .tar shard")
    samples: list[Sample] = []
    for entry in entries:
        if str(entry).startswith(REMOTE_PREFIXES):
            raise UserError(f"{entry} is a shard URL among local paths: give either URLs or local paths")
        found = [sample for file in listed_files(str(entry), "tar") for sample in _samples_of(file, labels)]
        if not found:
            raise UserError(f"no pictures found in {entry}: expected files ending in .jpg, .png, .webp … or .tar")
        samples += found
    if labels:
        if len(entries) == 1 and all(sample.label is None for sample in samples):
            samples = label_by_folder(samples)
        check_labels(samples)
    return samples


def check_labels(samples: Iterable[Sample]) -> None:
    """Raise `UserError` for the first one that has none."""
    for sample in samples:
        if sample.label is None:
            raise UserError(
                f"{sample.location} has no label: put an integer into a .cls file beside each picture, "
                "or sort the pictures of one folder into one sub-folder per class"
            )


def split_key(name: str) -> tuple[str, str]:
    """webdataset's rule: `dir/0001.seg.PNG` → key `dir/0001`, extension `seg.png`."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def picture_extension(extensions: Iterable[str]) -> str | None:
    """Which of one key's extensions is the picture: `jpg` before `left.jpg`; None if none is."""
    candidates = list(extensions)
    plain = (e for e in candidates if e in IMAGE_EXTENSIONS)
    dotted = (e for e in candidates if e.rpartition(".")[2] in IMAGE_EXTENSIONS)
    return next(plain, None) or next(dotted, None)


def parse_label(content: bytes, name: str) -> int:
    """Integer in a `.cls` file.

    Raises:
        UserError: it is not an integer; the message names `name`.
    """
    try:
        return int(content.decode("ascii").strip())
    except ValueError:
        raise UserError(f"label of {name} is {content[:40]!r}: a .cls file must hold one integer, such as 17") from None


def _as_list(source: Source) -> list[str | os.PathLike[str]]:
    return [source] if isinstance(source, (str, os.PathLike)) else list(source)


def expand_braces(pattern: str) -> list[str]:
    """`a-{0..2}.tar` → three names; a name without braces is itself."""
    if "{" not in pattern:
        return [pattern]
    lacking = f"{pattern} has braces, which need the braceexpand package: pip install 'monobath[train]'"
    with explained_as(f"{pattern} has unbalanced braces", "write name-{000000..000009}.tar"):
        return list(imported("braceexpand", lacking).braceexpand(pattern))


def expand_paths(pattern: str) -> list[Path]:
    """Existing paths for a path, a brace pattern or a glob pattern."""
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [Path(pattern)]
    paths = []
    for path in expand_braces(pattern):
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        if not matches:
            raise UserError(f"nothing matches {path}: check the pattern and the folder")
        paths += [Path(match) for match in matches]
    for found in paths:
        if not found.exists():
            raise UserError(f"{found} does not exist: give an image folder, a .tar shard or a shard pattern")
    return paths


def listed_files(pattern: str, *shards: str) -> Iterator[Sample]:
    """Every picture, and every file with one of these extensions, that a path or pattern names, sorted in each folder.

    Raises:
        UserError: there is no such path, or it is a file of another kind.
    """
    kinds = (*IMAGE_EXTENSIONS, *shards)
    for path in expand_paths(pattern):
        if path.is_dir():
            yield from (Sample(name, str(path / name)) for name in folder_files(path, kinds))
        elif path.suffix.lower().lstrip(".") in kinds:
            yield Sample(path.name, str(path))
        else:
            raise UserError(f"{path} is neither a folder, a picture nor a .{' or .'.join(shards)} shard")


def _samples_of(file: Sample, labels: bool) -> Iterable[Sample]:
    path = Path(file.path)
    if path.suffix.lower() == ".tar":
        return shard_samples(path, labels)
    return [replace(file, label=sibling_label(path) if labels else None)]


def folder_files(root: Path, extensions: Sequence[str]) -> list[str]:
    """Files below a folder with these extensions, as sorted relative names; hidden ones are left out."""

    def complain(error: OSError) -> None:
        logger.warning("folder left out: %s", error)

    found: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=complain):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            extension = name.rpartition(".")[2].lower()
            if not name.startswith(".") and extension in extensions:
                found.append(Path(folder, name).relative_to(root).as_posix())
    return sorted(found)


def sibling_label(path: Path) -> int | None:
    """The integer in the `.cls` file beside a picture; None: there is no such file."""
    sibling = path.with_suffix(".cls")
    return parse_label(sibling.read_bytes(), str(sibling)) if sibling.is_file() else None


def label_by_folder(samples: list[Sample]) -> list[Sample]:
    """The same with the number of each one's sub-folder as its label, unless one lies in none."""
    if any("/" not in sample.name for sample in samples):
        return samples
    classes = sorted({sample.name.partition("/")[0] for sample in samples})
    number = {name: index for index, name in enumerate(classes)}
    return [replace(sample, label=number[sample.name.partition("/")[0]]) for sample in samples]


def shard_members(path: Path, *, unique: bool = False) -> dict[str, dict[str, Sample]]:
    """The files in a tar shard, by webdataset key and extension, in the order of the keys' first members.

    Args:
        unique: a member that comes twice is an error; default: the later one counts.

    Raises:
        UserError: a member comes twice, where that is an error.
        OSError, EOFError, tarfile.TarError: the shard cannot be read as plain tar.
    """
    keys: dict[str, dict[str, Sample]] = {}
    with tarfile.open(path, "r:") as shard:
        for member in shard:
            name = member.name.removeprefix("./")
            if member.isreg():
                key, extension = split_key(name)
                members = keys.setdefault(key, {})
                if unique and extension in members:
                    raise UserError(f"{path}: the key {key} comes twice ({name}): rename one of them")
                members[extension] = Sample(name, str(path), member.offset_data, member.size)
    return keys


def shard_samples(path: Path, labels: bool, *, unique: bool = False) -> Iterator[Sample]:
    """One sample per key that has a picture, hidden ones left out; `unique` as in `shard_members`."""
    with explained_as(f"{path} cannot be read as a plain tar shard", "it may be cut short, fetch it again"):
        keys = shard_members(path, unique=unique)
    for key, members in keys.items():
        extension = picture_extension(members)
        stem = key.rpartition("/")[2]
        if extension is not None and stem and not stem.startswith("__"):
            labelled = labels and "cls" in members
            label = parse_label(members["cls"].read(), f"{path}:{key}.cls") if labelled else None
            yield replace(members[extension], label=label)
