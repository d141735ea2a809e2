"""Our one-step decoder against the KL-VAE's, with and without its discriminator, at one budget of images.

    python benchmarks/equal_budget.py train --data PHOTOS.tar --out runs/equal-budget [--rows one-step kl …]
    python benchmarks/equal_budget.py score --data HELD-OUT.tar --out runs/equal-budget
    python benchmarks/equal_budget.py show --out runs/equal-budget

`train` fits each decoder from random weights to the latents of one frozen encoder: the same crops of 64² in the same
order, as many of them, the same optimizer and averaging, for each seed. `score` decodes held-out photos at 256² and
then times one decoder a row, all interleaved; with --crop 64 it scores the centres of the same photos, of the size that
was trained on, apart: a KL-VAE's GroupNorms take their statistics over the whole picture. `show` prints means ±
standard deviations over seeds, and differences to the first row, seed by seed. Every training runs in the library's
loop; what is done is not done again.

Learning rates and perceptual weights are each system's own (--lr kl=2e-4 …, --perceptual kl=0.2 …; a row for each
value). The weights' defaults give the perceptual distance about the same share of each loss, a third: of the packaged
model's reconstructions of 64 held-out crops, the squared error is 0.024, the absolute error 0.097 and the distance
0.50, which counts 0.02 times beside the squared error (ours) and 0.1 times beside the absolute one (KL-VAE). The
encoder of `f8c4` was trained together with a decoder of ours, which may favour ours. The rows f8c4 and f16c4 train
encoder and decoder together instead, at two compressions.

What the published training has, one at a time, on a small network of the paper's (--name for each):

    N="--rows one-step --decoder size=XS/1 prediction=v --size 32 --crops 4000"
    python benchmarks/equal_budget.py train --data PHOTOS.tar --out runs/published $N --name usual
        --perceptual one-step=0 one-step=0.1 one-step=0.5 one-step=1
    python benchmarks/equal_budget.py train … $N --name first-weights --set first_weights=published
    python benchmarks/equal_budget.py train … $N --name repa --set loss.repa=0.25
    python benchmarks/equal_budget.py score --data HELD-OUT.tar --out runs/published --score-size 32
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from trainings import (
    FIGURES,
    LABELS,
    add_scoring,
    device,
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

from monobath import Tokenizer, UserError
from monobath.decoders import DecoderConfig, KLConfig, UViTConfig, decoder_config
from monobath.evaluation.speed import system_speeds
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_text
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training import dump_recipe, load_recipe
from monobath.training.config import DataConfig, LossConfig, OptimizerConfig, TimesConfig, TrainingConfig
from monobath.training.recipe import DecoderRecipe, TokenizerRecipe


@dataclass(kw_only=True)
class Row:
    """One system, with the rates and weights it takes unless told otherwise."""

    what: str
    lr: float
    perceptual: float
    kl: bool = False
    """The KL-VAE decoder, which learns by L1; else ours."""
    adversarial: bool = False
    factor: int = 0
    """Encoder and decoder train together at this factor; 0: on the frozen encoder."""


ROWS = {
    "one-step": Row(what="our decoder, one step from zero noise", lr=6e-4, perceptual=0.02),
    "kl": Row(what="KL-VAE decoder, L1 + perceptual", lr=4e-4, perceptual=0.1, kl=True),
    "kl-gan": Row(
        what="KL-VAE decoder, L1 + perceptual + adversarial", lr=4e-4, perceptual=0.1, kl=True, adversarial=True
    ),
    "f8c4": Row(what="our encoder and decoder together, f8c4", lr=6e-4, perceptual=0.02, factor=8),
    "f16c4": Row(what="our encoder and decoder together, f16c4", lr=6e-4, perceptual=0.02, factor=16),
}


def frozen_encoder(args: argparse.Namespace) -> str:
    """A model with the encoder and a decoder of no row's shape, so that a row's decoder starts from random weights."""
    folder = args.out / "encoder"
    if not (folder / "model.safetensors").is_file():
        source = Tokenizer.from_pretrained(args.encoder)
        encoder = source.config.encoder
        shape = UViTConfig(
            size="custom", patch=encoder.factor, channels=[8], middle_blocks=0,
            factor=encoder.factor, latent_channels=encoder.latent_channels,
        )  # fmt: skip
        holder = Tokenizer(TokenizerConfig(encoder=encoder, decoder=shape))
        holder.encoder.load_state_dict(source.encoder.state_dict())
        holder.save_pretrained(folder, extra={"encoder of": args.encoder})
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]["encoder of"]
    if before != args.encoder:
        raise UserError(f"{args.out} uses the encoder of {before}: choose another --out for {args.encoder}")
    return str(folder)


def our_decoder(args: argparse.Namespace, source: TokenizerConfig) -> DecoderConfig:
    """What --decoder says, else the shape of the encoder's own decoder."""
    if not args.decoder:
        return source.decoder
    given = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in args.decoder)}
    shared = {"factor": source.encoder.factor, "latent_channels": source.encoder.latent_channels}
    try:
        return decoder_config(shared | given)
    except TypeError as error:
        raise UserError(f"--decoder {' '.join(args.decoder)}: {error}; give fields of a decoder") from None


def model_of(row: Row, args: argparse.Namespace, source: TokenizerConfig) -> TokenizerConfig:
    """Shape of a row's tokenizer."""
    decoder, encoder = our_decoder(args, source), source.encoder
    if row.factor:
        if encoder.factor != 8:
            raise UserError(f"rows f8c4 and f16c4 need an --encoder of factor 8, not {encoder.name}")
        deeper = [*encoder.multipliers, *encoder.multipliers[-1:] * (row.factor.bit_length() - 4)]
        encoder = dataclasses.replace(encoder, factor=row.factor, multipliers=deeper)
        decoder = dataclasses.replace(decoder, factor=row.factor)
    if row.kl:
        decoder = KLConfig(
            channels=args.kl_channels,
            factor=decoder.factor,
            latent_channels=decoder.latent_channels,
            padding=decoder.padding,
        )
    return TokenizerConfig(encoder=encoder, decoder=decoder, sampler=SamplerConfig(steps=1, noise="zero"))


def recipe_for(name: str, args: argparse.Namespace, *, lr: float, perceptual: float, seed: int) -> TokenizerRecipe:
    """The training of a row."""
    row = ROWS[name]
    label = args.name if name == "one-step" else name
    folder = f"{label}-{args.crops}-lr{lr:g}-p{perceptual:g}-seed{seed}"
    source = Tokenizer.from_pretrained(args.encoder).config
    steps = args.crops // args.batch
    recipe = (TokenizerRecipe if row.factor else DecoderRecipe)(
        name=folder,
        run=str(args.out / folder),
        init="" if row.factor else frozen_encoder(args),
        model=model_of(row, args, source),
        data=DataConfig(
            source=args.data, size=args.size, scale=args.scale or [args.size, 3 * args.size], cache=True, workers=0
        ),
        times=TimesConfig(ones=0.75, zero_noise=0.667),
        loss=LossConfig(
            perceptual=perceptual,
            adversarial=args.adversarial if row.adversarial else 0.0,
            adversarial_start=args.adversarial_start,
        ),
        optimizer=OptimizerConfig(lr=lr, warmup=min(50, steps // 10)),
        training=TrainingConfig(
            steps=steps, batch_size=args.batch, precision=args.precision, train_encoder=bool(row.factor), ema=0.99,
            seed=seed, sample_every=0, checkpoint_every=200,
        ),
    )  # fmt: skip
    if name != "one-step" or not args.set:
        return recipe
    file = args.out / "recipes" / f"{folder}.yaml"
    write_text(file, dump_recipe(recipe))
    changed = load_recipe(str(file), args.set)
    assert isinstance(changed, TokenizerRecipe)
    return changed


def values_for(name: str, given: Sequence[str], default: float) -> list[float]:
    """The values of NAME=VALUE options for a row."""
    found = []
    for item in given:
        key, _, value = item.partition("=")
        if key not in ROWS:
            raise UserError(f"{item}: give ROW=VALUE with a row of {', '.join(ROWS)}")
        try:
            found += [float(value)] if key == name else []
        except ValueError:
            raise UserError(f"{item}: {value!r} is not a number") from None
    return found or [default]


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of photos")
    for seed in args.seeds:
        for name in args.rows:
            for lr in values_for(name, args.lr, ROWS[name].lr):
                for perceptual in values_for(name, args.perceptual, ROWS[name].perceptual):
                    recipe = recipe_for(name, args, lr=lr, perceptual=perceptual, seed=seed)
                    row = recipe.name.removesuffix(f"-seed{seed}")
                    facts = {"row": row, "kind": name, "lr": lr, "perceptual": perceptual, "crops": args.crops}
                    trained(recipe, **facts, seed=seed)


def grouped(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Finished trainings by row, each row's by seed; rows in the order of `ROWS`."""
    found: dict[str, list[Path]] = {}
    order = list(ROWS)
    for run in sorted(finished(args.out), key=lambda run: (order.index((f := facts_of(run))["kind"]), f["seed"])):
        found.setdefault(facts_of(run)["row"], []).append(run)
    return found


def system(run: Path) -> TokenizerSystem:
    """A trained tokenizer."""
    return TokenizerSystem(str(run / "model"), device=device())


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("score needs --data: folders or shards of held-out photos")
    judge, rows = judge_of(args), grouped(args)
    for runs in rows.values():
        for run in runs:
            judge.score(run / f"{scores_folder(args)}.json", lambda run=run: system(run))
    file = args.out / "speeds.json"
    speeds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if rows.keys() <= speeds.keys():
        return
    systems = []
    for name, runs in rows.items():
        systems.append(system(runs[0]))
        systems[-1].name = name
    timed = system_speeds(systems, (args.score_size, args.score_size), parts=("decode",), repeats=args.repeats)
    found = {
        each.name: {
            "ms": timed[each.name][0].ms, "low": timed[each.name][0].ms_low, "high": timed[each.name][0].ms_high,
            "parameters": sum(p.numel() for p in each.tokenizer.decoder.parameters()),
            "threads": torch.get_num_threads(),
        }
        for each in systems
    }  # fmt: skip
    write_text(file, json.dumps(found, indent=2) + "\n")


def show(args: argparse.Namespace) -> None:
    file = args.out / "speeds.json"
    speeds: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    head = ["row", "what", "crops", "lr", "perceptual", "seeds", *LABELS.values()]
    head += ["decode ms (quartiles)", "decoder parameters", "training, CPU s per 1000 images"]
    found: dict[str, dict[int, dict[str, float]]] = {}
    lines = []
    for name, runs in grouped(args).items():
        facts = [facts_of(run) for run in runs]
        figures = found[name] = {}
        for run, fact in zip(runs, facts, strict=True):
            if (score := read_score(run / f"{scores_folder(args)}.json")) is not None:
                values = score["figures"]
                figures[fact["seed"]] = {
                    key: values[key][0] if key == "fd_efflite" else statistics.fmean(values[key]) for key in FIGURES
                }
        cells = [name, ROWS[facts[0]["kind"]].what, str(facts[0]["crops"])]
        cells += [f"{facts[0]['lr']:g}", f"{facts[0]['perceptual']:g}", str(len(figures))]
        cells += [_over_seeds([each[key] for each in figures.values()], places) for key, places in FIGURES.items()]
        speed = speeds.get(name)
        cells += [f"{speed['ms']:.0f} ({speed['low']:.0f} … {speed['high']:.0f})" if speed else ""]
        cells += [f"{speed['parameters'] / 1e6:.2f} M" if speed else ""]
        cells += [f"{statistics.median(1000 * fact['cpu_seconds'] / fact['images'] for fact in facts):.0f}"]
        lines.append(cells)
    sys.stdout.write(markdown(head, lines))
    if len(found) < 2:
        return
    first, *others = found
    lines = []
    for name in others:
        seeds = sorted(found[first].keys() & found[name].keys())
        cells = [f"{name} − {first}", str(len(seeds))]
        for key, places in FIGURES.items():
            cells.append(_over_seeds([found[name][s][key] - found[first][s][key] for s in seeds], places, signed=True))
        lines.append(cells)
    sys.stdout.write("\n" + markdown(["difference, seed by seed", "seeds", *LABELS.values()], lines))


def _over_seeds(values: Sequence[float], places: int, *, signed: bool = False) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{places}f}"
    return f"{mean} ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else mean


ACTIONS = {"train": run_training, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    train = parser.add_argument_group("train")
    train.add_argument("--rows", nargs="+", choices=ROWS, default=["one-step", "kl", "kl-gan"])
    train.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    train.add_argument("--crops", type=int, default=8000, help="budget of each training, in crops")
    train.add_argument("--lr", nargs="+", default=[], metavar="ROW=VALUE", help="peak learning rates, several a row")
    train.add_argument("--perceptual", nargs="+", default=[], metavar="ROW=VALUE", help="perceptual weights, likewise")
    train.add_argument("--adversarial", type=float, default=0.5, help="weight of the discriminator")
    train.add_argument("--adversarial-start", type=float, default=0.5, help="fraction of the run without it")
    train.add_argument("--encoder", default="f8c4", help="tokenizer whose encoder is used, frozen")
    train.add_argument("--decoder", nargs="+", metavar="FIELD=VALUE", help="our decoder, such as size=XS/4 norm=local; "
                       "default: the shape of the encoder's own")  # fmt: skip
    train.add_argument("--name", default="one-step", help="name of our decoder's row")
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe values of that row")
    train.add_argument("--kl-channels", type=int, nargs="+", default=[32, 64, 128, 128], help="of each level")
    train.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    train.add_argument("--scale", type=int, nargs=2, help="short side before cropping; default: 1 to 3 × the crop's")
    train.add_argument("--batch", type=int, default=16, help="crops a step")
    train.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    add_scoring(parser, "score and show")
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
