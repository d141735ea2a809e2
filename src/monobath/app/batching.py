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

from ..errors import UserError, check_least


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
