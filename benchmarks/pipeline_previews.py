"""What a preview a step costs beside the step: a UNet of Stable Diffusion 1.5's size with random weights.

    python benchmarks/pipeline_previews.py --steps 3

The pipeline is diffusers' `StableDiffusionPipeline` with classifier-free guidance. Random weights take the same time as
trained ones; so does the decoder, the packaged model of Stable Diffusion's latent shape. Printed is the time of each
step, of the preview behind it, and their median ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from command import exit_code

from monobath.integrations.diffusers import AutoencoderMonobath, LatentPreviews


def pipeline(model: str) -> Any:
    """Stable Diffusion 1.5's UNet and scheduler, without text encoder and safety checker."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()  # its defaults are SD 1.5's
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        vae=AutoencoderMonobath.from_monobath(model), unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), **parts,
        requires_safety_checker=False,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="f8c4", help="the previews' decoder, of four channels")
    parser.add_argument("--size", type=int, default=512, help="side of the picture, in pixels")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args(arguments)
    pipe = pipeline(given.model)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as out:
        previews = LatentPreviews(given.model, out=out, notebook=False)
        since = time.perf_counter()

        def timed(*call: Any) -> dict[str, Any]:
            nonlocal since
            begin = time.perf_counter()
            kept = previews(*call)
            times.append((begin - since, time.perf_counter() - begin))
            since = time.perf_counter()
            return kept

        embeddings = torch.zeros(1, 77, 768)
        pipe.set_progress_bar_config(disable=True)
        pipe(prompt_embeds=embeddings, negative_prompt_embeds=embeddings, num_inference_steps=given.steps + 1,
             height=given.size, width=given.size, output_type="latent", callback_on_step_end=timed)  # fmt: skip
    for step, preview in times[1:]:  # the first one warms up
        sys.stdout.write(f"step {step:.2f} s, preview {preview:.3f} s\n")
    share = statistics.median(preview / step for step, preview in times[1:])
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    sys.stdout.write(
        f"{100 * share:.1f} % of a step: {given.model} at {given.size}², beside a UNet of {parameters / 1e6:.0f} M "
        f"parameters, {torch.get_num_threads()} thread(s)\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
