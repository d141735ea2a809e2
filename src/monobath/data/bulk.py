"""Bulk work on shards: what one worker does with one shard, and what the folder of results says about it.

    work = EncodingWork(tokenizer, ["photos/{000..999}.tar"], "latents", BulkEncoding())
    with claimed(work) as missing:
        reports = [run_shard(work, number) for number in missing]      # or on a cluster: integrations/ray.py
        finish(work)

A result is a function of its shard, the settings and the networks alone: batches never reach beyond a shard, pictures
of one padded size are gathered in the shard's order, and the number of threads is fixed. So a shard can be done
anywhere, any number of times: it appears whole, under its name, with the same bytes. The folder while work goes on:

    latents.json      what is made, from what, with which networks; another command is refused
    latents-000000.…  finished shards
    done/000000.json  a finished shard's report; the shard counts as done from here on
    partial/          half-written shards of running workers
    .lock             held by the one process that gives out work

`finish` puts the reports' counts into `latents.json`, their skipped pictures into `skipped.jsonl`, and removes `done`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import torch

from ..errors import UserError
from ..files import json_text
from .cache_shards import Stored, write_samples
from .folders import PARTIAL, Folder

T = TypeVar("T")
U = TypeVar("U")

DONE, SKIPPED = "done", "skipped.jsonl"
BATCH_SIDE = 512
"""A batch has no more pixels than `batch` squares of this side, but at least one picture."""
AHEAD = 4
"""Batches of a shard that are read while the network still has another."""


class Manifest(Protocol):
    """What the folder of results says, as its JSON file."""

    complete: bool

    def differences(self, other: Any) -> str:
        """In words, what makes another folder of results one that is made otherwise; empty: nothing."""


class Work(Protocol):
    """One command on many shards. It travels to the workers, with its networks."""

    folder: Folder
    suffix: str
    """Format of the pictures in the results."""
    shards: Sequence[Any]
    threads: int

    def manifest(self) -> Any:
        """What is to be made, before it is."""

    def read_manifest(self) -> Any:
        """What the folder says is being made in it; None: nothing."""

    def write_manifest(self, reports: Sequence[Report] | None) -> None:
        """Write it; with the reports of all shards: as finished."""

    def file(self, number: int) -> str:
        """What the finished shard is called."""

    def name(self, number: int) -> str:
        """What messages call the shard that is read."""

    def batches(self, number: int, report: Report) -> Iterator[list[tuple[int, Any]]]:
        """The shard's items, read, each with its place in the shard: see `in_buckets`."""

    def results(self, batch: list[tuple[int, Any]], report: Report) -> Iterable[Stored]:
        """What the networks make of a batch, in its order; counts the pictures in the report."""

    def to(self, device: str) -> None:
        """Move the networks."""


@dataclass(kw_only=True)
class Report:
    """What became of one shard."""

    number: int
    pictures: int = 0
    """Read and used."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Pictures that cannot be used: where, why and in words."""
    labels: list[int] = field(default_factory=list)
    """Each once, sorted."""
    bytes: int = 0
    """Of the finished shard."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By what was done: read (and decode), network, write."""
    error: str = ""
    """Why the shard could not be done; nothing else is said then."""
    again: bool = False
    """It was done before."""

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


# ---- the folder of results --------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(work: Work) -> Iterator[list[int]]:
    """Within: this process alone gives out the work of a folder. Yields the numbers of the shards that are missing.

    Raises:
        UserError: another process does, or the folder holds something made otherwise.
    """
    folder = work.folder
    with folder.claimed():
        before, wanted, there = work.read_manifest(), work.manifest(), folder.names()
        if before is not None and (different := wanted.differences(before)):
            raise UserError(f"{folder} was made otherwise ({different}): choose another folder")
        if before is None and any(name.startswith("latents-") for name in there):
            raise UserError(f"{folder} holds shards of something else: choose another folder")
        if before is not None and before.complete:
            lost = [work.file(number) for number in range(len(work.shards)) if work.file(number) not in there]
            if lost:
                raise UserError(
                    f"{folder.join(lost[0])} is missing from a finished folder: delete latents.json to write all anew"
                )
            yield []
            return
        folder.remove(PARTIAL)
        for inside in (DONE, PARTIAL):
            folder.make(inside)
        work.write_manifest(None)
        done = folder.names(DONE)
        yield [n for n in range(len(work.shards)) if _done(n) not in done or work.file(n) not in there]


def finish(work: Work) -> list[Report]:
    """All shards are done: say so in the folder, and tidy up. Returns their reports, in order.

    Raises:
        UserError: not one picture could be used.
    """
    if (work.read_manifest()).complete:
        return []
    folder = work.folder
    contents = folder.read([f"{DONE}/{_done(number)}" for number in range(len(work.shards))])
    reports: list[Report] = []
    for number, content in enumerate(contents):
        report = _parsed(content)
        if report is None:
            path = folder.join(f"{DONE}/{_done(number)}")
            raise UserError(f"{path} is gone or damaged: delete it, and run the same command again")
        reports.append(report)
    skipped = [row for report in reports for row in report.skipped]
    folder.write_text(SKIPPED, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in skipped))
    if not any(report.pictures for report in reports):
        raise UserError(
            f"none of the {len(skipped):,} pictures could be used: {folder.join(SKIPPED)} says why of each"
            if skipped else f"there is no picture in {work.name(0)}" + (" and the others" if len(reports) > 1 else "")
        )  # fmt: skip
    work.write_manifest(reports)
    for inside in (DONE, PARTIAL):
        folder.remove(inside)
    return reports


def _done(number: int) -> str:
    return f"{number:06d}.json"


def _report(work: Work, number: int) -> Report | None:
    """Of a shard that is done, and still there."""
    (content,) = work.folder.read([f"{DONE}/{_done(number)}"])
    report = _parsed(content)
    return report if report is not None and work.folder.has(work.file(number)) else None


def _parsed(content: bytes | None) -> Report | None:
    try:
        return None if content is None else Report(**json.loads(content))
    except (ValueError, TypeError):
        return None


def digest(names: Iterable[str]) -> str:
    """SHA-256 of names, in order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


# ---- what a worker does -----------------------------------------------------------------------------------------


def run_shard(work: Work, number: int, turn: contextlib.AbstractContextManager[Any] | None = None) -> Report:
    """Do one shard; a mistake of the user's is in the report. Done before: nothing is done.

    Args:
        turn: a lock that all threads share which do shards with the same networks: while one has them, others read the
            beginning of theirs, and write the end.
    """
    before = _report(work, number)
    if before is not None:
        return replace(before, again=True)
    report = Report(number=number)
    try:
        batches, found = work.batches(number, report), dict[int, Stored]()
        first = list(islice(batches, AHEAD))
        with turn or contextlib.nullcontext():
            for batch in chain(first, batches):
                places = (place for place, _ in batch)
                found |= zip(places, work.results(batch, report), strict=True)
        samples = [found[place] for place in range(len(found))]
        report.labels = sorted({sample.facts["label"] for sample in samples if "label" in sample.facts})
        with report.timed("write"):
            report.bytes = work.folder.write(
                work.file(number), lambda own: write_samples(own, samples, suffix=work.suffix)
            )
            work.folder.write_text(f"{DONE}/{_done(number)}", json_text(vars(report)))
    except UserError as error:
        return Report(number=number, error=str(error))
    except (torch.OutOfMemoryError, MemoryError):
        return Report(number=number, error=f"{work.name(number)}: out of memory; use a smaller --batch or --max_pixels")
    return report


def in_buckets(items: Iterable[T], side: Callable[[T], tuple[int, int]], batch: int) -> Iterator[list[tuple[int, T]]]:
    """Batches of items of equal sides, with each item's number; a function of the items' order alone.

    A batch is given as soon as it is full; what is held back is bounded: the largest batch goes first.

    Args:
        side: height and width in pixels.
        batch: see `BATCH_SIDE`.
    """
    waiting: dict[tuple[int, int], list[tuple[int, T]]] = {}
    pixels, room = 0, batch * BATCH_SIDE**2

    def taken(key: tuple[int, int]) -> list[tuple[int, T]]:
        nonlocal pixels
        found = waiting.pop(key)
        pixels -= len(found) * key[0] * key[1]
        return found

    for number, item in enumerate(items):
        key = side(item)
        waiting.setdefault(key, []).append((number, item))
        pixels += key[0] * key[1]
        if len(waiting[key]) == max(1, min(batch, room // (key[0] * key[1]))):
            yield taken(key)
        while pixels > 16 * room:
            yield taken(max(waiting, key=lambda k: len(waiting[k]) * k[0] * k[1]))
    for key in list(waiting):
        yield taken(key)


def ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Iterator[U]:
    """`map`, with so many threads at work ahead of what is asked for; 0: none."""
    if not threads:
        yield from map(function, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(function, item) for item in islice(rest, 8 * threads)]
        while waiting:
            found = waiting.pop(0).result()
            waiting += [pool.submit(function, item) for item in islice(rest, 1)]
            yield found
