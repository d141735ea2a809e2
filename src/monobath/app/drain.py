"""An answer that comes before the body was read, such as 413 or 503, arrives.

A server that answers and closes while the client still sends makes most clients see a broken pipe instead of the
answer. So what is left of the body is read first, and thrown away.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Drained:
    """ASGI middleware.

    Args:
        app: what may answer early.
        timeout: longest time for a body, in seconds, from the request's beginning.
    """

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app, self._timeout = app, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        more, until = True, asyncio.get_running_loop().time() + self._timeout

        async def receiver() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                try:
                    async with asyncio.timeout_at(until):
                        while more:
                            await receiver()
                except TimeoutError:
                    pass  # slow clients may miss the answer
            await send(message)

        await self._app(scope, receiver, sender)
