"""Counts and times for Prometheus, at `/metrics`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Service


class Metrics:
    """What one application counts, in a registry of its own."""

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
        places.set_function(lambda: service.places.taken)
        service.observe = batches.observe

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts the replies of our own routes by the route's template."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin, status = time.perf_counter(), 499  # the client left before a reply

        async def sender(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, sender)
        finally:
            route = getattr(scope.get("route"), "path", "") or "other"
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - begin)
