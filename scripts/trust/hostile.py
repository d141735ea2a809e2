"""Hostile files: an error in one line or a result, never a crash, never code run, never more memory than a file holds.

    python scripts/trust/hostile.py [--cases 100000]

Each case changes one file of a model, a generator, a latent, a cache, a shard of pictures, a recipe or a run, as
`mutations.py` says, reads it and uses what was read. Cases run in forks that may allocate `MEMORY` more than they
began with and take `SECONDS` of processor time each; running a command, opening a connection or writing a file is a
loss, and so is every error but `UserError`, and a `UserError` that tells of a failed allocation.
"""

from __future__ import annotations

import copy
import dataclasses
import faulthandler
import json
import logging
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mutations import mutated
from trial import Loss, Trial, exit_code, parser_of, rng_of
from works import make_photos, tiny_tokenizer, training

from monobath import Tokenizer, UserError
from monobath.data.cache import LatentDataset
from monobath.data.encoding import Caching, cache_latents, write_shard
from monobath.data.latent_file import LatentFile
from monobath.data.pictures import Crops, PhotoDataset
from monobath.generation import Generator
from monobath.generation.generator import GeneratorConfig
from monobath.models.dit import DiTConfig
from monobath.store import DIGEST
from monobath.training import Run
from monobath.training.recipes import load_recipe

MEMORY = 256 * 2**20
"""Bytes; every original file is smaller than 1 MB."""
SECONDS = 20.0
BATCH = 200
"""Cases of one fork."""
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect",
             "socket.getaddrinfo", "os.fork", "shutil.rmtree", "os.remove", "os.rename"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Something that is read."""

    name: str
    files: list[str]
    """Which may be hostile, below the folder."""
    read: Callable[[Path], object]
    """Reads the folder, and uses what it read."""


def targets(folder: Path) -> list[Target]:
    """Writes the originals, each target's in a folder of its name, and says how they are read."""
    shutil.rmtree(folder, ignore_errors=True)
    photos, tokenizer = make_photos(folder / "photos", 3), tiny_tokenizer()
    for name in ("model", "latent", "cache", "shard", "recipe", "run", "generator"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder / "model")
    LatentFile(latent=torch.zeros(4, 2, 3), size=(16, 24), factor=8, model="m").write(folder / "latent/a.safetensors")
    cache_latents(tokenizer, str(photos), folder / "cache", Crops(size=16, scale=(16, 20)), Caching(copies=2))
    write_shard(folder / "shard/a.tar", ((i, torch.full((3, 20, 24), 9 * i, dtype=torch.uint8), torch.zeros(2), {})
                                         for i in range(3)))  # fmt: skip
    training(photos).run(folder)
    shutil.copy(folder / "run/config.yaml", folder / "recipe/a.yaml")
    newest = "checkpoints/step-00000005"
    shutil.rmtree(folder / "run/checkpoints/step-00000004")
    dit = DiTConfig(size="custom", patch=1, width=16, depth=1, heads=2, classes=2)
    generator = GeneratorConfig(dit=dit, size=[2, 3], latent_mean=[0.0] * 4, latent_std=[1.0] * 4, labels=[0, 1])
    Generator(generator).save_pretrained(folder / "generator")

    for name in ("model", "generator"):  # whoever changes the weights changes their hash
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != DIGEST}))

    def model(place: Path) -> None:
        found = Tokenizer.from_pretrained(place)
        found.decode(found.encode(torch.zeros(1, 3, 16, 24)).mode())

    def latent(place: Path) -> None:
        found = LatentFile.read(place / "a.safetensors")
        if found.factor == tokenizer.factor:
            tokenizer.decode(found.latent[None], size=found.size, output="pil")

    def cache(place: Path) -> None:
        dataset = LatentDataset(place)
        for epoch in range(min(3, dataset.facts.copies)):
            for index in range(min(9, len(dataset))):
                dataset[epoch, index]

    def shard(place: Path) -> None:
        dataset = PhotoDataset(str(place), Crops(size=16, scale=(16, 20)), labels=False)
        for index in range(len(dataset)):
            dataset[index]

    trained = load_recipe(str(folder / "recipe/a.yaml"))

    def resume(place: Path) -> None:
        recipe = dataclasses.replace(copy.deepcopy(trained), run=str(place))
        recipe.training.steps = 7
        Run(recipe).step()

    weights = ["model.safetensors", "config.json"]
    inside = ["model.safetensors", "ema.safetensors", "trainer.pt", "state.json"]
    return [
        Target("model", weights, model),
        Target("generator", weights, lambda place: Generator.from_pretrained(place).sample([0], steps=1)),
        Target("latent", ["a.safetensors"], latent),
        Target("cache", ["latents.json", "latents-000000.tar"], cache),
        Target("shard", ["a.tar"], shard),
        Target("recipe", ["a.yaml"], lambda place: load_recipe(str(place / "a.yaml")).to_dict()),
        Target("run", ["config.yaml", *(f"{newest}/{name}" for name in inside)], resume),
    ]


class Forks:
    """Runs cases in forks."""

    def __init__(self, originals: Path, place: Path, seed: int) -> None:
        self.originals, self.place, self.seed = originals, place, seed
        self.targets = targets(originals)
        for target in self.targets:
            target.read(originals / target.name)  # imports what forks need

    def run(self, cases: list[int]) -> Counter[str]:
        """What became of them: "error" or "result", by target.

        Raises:
            Loss: the first one that is neither.
        """
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            self._child(cases, tell)
        os.close(tell)
        with open(told, "rb") as file:
            lines = file.read().decode(errors="replace").splitlines()
        _, status = os.waitpid(pid, 0)
        if status != 0 or len(lines) != len(cases):
            done = next((n for n, line in enumerate(lines) if not line.endswith((" error", " result"))), len(lines))
            case = cases[min(done, len(cases) - 1)]
            how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "\n".join(lines[-30:])
            raise Loss(f"hostile, case {case} ({self.describe(case)}): {how}")
        return Counter(lines)

    def describe(self, case: int) -> str:
        target, file, _ = self._case(case)
        return f"{target.name}, {file}"

    def _case(self, case: int) -> tuple[Target, str, bytes]:
        rng = rng_of(self.seed, case)
        target = self.targets[case % len(self.targets)]
        file = target.files[rng.integers(len(target.files))]
        return target, file, mutated(file, (self.originals / target.name / file).read_bytes(), rng)

    def _child(self, cases: list[int], tell: int) -> None:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        faulthandler.disable()
        code = 1
        try:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            guard = _Guard()
            for case in cases:
                os.write(tell, f"{self._one(case, guard)}\n".encode())
            code = 0
        except BaseException:
            os.write(tell, traceback.format_exc()[-20_000:].encode())
        os._exit(code)

    def _one(self, case: int, guard: _Guard) -> str:
        target, file, data = self._case(case)
        place = self.place / target.name
        if not place.exists():
            shutil.copytree(self.originals / target.name, place)
        (place / file).write_bytes(data)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            with guard:
                target.read(place)
            became = "result"
        except UserError as error:
            if "allocat" in str(error).lower() or "\n" in str(error):
                raise
            became = "error"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if guard.seen:
            raise Loss(f"{guard.seen}")
        shutil.copy(self.originals / target.name / file, place / file)
        if target.name == "run":
            shutil.copy(self.originals / "run/config.yaml", place / "config.yaml")
        return f"{target.name} {became}"


class _Guard:
    """Within: notes what no reader may do."""

    def __init__(self) -> None:
        self.active, self.seen = False, ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.active and event in FORBIDDEN:
            caller = sys._getframe(1).f_code.co_filename
            if "monobath/files.py" not in caller and "shutil" not in caller:  # `Run` states its recipe
                self.seen = f"{event} {arguments}"

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *exception: object) -> None:
        self.active = False


def main(arguments: list[str]) -> int:
    options = parser_of(__doc__ or "", cases=100_000).parse_args(arguments)
    trial = Trial("hostile", options.work, options.minutes)
    forks = Forks(trial.folder / "originals", trial.folder / "place", options.seed)
    batches = [range(first, min(first + BATCH, options.cases)) for first in range(0, options.cases, BATCH)]
    for number in trial.pending(len(batches)):
        shutil.rmtree(forks.place, ignore_errors=True)
        trial.record(number, cases=len(batches[number]), became=dict(forks.run(list(batches[number]))))
    became: Counter[str] = sum((Counter(row["became"]) for row in trial.rows), Counter())
    told = {what: sum(n for name, n in became.items() if name.endswith(what)) for what in ("error", "result")}
    by_target = {target.name: sum(n for name, n in became.items() if name.split()[0] == target.name)
                 for target in forks.targets}  # fmt: skip
    return trial.end(len(batches), of=BATCH, **{f"{name}s": n for name, n in told.items()}, **by_target)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
