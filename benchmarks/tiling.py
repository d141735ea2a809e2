"""Memory, time and seams of decoding large pictures in tiles.

    python benchmarks/tiling.py --sizes 1024 2048 4096 --tiles 0 512 1024

A mosaic of packaged sample photos, SIZE² pixels, is encoded in tiles, and its latent decoded to 8 bit: whole (tile 0)
and in tiles, each case in a fresh process, on the CPU in float32. "Peak" is the process's largest resident memory;
"before" is what it was when decoding began (Python, torch, weights, latent). "Seam" is the mean absolute difference of
neighbouring pixels across the lines where tiles begin, end or change over, divided by that of all other lines at the
same place of an 8×8 block (blocks have edges of their own): 1 is no seam. In the whole picture it is measured along the
lines that tiles of 512 would have, which says what chance does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_GB = 6.0
"""Largest accepted peak of the tiled cases."""
WORST_SEAM = 1.1
"""Largest accepted seam."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="sides in pixels")
    parser.add_argument("--tiles", type=int, nargs="+", default=[0, 512], help="sides of tiles; 0: the picture whole")
    parser.add_argument("--overlap", type=int, help="pixels that tiles share (default: monobath's)")
    parser.add_argument("--model", default="default", help="packaged name or folder (default: %(default)s)")
    parser.add_argument("--noise", choices=["gaussian", "zero"], help="default: what the model was made for")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    # What fresh processes are called with. This one stays small: on Linux a child's peak begins with its parent's size.
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    parser.add_argument("--latent", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        prepare(args.model, args.sizes[0], args.prepare)
        return 0
    if args.latent:
        sys.stdout.write(json.dumps(measure(args, args.sizes[0], args.tiles[0])) + "\n")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in args.sizes:
            latent = str(Path(folder) / f"{side}.pt")
            command = [sys.executable, __file__, "--model", args.model, "--sizes", str(side), "--prepare", latent]
            subprocess.run(command, check=True)
            for tile in args.tiles:
                rows.append(in_fresh_process(args, side, tile, latent))
                show(rows[-1])
    report = {
        "model": args.model,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(any(r["tile"] and (r["peak_gb"] > LIMIT_GB or r["seam"] > WORST_SEAM) for r in rows if "peak_gb" in r))


def in_fresh_process(args: argparse.Namespace, side: int, tile: int, latent: str) -> dict:
    command = [sys.executable, __file__, "--model", args.model, "--latent", latent]
    command += ["--sizes", str(side), "--tiles", str(tile)]
    command += ["--overlap", str(args.overlap)] if args.overlap is not None else []
    command += ["--noise", args.noise] if args.noise else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # negative: a signal, such as −9, memory
        return {"side": side, "tile": tile, "failed": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def prepare(model: str, side: int, path: str) -> None:
    """Encode the mosaic, in tiles; photos lie off the grid of tiles and are mirrored, so that none repeats nearby."""
    import numpy as np
    import torch
    from PIL import Image

    from monobath import Tokenizer, resources

    photos = [np.asarray(Image.open(p).convert("RGB")) for p in resources.sample_paths()]
    cell = min(min(p.shape[:2]) for p in photos) - 5
    picture = np.zeros((side, side, 3), np.uint8)
    for k, (y, x) in enumerate((y, x) for y in range(0, side, cell) for x in range(0, side, cell)):
        photo = np.rot90(photos[k % len(photos)][:cell, :cell], k // len(photos) % 4)
        picture[y : y + cell, x : x + cell] = photo[: side - y, : side - x]
    torch.save(Tokenizer.from_pretrained(model).encode(picture, tile=512).mode(), path)


def measure(args: argparse.Namespace, side: int, tile: int) -> dict:
    import torch

    from monobath import Tokenizer
    from monobath.tiles import plan

    tokenizer = Tokenizer.from_pretrained(args.model)
    config = tokenizer.config.decoder
    z = torch.load(args.latent, weights_only=True)
    tokenizer.decode(z[:, :, :8, :8])  # what the first call allocates and compiles
    before = memory_gb()
    start = time.perf_counter()
    picture = tokenizer.decode(z, noise=args.noise, tile=tile or None, overlap=args.overlap, output="uint8")
    seconds = time.perf_counter() - start
    peak = memory_gb()
    unit = max(config.factor, tokenizer.decoder.unit)
    layout = plan((side, side), tile or 512, args.overlap, unit, tokenizer.decoder.reach())
    return {
        "side": side,
        "tile": tile,
        "tiles": len(layout.rows) * len(layout.cols) if layout and tile else 1,
        "seconds": round(seconds, 2),
        "before_gb": round(before, 3),
        "peak_gb": round(peak, 3),
        "seam": round(max(seam(picture[0], 1, layout.rows), seam(picture[0], 2, layout.cols)), 4) if layout else 1.0,
    }


def memory_gb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def seam(picture, dim: int, spans: list[slice]) -> float:
    """Mean absolute difference across the lines between tiles over that across all other lines; see the top."""
    length = picture.shape[dim]
    steps = [
        (picture.select(dim, i).int() - picture.select(dim, i - 1).int()).abs().float().mean().item()
        for i in range(1, length)
    ]
    lines = set()
    for earlier, later in itertools.pairwise(spans):
        first, shared = later.start, earlier.stop - later.start
        lines |= {first, first + shared // 4, first + shared // 2, first + shared - shared // 4, first + shared}
    lines &= set(range(1, length))
    others: dict[int, list[float]] = {}
    for i in set(range(1, length)) - lines:
        others.setdefault(i % 8, []).append(steps[i - 1])
    ratios = [steps[i - 1] / (sum(others[i % 8]) / len(others[i % 8])) for i in lines]
    return sum(ratios) / len(ratios)


def show(row: dict) -> None:
    name = f"{row['side']}² {'whole' if not row['tile'] else 'tiles of ' + str(row['tile'])}"
    if "failed" in row:
        sys.stdout.write(f"{name}: failed with exit code {row['failed']}\n")
        return
    sys.stdout.write(
        f"{name}: {row['tiles']} in all, {row['seconds']} s, peak {row['peak_gb']} GB (before {row['before_gb']} GB), "
        f"seam {row['seam']}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
