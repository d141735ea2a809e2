"""Models behind one thread of arithmetic: what a request may ask, how a batch is done, previews as they come.

`Service.place` bounds what is in the house, from the first byte of a request to the last of its reply: memory, and
waiting time. `Batcher` is the queue of those who have arrived; while one batch is worked on, the next gathers. Results
are those of `Tokenizer.encode` and `Tokenizer.decode` for each request alone, whatever shared its batch.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import resources
from ..errors import UserError, check_least
from ..images import ImageTooLarge
from ..tokenizer import Tokenizer


class Full(Exception):
    """No place is free."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    max_batch: int = 8
    """Most samples decoded together; a request of more is a batch of its own."""
    max_wait_ms: float = 5.0
    """How long a request waits for others that are being received, in milliseconds."""
    max_queue: int = 64
    """Most requests at a time; further ones are told to come again."""
    max_bytes: int = 64 << 20
    """Largest body, in bytes."""
    max_pixels: int = 1 << 22
    """Largest picture, in pixels, counted once per sample and step; also of a batch."""
    timeout: float = 60.0
    """Longest time for a body to arrive, and for the work on it, in seconds."""

    def __post_init__(self) -> None:
        check_least(0, {"max_wait_ms": self.max_wait_ms})
        for name, value in vars(self).items():
            if name != "max_wait_ms" and value <= 0:
                raise UserError(f"{name} is {value}: it must be above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One request's tensor: latents to decode, or pictures to encode."""

    model: str
    kind: Literal["decode", "encode"]
    data: Tensor
    size: tuple[int, int]
    steps: int | None = None
    seed: int = 0

    @property
    def key(self) -> Any:
        """Equal for jobs that fit one call."""
        return (self.model, self.kind, self.data.shape[1:], self.size, self.steps)

    @property
    def samples(self) -> int:
        """B."""
        return len(self.data)

    @property
    def pixels(self) -> int:
        """Of all samples and steps."""
        return len(self.data) * self.size[0] * self.size[1] * (self.steps or 1)


class Batcher:
    """Gathers jobs, oldest first, and works on one batch at a time.

    Args:
        run: a batch of jobs of one key → a result or an exception for each.
        limits: of a batch, and how long its first job waits while `expected` says that others may come.
        expected: whether a request has arrived whose job is not here yet. A lone client never waits.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Awaitable[list[Any]]],
        limits: Limits,
        expected: Callable[[int], bool],
    ) -> None:
        self._run, self._limits, self._expected = run, limits, expected
        self._waiting: list[tuple[Job, asyncio.Future[Any]]] = []
        self._working: asyncio.Task[None] | None = None
        self._unanswered = 0

    async def submit(self, job: Job) -> Any:
        """The job's result. Cancelled while it waits, the job is not worked on.

        Raises:
            Exception: whatever `run` found for this job.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((job, future))
        self._unanswered += 1
        if self._working is None or self._working.done():
            self._working = loop.create_task(self._work())
        try:
            return await future
        finally:
            self._unanswered -= 1

    async def _work(self) -> None:
        loop, wait = asyncio.get_running_loop(), self._limits.max_wait_ms / 1000
        while self._waiting:
            until = loop.time() + wait
            while self._expected(self._unanswered) and loop.time() < until and not self._batch()[1]:
                await asyncio.sleep(wait / 10)
            batch, _ = self._batch()
            self._waiting = [entry for entry in self._waiting if entry not in batch and not entry[1].done()]
            if batch:
                results = await self._run([job for job, _ in batch])
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():  # its client may have left
                        future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def _batch(self) -> tuple[list[tuple[Job, asyncio.Future[Any]]], bool]:
        """The oldest job with others of its key that still fit, and whether no more do."""
        here = [entry for entry in self._waiting if not entry[1].done()]
        batch, samples, pixels = here[:1], 0, 0
        for entry in here:
            if entry[0].key == here[0][0].key:
                samples, pixels = samples + entry[0].samples, pixels + entry[0].pixels
                if samples > self._limits.max_batch or pixels > self._limits.max_pixels:
                    return batch, True
                batch += [entry] if entry is not here[0] else []
        return batch, samples == self._limits.max_batch


class Service:
    """Tokenizers by name, the first being the default.

    Args:
        models: as they are served.
        limits: see there.
        submit: how a job gets its result; default: a `Batcher` of this process's own.
    """

    def __init__(
        self, models: Mapping[str, Tokenizer], limits: Limits, submit: Callable[[Job], Awaitable[Tensor]] | None = None
    ) -> None:
        self.models = dict(models)
        self.limits = limits
        self.taken = 0
        """Requests that hold a place."""
        self.observe: Callable[[int], None] = lambda samples: None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")
        self._submit = submit or Batcher(self.run, limits, lambda answered: self.taken > answered).submit

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of `max_queue` places.

        Raises:
            Full: there is none.
        """
        if self.taken >= self.limits.max_queue:
            raise Full
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def encode(self, model: str, images: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1] → raw latents, the posterior's mode, `(B, c, ceil(H/f), ceil(W/f))`.

        Raises:
            UserError: see `Tokenizer.encode`; above max_pixels, `ImageTooLarge`.
        """
        job = Job(model=model, kind="encode", data=images, size=(images.shape[-2], images.shape[-1]))
        return await self._submit(self._checked(job))

    async def decode(self, model: str, z: Tensor, size: tuple[int, int], steps: int | None, seed: int) -> Tensor:
        """Raw latents `(B, c, h, w)` → pictures `(B, 3, H, W)` in [-1, 1], each from noise of the same seed.

        Raises:
            UserError: see `Tokenizer.decode`; above max_pixels, `ImageTooLarge`.
        """
        job = Job(model=model, kind="decode", data=z, size=size, steps=steps, seed=seed)
        return await self._submit(self._checked(job))

    async def previews(
        self, model: str, z: Tensor, size: tuple[int, int], steps: int | None, seed: int
    ) -> AsyncIterator[Tensor]:
        """As `decode`, coarse to fine. Whoever stops listening stops the work after the stage that is running."""
        job = self._checked(Job(model=model, kind="decode", data=z, size=size, steps=steps, seed=seed))
        decode = partial(self.models[model].decode_progressive, z, size=size, steps=steps, seed=[seed] * len(z))
        pictures = await self._call(decode)
        self.observe(job.samples)
        while (picture := await self._call(next, pictures, None)) is not None:
            yield picture.cpu()

    async def run(self, jobs: list[Job]) -> list[Tensor | Exception]:
        """A batch of one key: a result or an exception for each. What fails together is tried one by one."""
        return await self._call(self._run, jobs)

    async def timed(self, work: Awaitable[Any]) -> tuple[Any, float]:
        """(result, milliseconds)."""
        begin = time.perf_counter()
        return await work, (time.perf_counter() - begin) * 1000

    def _checked(self, job: Job) -> Job:
        if job.pixels > self.limits.max_pixels:
            (h, w), steps = job.size, job.steps or 1
            raise ImageTooLarge(
                f"{job.samples} × {w}x{h} in {steps} steps = {job.pixels:,} pixels, above max_pixels="
                f"{self.limits.max_pixels:,}: make it smaller, or ask for fewer"
            )
        return job

    def _run(self, jobs: list[Job]) -> list[Tensor | Exception]:
        try:
            self.observe(sum(job.samples for job in jobs))
            first, tokenizer = jobs[0], self.models[jobs[0].model]
            data = torch.cat([job.data for job in jobs]) if len(jobs) > 1 else first.data
            if first.kind == "encode":
                result = tokenizer.encode(data, max_pixels=self.limits.max_pixels).mode()
            else:
                seeds = [job.seed for job in jobs for _ in range(job.samples)]
                result = tokenizer.decode(data, size=first.size, steps=first.steps, seed=seeds)
            return list(result.cpu().split([job.samples for job in jobs]))
        except Exception as error:
            return [error] if len(jobs) == 1 else [self._run([job])[0] for job in jobs]

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def names_and_sources(given: list[str] | None) -> dict[str, str]:
    """`NAME=WHERE`, or WHERE alone, whose last part is the name: {name: where}, in order.

    Where nothing is named, the short names of the packaged weights, default first.

    Raises:
        UserError: two of one name.
    """
    found: dict[str, str] = {}
    for text in given or resources.short_names() or resources.weights_names():
        name, equals, where = text.partition("=")
        where = where if equals else text
        name = name if equals else Path(where).name
        if name in found or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--model {text}: {name!r} is taken or no name for an address; write NAME={where}")
        found[name] = where
    return found
