"""Models behind one thread of arithmetic: what a request may ask, how a batch is done, previews as they come.

Results are those of `Tokenizer.encode` and `Tokenizer.decode` for each request alone, whatever shared its batch.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import resources
from ..errors import UserError
from ..images import ImageTooLarge
from ..tokenizer import Tokenizer
from .batching import Batcher, Job, Limits, Places

Submit = Callable[[Job], Awaitable[Tensor]]


class Service:
    """Tokenizers by name, the first being the default.

    Args:
        models: as they are served.
        limits: see there.
        submit: how a job gets its result; default: a `Batcher` of this process's own.
    """

    def __init__(self, models: Mapping[str, Tokenizer], limits: Limits, submit: Submit | None = None) -> None:
        self.models = dict(models)
        self.limits = limits
        self.places = Places(limits.max_queue)
        self.observe: Callable[[int], None] = lambda samples: None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")
        self._submit = submit or Batcher(self.run, limits, lambda answered: self.places.taken > answered).submit

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


def packaged_names() -> list[str]:
    """What is served where nothing is named: the short names of the packaged weights, default first."""
    return resources.short_names() or resources.weights_names()


def names_and_sources(given: list[str]) -> dict[str, str]:
    """`NAME=WHERE`, or WHERE alone, whose last part is the name: {name: where}, in order.

    Raises:
        UserError: two of one name.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, where = text.partition("=")
        where = where if equals else text
        name = name if equals else Path(where).name
        if name in found or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--model {text}: {name!r} is taken or no name for an address; write NAME={where}")
        found[name] = where
    return found
