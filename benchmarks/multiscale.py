"""Full-resolution sampling against coarse-to-fine decoding: time, calls of the network and quality on held-out photos.

    python benchmarks/multiscale.py train --data PHOTOS.tar --out runs/multiscale [--steps 4000 …]
    python benchmarks/multiscale.py score --data HELD-OUT.tar --out runs/multiscale
    python benchmarks/multiscale.py time --out runs/multiscale
    python benchmarks/multiscale.py show --out runs/multiscale [--data HELD-OUT.tar --picture docs/images/stages.png]
    python benchmarks/multiscale.py all --data PHOTOS.tar --held-out HELD-OUT.tar --out runs/multiscale
    python benchmarks/multiscale.py curve --out runs/multiscale [--decoder XS/1 --smallest 16 --stage-steps 1]

`train` fits three models of one network, from one start (--start), on crops of 128² and the same encoder: `full` at one
scale, `multi` at three, and `student`, one step a stage distilled from `multi`. Equal budget: `multi` and `student`
together see as many crops, in as many steps, as `full` (--steps); `student` gets --share of them. Seconds are shown,
too.
`score` decodes held-out photos at 256²; `time` measures decoding of one of them, interleaved in one process, and the
first preview. `show` prints the table and what it says of three claims: the student takes at most a tenth of the
50-step time; its EffLite distance and FD-EffLite are at most 1.05 times those of 8 full-resolution steps; its first
preview arrives within 15 % of its decoding time. What is done is not done again, so the same command goes on.

`curve` is MSD's claim, a speed-up of O(log n) for n pixels: S = 1 … 5 stages from a fixed smallest side, against as
many steps in all at full resolution, in operations and time (random weights: neither depends on them). k steps at each
of S stages cost k·(1 + 4 + … + 4^(S−1)) of the smallest, k·S at full resolution k·S·4^(S−1), so that the quotient is
S·(3/4)/(1 − 4^−S), and S is 1 + log₄ of n over the smallest stage's pixels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid
from trainings import (
    LABELS,
    Judge,
    cell,
    device,
    estimate,
    exit_code,
    facts_of,
    make_parser,
    markdown,
    read_score,
    recipe_of,
    scores_folder,
    trained,
)

from monobath import Tokenizer, UserError
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.decoders import decoder_config, make_decoder
from monobath.decoding import Decoding, SamplerConfig, pictures
from monobath.evaluation.speed import count_flops, measure, sample_images
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_file, write_text
from monobath.images import tensor_to_pil, to_float, to_uint8
from monobath.sampling import Noise
from monobath.training import load_recipe
from monobath.training.recipe import TokenizerRecipe

FULL, MULTI, STUDENT = "full", "multi", "student"
FIRST = "first preview of "
REFERENCE, SLOW, FAST = "full, 8 steps", "full, 50 steps", "student, 1 step a stage"


@dataclasses.dataclass(frozen=True)
class Row:
    """A way of decoding."""

    name: str
    model: str
    steps: int
    noise: Noise = "gaussian"


ROWS = [
    Row(SLOW, FULL, 50),
    Row(REFERENCE, FULL, 8),
    Row("full, 1 step", FULL, 1),
    Row("full, 1 step, zero noise", FULL, 1, "zero"),
    Row("multi, 16 steps a stage", MULTI, 16),
    Row("multi, 4 steps a stage", MULTI, 4),
    Row("multi, 1 step a stage", MULTI, 1),
    Row("multi, 1 step a stage, zero noise", MULTI, 1, "zero"),
    Row(FAST, STUDENT, 1),
    Row("student, 1 step a stage, zero noise", STUDENT, 1, "zero"),
]


def recipes(args: argparse.Namespace) -> dict[str, TokenizerRecipe]:
    """The three trainings, in order."""
    if not 0 < args.share < 1:
        raise UserError(f"--share is {args.share}: it is a fraction, above 0 and below 1")
    distilled = max(1, round(args.share * args.steps))
    start = Tokenizer.from_pretrained(args.start).config
    plans = {
        FULL: ("cpu-progressive", args.steps, 1, args.set),
        MULTI: ("cpu-progressive", args.steps - distilled, 3, args.set),
        STUDENT: ("cpu-progressive-distill", distilled, 3, args.set_student),
    }
    common = [f"training.seed={args.seed}", f"data.source={json.dumps(args.data)}"]
    found = {}
    for name, (recipe, steps, stages, own) in plans.items():
        if name == STUDENT and not place(args.out, MULTI).is_dir():
            continue  # its teacher says what shape it has
        settings = [f"name={name}", f"run={args.out / name}", f"training.steps={steps}", *common, *own]
        settings += [f"distill.teacher={place(args.out, MULTI)}"] if name == STUDENT else []
        found[name] = load_recipe(recipe, settings)
        if name != STUDENT:
            sampler = dataclasses.replace(found[name].model.sampler, stages=stages)
            decoder = dataclasses.replace(start.decoder, stages=stages)
            model = dataclasses.replace(start, decoder=decoder, sampler=sampler)
            found[name] = dataclasses.replace(found[name], init=args.start, model=model)
    return found


def place(out: Path, name: str) -> Path:
    """Folder of a finished model."""
    return out / name / "model"


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of photos")
    for name in (FULL, MULTI, STUDENT):
        trained(recipes(args)[name])


def load(args: argparse.Namespace, row: Row) -> TokenizerSystem:
    """A row's system."""
    system = TokenizerSystem(str(place(args.out, row.model)), steps=row.steps, noise=row.noise, device=device())
    system.name = row.name
    return system


def rows_of(args: argparse.Namespace) -> list[Row]:
    """The rows whose models are trained, those from zero noise only where the model has learnt it."""
    found = []
    for row in ROWS:
        run = args.out / row.model
        if (run / "model").is_dir() and (row.noise != "zero" or recipe_of(run).times.zero_noise):
            found.append(row)
    if not found:
        raise UserError(f"{args.out} holds no training: run train first")
    return found


def score_file(args: argparse.Namespace, row: Row) -> Path:
    """Where a row's scores are."""
    return args.out / scores_folder(args) / f"{row.model}-{row.steps}-{row.noise}.json"


def run_scoring(args: argparse.Namespace) -> None:
    data = args.held_out or args.data
    if not data:
        raise UserError("score needs --data: folders or shards of held-out photos")
    rows = rows_of(args)
    judge = Judge(data, size=args.size, limit=args.limit, crop=args.crop)
    for row in rows:
        judge.score(score_file(args, row), lambda row=row: load(args, row))


def run_timing(args: argparse.Namespace) -> None:
    """Decoding one picture every way, and the first previews, in interleaved rounds; calls of the network."""
    file = args.out / "times.json"
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))["times"]
        if {row.name for row in rows_of(args)} <= known.keys():
            return
    x = sample_images((args.size, args.size))[:1]
    works: dict[str, Any] = {}
    calls: dict[str, int] = {}
    for row in rows_of(args):
        system = load(args, row)
        tokenizer, code = system.tokenizer, system.encode(x.to(system.device))

        def decode(system: TokenizerSystem = system, code: Any = code) -> None:
            system.decode(code, [0])

        def preview(tokenizer: Tokenizer = tokenizer, z: Any = code.payload, row: Row = row) -> None:
            next(iter(tokenizer.decode_progressive(z, steps=row.steps, noise=row.noise)))

        with mock.patch.object(tokenizer.decoder, "predict", wraps=tokenizer.decoder.predict) as counted:
            decode()
        calls[row.name] = counted.call_count
        works[row.name] = decode
        if row.model != FULL:
            works[FIRST + row.name] = preview
    timed = measure(works, repeats=args.repeats, device=device())
    found = {
        name: {"ms": timing.median, "low": timing.quartiles[0], "high": timing.quartiles[1], "calls": calls.get(name)}
        for name, timing in timed.items()
    }
    conditions = {"size": args.size, "threads": torch.get_num_threads(), "device": str(device()), "dtype": "float32"}
    write_text(file, json.dumps({"conditions": conditions, "times": found}, indent=2) + "\n")


def show(args: argparse.Namespace) -> None:
    file = args.out / "times.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"times": {}}
    times: dict[str, Any] = kept["times"]
    scores = {row.name: read_score(score_file(args, row)) for row in rows_of(args)}
    figures = ("psnr", "efflite", "fd_efflite")
    lines = []
    for row in rows_of(args):
        time, score = times.get(row.name), scores[row.name]
        first = times.get(FIRST + row.name)
        lines.append([
            row.name,
            str(time["calls"]) if time else "",
            f"{time['ms']:.0f} ({time['low']:.0f} … {time['high']:.0f})" if time else "",
            f"{first['ms']:.0f}" if first else "",
            *(cell(estimate(score, key), key) if score else "" for key in figures),
        ])  # fmt: skip
    head = ["decoding", "calls", "ms (quartiles)", "first preview, ms", *(LABELS[key] for key in figures)]
    sys.stdout.write(markdown(head, lines))
    if times:
        facts = ", ".join(f"{key} {value}" for key, value in kept["conditions"].items())
        sys.stdout.write(f"\nTimes: one picture, {facts}. ± is one standard error.\n")
    lines = []
    for name in (FULL, MULTI, STUDENT):
        if (args.out / name / "facts.json").is_file():
            facts = facts_of(args.out / name)
            numbers = (facts["images"], facts["seconds"], facts["cpu_seconds"])
            lines.append([name, *(f"{number:.0f}" for number in numbers)])
    sys.stdout.write("\n" + markdown(["training", "crops", "seconds", "CPU seconds"], lines))
    sys.stdout.write("\n" + "".join(f"- {claim}\n" for claim in claims(times, scores)))
    if args.picture:
        draw(args)


def claims(times: dict[str, Any], scores: dict[str, Any]) -> list[str]:
    """What the figures say of the three claims, of those that are there."""
    found = []
    if {SLOW, FAST} <= times.keys():
        share = times[FAST]["ms"] / times[SLOW]["ms"]
        found.append(f"time of one step a stage / time of 50 steps: {share:.3f}, {_verdict(share <= 0.1)} (≤ 0.1)")
    for key in ("efflite", "fd_efflite"):
        own, other = scores.get(FAST), scores.get(REFERENCE)
        if own and other:
            ratio = estimate(own, key).value / estimate(other, key).value
            gap = cell(estimate(own, key, other), key, signed=True)
            words = f"{LABELS[key]} of one step a stage / of 8 full-resolution steps: {ratio:.3f} (difference {gap})"
            found.append(f"{words}, {_verdict(ratio <= 1.05)} (≤ 1.05)")
    if {FAST, FIRST + FAST} <= times.keys():
        share = times[FIRST + FAST]["ms"] / times[FAST]["ms"]
        found.append(f"first preview after {100 * share:.1f} % of the decoding time, {_verdict(share < 0.15)} (< 15 %)")
    return found


def _verdict(kept: bool) -> str:
    return "as asked" if kept else "NOT as asked"


def draw(args: argparse.Namespace) -> None:
    """The student's three stages beside the original, a row a photo, every stage enlarged to the picture's size."""
    data = args.held_out or args.data
    if not data:
        raise UserError("--picture needs --data: folders or shards of held-out photos")
    dataset = make_dataset(data, Crops(size=args.size, augment=False))
    batch = next(iter(iterate_eval(dataset, batch_size=args.shown, limit=args.shown)))
    x = to_float(batch["image"])
    tokenizer = Tokenizer.from_pretrained(str(place(args.out, STUDENT)))
    stages = list(tokenizer.decode_progressive(tokenizer.encode(x).mode(), seed=batch["index"].tolist()))
    columns = [F.interpolate(stage, size=x.shape[2:], mode="nearest") for stage in (*stages, x)]
    cells = torch.stack([to_uint8(column) for column in columns], dim=1).flatten(0, 1)
    write_file(args.picture, tensor_to_pil(make_grid(cells, nrow=len(columns), padding=2, pad_value=255)).save)


def run_curve(args: argparse.Namespace) -> None:
    """Operations and time by the number of stages."""
    file = args.out / f"curve-{args.decoder.replace('/', '-')}-{args.smallest}-{args.stage_steps}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for stages in range(len(rows) + 1, 6):
        config = decoder_config({"size": args.decoder, "stages": stages})
        decoder, side = make_decoder(config).to(device()).eval(), args.smallest << (stages - 1)
        z = torch.randn(1, config.latent_channels, side // config.factor, side // config.factor, device=device())
        row: dict[str, Any] = {"stages": stages, "side": side}
        works = {}
        for name, given in (("multi", stages), ("full", 1)):
            steps = args.stage_steps * stages // given
            how = Decoding(stages=given, steps=steps).checked(decoder, SamplerConfig(), z)
            works[name] = lambda decoder=decoder, z=z, how=how: list(pictures(decoder, z, how))
            row[name] = {"gflop": count_flops(works[name]) / 1e9}
        for name, timing in measure(works, repeats=args.repeats, device=device()).items():
            row[name] |= {"ms": timing.median, "low": timing.quartiles[0], "high": timing.quartiles[1]}
        rows.append(row)
        write_text(file, json.dumps(rows) + "\n")
    lines = []
    for row in rows:
        stages, multi, full = row["stages"], row["multi"], row["full"]
        lines.append([
            str(stages), f"{row['side']}²", f"{multi['gflop']:.2f}", f"{full['gflop']:.2f}",
            f"{stages * 0.75 / (1 - 0.25**stages):.2f}", f"{full['gflop'] / multi['gflop']:.2f}",
            *(f"{way['ms']:.0f} ({way['low']:.0f} … {way['high']:.0f})" for way in (multi, full)),
            f"{full['ms'] / multi['ms']:.2f}",
        ])  # fmt: skip
    head = ["stages", "picture", "GFLOP", "at full resolution", "formula, times", "GFLOP, times", "ms (quartiles)",
            "at full resolution", "ms, times"]  # fmt: skip
    sys.stdout.write(markdown(head, lines))


def everything(args: argparse.Namespace) -> None:
    """All of training and decoding, one after the other."""
    for action in (run_training, run_scoring, run_timing, show):
        action(args)


ACTIONS = {
    "train": run_training, "score": run_scoring, "time": run_timing, "show": show, "all": everything,
    "curve": run_curve,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    parser.add_argument("--held-out", nargs="+", default=[], help="all: held-out photos, --data being the others")
    train = parser.add_argument_group("train")
    train.add_argument("--steps", type=int, default=4000, help="optimizer steps of full, and of the others together")
    train.add_argument("--share", type=float, default=0.2, help="fraction of them that the student gets")
    train.add_argument("--start", default="f8c4", help="single-scale model to start from: packaged name or folder")
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe values of full and multi")
    train.add_argument("--set-student", nargs="+", default=[], metavar="KEY=VALUE", help="recipe values of the student")
    train.add_argument("--seed", type=int, default=0)
    score = parser.add_argument_group("score, time and show")
    score.add_argument("--size", type=int, default=256, help="side of the held-out pictures, in pixels")
    score.add_argument("--crop", type=int, default=0, help="score the pictures' centres of this side only, apart")
    score.add_argument("--limit", type=int, help="at most so many held-out pictures")
    score.add_argument("--repeats", type=int, default=5, help="timed rounds, of curve, too")
    score.add_argument("--picture", type=Path, help="show: draw the stages beside the originals")
    score.add_argument("--shown", type=int, default=3, help="photos in that picture")
    curve = parser.add_argument_group("curve")
    curve.add_argument("--decoder", default="XS/1", help="SIZE/PATCH")
    curve.add_argument("--smallest", type=int, default=16, help="side of the first stage, in pixels")
    curve.add_argument("--stage-steps", type=int, default=1, help="steps of each stage")
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
