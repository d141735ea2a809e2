"""What a decoder does near the borders, and how it does with less context: the same photos' centres at several sizes.

    python benchmarks/borders.py --data HELD-OUT.tar [--model default …] [--crop-sizes 64 128 256]

Photos are scaled and cropped to SIZE; of each such square, the centre of each crop size is encoded and decoded on its
own. First table: PSNR, mean error (the channel farthest from 0), grid figures, as `monobath eval` gives them. Second
table and OUT/borders.png: PSNR (mean of the pictures') and mean error of the places at each distance to the border of
the decoded picture, in pixels; 0 is the outermost. Errors are in [-1, 1].
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from command import exit_code
from torch import Tensor
from trainings import device, markdown

from monobath.evaluation import tables
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.metrics import CHANNELS, mean_error, psnr
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_file

FIGURES = ["psnr", "mean_error", "grid4", "grid8"]


@dataclass
class Band:
    """Places at some distances to the border."""

    name: str
    """Such as 8–15, in pixels."""
    psnr: float
    mean_error: list[float]
    """Of each channel."""


def bands(output: Tensor, original: Tensor) -> list[Band]:
    """uint8 `(B, 3, H, W)` → figures by the distance to the border: 0, 1, 2–3, 4–7, … pixels, as far as there are."""
    rows, columns = (torch.arange(side) for side in output.shape[2:])
    rows, columns = torch.minimum(rows, rows.flip(0)), torch.minimum(columns, columns.flip(0))
    distance = torch.minimum(rows[:, None], columns)
    found = []
    first, end = 0, 1
    while first <= distance.max():
        chosen = (distance >= first) & (distance < end)
        a, b = output[:, :, None, chosen], original[:, :, None, chosen]  # (B, 3, 1, places)
        name = str(first) if end == first + 1 else f"{first}–{end - 1}"
        found.append(Band(name, psnr(a, b).mean().item(), mean_error(a, b).mean(0).tolist()))
        first, end = end, 2 * end
    return found


def draw(lines: dict[str, list[Band]], path: Path) -> None:
    """The plot: a panel for PSNR, one for the mean error of the channel that goes farthest from 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = max(lines.values(), key=len)
    for name, found in lines.items():
        left.plot([band.psnr for band in found], marker="o", label=name)
        channels = zip(*(band.mean_error for band in found), strict=True)
        channel, errors = max(zip(CHANNELS, channels, strict=True), key=lambda pair: max(map(abs, pair[1])))
        right.plot(errors, marker="o", label=f"{name}, {channel}")
    right.axhline(0, color="gray", linewidth=0.8)
    for axes, label in ((left, "PSNR, dB"), (right, "mean error")):
        axes.set_xticks(range(len(longest)), [band.name for band in longest])
        axes.set(xlabel="distance to the border, pixels", ylabel=label)
        axes.legend()
    write_file(path, lambda partial: figure.savefig(partial, format="png", dpi=120))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of held-out photos")
    parser.add_argument("--model", nargs="+", default=["default"], help="packaged names or folders")
    parser.add_argument("--size", type=int, default=256, help="side of the squares that the crops are taken from")
    parser.add_argument("--crop-sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of what is decoded")
    parser.add_argument("--limit", type=int, default=150, help="at most so many photos; all are held in memory")
    parser.add_argument("--out", type=Path, default=Path("runs/borders"), help="folder for the plot")
    args = parser.parse_args(arguments)
    systems = [TokenizerSystem(name, device=device()) for name in args.model]
    count = args.limit
    sizes = [
        evaluate(
            systems, args.data, Settings(size=size, short_side=args.size, metrics=FIGURES, limit=count, keep=count)
        )
        for size in dict.fromkeys(args.crop_sizes)
    ]
    joined = tables.side_by_side([evaluation for evaluation, _ in sizes])
    pictures = [(kept.outputs[system.name], kept.originals) for system in systems for _, kept in sizes]
    lines = {result.name: bands(*pair) for result, pair in zip(joined.systems, pictures, strict=True)}

    rows = [
        [f"{figure} ({interval})" if interval else figure for figure, interval in (row[0], *row[2:-2])]
        for row in tables.rows(joined)
    ]
    sys.stdout.write(markdown(["system", *(m.label for m in joined.metrics)], rows))
    sys.stdout.write(f"\n{len(joined.names)} photos. In brackets: 95 % intervals over photos.\n\n")
    rows = [
        [name, band.name, f"{band.psnr:.2f}", *(f"{error:+.4f}" for error in band.mean_error)]
        for name, found in lines.items()
        for band in found
    ]
    sys.stdout.write(markdown(["system", "distance", "PSNR (dB)", *(f"mean error, {c}" for c in CHANNELS)], rows))
    draw(lines, args.out / "borders.png")
    sys.stdout.write(f"\n{args.out / 'borders.png'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
