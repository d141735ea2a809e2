"""The HTTP API: routes, their limits, and errors that are always JSON, `{"detail": "one line"}`.

400  what was sent cannot be decoded, and the line says why
401  the token is missing or wrong
408  the body did not arrive in time
413  too many bytes or pixels
422  a query that is not one
503  no place is free, or it took too long; Retry-After says when to come again
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from torch import Tensor

from .. import __version__
from ..errors import UserError
from ..images import ImageTooLarge, to_float
from .door import Door, Metrics
from .protocol import DecodeQuery, EncodeQuery, ReconstructQuery, bits_per_pixel, picture_of, picture_reply, psnr
from .service import Full, Service

COME_AGAIN = {"Retry-After": "1"}
GONE = 499
"""Status of a reply that nobody reads: its client has left."""
BOUNDARY = "monobath-preview"


class Problem(BaseModel):
    """Every error."""

    detail: str
    """What is wrong, and what to do about it, in one line."""


ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 401, 408, 413, 422, 500, 503)}


def build_api(service: Service, token: str = "") -> FastAPI:
    """The application, without the page.

    Args:
        service: models and limits.
        token: what callers must know; empty: anybody may call.
    """
    api = FastAPI(title="monobath", version=__version__, description="Latents to pictures in one step, and back.")
    metrics = Metrics(service)
    api.add_middleware(Door, token=token, timeout=service.limits.timeout, metrics=metrics)
    for kind in MISTAKES:
        api.add_exception_handler(kind, refusal)
    first = next(iter(service.models))
    api.include_router(model_routes(service, first))
    for name in service.models:
        api.include_router(model_routes(service, name), prefix=f"/models/{name}")

    @api.get("/models")
    async def models() -> list[dict[str, Any]]:
        """What is served, as a client must know it; the short paths are the first one's."""
        return [
            {
                "name": name,
                "latent_channels": tokenizer.config.encoder.latent_channels,
                "factor": tokenizer.factor,
                "scaling_factor": tokenizer.config.scaling_factor,
                "shift_factor": tokenizer.config.shift_factor,
                "steps": tokenizer.config.sampler.steps,
                "previews": tokenizer.config.decoder.stages,
                "max_pixels": service.limits.max_pixels,
            }
            for name, tokenizer in service.models.items()
        ]

    @api.get("/health")
    async def health() -> dict[str, str]:
        """That the process lives."""
        return {"status": "ok"}

    @api.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return api


def model_routes(service: Service, name: str) -> APIRouter:
    """Decode, encode and reconstruct with one model."""
    tokenizer, limits = service.models[name], service.limits

    async def place() -> AsyncIterator[None]:
        try:
            with service.place():
                yield
        except Full:
            raise busy(f"all {limits.max_queue} places are taken: come again later") from None

    async def received(request: Request) -> bytes:
        too_large = HTTPException(413, f"the body is above max_bytes={limits.max_bytes:,}: send a smaller one")
        body = bytearray()
        try:
            async with asyncio.timeout(limits.timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_bytes:
                        raise too_large
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not arrive within timeout={limits.timeout:g} s: send it again"
            ) from None
        return bytes(body)

    Body = Annotated[bytes, Depends(received)]
    router = APIRouter(dependencies=[Depends(place)], responses=ERRORS)
    binary = {
        "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    }

    async def within(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
        """The reply, in time, or none if the client leaves."""
        task = asyncio.create_task(work)
        leaving = asyncio.ensure_future(request.receive())  # after the body, only that can come
        try:
            await asyncio.wait({task, leaving}, timeout=limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if leaving.done():
                return Response(status_code=GONE)
            raise busy(f"this took longer than timeout={limits.timeout:g} s: come again later, or ask for less")
        finally:
            task.cancel()
            leaving.cancel()

    @router.post("/decode", response_class=Response, openapi_extra=binary)
    async def decode(request: Request, query: Annotated[DecodeQuery, Query()], body: Body) -> Response:
        """Latents → a picture or a tensor, in the protocol of diffusers' `remote_decode`."""
        accept = request.headers.get("accept", "")
        config = tokenizer.config
        z, size = query.latents(body, tokenizer.factor, (config.scaling_factor, config.shift_factor))

        async def whole() -> Response:
            pictures = await service.decode(name, z, size, query.steps, query.seed)
            return await asyncio.to_thread(query.reply, pictures, accept)

        async def progressive() -> Response:
            pictures = service.previews(name, z, size, query.steps, query.seed)
            first = await anext(pictures)  # what is wrong with the request shows here
            parts = multipart(first, pictures, lambda x: query.reply(x, accept))
            return StreamingResponse(parts, media_type=f"multipart/mixed; boundary={BOUNDARY}")

        return await within(request, progressive() if query.progressive else whole())

    @router.post("/encode", response_class=Response, openapi_extra=binary)
    async def encode(request: Request, query: Annotated[EncodeQuery, Query()], body: Body) -> Response:
        """A picture file, or a tensor → latents, in the protocol of diffusers' `remote_encode`."""

        async def work() -> Response:
            images = await asyncio.to_thread(query.images, body, limits.max_pixels)
            return query.reply(await service.encode(name, images))

        return await within(request, work())

    @router.post("/reconstruct", response_class=Response, openapi_extra=binary)
    async def reconstruct(request: Request, query: Annotated[ReconstructQuery, Query()], body: Body) -> Response:
        """A picture file → its reconstruction, with PSNR, bits per pixel and times as headers."""

        async def work() -> Response:
            pixels = await asyncio.to_thread(picture_of, body, limits.max_pixels)
            size = (pixels.shape[1], pixels.shape[2])
            z, encode_ms = await service.timed(service.encode(name, to_float(pixels)[None]))
            pictures, decode_ms = await service.timed(service.decode(name, z, size, query.steps, query.seed))
            reply = await asyncio.to_thread(picture_reply, pictures[0], query.image_format)
            reply.headers["psnr"] = f"{psnr(pixels, pictures[0]):.3f}"
            reply.headers["bits-per-pixel"] = f"{bits_per_pixel(z, size):.3f}"
            reply.headers["encode-ms"] = f"{encode_ms:.1f}"
            reply.headers["decode-ms"] = f"{decode_ms:.1f}"
            return reply

        return await within(request, work())

    return router


async def multipart(
    first: Tensor, rest: AsyncIterator[Tensor], reply: Callable[[Tensor], Response]
) -> AsyncIterator[bytes]:
    """Pictures as parts of multipart/mixed, each sent as soon as it exists."""
    picture: Tensor | None = first
    while picture is not None:
        part = await asyncio.to_thread(reply, picture)
        head = "".join(f"{name}: {value}\r\n" for name, value in part.headers.items())
        yield f"--{BOUNDARY}\r\n{head}\r\n".encode() + part.body + b"\r\n"
        picture = await anext(rest, None)
    yield f"--{BOUNDARY}--\r\n".encode()


def busy(message: str) -> HTTPException:
    """503, with the time to come again."""
    return HTTPException(503, message, headers=COME_AGAIN)


MISTAKES = (UserError, RequestValidationError, MemoryError, torch.OutOfMemoryError, Exception)
"""What `refusal` answers."""


async def refusal(request: Request, error: Exception) -> JSONResponse:
    """An error as one line; of what should not happen, the server's log has the traceback."""
    status, detail, headers = 500, "internal error: the server's log says more", None
    if isinstance(error, UserError):
        status, detail = 413 if isinstance(error, ImageTooLarge) else 400, str(error)
    elif isinstance(error, RequestValidationError):
        mistakes = [f"{'.'.join(map(str, e['loc'][1:])) or 'query'}: {e['msg']}" for e in error.errors()]
        status, detail = 422, "; ".join(mistakes)
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        status, detail, headers = 503, "out of memory: come again later, or send something smaller", COME_AGAIN
    return JSONResponse({"detail": detail}, status, headers)
