"""The web page: a photo, its reconstruction under one slider, its latents, figures; previews as they arrive.

Everything comes from this machine: fonts are the system's, analytics are off. Uploads live in Gradio's temporary folder
and are deleted from it after minutes; `server` makes that folder private and removes it at the end.
"""

from __future__ import annotations

import base64
import html
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from .. import resources
from ..errors import UserError
from ..images import open_image, pil_to_tensor, to_float
from .protocol import BITS, bits_per_pixel, latent_picture, picture_reply, psnr
from .service import Full, Service

SIDE = 1024
"""Longest side that is worked on, in pixels: a photo from a phone would take a CPU many seconds."""
AS_MADE = "as made"
COMPARED = Path(__file__).with_name("compared.html").read_text(encoding="utf-8")
STEPS = (AS_MADE, "1", "2", "4", "8")
FONTS = ("system-ui", "sans-serif")
LOOK = {
    "theme": gr.themes.Base(primary_hue="orange", font=FONTS, font_mono=("ui-monospace", "monospace")),
    "css_paths": [Path(__file__).with_name("page.css")],
    "head": '<meta name="color-scheme" content="light dark">',
}
"""How it looks: arguments of `mount_gradio_app` and of `launch`."""
LOCKED: dict[str, Any] = {"footer_links": [], "ssr_mode": False, "show_error": False, "run_history": False}
"""What is left out, likewise."""


def build_page(service: Service) -> gr.Blocks:
    """The page over a service's models."""
    names = list(service.models)

    async def develop(photo: str | None, name: str, steps: str) -> AsyncIterator[tuple[str, Any, str]]:
        """(slider, latents, figures), again for each preview; or our message."""
        if photo is None:
            yield "", None, ""
            return
        try:
            with service.place():
                async for shown in developed(service, photo, name, None if steps == AS_MADE else int(steps)):
                    yield shown
        except UserError as error:
            yield "", None, said(str(error))
        except Full:
            yield "", None, said("Many photos are being developed: try again in a moment.")

    samples = [str(path) for path in resources.sample_paths()]

    def sample(event: gr.SelectData) -> str:
        return samples[event.index]

    # Every minute, uploads are deleted that are ten minutes old.
    with gr.Blocks(title="monobath", analytics_enabled=False, delete_cache=(60, 600)) as page:
        chosen = gr.State()
        gr.Markdown("# monobath\nDrop a photo: it is turned into latents, and back into a picture in one step.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                photo = gr.File(label="Photo", type="filepath", height=140, elem_id="photo")
                gallery = gr.Gallery(
                    samples, columns=4, object_fit="cover", allow_preview=False, interactive=False, show_label=False,
                    label="Or one of ours", buttons=[], elem_id="samples",
                )  # fmt: skip
                model = gr.Radio(names, value=names[0], label="Model", visible=len(names) > 1)
                steps = gr.Radio(
                    STEPS, value=AS_MADE, label="Steps", info="More than the model was made for can be worse"
                )
            with gr.Column(scale=2, min_width=280):
                slider = gr.HTML(elem_id="slider")
                figures = gr.HTML(elem_id="figures")
                latents = gr.Image(
                    label="Latents: their three principal components", format="png", interactive=False, buttons=[],
                    elem_id="latents",
                )  # fmt: skip
        quietly: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        photo.upload(lambda path: (path, None), photo, [chosen, photo], **quietly)  # frees the field for the next one
        gallery.select(sample, None, chosen, **quietly)
        gr.on(
            [chosen.change, model.change, steps.change],
            develop,
            [chosen, model, steps],
            [slider, latents, figures],
            trigger_mode="always_last",
            show_progress_on=[figures],
            api_visibility="private",
        )
    page.queue(max_size=service.limits.max_queue, default_concurrency_limit=service.limits.max_batch)
    return page


async def developed(
    service: Service, photo: str, name: str, steps: int | None
) -> AsyncIterator[tuple[str, Image.Image, str]]:
    """What the page shows, coarse to fine.

    Raises:
        UserError: not a picture, or one too large.
    """
    original = open_image(photo, name=Path(photo).name)
    shown = original.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = pil_to_tensor(shown)
    size = (shown.height, shown.width)
    given = to_float(pixels)
    z, encode_ms = await service.timed(service.encode(name, given[None]))
    latents = latent_picture(z, service.models[name].factor)
    stages, decode_ms = service.models[name].config.sampler.stages, 0.0
    previews = service.previews(name, z, size, steps, 0)
    for _ in range(stages):  # as `decode` does it, which has one stage or all of the decoder's
        next_one = anext(previews) if stages > 1 else service.decode(name, z, size, steps, 0)
        (picture,), ms = await service.timed(next_one)
        decode_ms += ms
        words = f"Preview: {picture.shape[2]} × {picture.shape[1]} pixels …"
        if picture.shape == pixels.shape:
            shrunk = "" if original.size == shown.size else f", shrunk from {original.width} × {original.height}"
            words = (
                f"<b>{psnr(pixels, picture):.2f} dB</b> PSNR, <b>{bits_per_pixel(z, size):.2f} bits</b> per pixel of "
                f"24, encoded in <b>{encode_ms:.0f} ms</b>, decoded in <b>{decode_ms:.0f} ms</b>: "
                f"{shown.width} × {shown.height} pixels{shrunk}, {z.numel():,} latent numbers of {BITS} bits."
            )
        yield compared(given, picture), latents, f'<p role="status">{words}</p>'


def said(message: str) -> str:
    """Words of ours, which may hold words of the user's."""
    return f'<p role="alert"><b>{html.escape(message)}</b></p>'


def compared(original: Tensor, output: Tensor) -> str:
    """Two pictures `(3, H, W)`, the second of any size, under one slider."""
    files = (base64.b64encode(picture_reply(picture, "jpg").body).decode() for picture in (original, output))
    return COMPARED.format(*(f"data:image/jpeg;base64,{file}" for file in files))
