"""Our decoders on a frozen foreign encoder's latents, beside that family's own decoder on the very same latents.

    python benchmarks/retrofit.py train --encoder taef2=FOLDER --data PHOTOS.tar --out runs/retrofit-taef2
    python benchmarks/retrofit.py score --encoder taef2=FOLDER --data HELD-OUT.tar --out runs/retrofit-taef2
    python benchmarks/retrofit.py show --out runs/retrofit-taef2

`train` runs the recipe `retrofit` for each of --decoders and --seeds, from cached latents where --copies says how many
crops of each picture to keep (each is encoded once, for all trainings), else encoding on the fly. --encode-size 256
caches crops of 256² and trains on windows of them: needed where the encoder has statistics over the picture. `score`
decodes held-out photos at 256² with every decoder and times one a row, all interleaved; `show` prints means and
differences to the family's own decoder, both paired by picture. What is done is not done again.

The family's own decoder saw many more pictures than a training here does: this says how far a budget of crops gets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trainings import (
    FIGURES,
    LABELS,
    add_scoring,
    cell,
    device,
    estimate,
    exit_code,
    facts_of,
    finished,
    judge_of,
    make_parser,
    markdown,
    read_score,
    scores_folder,
    trained,
)

from monobath import UserError
from monobath.autoencoders import as_encoder, split_spec
from monobath.data import Crops
from monobath.data.encoding import Caching, cache_latents
from monobath.evaluation.peers import make_peer
from monobath.evaluation.speed import system_speeds
from monobath.evaluation.system import System, TokenizerSystem
from monobath.files import write_text
from monobath.training import load_recipe

OWN = "own"
"""Row of the family's own decoder."""


def run_training(args: argparse.Namespace) -> None:
    if not args.data or not args.encoder:
        raise UserError("train needs --data, folders or shards of photos, and --encoder KIND=WHERE")
    family, source = split_spec(args.encoder)
    data = args.data
    side = args.encode_size or args.size
    scale = tuple(args.scale or (side, 3 * side))
    if args.encode_size and not args.copies:
        raise UserError("--encode-size is the size of cached crops: add --copies")
    if args.copies:
        folder = args.out / f"latents-{side}x{args.copies}"
        encoder = as_encoder(args.encoder).to(device())
        cache_latents(
            encoder,
            args.data,
            folder,
            Crops(size=side, scale=scale),
            Caching(copies=args.copies, model=args.encoder, batch_size=max(1, 16 * args.size**2 // side**2)),
        )
        data = [str(folder)]
    for seed in args.seeds:
        for decoder in args.decoders:
            row = "-".join([decoder.replace("/", "-"), *([args.name] if args.name else []), str(args.crops)])
            overrides = [
                f"name={row}-seed{seed}", f"run={args.out / f'{row}-seed{seed}'}", f"data.source={json.dumps(data)}",
                f"data.latents={json.dumps(bool(args.copies))}", f"model.encoder.family={family}",
                f"model.encoder.source={source}", shape_of(decoder), f"data.size={args.size}",
                f"data.scale=[{scale[0]}, {scale[1]}]", f"training.steps={args.crops // args.batch}",
                f"training.batch_size={args.batch}", f"training.seed={seed}", "training.sample_every=0", *args.set,
            ]  # fmt: skip
            facts = {"row": row, "decoder": decoder, "crops": args.crops, "cached": bool(args.copies), "seed": seed}
            trained(load_recipe("retrofit", overrides), **facts)


def shape_of(decoder: str) -> str:
    """The recipe's setting for one of --decoders."""
    name, _, channels = decoder.partition("/")
    return f"model.decoder.slim={channels}" if name == "slim" else f"model.decoder.size={decoder}"


def system(run: Path, encoder: str) -> TokenizerSystem:
    """A trained decoder with what makes its latents."""
    return TokenizerSystem(str(run / "model"), encoder=encoder, device=device())


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data or not args.encoder:
        raise UserError("score needs --data, folders or shards of held-out photos, and --encoder KIND=WHERE")
    judge, runs = judge_of(args), finished(args.out)
    own = make_peer(args.encoder, device())
    judge.score(args.out / f"{OWN}-{scores_folder(args)}.json", lambda: own)
    for run in runs:
        judge.score(run / f"{scores_folder(args)}.json", lambda run=run: system(run, args.encoder))
    first = {facts_of(run)["row"]: run for run in reversed(runs)}
    file = args.out / "speeds.json"
    if file.is_file() and {OWN, *first} <= json.loads(file.read_text(encoding="utf-8")).keys():
        return
    systems: list[System] = [own, *(system(run, args.encoder) for run in first.values())]
    title = own.name
    for each, name in zip(systems, (OWN, *first), strict=True):
        each.name = name
    timed = system_speeds(systems, (args.score_size, args.score_size), parts=("decode",), repeats=args.repeats)
    found: dict[str, Any] = {}
    for each in systems:
        speed = timed[each.name][0]
        assert each.decoder is not None
        parameters = sum(p.numel() for p in each.decoder.parameters())
        found[each.name] = {"ms": speed.ms, "low": speed.ms_low, "high": speed.ms_high, "gflop": speed.gflop}
        found[each.name] |= {"parameters": parameters, "threads": torch.get_num_threads(), "device": str(device())}
    found[OWN]["title"] = title
    write_text(file, json.dumps(found, indent=2) + "\n")


def show(args: argparse.Namespace) -> None:
    file, own = args.out / "speeds.json", read_score(args.out / f"{OWN}-{scores_folder(args)}.json")
    if own is None or not file.is_file():
        raise UserError(f"{args.out} holds no scores: run score first")
    speeds = json.loads(file.read_text(encoding="utf-8"))
    head = ["decoder", "crops", "seed", *LABELS.values(), "decode ms (quartiles)", "decoder parameters"]
    head.append("training, CPU s per 1000 crops")
    lines, differences = [[speeds[OWN]["title"], "", "", *_cells(own), *_costs(speeds[OWN]), ""]], []
    for run in finished(args.out):
        score, facts = read_score(run / f"{scores_folder(args)}.json"), facts_of(run)
        if score is None:
            continue
        cost = f"{1000 * facts['cpu_seconds'] / max(1, facts['images']):.0f}"
        cost += " (cached latents)" if facts["cached"] else ""
        lines.append(
            [facts["row"], str(facts["crops"]), str(facts["seed"]), *_cells(score), *_costs(speeds[facts["row"]]), cost]
        )
        differences.append([f"{run.name} − {speeds[OWN]['title']}", *_cells(score, own)])
    sys.stdout.write(markdown(head, lines) + "\n" + markdown(["difference, paired", *LABELS.values()], differences))


def _cells(score: dict[str, Any], other: dict[str, Any] | None = None) -> list[str]:
    return [cell(estimate(score, key, other), key, signed=other is not None) for key in FIGURES]


def _costs(speed: dict[str, Any]) -> list[str]:
    time = f"{speed['ms']:.0f} ({speed['low']:.0f} … {speed['high']:.0f})"
    return [time, f"{speed['parameters'] / 1e6:.2f} M"]


ACTIONS = {"train": run_training, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    parser.add_argument("--encoder", help="KIND=WHERE, as for monobath train; score measures its own decoder too")
    train = parser.add_argument_group("train")
    train.add_argument(
        "--decoders",
        nargs="+",
        default=["CM/4"],
        help="sizes, such as CM/4 CL/4 S/2; slim/32: the family's own with that many channels in its last block",
    )
    train.add_argument("--seeds", type=int, nargs="+", default=[0])
    train.add_argument("--crops", type=int, default=8000, help="budget of each training, in crops")
    train.add_argument("--copies", type=int, default=0, help="crops of each picture to encode once and keep; 0: none")
    train.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    train.add_argument("--encode-size", type=int, help="side of the cached crops, of which --size is a window")
    train.add_argument("--scale", type=int, nargs=2, help="short side before cropping; default: 1 to 3 × the crop's")
    train.add_argument("--batch", type=int, default=16, help="crops a step")
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values of the recipe")
    train.add_argument("--name", default="", help="name of the row with these values")
    add_scoring(parser)
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
