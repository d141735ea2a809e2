"""A bounded number of requests, and those of one shape decoded together.

`Places` bounds what is in the house, from the first byte of a request to the last of its reply: memory, and waiting
time. `Batcher` is the queue of those who have arrived; while one batch is worked on, the next gathers by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


class Full(Exception):
    """No place is free."""


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


class Places:
    """A bounded number of requests."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold one place.

        Raises:
            Full: there is none.
        """
        if self.taken >= self.limit:
            raise Full
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Batcher:
    """Gathers jobs, oldest first, and works on one batch at a time.

    Args:
        run: a batch of jobs of one key → a result or an exception for each.
        max_batch: most samples in a batch; a job of more is a batch of its own.
        max_pixels: most pixels in a batch, likewise.
        max_wait: how long the first job waits for others, in seconds, while `expected` says that some may come.
        expected: whether a request has arrived whose job is not here yet. A lone client never waits.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Awaitable[list[Any]]],
        *,
        max_batch: int,
        max_pixels: int,
        max_wait: float,
        expected: Callable[[int], bool],
    ) -> None:
        self._run, self._expected = run, expected
        self.max_batch, self.max_pixels, self.max_wait = max_batch, max_pixels, max_wait
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
        loop = asyncio.get_running_loop()
        while self._waiting:
            until = loop.time() + self.max_wait
            while self._expected(self._unanswered) and loop.time() < until and not self._batch()[1]:
                await asyncio.sleep(self.max_wait / 10)
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
            job = entry[0]
            if job.key != here[0][0].key:
                continue
            samples, pixels = samples + job.samples, pixels + job.pixels
            if samples > self.max_batch or pixels > self.max_pixels:
                return batch, True
            if entry is not here[0]:
                batch.append(entry)
        return batch, samples == self.max_batch
