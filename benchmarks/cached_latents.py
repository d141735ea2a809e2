"""What cached latents save: training steps a second with the frozen encoder run live, and from a cache.

    python benchmarks/cached_latents.py [--networks cpu-default paper] [--data PHOTOS.tar] [--size 64] [--batch 16]

`cpu-default` is that recipe's pair of networks, `paper` the 34 M parameter f8c4 encoder with decoder S/2. Random
weights: only speed is measured, of whole optimizer steps of the training loop, both kinds in one process and in turns,
after a warm-up, with the pictures kept in memory. Further arguments are recipe keys, such as training.precision=fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from monobath import Tokenizer, UserError, resources
from monobath.data import Crops
from monobath.data.encoding import Caching, cache_latents
from monobath.devices import synchronize
from monobath.training import Run, load_recipe

NETWORKS = {
    "cpu-default": ("cpu-default", []),
    "paper": (
        "ssdd-stage1-pretrain",
        [
            "model.decoder.size=S/2",
            "loss.perceptual_backbone=efflite",  # the paper's features are not everywhere
            "loss.repa_features=efflite",
            "optimizer.kind=adamw",
            "training.compile=false",
        ],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", nargs="+", help="pictures; default: the packaged sample photos")
    parser.add_argument("--size", type=int, default=64, help="side of the crops, in pixels")
    parser.add_argument("--batch", type=int, default=16, help="crops a step")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, in each of which both kinds run")
    parser.add_argument("--steps", type=int, default=2, help="steps a round and kind")
    parser.add_argument("--copies", type=int, default=8, help="crops of each picture in the cache")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys")
    given = parser.parse_args()
    data = given.data or [str(path) for path in resources.sample_paths()]
    table = Table(title=f"training images/s, crops of {given.size}², batches of {given.batch}")
    for name in ("networks", "live encoder", "cached latents", "times faster"):
        table.add_column(name, justify="left" if name == "networks" else "right")
    for networks in given.networks:
        with tempfile.TemporaryDirectory() as folder:
            try:
                live, cached = measure(networks, data, Path(folder), given)
            except UserError as error:
                sys.stderr.write(f"{error}\n")
                return 2
        ratios = [a / b for a, b in zip(cached, live, strict=True)]
        table.add_row(networks, *(_words(values) for values in (live, cached, ratios)))
    Console().print(table)
    threads, device = torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu"
    Console().print(f"median (least … most) of {given.rounds} rounds, {device}, {threads} threads")
    return 0


def measure(networks: str, data: Sequence[str], folder: Path, given: Any) -> tuple[list[float], list[float]]:
    """Images/s of each round: (encoder run live, from the cache)."""
    name, overrides = NETWORKS[networks]
    common = [
        f"data.size={given.size}", f"data.scale=[{given.size}, {2 * given.size}]", "data.workers=0", "data.cache=true",
        f"training.batch_size={given.batch}", "training.train_encoder=false", "training.sample_every=0",
        f"init_encoder={folder / 'model'}", *overrides, *given.overrides,
    ]  # fmt: skip
    recipe = load_recipe(name, common)
    torch.manual_seed(recipe.training.seed)
    tokenizer = Tokenizer(recipe.model)
    tokenizer.save_pretrained(folder / "model")
    cache_latents(
        tokenizer, data, folder / "cache", Crops(size=given.size), Caching(copies=given.copies, model=networks)
    )
    runs = []
    for latents in (False, True):
        recipe = load_recipe(name, [*common, f"data.latents={str(latents).lower()}", f"run={folder / str(latents)}"])
        recipe.data.source = [str(folder / "cache")] if latents else list(data)
        runs.append(Run(recipe))
    for run in runs:
        _speed(run, 2)
    rounds = [[_speed(run, given.steps) for run in runs] for _ in range(given.rounds)]
    return [live for live, _ in rounds], [cached for _, cached in rounds]


def _speed(run: Run, steps: int) -> float:
    """Images/s of some optimizer steps."""
    synchronize(run.device)
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    synchronize(run.device)
    return steps * run.recipe.training.batch_size / (time.perf_counter() - start)


def _words(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
