"""What keeps texture in one step, at the end of a training: pooled features, or an energy score.

    python benchmarks/texture.py train --data PHOTOS.tar … --out runs/texture [--rows plain pooled-0.2 energy …]
    python benchmarks/texture.py score --data HELD-OUT.tar --out runs/texture
    python benchmarks/texture.py show --out runs/texture

Each row trains the decoder of --start on, on the latents of its frozen encoder: the same crops in the same order, for
each seed, one step at full resolution.

- plain: squared error, perceptual distance, grid; from zero noise.
- pooled-S: the same, and the distance of pooled features, its weight set at each step so that its gradient at the last
  layer has S times the norm of the others' (as VQGAN weighs its discriminator, equation 7).
- energy, energy-latent: the energy score of `energy.py`; its feature maps have the weight --energy-features. The noise
  of energy-latent is the same in blocks of 8×8 pixels. Both are scored with all of their noise, half of it, and none:
  one checkpoint from texture to fidelity.

What would count as success, stated before it is run: FD-EffLite below plain's in every seed, PSNR at most 0.3 dB below
it for pooled, 1.5 dB for an energy score.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from energy import energy_losses, noise_like
from torch import Tensor
from trainings import (
    FIGURES,
    LABELS,
    Judge,
    device,
    exit_code,
    facts_of,
    finished,
    make_parser,
    markdown,
    read_score,
    trained,
)

from monobath import Tokenizer, UserError
from monobath.evaluation.system import Code, TokenizerSystem
from monobath.losses.adversarial import adaptive_weight
from monobath.losses.perceptual import PooledDistance
from monobath.training import load_recipe
from monobath.training.config import DataConfig, LossConfig, OptimizerConfig
from monobath.training.objectives.base import Batch, Losses
from monobath.training.objectives.staged import UnionObjective
from monobath.training.recipe import DecoderRecipe

SCALES = (0.0, 0.5, 1.0)
"""Of the noise, that energy rows are scored with."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One lever."""

    pooled: float = 0.0
    """Its gradient's norm, in multiples of the others'."""
    energy: bool = False
    latent_step: int = 1
    """Noise is the same in so many pixels each way."""


ROWS = {
    "plain": Row(),
    **{f"pooled-{share:g}": Row(pooled=share) for share in (0.1, 0.2, 0.3)},
    "energy": Row(energy=True),
    "energy-latent": Row(energy=True, latent_step=8),
}


def losses_of(row: Row) -> Any:
    """`UnionObjective._decoder_losses`, one step at full resolution, with a row's lever."""
    if row.energy:
        return energy_losses(row.latent_step)
    pooled = PooledDistance().to(device()) if row.pooled else None

    def of_decoder(self: UnionObjective, batch: Batch, z: Tensor) -> Losses:
        x, decoder, ones = batch.images.float(), self.tokenizer.decoder, batch.draws.t
        clean = decoder(batch.draws.noise, ones, z).float()
        flow = (clean - x).square().mean()
        losses = Losses(total=flow, parts={"flow": flow}, clean=clean, target=x, real=x)
        losses = self._with_others(losses, batch.judge)
        if pooled is not None:
            value = pooled(clean, x).mean()
            share = row.pooled * adaptive_weight(losses.total, value, decoder.last_layer.weight)
            losses.parts["pooled"], losses.total = value, losses.total + share * value
        return losses

    return of_decoder


def recipe_for(name: str, args: argparse.Namespace, seed: int) -> DecoderRecipe:
    """The training of a row."""
    base, folder = load_recipe("progressive"), f"{name}-{args.crops}-seed{seed}"
    perceptual = args.energy_features if ROWS[name].energy else args.perceptual
    scale = [args.size, 5 * args.size // 2]
    return DecoderRecipe(
        name=folder, run=str(args.out / folder), init=args.start, model=Tokenizer.from_pretrained(args.start).config,
        data=DataConfig(source=args.data, size=args.size, scale=scale, cache=True, workers=0), times=base.times,
        scales=base.scales, loss=LossConfig(perceptual=perceptual, grid=0.1),
        optimizer=OptimizerConfig(lr=args.lr, warmup=20),
        training=dataclasses.replace(
            base.training, steps=args.crops // args.batch, batch_size=args.batch, precision=args.precision, seed=seed,
            compile=False, train_encoder=False, ema=0.99, ema_start=0.0, log_every=10, checkpoint_every=50,
        ),
    )  # fmt: skip


class Noisy(TokenizerSystem):
    """An energy row, from so much of its noise."""

    def __init__(self, model: str, row: Row, scale: float) -> None:
        super().__init__(model, device=device())
        self.row, self.scale = row, scale

    @torch.no_grad()
    def decode(self, code: Code, seeds: Sequence[int]) -> Tensor:
        """Latents → float images `(B, 3, H, W)` in [-1, 1]; a picture's noise is its seed's."""
        z, f = code.payload, self.tokenizer.factor
        empty = torch.empty(1, 3, z.shape[2] * f, z.shape[3] * f)
        noise = torch.cat(
            [noise_like(empty, self.row.latent_step, torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        decoder = self.tokenizer.decoder
        pictures = decoder(self.scale * noise.to(z.device), torch.ones(len(z), device=z.device), z)
        return pictures[:, :, : code.size[0], : code.size[1]].float().clamp(-1, 1)


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of photos")
    for seed in args.seeds:
        for name in args.rows:
            changed = losses_of(ROWS[name])
            with mock.patch.object(UnionObjective, "_decoder_losses", changed):
                trained(recipe_for(name, args, seed), row=name, seed=seed)


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("score needs --data: folders or shards of held-out photos")
    judge = Judge(args.data, size=args.score_size, limit=args.limit)
    for run in finished(args.out):
        row, model = ROWS[facts_of(run)["row"]], str(run / "model")
        for scale in SCALES if row.energy else SCALES[:1]:
            judge.score(run / f"scores-{scale:g}.json", lambda m=model, r=row, s=scale: Noisy(m, r, s))


def show(args: argparse.Namespace) -> None:
    lines = []
    for name, row in ROWS.items():
        runs = [run for run in finished(args.out) if facts_of(run)["row"] == name]
        for scale in SCALES if row.energy else SCALES[:1]:
            found = [score["figures"] for run in runs if (score := read_score(run / f"scores-{scale:g}.json"))]
            if not found:
                continue
            cells = [name, f"{scale:g}", str(len(found))]
            for key, places in FIGURES.items():
                values = [each[key][0] if key == "fd_efflite" else statistics.fmean(each[key]) for each in found]
                cells.append(", ".join(f"{value:.{places}f}" for value in values))
            cost = statistics.median(1000 * facts_of(run)["cpu_seconds"] / facts_of(run)["images"] for run in runs)
            lines.append([*cells, f"{cost:.0f}"])
    sys.stdout.write(markdown(["row", "noise", "seeds", *LABELS.values(), "CPU s, 1 000 crops"], lines))


ACTIONS = {"train": run_training, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--start", default="default", help="a one-step model with stages, trained on")
    parser.add_argument("--crops", type=int, default=16_000, help="budget of each row, in crops")
    parser.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--perceptual", type=float, default=0.03, help="weight of the perceptual distance")
    parser.add_argument("--energy-features", type=float, default=0.1, help="weight of the feature maps' distance")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the trainings")
    parser.add_argument("--score-size", type=int, default=256, help="side of the held-out pictures, in pixels")
    parser.add_argument("--limit", type=int, help="at most so many held-out pictures")
    args = parser.parse_args(arguments)
    args.out = Path(args.out)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
