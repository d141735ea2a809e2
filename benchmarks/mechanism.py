"""The papers' mechanism on pictures of 32²: several steps against one, and what distillation keeps of them.

    python benchmarks/mechanism.py train --data TINY.tar PHOTOS.tar --out runs/mechanism [--jobs 12]
    python benchmarks/mechanism.py score --held-out TINY-VAL.tar --out runs/mechanism [--jobs 12]
    python benchmarks/mechanism.py show --out runs/mechanism [--picture mechanism.png]
    python benchmarks/mechanism.py pack --out runs/mechanism --to FOLDER [--models teacher student-best]

`train` cuts the crops once, prints what the rows below will cost, and trains them in order of importance, each as soon
as what it starts from is there; `--jobs` rows at a time, each a process, on one GPU or several cores. `--rows` and
`--seeds` choose, `--minutes` starts nothing later than that. `score` decodes and measures the held-out pictures, `show`
prints the table and the criteria of docs/mechanism.md, `pack` gathers what is worth keeping. What is done is not done
again, so the same command goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import mechanism_scores as scores
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from trainings import device, exit_code, facts_of, finished, make_parser, trained

from monobath import Tokenizer, UserError
from monobath.data import Crops, make_dataset
from monobath.decoders import ConvConfig, DecoderConfig, KLConfig, UViTConfig, make_decoder
from monobath.files import write_file, write_json
from monobath.models.encoder import Encoder, EncoderConfig
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training import Run, checkpoints
from monobath.training.config import (
    DataConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    TimesConfig,
    TrainingConfig,
)
from monobath.training.recipe import DecoderRecipe, DistillationRecipe, TokenizerRecipe

SIDE, SCALE, CROPS = 32, (32, 64), 300_000
CPU, GPU = 0.1, 20.0
"""TFLOP/s that the estimates count with: one core in bf16, and a GPU on so small a network."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training."""

    what: str
    crops: int = 100_000
    init: str = "encoder"
    """The row it starts from; a decoder of another shape starts anew."""
    factor: int = 8
    ones: float = 0.0
    """Fraction of the samples at t = 1."""
    perceptual: float = 0.0
    steps: int | None = None
    """Of the teacher, `init`; 0: its best number; None: no distillation."""
    stages: int = 1
    kl: bool = False
    adversarial: float = 0.0
    encoder: bool = False
    """Encoder and decoder learn together."""
    lr: float = 8e-4


P = 0.05
STUDENT = Row(what="one step from {} of the teacher's", crops=30_000, init="teacher", ones=1.0, steps=0, lr=4e-4)
ROWS = {
    "encoder": Row(what="encoder f8c4 with a decoder of convolutions, squared error", init="", encoder=True),
    "teacher": Row(what="XS/1, velocity, all times", crops=CROPS),
    "teacher-p": Row(what="the same, perceptual", crops=CROPS, perceptual=P),
    "ones": Row(what="XS/1 at t = 1 only", ones=1.0),
    "ones-p": Row(what="the same, perceptual", ones=1.0, perceptual=P),
    "student-12": dataclasses.replace(STUDENT, steps=12),
    "student-best": STUDENT,
    "student-12-p": dataclasses.replace(STUDENT, steps=12, perceptual=P),
    "student-best-p": dataclasses.replace(STUDENT, perceptual=P),
    "student-of-p": dataclasses.replace(STUDENT, init="teacher-p", perceptual=P),
    "continued": Row(what="the teacher trained on", crops=30_000, init="teacher", lr=4e-4),
    "kl": Row(what="KL-VAE decoder, L1 + perceptual", perceptual=0.1, kl=True),
    "kl-gan": Row(what="the same + discriminator", perceptual=0.1, kl=True, adversarial=0.5),
    "multi": Row(what="the teacher trained on at 16² and 32²", init="teacher", stages=2, lr=4e-4),
    "multi-student": dataclasses.replace(STUDENT, init="multi", steps=4, stages=2, perceptual=P),
}
for _name in ("encoder", "teacher", "ones", "student-best-p"):
    _row = ROWS[_name]
    ROWS[f"f16-{_name}"] = dataclasses.replace(_row, factor=16, init=_row.init and f"f16-{_row.init}")
STUDENTS = ("student-12", "student-best", "student-12-p", "student-best-p")
BEST, FAVOURED = "best-of-", "favoured"
"""Choices: the teacher's best number of steps, and the students' best row, by the FD of training crops."""
PLAN = [
    ("encoder", 0), ("teacher", 0), ("ones", 0), ("ones", 1), ("ones", 2), (f"{BEST}teacher", 0),
    *((name, 0) for name in STUDENTS), (FAVOURED, 0), (FAVOURED, 1), (FAVOURED, 2),
    ("kl-gan", 0), ("kl", 0), ("ones-p", 0), ("continued", 0), ("multi", 0), ("multi-student", 0),
    ("teacher-p", 0), (f"{BEST}teacher-p", 0), ("student-of-p", 0),
    ("continued", 1), ("continued", 2), ("ones-p", 1), ("ones-p", 2), ("multi-student", 1), ("multi-student", 2),
    ("student-of-p", 1), ("student-of-p", 2), ("kl-gan", 1), ("kl-gan", 2), ("kl", 1), ("kl", 2),
    ("f16-encoder", 0), ("f16-teacher", 0), ("f16-ones", 0), (f"{BEST}f16-teacher", 0), ("f16-student-best-p", 0),
]  # fmt: skip
"""(row or choice, seed), the most important first."""
Item = tuple[str, int]


# ---- crops --------------------------------------------------------------------------------------------------


def cut_crops(args: argparse.Namespace) -> None:
    """All crops that any row sees, in `crops.npy`, uint8 `(N, 3, SIDE, SIDE)`: crop i is of picture i mod n."""
    file, count = args.out / "crops.npy", max(args.batch, round(CROPS * args.budget_scale))
    facts = {"data": [Path(source).name for source in args.data], "count": count}
    if file.is_file():
        if json.loads((args.out / "crops.json").read_text(encoding="utf-8")) != facts:
            raise UserError(f"{file} holds other crops: choose another --out for this --data and --budget-scale")
        return
    if not args.data:
        raise UserError("train needs --data: folders or shards of pictures")
    clock = time.perf_counter()
    dataset = make_dataset(args.data, Crops(size=SIDE, scale=SCALE), cache=True)
    dataset.preload()  # type: ignore[union-attr]

    def write(path: Path) -> None:
        np.lib.format.open_memmap(path, "w+", np.uint8, (count, 3, SIDE, SIDE)).flush()
        shares = [range(first, count, args.jobs) for first in range(args.jobs)]
        in_processes([lambda share=share: _cut(dataset, path, share) for share in shares])

    write_json(args.out / "crops.json", facts)
    write_file(file, write)
    Console().print(f"{count} crops of {len(dataset)} pictures: {time.perf_counter() - clock:.0f} s")  # type: ignore[arg-type]


def _cut(dataset: Any, path: Path, share: range) -> None:
    crops = np.lib.format.open_memmap(path, "r+")
    for i in share:
        crops[i] = dataset[divmod(i, len(dataset))]["image"]
    crops.flush()


def read_crops(out: Path, count: int | None = None) -> Tensor:
    """The first `count` of them."""
    return torch.from_numpy(np.load(out / "crops.npy", mmap_mode="c")[:count])


class CropRun(Run):
    """A run on the crops of its parent folder, which lie on the device, in an order of its own seed.

    A GPU takes several thousand crops of this size in a second, more than cores cut.
    """

    def batches(self) -> Iterator[dict[str, Tensor]]:
        crops, size = read_crops(self.folder.parent).to(self.device), self.recipe.training.batch_size
        order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(self.recipe.training.seed))
        order = order.to(self.device)
        for first in range(self.done * size, self.recipe.training.steps * size, size):
            places = torch.arange(first, first + size, device=self.device) % len(crops)
            yield {"image": crops[order[places]]}


# ---- recipes ------------------------------------------------------------------------------------------------


def folder_of(out: Path, item: Item) -> Path:
    """Where a row's run is; a choice's file."""
    name, seed = item
    if is_choice(item):
        return out / f"{name}.json"
    return out / f"{chosen(out, name) if name == FAVOURED else name}-seed{seed}"


def is_choice(item: Item) -> bool:
    """Whether an item of the plan chooses instead of training."""
    return item[0].startswith(BEST) or item == (FAVOURED, 0)


def chosen(out: Path, name: str) -> Any:
    """What a choice chose."""
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["chosen"]


def is_done(out: Path, item: Item) -> bool:
    """Whether an item of the plan is finished."""
    if item[0] == FAVOURED and item[1] and not is_done(out, (FAVOURED, 0)):
        return False
    folder = folder_of(out, item)
    return folder.is_file() if is_choice(item) else (folder / "facts.json").is_file()


def needs(item: Item) -> list[Item]:
    """What must be finished before it."""
    name, _ = item
    if item == (FAVOURED, 0):
        return [(student, 0) for student in STUDENTS]
    if name == FAVOURED:
        return [(FAVOURED, 0)]
    if is_choice(item):
        return [(name.removeprefix(BEST), 0)]
    row = ROWS[name]
    return [(row.init, 0)] * bool(row.init) + [(f"{BEST}{row.init}", 0)] * (row.steps == 0)


def encoder_of(row: Row) -> EncoderConfig:
    """Four channels at the row's factor."""
    return EncoderConfig(
        factor=row.factor, latent_channels=4, base=32, multipliers=[2, 4, 4][: row.factor.bit_length() - 2], patch=4,
        middle_attention=False, linear_skip=True,
    )  # fmt: skip


def decoder_of(row: Row) -> DecoderConfig:
    """The row's decoder."""
    if row.encoder:
        return ConvConfig(size="CS/4", factor=row.factor)
    if row.kl:
        return KLConfig(channels=[64, 128, 128, 160])  # 5.04 M parameters, 1 % more than XS/1
    return UViTConfig(size="XS/1", factor=row.factor, stages=row.stages)


def recipe_for(name: str, seed: int, args: argparse.Namespace) -> TokenizerRecipe:
    """The training of a row; what it starts from is finished."""
    row = ROWS[name]
    run, steps = folder_of(args.out, (name, seed)), max(1, round(row.crops * args.budget_scale / args.batch))
    third = row.crops == CROPS  # kept at a third, too, which is the budget of the others
    steps = 3 * max(1, round(steps / 3)) if third else steps
    start = str(folder_of(args.out, (row.init, 0)) / "model") if row.init else ""
    one = row.encoder or row.kl or row.ones == 1
    sampler = SamplerConfig(
        steps=1 if one else 4, stages=row.stages, noise="zero" if row.encoder or row.kl else "gaussian"
    )
    common: dict[str, Any] = {
        "name": run.name,
        "run": str(run),
        "init": start,
        "model": TokenizerConfig(encoder=encoder_of(row), decoder=decoder_of(row), sampler=sampler),
        "data": DataConfig(source=args.data, size=SIDE, scale=list(SCALE), cache=True, workers=0),
        "times": TimesConfig(ones=1.0 if one else 0.0, zero_noise=float(row.encoder)),
        "loss": LossConfig(perceptual=row.perceptual, adversarial=row.adversarial),
        "optimizer": OptimizerConfig(lr=row.lr, warmup=min(50, steps // 10), schedule="constant"),
        "training": TrainingConfig(
            steps=steps, batch_size=args.batch, precision=args.precision, train_encoder=row.encoder, seed=seed,
            sample_every=0, log_every=25, checkpoint_every=steps // 3 if third else steps, keep=3 if third else 1,
        ),
    }  # fmt: skip
    if row.encoder:
        return TokenizerRecipe(**common)
    if row.steps is None:
        return DecoderRecipe(**common)
    number = row.steps or chosen(args.out, f"{BEST}{row.init}")
    return DistillationRecipe(**common, distill=DistillConfig(teacher=start, steps=number))


def flops(name: str) -> float:
    """Operations per crop of a row, without its perceptual network and discriminator; "best" counts as 8."""
    row = ROWS["student-best-p" if name == FAVOURED else name]

    def forward(module: torch.nn.Module, *inputs: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        return counter.get_total_flops()

    with torch.device("meta"):
        z, t = torch.zeros(1, 4, SIDE // row.factor, SIDE // row.factor), torch.ones(1)
        encoder = forward(Encoder(encoder_of(row)), torch.zeros(1, 3, SIDE, SIDE))
        network = make_decoder(decoder_of(row))
        parts = [forward(network, torch.zeros(1, 3, SIDE >> s, SIDE >> s), t, z) for s in range(row.stages)]
    if row.encoder:
        return 3.0 * (encoder + sum(parts))
    if row.steps is None:
        return encoder + 3.0 * sum(parts) / row.stages
    return float(encoder + (3 + (row.steps or 8)) * sum(parts))


# ---- work ---------------------------------------------------------------------------------------------------


def perform(item: Item, args: argparse.Namespace) -> None:
    """Train, or choose."""
    name, seed = item
    if is_choice(item):
        return choose(name, args)
    name = chosen(args.out, name) if name == FAVOURED else name
    recipe = recipe_for(name, seed, args)
    crops = recipe.training.steps * args.batch
    run = trained(recipe, by=lambda recipe: CropRun(recipe).train(), row=name, seed=seed, crops=crops)
    early = run / "checkpoints" / f"step-{recipe.training.steps // 3:08d}"
    if early.is_dir():  # kept at a third
        tokenizer = Tokenizer(recipe.model)
        checkpoints.load(early, model=tokenizer, ema=(ema := checkpoints.EMA(tokenizer, 0.0)))
        ema.model.save_pretrained(run / "model-third")  # type: ignore[operator]
    return None


def choose(name: str, args: argparse.Namespace) -> None:
    """Write down which candidate has the smallest Fréchet distance on training crops."""
    model = lambda row: folder_of(args.out, (row, 0)) / "model"  # noqa: E731
    candidates: dict[Any, tuple[Path, int]] = {row: (model(row), 1) for row in STUDENTS}
    if name != FAVOURED:
        candidates = {steps: (model(name.removeprefix(BEST)), steps) for steps in (4, 8, 12)}
    crops = read_crops(args.out, args.limit or 1000)
    scorer = scores.Scorer(crops, device())
    found = {key: scorer.distance(scores.decoded(*how, crops, device())) for key, how in candidates.items()}
    best = min(found, key=lambda key: found[key])
    Console().print(f"{name}: {best} of {found}")
    write_json(args.out / f"{name}.json", {"chosen": best, "fd": {str(key): value for key, value in found.items()}})


def in_processes(works: Sequence[Callable[[], None]]) -> None:
    """Side by side, forked, so that they share what is in memory; one alone stays in this process."""
    if len(works) == 1:
        return works[0]()
    processes = [multiprocessing.get_context("fork").Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise UserError("a process failed: see above; the same command goes on")
    return None


def run_training(args: argparse.Namespace) -> None:
    items = [(n, s) for n, s in PLAN if (not args.rows or n in args.rows) and (s in args.seeds or is_choice((n, s)))]
    items = [item for item in items if not is_done(args.out, item)]
    args.out.mkdir(parents=True, exist_ok=True)
    announce(items, args)
    cut_crops(args)
    schedule(items, args)


def announce(items: Sequence[Item], args: argparse.Namespace) -> None:
    """What it will cost."""
    budget = {item: 0.0 if is_choice(item) else _crops(item) * args.budget_scale * flops(item[0]) for item in items}
    for (name, seed), cost in budget.items():
        Console().print(f"{name}-seed{seed}: {cost / 1e15:.3f} PFLOP", soft_wrap=True)
    total = sum(budget.values()) / 1e12
    hours, minutes = total / CPU / 3600, total / GPU / 60
    Console().print(f"{total / 1e3:.2f} PFLOP: about {hours:.1f} core-hours, or {minutes:.1f} minutes of a GPU")


def _crops(item: Item) -> int:
    return ROWS["student-best" if item[0] == FAVOURED else item[0]].crops


def schedule(items: Sequence[Item], args: argparse.Namespace) -> None:
    """All items, in order, `args.jobs` at a time, each when what it needs is finished."""
    waiting, running, failed = list(items), {}, []  # type: ignore[var-annotated]
    clock = time.perf_counter()
    while waiting or running:
        late = args.minutes and time.perf_counter() - clock > 60 * args.minutes
        ready = [item for item in waiting if all(is_done(args.out, need) for need in needs(item))]
        for item in [] if late else ready[: max(0, args.jobs - len(running))]:
            waiting.remove(item)
            if args.jobs == 1:
                perform(item, args)
                break  # something more important may be ready now
            process = multiprocessing.get_context("fork").Process(target=perform, args=(item, args))
            process.start()
            running[process] = item
        else:
            if not running:
                break
            gone = connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in gone]:
                process.join()
                failed += [running[process]] * bool(process.exitcode)
                del running[process]
    if failed or waiting:
        names = ", ".join(f"{name}-seed{seed}" for name, seed in [*failed, *waiting])
        raise UserError(f"not done: {names}; failures are told above, and the same command goes on")


def systems(out: Path) -> list[scores.System]:
    """Everything that there is to score: the rows' models at their numbers of steps, in the order of the plan."""
    found = []
    order = list(ROWS)
    for run in sorted(finished(out), key=lambda run: (order.index(facts_of(run)["row"]), facts_of(run)["seed"])):
        facts = facts_of(run)
        row = ROWS[facts["row"]]
        if row.encoder:
            continue
        many = row.steps is None and not row.kl and row.ones < 1
        for folder in ("model", "model-third"):
            if (run / folder).is_dir():
                name = facts["row"] + ("@third" if folder == "model-third" else "")
                numbers = (1, 2, 4, 8, 12) if many else (1,)
                found += [scores.System(name, facts["seed"], n, run / folder, facts["crops"]) for n in numbers]
    return found


def run_scoring(args: argparse.Namespace) -> None:
    if not args.held_out:
        raise UserError("score needs --held-out: folders or shards of held-out pictures")
    missing = [system for system in systems(args.out) if not system.file(args.out).is_file()]
    shares = [share for first in range(args.jobs) if (share := missing[first :: args.jobs])]
    if shares:
        in_processes([lambda share=share: scores.score(share, args) for share in shares])


def run_packing(args: argparse.Namespace) -> None:
    """Scores, facts and logs in one archive; named rows' models as bfloat16, each a folder."""
    if args.to is None:
        raise UserError("pack needs --to: a folder")
    kept = [path for kind in ("json", "jsonl", "yaml", "png") for path in args.out.rglob(f"*.{kind}")]
    kept = sorted(path for path in kept if not {"checkpoints", "model", "model-third"} & set(path.parts))

    def write(path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for file in kept:
                archive.add(file, file.relative_to(args.out))

    write_file(args.to / "mechanism.tar.gz", write)
    for name in args.models:
        tokenizer = Tokenizer.from_pretrained(args.out / f"{name}-seed0" / "model")
        tokenizer.save_pretrained(args.to / name, dtype=torch.bfloat16)


ACTIONS = {
    "train": run_training,
    "score": run_scoring,
    "show": lambda args: scores.show(systems(args.out), args),
    "pack": run_packing,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, ACTIONS)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--limit", type=int, help="at most so many pictures to choose by or to score")
    train = parser.add_argument_group("train")
    names = list(dict.fromkeys(name for name, _ in PLAN))
    train.add_argument("--rows", nargs="+", choices=names, default=[], help="default: all")
    train.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    train.add_argument("--budget-scale", type=float, default=1.0, help="all crops times this")
    train.add_argument("--batch", type=int, default=128, help="crops per step")
    train.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    train.add_argument("--minutes", type=float, default=0.0, help="start no row later than this; 0: no limit")
    score = parser.add_argument_group("score, show and pack")
    score.add_argument("--held-out", nargs="+", default=[], help="folders or shards of held-out pictures")
    score.add_argument("--picture", type=Path, help="show: original, one step, 12, student, KL-VAE + GAN, side by side")
    score.add_argument("--to", type=Path, help="pack: folder")
    score.add_argument("--models", nargs="+", choices=list(ROWS), default=[], help="pack: rows whose models are kept")
    args = parser.parse_args(arguments)
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
