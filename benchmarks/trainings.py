"""Trainings and scores kept on disk, for the benchmarks that compare trainings: what is there is not done again.

The pictures, metrics, half-samples and intervals are those of `monobath eval`. Unlike it, scores are kept system by
system with the figures of every picture and half-sample, so that any two systems can be compared pairwise afterwards
and a new one is measured alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from rich.console import Console
from torchvision.transforms.functional import center_crop

from monobath import UserError
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.evaluation.compare import half_sample_estimate, mean_estimate
from monobath.evaluation.frechet import Gaussian, HalfSampled, frechet_distance
from monobath.evaluation.metrics import PictureMetric, SetMetric, load_metrics
from monobath.evaluation.results import Estimate
from monobath.evaluation.system import System
from monobath.files import write_text
from monobath.images import to_float, to_uint8
from monobath.training import Interrupted, Recipe, checkpoints, load_recipe, train

FIGURES = {"psnr": 2, "ssim": 4, "efflite": 4, "fd_efflite": 1}
"""Metrics and the decimal places they are shown with."""
SHAPE = ("mean_error", "grid4", "grid8")
"""What of the error stands still: measured too, for the tables that show it."""
LABELS = {
    "psnr": "PSNR, dB", "ssim": "SSIM", "efflite": "EffLite distance (Lite2)", "fd_efflite": "FD-EffLite",
}  # fmt: skip


def make_parser(doc: str | None, actions: Iterable[str]) -> argparse.ArgumentParser:
    """What all of them take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=actions)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings and scores")
    parser.add_argument("--data", nargs="+", default=[], help="folders or shards of photos: to train on, or held out")
    return parser


def add_scoring(parser: argparse.ArgumentParser, title: str = "score") -> argparse._ArgumentGroup:
    """What those take that score pictures of another size than they train on, and time rows."""
    score = parser.add_argument_group(title)
    score.add_argument("--score-size", type=int, default=256, help="side of the held-out pictures, in pixels")
    score.add_argument("--crop", type=int, default=0, help="score the pictures' centres of this side only, apart")
    score.add_argument("--limit", type=int, help="at most so many held-out pictures")
    score.add_argument("--repeats", type=int, default=5, help="timed decodes a row")
    return score


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trained(recipe: Recipe, *, by: Callable[[Recipe], Path] = train, **facts: Any) -> Path:
    """Train as the recipe says, or go on, or find it done; `facts.json` in the run folder says what it took.

    Args:
        by: what trains.
        facts: plain values that are kept with it.

    Returns:
        The run folder.

    Raises:
        UserError: the folder holds a training by another recipe.
    """
    run = Path(recipe.run)
    if (run / "config.yaml").is_file():
        before = recipe_of(run)
        same_place = {"run": recipe.run, "data": dataclasses.replace(before.data, source=recipe.data.source)}
        if dataclasses.replace(before, **same_place) != recipe:
            raise UserError(f"{run} holds a training with other settings: give this one another name, or --out")
    if (run / "facts.json").is_file():
        return run
    started = checkpoints.latest(run)
    first = int(started.name.rpartition("-")[2]) if started is not None else 0
    clock, cpu = time.perf_counter(), time.process_time()
    by(recipe)
    images = (recipe.training.steps - first) * recipe.training.batch_size  # of this process, if it was interrupted
    took = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu, "images": images}
    took |= {"threads": torch.get_num_threads(), "device": str(device())}
    write_text(run / "facts.json", json.dumps(facts | took, indent=2) + "\n")
    Console().print(f"{run.name}: {took['seconds']:.0f} s")
    return run


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder."""
    return load_recipe(str(run / "config.yaml"))


def facts_of(run: Path) -> dict[str, Any]:
    """What `trained` kept."""
    found: dict[str, Any] = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    return found


def finished(out: Path) -> list[Path]:
    """Run folders of finished trainings, by name."""
    return sorted(path.parent for path in out.glob("*/facts.json"))


class Judge:
    """Scores systems on the same held-out pictures; the features of the originals are found once.

    Args:
        data: folders or shards.
        size: the short side is resized to it, then the centre square cropped.
        limit: at most so many pictures.
        crop: of that square, only the centre of this side; 0: all.
        metrics: what is measured of each picture, and of all.
    """

    def __init__(
        self,
        data: Sequence[str],
        *,
        size: int,
        limit: int | None,
        crop: int = 0,
        metrics: Sequence[str] = (*FIGURES, *SHAPE),
    ) -> None:
        self.dataset, self.limit, self.crop = make_dataset(list(data), Crops(size=size, augment=False)), limit, crop
        self.protocol = {"data": [Path(source).name for source in data], "size": size, "limit": limit}
        self.protocol |= {"crop": crop} if crop else {}
        _, loaded = load_metrics(list(metrics), device=device())
        self.of_pictures = [metric for metric in loaded if isinstance(metric, PictureMetric)]
        self.of_sets = [metric for metric in loaded if isinstance(metric, SetMetric)]
        self.originals: dict[str, list[Gaussian]] = {}

    def score(self, file: Path, system: Callable[[], System]) -> dict[str, Any]:
        """The scores in `file`, measured and written there if they are missing or of other pictures."""
        found = read_score(file)
        if found is None or found["protocol"] != self.protocol:
            found = {"protocol": self.protocol, "figures": self._measure(system())}
            write_text(file, json.dumps(found) + "\n")
            means = {key: np.round(values[0] if key == "fd_efflite" else np.mean(values, axis=0), 4).tolist()
                     for key, values in found["figures"].items()}  # fmt: skip
            Console().print(f"{file.parent.name}/{file.stem}", means)
        return found

    @torch.no_grad()
    def _measure(self, system: System) -> dict[str, list[Any]]:
        """Of every picture; for sets, of the whole set and then of its half-samples."""
        figures: dict[str, list[Any]] = {metric.info.key: [] for metric in self.of_pictures}
        outputs = {metric.info.key: HalfSampled(metric.dim) for metric in self.of_sets}
        references = {} if self.originals else {metric.info.key: HalfSampled(metric.dim) for metric in self.of_sets}
        position = 0
        for batch in iterate_eval(self.dataset, batch_size=8, limit=self.limit):
            indices = batch["index"].tolist()
            positions = range(position, position + len(indices))
            position += len(indices)
            original = batch["image"].to(system.device)
            original = center_crop(original, [self.crop]) if self.crop else original
            output = to_uint8(system.decode(system.encode(to_float(original)), indices))
            for metric in self.of_pictures:
                figures[metric.info.key] += metric.measure(output, original).tolist()
            for metric in self.of_sets:
                outputs[metric.info.key].update(metric.features(output, indices).cpu(), positions)
                if references:
                    references[metric.info.key].update(metric.features(original, indices).cpu(), positions)
        if position < 4:
            raise UserError(f"{position} usable pictures in {self.dataset.source}: at least 4 are needed")
        self.originals |= {key: statistics.gaussians() for key, statistics in references.items()}
        for key, statistics in outputs.items():
            pairs = zip(self.originals[key], statistics.gaussians(), strict=True)
            figures[key] = [frechet_distance(a, b) for a, b in pairs]
        return figures


def judge_of(args: argparse.Namespace) -> Judge:
    """The judge of what `add_scoring` takes."""
    return Judge(args.data, size=args.score_size, limit=args.limit, crop=args.crop)


def scores_folder(args: argparse.Namespace) -> str:
    """Name of the folder (or the file's stem) of scores: those of centres stand apart."""
    return f"scores-crop{args.crop}" if args.crop else "scores"


def read_score(file: Path) -> dict[str, Any] | None:
    """What `Judge.score` wrote; None if there is nothing."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def estimate(score: dict[str, Any], key: str, other: dict[str, Any] | None = None) -> Estimate:
    """A figure with its interval, or how much more it is than another system's, paired."""
    values = np.asarray(score["figures"][key])
    if other is not None:
        if other["protocol"] != score["protocol"]:
            raise UserError("these scores are of different pictures: run score for all of them on the same --data")
        values = values - np.asarray(other["figures"][key])
    return half_sample_estimate(values) if key == "fd_efflite" else mean_estimate(values.tolist())


def spread(found: Estimate) -> float:
    """One standard error: over half-samples for a Fréchet distance, else over pictures."""
    return (found.high - found.low) / 4


def cell(found: Estimate, key: str, *, signed: bool = False) -> str:
    """"24.81 ± 0.22"; ± is one standard error."""  # fmt: skip
    return f"{found.value:{'+' if signed else ''}.{FIGURES[key]}f} ± {spread(found):.{FIGURES[key]}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def exit_code(main: Callable[[], int]) -> int:
    """Run a benchmark that trains: an interrupted training says that the same command goes on."""
    return command.exit_code(main, Interrupted)
