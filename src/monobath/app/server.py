"""One process that serves the API and the page until it is told to stop; then what is under way is finished."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.routing import Mount

from ..errors import UserError
from .api import build_api
from .service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN = "MONOBATH_TOKEN"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 is a free one.

    Raises:
        UserError: the port is taken, or the host is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"--host {host} --port {port} cannot be listened on ({reason}): choose another port") from None


def checked_token(host: str, no_token: bool) -> str:
    """The token from the environment.

    Raises:
        UserError: everybody on the network could come in, and nobody said that they may.
    """
    token = os.environ.get(TOKEN, "")
    if not (token or no_token or host in LOOPBACK):
        raise UserError(f"--host {host} lets others in: set {TOKEN}, or add --no_token if everybody may use this")
    return "" if no_token else token


def run(service: Service, listener: socket.socket, token: str, page: bool, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM (then exit code 0) or Ctrl-C; open requests are answered first.

    Args:
        page: whether `/` is the web page.
        ready: called once, before the first request.
    """
    with tempfile.TemporaryDirectory(prefix="monobath-") as folder:  # mode 700
        api = build_api(service, token)
        mounted = with_page(api, service, folder) if page else None
        config = uvicorn.Config(
            api,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=int(service.limits.timeout) + 1,
        )
        # uvicorn hands the signal on once everything is answered: to this, so that the folder is removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        ready()
        Server(config, mounted).run(sockets=[listener])


class Server(uvicorn.Server):
    """Also ends the page's heartbeats, which otherwise keep a server up as long as a browser looks at it."""

    def __init__(self, config: uvicorn.Config, page: Any) -> None:
        super().__init__(config)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._page is not None:
            self._page.stop_event.set()
        await super().shutdown(sockets)


def with_page(api: FastAPI, service: Service, folder: str) -> Any:
    """Mount the page at `/`; returns Gradio's application.

    Args:
        folder: where Gradio keeps uploads; it reads that, and whether to phone home, from the environment.
    """
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr

    from .page import LOCKED, LOOK, build_page

    page = build_page(service)
    gr.mount_gradio_app(api, page, path="/", max_file_size=service.limits.max_bytes, **LOOK, **LOCKED)
    mount = api.routes[-1]
    assert isinstance(mount, Mount)
    return mount.app
