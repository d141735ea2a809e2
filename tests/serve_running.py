"""A real server on a free port of this machine, and what the tests of it share."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is missing: pip install 'monobath[serve]'")
requests = pytest.importorskip("requests", reason="requests is missing: pip install 'monobath[diffusers]'")

from conftest import tiny_tokenizer  # noqa: E402

from monobath.app.api import build_api  # noqa: E402
from monobath.app.server import with_page  # noqa: E402
from monobath.app.service import Limits, Service  # noqa: E402


@dataclass
class Running:
    """A server that is up."""

    service: Service
    url: str

    def post(self, path: str, data: Any = b"", params: Any = None, **options: Any) -> Any:
        """A reply; every test of errors asks for JSON."""
        return requests.post(self.url + path, data=data, params=params, timeout=30, **options)

    def get(self, path: str, **options: Any) -> Any:
        """A reply."""
        return requests.get(self.url + path, timeout=30, **options)


def models() -> dict[str, Any]:
    """Two tiny random models: one of noise and one step, one of three stages."""
    return {"plain": tiny_tokenizer(0), "staged": tiny_tokenizer(1, decoder={"stages": 3}, stages=3)}


@contextmanager
def running(token: str = "", page_folder: str = "", served: Any = None, **limits: Any) -> Iterator[Running]:
    """A server in a thread, for as long as the block lasts.

    Args:
        served: tokenizers by name; default: `models()`.
        page_folder: where the page keeps uploads; empty: no page.
        limits: fields of `Limits`.
    """
    service = Service(served or models(), Limits(**limits))
    api = build_api(service, token)
    if page_folder:
        with_page(api, service, page_folder)
    with listening(api, hurry=bool(page_folder)) as url:
        yield Running(service, url)


@contextmanager
def listening(api: Any, hurry: bool = False) -> Iterator[str]:
    """The address of an application that is served from a thread.

    Args:
        hurry: do not wait for open connections at the end: a page's heartbeats last as long as its browser.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(api, log_level="critical", server_header=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            server.force_exit = hurry
            thread.join(20)
            assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.01)


def picture(height: int = 24, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def query(z: torch.Tensor, **others) -> dict:
    return {"shape": list(z.shape), "dtype": str(z.dtype).removeprefix("torch."), **others}


def raw(z: torch.Tensor) -> bytes:
    return z.contiguous().view(torch.uint8).numpy().tobytes()
