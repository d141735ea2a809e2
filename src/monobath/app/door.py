"""The door of the application, through which every request and reply passes.

Who may come in: a bearer token, compared in constant time, before anything else is looked at; no other origins. A
browser asks for it by itself (basic authentication, any name, the token as password), so that one rule covers the API
and the page. `/health` is open: it says that the process lives, and nothing else.

An answer that comes before the body was read, such as 413 or 503, arrives: a server that answers and closes while the
client still sends makes most clients see a broken pipe instead. So what is left of the body is read first, and thrown
away. Refusals are drained, and count.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Service

OPEN = ("/health",)


class Metrics:
    """What one application counts for Prometheus, in a registry of its own."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "monobath_requests", "Replies sent", ("route", "status"), registry=self.registry
        )  # exported as monobath_requests_total
        self.seconds = Histogram(
            "monobath_request_seconds", "From request to reply", ("route",), registry=self.registry
        )
        batches = Histogram(
            "monobath_batch_samples", "Samples per batch", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        places = Gauge("monobath_requests_in_progress", "Requests that hold a place", registry=self.registry)
        places.set_function(lambda: service.taken)
        service.observe = batches.observe


class Door:
    """ASGI middleware.

    Args:
        app: what is behind it.
        token: what callers must know; empty: anybody may come.
        timeout: longest time for a body, in seconds, from the request's beginning.
        metrics: where replies are counted, by the route's template.
    """

    def __init__(self, app: ASGIApp, token: str, timeout: float, metrics: Metrics) -> None:
        self._app, self._token, self._timeout, self._metrics = app, token.encode(), timeout, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        app = self._app if self._lets_in(scope) else _refusal()
        if scope["type"] == "websocket":
            return await app(scope, receive, send)
        begin, status = time.perf_counter(), 499  # the client left before a reply
        more, until = True, asyncio.get_running_loop().time() + self._timeout

        async def receiver() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sender(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.start":
                # Gradio allows origins of its own choice; here none are.
                headers = message.get("headers", ())
                message["headers"] = [pair for pair in headers if not pair[0].lower().startswith(b"access-control-")]
                try:
                    async with asyncio.timeout_at(until):
                        while more:
                            await receiver()
                except TimeoutError:
                    pass  # slow clients may miss the answer
            await send(message)

        try:
            await app(scope, receiver, sender)
        finally:
            route = getattr(scope.get("route"), "path", "") or "other"
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)

    def _lets_in(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in OPEN:
            return True
        return hmac.compare_digest(_credential(Headers(scope=scope)), self._token)


def _refusal() -> ASGIApp:
    message = "this server needs its token: send the header Authorization: Bearer TOKEN"
    challenge = {"WWW-Authenticate": 'Basic realm="monobath: the token is the password", charset="UTF-8"'}
    return JSONResponse({"detail": message}, 401, headers=challenge)


def _credential(headers: Headers) -> bytes:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
