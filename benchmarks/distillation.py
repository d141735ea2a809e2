"""What distillation to one step buys: the student, its teacher, and the same model trained on for as long without it.

    python benchmarks/distillation.py train --data PHOTOS.tar --out runs/distillation [--name NAME] [--steps 500 …]
    python benchmarks/distillation.py score --data HELD-OUT.tar --out runs/distillation
    python benchmarks/distillation.py show --out runs/distillation

`train` starts twice from the same model (--start), on the same crops in the same order, with a frozen encoder, the
same learning rates and as many steps: (a) it goes on with its own recipe's objective, times and loss weights; (b) a
student learns what the start model, its teacher, samples in --teacher-steps steps (SSDD, arXiv 2510.04961, section
3.3). `score` decodes held-out photos at 256² with (a) and (b) in one step, and with (c) the teacher in 1, 2, 4, 8 and
12, from Gaussian noise, and from zero noise where a model has learnt it. `show` prints a row for each, and paired
differences b − a and b − c; ± is one standard error over pictures, or half-samples of them. Variants stand side by
side: give each its --name. Those that differ in losses or rates only can share the teacher's samples (--cache; 24 KiB a
crop of 64²). What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainings import (
    FIGURES,
    LABELS,
    add_scoring,
    cell,
    device,
    estimate,
    exit_code,
    finished,
    judge_of,
    make_parser,
    markdown,
    read_score,
    recipe_of,
    scores_folder,
    trained,
)

from monobath import Tokenizer, UserError, resources
from monobath.evaluation.speed import system_speeds
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_text
from monobath.sampling import Noise
from monobath.tokenizer import SamplerConfig
from monobath.training.config import (
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    TimesConfig,
    TrainingConfig,
)
from monobath.training.recipe import DecoderRecipe, DistillationRecipe

PLAIN = "undistilled-"
"""What names of (a) begin with."""


def own_objective(start: str) -> tuple[TimesConfig, LossConfig]:
    """Times and losses that a model was trained with, from the recipe it carries."""
    folder = resources.weights_path(start) or Path(start)
    try:
        recipe = json.loads((folder / "config.json").read_text(encoding="utf-8"))["training"]["recipe"]
        return TimesConfig(**recipe["times"]), LossConfig(**recipe["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--start {start} carries no recipe: give a packaged name, or a folder that monobath train wrote"
        ) from None


def common(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What both trainings share."""
    return {
        "name": name,
        "run": str(args.out / name),
        "init": args.start,
        "data": DataConfig(
            source=args.data, size=args.size, scale=[args.size, 3 * args.size], cache=True, workers=args.workers
        ),
        "optimizer": OptimizerConfig(lr=args.lr, warmup=min(50, args.steps // 10)),
        "training": TrainingConfig(
            steps=args.steps, batch_size=args.batch, precision=args.precision, train_encoder=False, ema=0.99,
            seed=args.seed, sample_every=0, checkpoint_every=100,
        ),
    }  # fmt: skip


def undistilled(args: argparse.Namespace) -> DecoderRecipe:
    """(a): the start model goes on as it began. Its name says what it depends on, so that variants share it."""
    times, loss = own_objective(args.start)
    name = f"{PLAIN}{args.steps}-lr{args.lr:g}-crop{args.size}x{args.batch}-seed{args.seed}"
    config = Tokenizer.from_pretrained(args.start).config
    return DecoderRecipe(**common(args, name), model=config, times=times, loss=loss)


def student(args: argparse.Namespace) -> DecoderRecipe:
    """(b): the student, or its control without a teacher."""
    config = Tokenizer.from_pretrained(args.start).config
    config.sampler = SamplerConfig(power=config.sampler.power, noise="zero" if args.zero_noise else "gaussian")
    loss = LossConfig(perceptual=args.perceptual, repa=args.repa)
    times = TimesConfig(ones=1.0, zero_noise=args.zero_noise)
    if args.no_teacher:
        return DecoderRecipe(**common(args, args.name), model=config, times=times, loss=loss)
    cache = f"samples-{args.teacher_steps}-zero{args.zero_noise:g}-crop{args.size}x{args.batch}-seed{args.seed}"
    return DistillationRecipe(
        **common(args, args.name),
        model=config,
        times=times,
        loss=loss,
        distill=DistillConfig(
            teacher=args.start,
            steps=args.teacher_steps,
            power=args.teacher_power,
            perceptual_to=args.perceptual_to,
            cache=str(args.out / "teacher-samples" / cache) if args.cache else "",
        ),
    )


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of photos")
    if args.name == "teacher" or args.name.startswith(PLAIN):
        raise UserError(f"--name {args.name} is a name of another row: choose another")
    file = args.out / "start.json"
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))["start"]) != args.start:
        raise UserError(f"{args.out} starts from {before}: choose another --out for {args.start}")
    recipes = undistilled(args), student(args)
    write_text(file, json.dumps({"start": args.start}) + "\n")
    for recipe in recipes:
        trained(recipe)


def rows(args: argparse.Namespace) -> list[tuple[str, str, int, Noise, Path]]:
    """(system, model, steps, noise, file of its scores) of everything that there is to compare."""
    file = args.out / "start.json"
    if not file.is_file():
        raise UserError(f"{args.out} holds no training: run train first")
    start = json.loads(file.read_text(encoding="utf-8"))["start"]
    found: list[tuple[str, str, int, Noise]] = [("teacher", start, n, "gaussian") for n in sorted(args.teacher_rows)]
    if own_objective(start)[0].zero_noise:
        found += [("teacher", start, n, "zero") for n in sorted(args.zero_rows)]
    for run in sorted(finished(args.out), key=lambda run: (not run.name.startswith(PLAIN), run.name)):
        found.append((run.name, str(run / "model"), 1, "gaussian"))
        if recipe_of(run).times.zero_noise:
            found.append((run.name, str(run / "model"), 1, "zero"))
    scores = args.out / scores_folder(args)
    return [(name, model, n, noise, scores / f"{name}-{n}-{noise}.json") for name, model, n, noise in found]


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("score needs --data: folders or shards of held-out photos")
    judge = judge_of(args)
    found = rows(args)
    for _, model, steps, noise, file in found:
        judge.score(file, lambda m=model, s=steps, e=noise: TokenizerSystem(m, steps=s, noise=e, device=device()))
    # All of them are the same network: time depends on the number of steps alone.
    steps, file = sorted({row[2] for row in found}), args.out / "speeds.json"
    speeds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not {str(n) for n in steps} <= speeds.keys():
        systems = [TokenizerSystem(found[0][1], steps=n, noise="gaussian", device=device()) for n in steps]
        for system, n in zip(systems, steps, strict=True):
            system.name = str(n)
        size = (args.score_size, args.score_size)
        timed = system_speeds(systems, size, parts=("decode",), repeats=args.repeats)
        write_text(file, json.dumps({n: speed.images_per_second for n, (speed,) in timed.items()}, indent=2) + "\n")


def show(args: argparse.Namespace) -> None:
    file = args.out / "speeds.json"
    speeds = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    scores, lines = {}, []
    for name, _, steps, noise, path in rows(args):
        score = read_score(path)
        if score is None:
            continue
        scores[name, steps, noise] = score
        figures = [cell(estimate(score, key), key) for key in FIGURES]
        speed = f"{speeds[str(steps)]:.2f}" if str(steps) in speeds else ""
        lines.append([name, str(steps), noise, *figures, speed])
    sys.stdout.write(markdown(["system", "steps", "noise", *LABELS.values(), "images/s"], lines))
    lines = []
    for run in finished(args.out):
        recipe = recipe_of(run)
        if run.name.startswith(PLAIN):
            continue
        plain = next((other.name for other in finished(args.out) if _is_plain(recipe, other)), "")
        for noise in ("gaussian", "zero"):
            own = scores.get((run.name, 1, noise))
            others = [(plain, 1, noise), ("teacher", args.against, "gaussian")]
            for other in others:
                if own is None or other not in scores:
                    continue
                gaps = [cell(estimate(own, key, scores[other]), key, signed=True) for key in FIGURES]
                ratios = [
                    f"{estimate(own, key).value / estimate(scores[other], key).value:.3f}"
                    for key in ("efflite", "fd_efflite")
                ]
                than = "1 step" if other[1] == 1 else f"{other[1]} steps"
                lines.append([f"{run.name} ({noise}) − {other[0]} ({than}, {other[2]})", *gaps, *ratios])
    sys.stdout.write("\n" + markdown(["difference", *LABELS.values(), "ratio of distances", "ratio of FD"], lines))


def _is_plain(student: DecoderRecipe, run: Path) -> bool:
    """Whether a run is (a) of a student: the same crops, steps and rates, its own objective."""
    other = recipe_of(run)
    alike = (student.training, student.optimizer, student.data.size) == (
        other.training,
        other.optimizer,
        other.data.size,
    )
    return alike and run.name.startswith(PLAIN)


ACTIONS = {"train": run_training, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    train = parser.add_argument_group("train")
    train.add_argument("--start", default="default", help="start model and teacher: packaged name or folder")
    train.add_argument("--name", default="student", help="of the student's row and folder")
    train.add_argument("--steps", type=int, default=500, help="optimizer steps of both trainings")
    train.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of both trainings")
    train.add_argument("--teacher-steps", type=int, default=8, help="Euler steps of the teacher")
    train.add_argument(
        "--no-teacher", action="store_true", help="a control: the student's times and losses, no teacher"
    )
    train.add_argument("--teacher-power", type=float, default=0.0, help="of its time grid; 0: its own")
    train.add_argument("--zero-noise", type=float, default=0.5, help="fraction of samples that start from zero noise")
    train.add_argument("--loss.perceptual", dest="perceptual", type=float, default=0.02, help="weight (student)")
    train.add_argument("--perceptual-to", choices=["teacher", "image"], default="teacher", help="(student)")
    train.add_argument("--loss.repa", dest="repa", type=float, default=0.0, help="weight (student)")
    train.add_argument("--cache", action="store_true", help="keep the teacher's samples, for the next variant")
    train.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    train.add_argument("--batch", type=int, default=16, help="crops a step")
    train.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    train.add_argument("--workers", type=int, default=0, help="loader processes")
    train.add_argument("--seed", type=int, default=0)
    score = add_scoring(parser, "score and show")
    score.add_argument("--teacher-rows", type=int, nargs="+", default=[1, 2, 4, 8, 12], help="steps, Gaussian noise")
    score.add_argument("--zero-rows", type=int, nargs="+", default=[1], help="the teacher's steps from zero noise")
    score.add_argument("--against", type=int, default=8, help="teacher steps that students are compared with")
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
