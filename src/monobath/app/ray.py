"""The API under Ray Serve, which starts, replaces, scales and balances replicas:

    serve run monobath.app.ray:app
    serve run monobath.app.ray:app models=default,f8c4 max_replicas=8 gpus=1 device=cuda

Requests, replies, limits and the token are those of `monobath serve`; `serve.batch` gathers batches. There is no page:
it remembers its visitors, and a replica does not know those of another. `limits.max_queue` is for each replica.
"""

import os
from itertools import groupby

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from torch import Tensor

from ..tokenizer import Tokenizer
from .api import build_api
from .server import TOKEN
from .service import Job, Limits, Service, names_and_sources


class Settings(BaseModel):
    """What follows `serve run monobath.app.ray:app`, as KEY=VALUE."""

    models: str = ""
    """As `--model` of `monobath serve`, with commas; default: the packaged ones."""
    device: str = "cpu"
    dtype: str = "float32"
    min_replicas: int = 1
    max_replicas: int = 4
    gpus: float = 0
    """For each replica; a part of one is fine."""
    limits: Limits = Limits()


def app(settings: Settings) -> Application:
    """The application, for `serve run` and `serve.run`. The token is MONOBATH_TOKEN where this is called."""
    token, limits = os.environ.get(TOKEN, ""), settings.limits
    deployment = serve.deployment(
        name="monobath",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": limits.max_batch,
        },
        max_ongoing_requests=2 * limits.max_queue,  # a full replica still says so
        ray_actor_options={"num_gpus": settings.gpus},
    )
    return deployment(serve.ingress(lambda: build_replica(settings, token))()).bind()


def build_replica(settings: Settings, token: str) -> FastAPI:
    """The API of one replica, with models of its own."""
    limits = settings.limits
    sources = names_and_sources([name for name in settings.models.split(",") if name])
    models = {
        name: Tokenizer.from_pretrained(where, device=settings.device, dtype=getattr(torch, settings.dtype))
        for name, where in sources.items()
    }

    @serve.batch(
        max_batch_size=limits.max_batch,
        batch_wait_timeout_s=limits.max_wait_ms / 1000,
        batch_size_fn=lambda jobs: sum(job.samples for job in jobs),
    )
    async def gathered(jobs: list[Job]) -> list[Tensor | Exception]:
        """Jobs of any key: those of one key together."""
        results: dict[int, Tensor | Exception] = {}
        order = sorted(range(len(jobs)), key=lambda i: str(jobs[i].key))
        for _, group in groupby(order, key=lambda i: jobs[i].key):
            numbers = list(group)
            results |= zip(numbers, await service.run([jobs[i] for i in numbers]), strict=True)
        return [results[i] for i in range(len(jobs))]

    async def submit(job: Job) -> Tensor:
        result = await gathered(job)
        if isinstance(result, Exception):
            raise result
        return result

    service = Service(models, limits, submit)
    return build_api(service, token)
