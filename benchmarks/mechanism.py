"""The papers' mechanism on pictures of 32²: several steps against one, and what distillation keeps of them.

    python benchmarks/mechanism.py train --data TINY.tar PHOTOS.tar --out runs/mechanism [--jobs 12]
    python benchmarks/mechanism.py score --held-out TINY-VAL.tar --out runs/mechanism [--jobs 12]
    python benchmarks/mechanism.py show --out runs/mechanism [--picture mechanism.png]
    python benchmarks/mechanism.py pack --out runs/mechanism --to FOLDER [--models teacher student-best]

`train` cuts the crops once, prints what the rows below will cost, and trains them in order of importance, each as soon
as what it starts from is there; `--jobs` rows at a time, each a process of one thread, on one GPU or several cores.
`--rows` and `--seeds` choose, `--minutes` starts nothing later than that. `score` decodes and measures the held-out
pictures, `show` prints the table and the criteria of docs/mechanism.md, `pack` gathers what is worth keeping. What is
done is not done again, so the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import mechanism_scores as scores
import numpy as np
import torch
from energy import energy_losses
from mechanism_rows import (
    BEST,
    CROPS,
    FAVOURED,
    PLAN,
    ROWS,
    SCALE,
    SIDE,
    STUDENTS,
    Item,
    chosen,
    cost,
    folder_of,
    is_choice,
    is_done,
    needs,
    recipe_for,
)  # fmt: skip
from rich.console import Console
from torch import Tensor
from trainings import device, exit_code, facts_of, finished, make_parser, trained

from monobath import Tokenizer, UserError
from monobath.data import Crops, make_dataset
from monobath.files import write_file, write_json
from monobath.training import Run, checkpoints
from monobath.training.objectives.base import AutoencoderObjective

STEPS = (1, 2, 4, 8, 12)
"""Of decoders that take several, per stage."""
CPU, GPU = 0.1, 12.0
"""TFLOP/s that the estimates count with: one core in bf16, and an H200 that nine rows share, as far as it was seen."""


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


# ---- work ---------------------------------------------------------------------------------------------------


def perform(item: Item, args: argparse.Namespace) -> None:
    """Train, or choose."""
    name, seed = item
    if is_choice(item):
        return choose(name, args)
    name = chosen(args.out, name) if name == FAVOURED else name
    recipe = recipe_for(name, seed, args)
    crops = recipe.training.steps * args.batch
    patch = mock.patch.object(AutoencoderObjective, "_decoder_losses", energy_losses())
    with patch if ROWS[name].energy else nullcontext():
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


def fork(work: Callable[..., None], *arguments: Any) -> Any:
    """A process of one thread that shares what is in memory, started. This one must not have looked for a GPU."""

    def done() -> int:
        work(*arguments)
        return 0

    def alone() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: whoever waits for them waits forever
        sys.exit(exit_code(done))  # a mistake is one line here, too

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def in_processes(works: Sequence[Callable[[], None]]) -> None:
    """Side by side; one alone stays in this process."""
    if len(works) == 1:
        return works[0]()
    processes = [fork(work) for work in works]
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise UserError("a process failed: see above; the same command goes on")
    return None


def run_training(args: argparse.Namespace) -> None:
    items = [(n, s) for n, s in PLAN if (not args.rows or n in args.rows) and (s in args.seeds or is_choice((n, s)))]
    items = [item for item in items if not is_done(args.out, item)]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        teller = fork(announce, items, args)  # what it imports looks for a GPU, after which a fork could not use it
        teller.join()
        if teller.exitcode:
            raise UserError("nothing is trained: see above; --rows leaves out what this machine lacks packages for")
    else:
        announce(items, args)
    cut_crops(args)
    schedule(items, args)


def announce(items: Sequence[Item], args: argparse.Namespace) -> None:
    """What it will cost."""
    budget = {item: cost(item, args.budget_scale) for item in items}
    for (name, seed), operations in budget.items():
        Console().print(f"{name}-seed{seed}: {operations / 1e15:.3f} PFLOP", soft_wrap=True)
    total = sum(budget.values()) / 1e12
    hours, minutes = total / CPU / 3600, total / GPU / 60
    Console().print(f"{total / 1e3:.2f} PFLOP: about {hours:.1f} core-hours, or {minutes:.1f} minutes of a GPU")


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
            running[fork(perform, item, args)] = item
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
                numbers = STEPS if many else (1,)
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
