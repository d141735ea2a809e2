"""What convolutions read beyond the edge of a crop: trained on crops of 64², how does each form hold on whole pictures?

    python benchmarks/padding.py train --data PHOTOS.tar … --out runs/padding [--rows zeros replicate …] [--seeds 0 1]
    python benchmarks/padding.py score --data HELD-OUT.tar --out runs/padding
    python benchmarks/padding.py show --out runs/padding

`train` trains encoder and decoder together, from random weights, with the recipe `cpu-default` (8 000 crops by default;
each row on the same crops in the same order, of one seed). `score` takes the centres of the same held-out photos at
64², 128² and 256². `show` prints a row for each form, means over seeds. Forms that lost live here only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from trainings import (
    SHAPE,
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

from monobath import UserError
from monobath.decoders import KLConfig, decoder_config
from monobath.evaluation.system import TokenizerSystem
from monobath.models import blocks, encoder
from monobath.tokenizer import SamplerConfig
from monobath.training import load_recipe
from monobath.training.objectives.base import AutoencoderObjective, Batch, Losses
from monobath.training.recipe import TokenizerRecipe

RIM = 16
"""Pixels around the crop that are context and outside the loss, in the row that has them."""


@dataclass(kw_only=True)
class Row:
    """One form."""

    what: str
    padding: Literal["zeros", "replicate"] = "zeros"
    reflect: bool = False
    """Reflected instead of replicated."""
    rim: int = 0
    grows: bool = False
    """The last fifth of the crops is of 128², then of 192²."""
    size: int = 0
    """Side of the crops, if other than --size; fewer of them, so that the pixels are as many."""
    decoder: dict[str, Any] = field(default_factory=dict)
    kl: bool = False
    grid: float = 0.0
    """Weight of the grid's energy in the loss."""


ROWS = {
    "zeros": Row(what="zero padding"),
    "replicate": Row(what="replicate padding", padding="replicate"),
    "reflect": Row(what="reflect padding", padding="replicate", reflect=True),
    "rim": Row(what=f"zero padding, a rim of {RIM} pixels outside the loss", rim=RIM),
    "grows": Row(what="zero padding, 64², then 128², 192² in the last fifth", grows=True),
    "replicate-grows": Row(what="replicate padding, growing likewise", padding="replicate", grows=True),
    "replicate-grid-0.2": Row(what="replicate padding, loss.grid 0.2", padding="replicate", grid=0.2),
    "replicate-grid-1": Row(what="replicate padding, loss.grid 1", padding="replicate", grid=1.0),
    "windows": Row(what="zero padding, windows of 256², as many pixels", size=256),
    "replicate-windows": Row(what="replicate padding, windows of 256², as many pixels", padding="replicate", size=256),
    "xs4-zeros": Row(what="U-ViT XS/4, zero padding", decoder={"size": "XS/4"}),
    "xs4-replicate": Row(what="U-ViT XS/4, replicate padding", decoder={"size": "XS/4"}, padding="replicate"),
    "kl-zeros": Row(what="KL-VAE decoder, zero padding", kl=True),
    "kl-replicate": Row(what="KL-VAE decoder, replicate padding", kl=True, padding="replicate"),
}


def recipe_for(name: str, args: argparse.Namespace, *, seed: int, part: int = 0) -> TokenizerRecipe:
    """The training of a row, or the part of it at another size of crops (0, 1, 2 of a row that grows)."""
    row, base = ROWS[name], load_recipe("cpu-default")
    size, crops = (row.size or args.size) + 2 * row.rim, args.crops
    if row.size:
        crops = args.crops * args.size**2 // row.size**2
    if row.grows:
        size, crops = args.size * (1, 2, 3)[part], args.crops * (8, 1, 1)[part] // 10
    folder = f"{name}-{args.crops}-seed{seed}" + (f"-part{part}" if part else "")
    batch = min(args.batch, max(1, args.batch * args.size**2 // row.size**2)) if row.size else args.batch
    steps = crops // batch
    latents, factor = args.channels, base.model.encoder.factor
    shape = {"size": base.model.decoder.size} | row.decoder
    shared: dict[str, Any] = {"factor": factor, "latent_channels": latents, "padding": row.padding}
    model = dataclasses.replace(
        base.model,
        encoder=dataclasses.replace(base.model.encoder, latent_channels=latents, padding=row.padding),
        decoder=KLConfig(channels=args.kl_channels, **shared) if row.kl else decoder_config(shared | shape),
        sampler=SamplerConfig(steps=1, noise="zero"),
    )
    return dataclasses.replace(
        base,
        name=folder,
        run=str(args.out / folder),
        init=recipe_for(name, args, seed=seed, part=part - 1).run + "/model" if part else "",
        model=model,
        data=dataclasses.replace(base.data, source=args.data, size=size, scale=[size, max(size, 3 * args.size)]),
        loss=dataclasses.replace(base.loss, perceptual=0.1 if row.kl else 0.02, grid=row.grid, kl=1e-6),
        optimizer=dataclasses.replace(base.optimizer, lr=args.lr / (1 + part), warmup=min(100, steps // 10)),
        training=dataclasses.replace(
            base.training, steps=steps, batch_size=batch, seed=seed, precision=args.precision, sample_every=0,
            checkpoint_every=500,
        ),
    )  # fmt: skip


@contextlib.contextmanager
def form(row: Row) -> Iterator[None]:
    """What a row changes in the library's own code."""
    with contextlib.ExitStack() as stack:
        if row.reflect:
            for module in (blocks, encoder):
                stack.enter_context(mock.patch.object(module, "replicated", reflected))
        if row.rim:
            inner = AutoencoderObjective._with_others
            stack.enter_context(mock.patch.object(AutoencoderObjective, "_decoder_losses", inside(row.rim, inner)))
        yield


def reflected(x: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    """`blocks.replicated`, with the map reflected at its edges."""
    return F.pad(x, sides, mode="reflect")


def inside(rim: int, with_others: Any) -> Any:
    """`AutoencoderObjective._decoder_losses` of a one-step decoder, without what is within `rim` of the crop's edge."""

    def losses_of(self: Any, batch: Batch, z: Tensor) -> Losses:
        part = slice(rim, -rim)
        clean = self.tokenizer.decoder(batch.draws.noise, batch.draws.t, z).float()[:, :, part, part]
        x = batch.images[:, :, part, part]
        flow = (clean - x.float()).square().mean()
        losses = Losses(total=self.loss.flow * flow, parts={"flow": flow}, clean=clean, target=x, real=x)
        found: Losses = with_others(self, losses, batch.judge)
        return found

    return losses_of


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of photos")
    for seed in args.seeds:
        for name in args.rows:
            for part in range(3 if ROWS[name].grows else 1):
                recipe = recipe_for(name, args, seed=seed, part=part)
                with form(ROWS[name]):
                    trained(recipe, row=name, seed=seed, part=part, crops=args.crops)


def last_parts(out: Path, rows: Sequence[str]) -> list[Path]:
    """Run folders of finished trainings, of their last parts."""
    found = [run for run in finished(out) if facts_of(run)["row"] in rows]
    return [run for run in found if facts_of(run)["part"] == (2 if ROWS[facts_of(run)["row"]].grows else 0)]


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("score needs --data: folders or shards of held-out photos")
    for size in args.sizes:
        judge = Judge(args.data, size=max(args.sizes), limit=args.limit, crop=size if size < max(args.sizes) else 0,
                      metrics=("psnr", *SHAPE))  # fmt: skip
        for run in last_parts(args.out, args.rows):
            with form(ROWS[facts_of(run)["row"]]):
                judge.score(
                    run / f"scores-{size}.json", lambda run=run: TokenizerSystem(f"{run}/model", device=device())
                )


def show(args: argparse.Namespace) -> None:
    head = ["form", "what", "seeds", "training, CPU s for 1 000 crops"]
    for size in args.sizes:
        head += [f"PSNR at {size}², dB", "mean error", "grid 4, 8"]
    lines = []
    for name in args.rows:
        runs = [run for run in last_parts(args.out, [name]) if (run / f"scores-{max(args.sizes)}.json").is_file()]
        if not runs:
            continue
        facts = [facts_of(run) for run in runs]
        cells = [name, ROWS[name].what, str(len(runs))]
        cells += [f"{statistics.median(1000 * fact['cpu_seconds'] / fact['images'] for fact in facts):.0f}"]
        for size in args.sizes:
            scores = [(read_score(run / f"scores-{size}.json") or {})["figures"] for run in runs]
            cells.append(over_seeds([statistics.fmean(each["psnr"]) for each in scores], 2))
            cells.append(over_seeds([largest(each["mean_error"]) for each in scores], 4))
            cells.append(", ".join(over_seeds([statistics.fmean(e[f"grid{p}"]) for e in scores], 1) for p in (4, 8)))
        lines.append(cells)
    sys.stdout.write(markdown(head, lines))


def largest(errors: Sequence[Sequence[float]]) -> float:
    """Of the mean errors of three channels, of every picture, the one furthest from 0 after averaging."""
    return float(torch.tensor(errors).mean(0).abs().max())


def over_seeds(values: Sequence[float], places: int) -> str:
    """Mean, and the values of the seeds if there are several."""
    mean = f"{statistics.fmean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{v:.{places}f}' for v in values)})"


ACTIONS = {"train": run_training, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--crops", type=int, default=8000, help="budget of each training, in crops")
    parser.add_argument("--channels", type=int, default=16, help="of the latent")
    parser.add_argument("--kl-channels", type=int, nargs="+", default=[32, 64, 128, 128], help="of each level")
    parser.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--lr", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of the trainings")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="sides of what is scored")
    parser.add_argument("--limit", type=int, help="at most so many held-out pictures")
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
