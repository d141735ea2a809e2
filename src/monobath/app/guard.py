"""Who may come in: a bearer token, compared in constant time, before anything else is looked at; no other origins.

A browser asks for it by itself (basic authentication, any name, the token as password), so that one rule covers the API
and the page. `/health` is open: it says that the process lives, and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/health",)


class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        token: what callers must know; empty: anybody may come.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN:
            await self._app(scope, receive, send)
        elif self._token and not hmac.compare_digest(_credential(Headers(scope=scope)), self._token):
            message = "this server needs its token: send the header Authorization: Bearer TOKEN"
            challenge = {"WWW-Authenticate": 'Basic realm="monobath: the token is the password", charset="UTF-8"'}
            await JSONResponse({"detail": message}, 401, headers=challenge)(scope, receive, send)
        else:
            await self._app(scope, receive, _without_cors(send))


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


def _without_cors(send: Send) -> Send:
    """Gradio allows origins of its own choice; here none are."""

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = list(message.get("headers", ()))
            message["headers"] = [pair for pair in headers if not pair[0].lower().startswith(b"access-control-")]
        await send(message)

    return sender
