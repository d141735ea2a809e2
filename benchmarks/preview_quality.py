"""One-step reconstruction of held-out photos against what few numbers a block can keep.

    python benchmarks/preview_quality.py --data PHOTOS.tar [--size 128] [--model default]

Short side resized to SIZE (bicubic, antialias), centre crop, posterior mode, one step, 8-bit; PSNR is the mean of the
pictures' PSNRs; the EffLite distance uses Lite2, which no model is trained with. Baselines: bicubic ÷8 then ×8 keeps
the 3 numbers of one RGB pixel per 8×8 block; `pca-3` and `pca-4` keep 3 or 4 principal components of each block,
fitted to these very photos, which no code can beat block by block with linear maps.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
import torch.nn.functional as F
from command import exit_code
from rich.console import Console
from rich.table import Table
from torch import Tensor

from monobath import Tokenizer
from monobath.data import Crops, PhotoDataset, iterate_eval
from monobath.evaluation.metrics import psnr
from monobath.evaluation.peers import Bicubic
from monobath.images import to_float, to_uint8
from monobath.losses.perceptual import EffLiteDistance


def principal_components(x: Tensor, kept: int) -> Tensor:
    """Keep `kept` principal components of every 8×8 RGB block, fitted to x itself."""
    blocks = F.pixel_unshuffle(x, 8).permute(0, 2, 3, 1)
    flat = blocks.reshape(-1, blocks.shape[-1]).double()
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    basis = vectors[:, -kept:]
    back = ((flat - mean) @ basis @ basis.T + mean).float()
    return F.pixel_shuffle(back.reshape(blocks.shape).permute(0, 3, 1, 2), 8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of held-out photos")
    parser.add_argument("--size", type=int, default=128, help="side of the centre crops, in pixels, a multiple of 8")
    parser.add_argument("--model", nargs="+", default=["default"], help="packaged names or folders")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--noise", choices=["gaussian", "zero"], help="default: what each checkpoint is made for")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()

    dataset = PhotoDataset(args.data, Crops(size=args.size, augment=False))
    x = to_float(torch.cat([b["image"] for b in iterate_eval(dataset, batch_size=16)]))
    scaled = Bicubic(8)
    systems: dict[str, Tensor] = {scaled.name: scaled.decode(scaled.encode(x), range(len(x)))}
    systems |= {f"pca-{k}": principal_components(x, k) for k in (3, 4)}
    for name in args.model:
        tokenizer = Tokenizer.from_pretrained(name)
        parts = []
        for start in range(0, len(x), 16):
            z = tokenizer.encode(x[start : start + 16]).mode()
            seeds = list(range(start, start + len(z)))
            parts.append(tokenizer.decode(z, steps=args.steps, noise=args.noise, seed=seeds))
        systems[f"{name} ({tokenizer.config.encoder.name})"] = torch.cat(parts)

    distance = EffLiteDistance("lite2")
    table = Table(title=f"{len(x)} photos at {args.size}², {args.steps} step(s), data range 0…255")
    for column in ("system", "PSNR, dB", "EffLite distance (Lite2)"):
        table.add_column(column)
    results = {}
    for name, output in systems.items():
        a, b = to_uint8(output), to_uint8(x)
        mean_psnr = psnr(a, b).mean()
        with torch.no_grad():
            pairs = zip(to_float(a).split(16), to_float(b).split(16), strict=True)
            effl = torch.cat([distance(p, q) for p, q in pairs]).mean()
        results[name] = {"psnr": mean_psnr.item(), "efflite_lite2": effl.item()}
        table.add_row(name, f"{mean_psnr:.2f}", f"{effl:.4f}")
    Console().print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
