"""Windowed attention: the backends side by side, and how far each is from the reference (dense).

    python benchmarks/attention.py [--device cuda] [--grids 32x32 64x64 128x128] [--dtype bfloat16]

One process, interleaved, median of --repeats after a warm-up, forward, then forward and backward. A grid of 32×32
tokens is a picture of 256². Above 64×64 the dense one is left out, as its largest tensor would not fit.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
from command import exit_code
from rich.console import Console
from rich.table import Table

from monobath.evaluation.speed import measure
from monobath.models.attention import windowed_attention


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--grids", nargs="+", default=["16x16", "32x32", "64x64"], help="rows x columns of tokens")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=40, help="channels a head (S has 40)")
    parser.add_argument("--reach", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backends", nargs="+", help="default: all")
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    table = Table("grid", "backend", "ms", "forward and backward, ms", "largest difference from dense")
    for text in args.grids:
        grid = tuple(int(side) for side in text.split("x"))
        generator = torch.Generator().manual_seed(0)
        shape = (args.batch, args.heads, grid[0] * grid[1], args.width)
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
        side = 2 * args.reach + 1
        bias = torch.randn(side, side, args.heads, generator=generator).to(device).requires_grad_()
        backends = args.backends or (["dense", "blocked"] if grid[0] * grid[1] <= 64 * 64 else ["blocked"])
        works = {name: partial(_forward, q, k, v, bias, grid, name) for name in backends}
        outs = {name: work() for name, work in works.items()}
        times = measure(works, repeats=args.repeats, warmup=2, device=device)
        works = {name: partial(_both, q, k, v, bias, grid, name) for name in backends}
        both = measure(works, repeats=args.repeats, warmup=2, device=device)
        for name in backends:
            far = f"{(outs[name] - outs['dense']).abs().max():.1e}" if "dense" in outs else ""
            table.add_row(text, name, f"{times[name].median:.2f}", f"{both[name].median:.2f}", far)
    Console().print(table)
    return 0


@torch.no_grad()
def _forward(*arguments: object) -> torch.Tensor:
    *tensors, backend = arguments
    return windowed_attention(*tensors, backend=backend)  # type: ignore[arg-type,misc]


@torch.enable_grad()  # `measure` runs without
def _both(*arguments: object) -> None:
    *tensors, backend = arguments
    windowed_attention(*tensors, backend=backend).float().square().mean().backward()  # type: ignore[arg-type,misc]


if __name__ == "__main__":
    sys.exit(exit_code(main))
