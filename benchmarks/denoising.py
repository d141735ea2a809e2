"""How well a decoder of several steps denoises: the error of its clean image at each time, beside simple estimates.

    python benchmarks/denoising.py MODEL [MODEL …] --data HELD-OUT.tar [--times 0.03 0.06 … 1]

Sampling in several steps is as good as the decoder's clean images are on the way: where they are worse than those of a
denoiser that has never seen the latent, steps add errors instead of details. For each time t, held-out photos at 256²
are mixed with noise, x_t = (1 − t)·x + t·ε, and the mean squared error to x (range [-1, 1]) of the decoder's clean
image, given x_t and the latent, is printed beside that of x_t / (1 − t) as it is and of total-variation denoising of it
(Chambolle; scikit-image), the best of five weights each time, which sees no latent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from trainings import device, exit_code, markdown

from monobath import Tokenizer
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.decoders.unet import UNet
from monobath.flow import interpolate, to_clean
from monobath.images import to_float

WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.3)
"""Of total variation, in standard deviations of the noise."""


def total_variation(noisy: Tensor, std: float, x: Tensor) -> float:
    """Mean squared error of the best of `WEIGHTS`, chosen for all pictures together."""
    from skimage.restoration import denoise_tv_chambolle

    pictures = noisy.permute(0, 2, 3, 1).numpy()
    found = []
    for weight in WEIGHTS:
        smooth = [torch.from_numpy(denoise_tv_chambolle(p, weight=weight * std, channel_axis=2)) for p in pictures]
        found.append((torch.stack(smooth).permute(0, 3, 1, 2).clamp(-1, 1) - x).square().mean().item())
    return min(found)


@torch.no_grad()
def clean_error(tokenizer: Tokenizer, x: Tensor, noise: Tensor, z: Tensor, t: float) -> float:
    """Mean squared error of a decoder's clean images at time t, not clipped."""
    decoder = tokenizer.decoder
    assert isinstance(decoder, UNet)
    kind = decoder.config.prediction
    total = 0.0
    for rows in torch.arange(len(x)).split(8):
        times = torch.full((len(rows),), t)
        x_t, where = interpolate(x[rows], noise[rows], times), tokenizer.device
        predicted = decoder(x_t.to(where), times.to(where), z[rows].to(where)).cpu()
        total += (to_clean(predicted, x_t, times, kind) - x[rows]).square().mean().item() * len(rows)  # type: ignore[arg-type]
    return total / len(x)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="single-scale models: packaged names, folders, Hub ids")
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of held-out photos")
    parser.add_argument("--times", type=float, nargs="+", default=[0.03, 0.06, 0.1, 0.14, 0.25, 0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--limit", type=int, default=24, help="at most so many photos")
    args = parser.parse_args(arguments)
    dataset = make_dataset(args.data, Crops(size=args.size, augment=False))
    batches = iterate_eval(dataset, batch_size=8, limit=args.limit)
    x = torch.cat([to_float(batch["image"]) for batch in batches])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    loaded = [Tokenizer.from_pretrained(name, device=device()).eval() for name in args.models]
    latents = [torch.cat([model.encode(part).mode().cpu() for part in x.split(8)]) for model in loaded]
    lines = []
    for t in args.times:
        cells = ["", ""]
        if t < 1:
            std = t / (1 - t)
            noisy = x + std * noise
            cells = [f"{std**2:.4f}", f"{total_variation(noisy, std, x):.4f}"]
        pairs = zip(loaded, latents, strict=True)
        lines.append([f"{t:g}", *cells, *(f"{clean_error(model, x, noise, z, t):.4f}" for model, z in pairs)])
    head = ["t", "noisy image", "total variation", *args.models]
    sys.stdout.write(markdown(head, lines))
    sys.stdout.write(f"\nMean squared errors, {len(x)} photos at {args.size}², images in [-1, 1].\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
