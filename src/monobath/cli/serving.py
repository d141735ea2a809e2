"""The verb that serves models over HTTP. Imports stay lazy."""

from __future__ import annotations

from ..errors import UserError
from .shared import DType, load_tokenizer, write


def serve(
    *,
    model: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 8,
    max_wait_ms: float = 5.0,
    max_queue: int = 64,
    max_bytes: int = 64 << 20,
    max_pixels: int = 1 << 22,
    timeout: float = 60.0,
    no_page: bool = False,
    no_token: bool = False,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Serve models over HTTP, to diffusers' remote VAE client and others, and a web page. Ctrl-C or SIGTERM stops it.

    POST /decode, /encode and /reconstruct are the first model's; every model has /models/NAME/decode and so on. GET
    /docs describes the rest. Where the environment has MONOBATH_TOKEN, callers must send it (Authorization: Bearer
    TOKEN), and the page asks for it as a password.

    Args:
        model: Packaged names, folders, or Hugging Face Hub ids, each under its last part as name, or NAME=WHERE;
            default: the packaged ones.
        host: Address to listen on. Another than this machine's own needs MONOBATH_TOKEN, or --no_token.
        port: Port to listen on; 0: a free one.
        max_batch: Most samples decoded together.
        max_wait_ms: How long a request waits for others that are arriving, in milliseconds.
        max_queue: Most requests at a time; further ones get 503 and are told when to come again.
        max_bytes: Largest body of a request, in bytes.
        max_pixels: Largest picture, in pixels, counted once per sample and step; also of a batch.
        timeout: Longest time for a body to arrive, and for the work on it, in seconds.
        no_page: Serve the API alone.
        no_token: Let everybody in, whatever the host.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    try:
        from ..app import server
        from ..app.service import Limits, Service, names_and_sources

        if not no_page:
            import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error}): pip install 'monobath[serve]'") from None
    limits = Limits(
        max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue, max_bytes=max_bytes, max_pixels=max_pixels,
        timeout=timeout,
    )  # fmt: skip
    token = server.checked_token(host, no_token)
    sources = names_and_sources(model)
    listener = server.listen(host, port)
    models = {name: load_tokenizer(where, device, dtype) for name, where in sources.items()}
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    server.run(
        Service(models, limits),
        listener,
        token,
        page=not no_page,
        ready=lambda: write(f"serving {', '.join(models)} at {address}\n"),
    )
