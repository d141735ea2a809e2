"""Are latents of a crop a crop of the latents, and is colour a local property of them?

    python benchmarks/latent_windows.py --encoder taef2=FOLDER --data HELD-OUT.tar [--model MODEL] [--limit 32]

For pictures of 256²: how far the latents of centre crops are from the same part of the whole picture's latents, away
from the crop's border; and where the squared error of decoders lies, as PSNR of each part: mean colour, the
16×16 means about that, and the rest. The family's own decoder is given whole latents, and windows of 16×16 of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from command import exit_code
from torch import Tensor

from monobath import Tokenizer
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.evaluation.peers import make_peer
from monobath.images import to_float

SIDE, FACTOR = 256, 8


def parts(error: Tensor) -> Tensor:
    """Mean squares of an error `(B, 3, H, W)`: all, mean colour, coarse, the rest: `(B, 4)`."""
    colour = error.mean((2, 3), keepdim=True)
    coarse = F.avg_pool2d(error, 16) - colour
    squares = [part.square().mean((1, 2, 3)) for part in (error, colour, coarse)]
    return torch.stack([*squares, squares[0] - squares[1] - squares[2]], 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="KIND=WHERE, as for monobath eval --peer")
    parser.add_argument("--data", nargs="+", required=True, help="folders or shards of photos")
    parser.add_argument("--model", help="a decoder of ours for these latents")
    parser.add_argument("--limit", type=int, default=32, help="at most so many pictures")
    args = parser.parse_args(arguments)
    peer = make_peer(args.encoder, torch.device("cpu"))
    ours = Tokenizer.from_pretrained(args.model, encoder=args.encoder) if args.model else None
    errors: dict[str, list[Tensor]] = {"own": [], "own, windows": []} | ({"ours": []} if ours else {})
    gaps: dict[int, list[Tensor]] = {64: [], 128: []}
    deviation = []
    with torch.no_grad():
        for batch in iterate_eval(
            make_dataset(args.data, Crops(size=SIDE, augment=False)), batch_size=8, limit=args.limit
        ):
            x = to_float(batch["image"])
            code, indices = peer.encode(x), batch["index"].tolist()
            z = code.payload
            deviation.append(z.square().mean() - z.mean().square())
            for side, found in gaps.items():
                first, rim = (SIDE - side) // 2, side // FACTOR // 4
                crop = peer.encode(x[:, :, first : first + side, first : first + side]).payload
                place = slice(first // FACTOR + rim, (first + side) // FACTOR - rim)
                found.append((crop[:, :, rim:-rim, rim:-rim] - z[:, :, place, place]).square().mean())
            errors["own"].append(parts(peer.decode(code, indices).clamp(-1, 1) - x))
            window = dataclasses.replace(code, payload=z[:, :, 8:24, 8:24].contiguous(), size=(128, 128))
            seen = peer.decode(window, indices).clamp(-1, 1) - x[:, :, 64:192, 64:192]
            errors["own, windows"].append(parts(seen[:, :, 16:112, 16:112]))
            if ours:
                errors["ours"].append(parts(ours.decode(z) - x))
    sys.stdout.write(f"deviation of the latents {torch.stack(deviation).mean().sqrt():.2f}\n")
    for side, squares in gaps.items():
        sys.stdout.write(f"crops of {side}²: rms difference {torch.stack(squares).mean().sqrt():.2f}\n")
    sys.stdout.write("| decoder | all | mean colour | 16×16 means | the rest |\n|---|---|---|---|---|\n")
    for name, rows in errors.items():
        decibels = 10 * torch.log10(4 / torch.cat(rows).mean(0))
        sys.stdout.write(f"| {name} | " + " | ".join(f"{value:.1f}" for value in decibels.tolist()) + " |\n")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
