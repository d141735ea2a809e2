"""Scores of `mechanism.py`: what is measured of small pictures, its table, and the criteria of docs/mechanism.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.utils import make_grid
from trainings import device, markdown

from monobath import UserError
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.evaluation.frechet import CropFeatures, HalfSampled, frechet_distance, half_members
from monobath.evaluation.metrics import psnr
from monobath.evaluation.system import TokenizerSystem
from monobath.files import write_file, write_text
from monobath.images import tensor_to_pil, to_float, to_uint8
from monobath.losses.perceptual import EffLiteDistance

SIDE, SHOWN, NEIGHBOURS = 32, 12, 3
PLACES = {"fd": 1, "efflite": 4, "psnr": 2, "precision": 3, "recall": 3}
"""Figures, and the decimal places they are shown with."""
LABELS = {"fd": "FD (Lite2, whole)", "efflite": "EffLite distance", "psnr": "PSNR, dB", "precision": "precision",
          "recall": "recall"}  # fmt: skip


@dataclass(frozen=True)
class System:
    """A trained row at a number of steps."""

    name: str
    seed: int
    steps: int
    model: Path
    crops: int

    def file(self, out: Path) -> Path:
        """Of its scores."""
        return out / "scores" / f"{self.name}-seed{self.seed}-{self.steps}.json"


@torch.no_grad()
def decoded(model: Path, steps: int, originals: Tensor, device: torch.device) -> Tensor:
    """What a model makes of pictures uint8 `(N, 3, H, W)`, each with the noise of its own number: uint8 on the CPU."""
    system = TokenizerSystem(str(model), steps=steps, device=device)
    parts = []
    for first in range(0, len(originals), 250):
        part = originals[first : first + 250].to(device)
        code = system.encode(to_float(part))
        parts.append(to_uint8(system.decode(code, range(first, first + len(part)))).cpu())
    return torch.cat(parts)


class Scorer:
    """Measures outputs against originals, uint8 `(N, 3, H, W)`; features of the originals are found once.

    A figure is a list: of the pictures (EffLite distance, PSNR), or of the whole set and then of its half-samples.
    """

    def __init__(self, originals: Tensor, device: torch.device) -> None:
        torch.backends.cudnn.allow_tf32 = False  # the same figures as on a CPU, to rounding
        self.originals, self.device = originals, device
        self.network, self.perceptual = CropFeatures(device), EffLiteDistance("lite2").to(device)
        self.members = torch.from_numpy(np.concatenate([np.ones((1, len(originals)), bool), self._halves()])).to(device)
        self.features = self._features(originals)
        self.reference = self._gaussians(self.features)

    def figures(self, output: Tensor) -> dict[str, list[float]]:
        """Of outputs in the order of the originals."""
        features = self._features(output)
        precision, recall = precision_recall(self.features, features, self.members)
        pairs = zip(output.to(self.device).split(100), self.originals.to(self.device).split(100), strict=True)
        with torch.no_grad():
            distances = torch.cat([self.perceptual(to_float(a), to_float(b)) for a, b in pairs])
        return {
            "fd": [frechet_distance(a, b) for a, b in zip(self.reference, self._gaussians(features), strict=True)],
            "efflite": distances.tolist(),
            "psnr": psnr(output, self.originals).tolist(),
            "precision": precision,
            "recall": recall,
        }

    def distance(self, output: Tensor) -> float:
        """The Fréchet distance alone."""
        return frechet_distance(self.reference[0], self._gaussians(self._features(output))[0])

    def _halves(self) -> np.ndarray:
        return half_members(range(len(self.originals)))

    def _features(self, pictures: Tensor) -> Tensor:
        """`(N, 1280)`, float32."""
        return torch.cat([self.network.pooled(part.to(self.device)) for part in pictures.split(self.network.chunk)])

    def _gaussians(self, features: Tensor) -> list[Any]:
        statistics = HalfSampled(features.shape[1])
        statistics.update(features.cpu()[:, None], range(len(features)))
        return statistics.gaussians()


def precision_recall(real: Tensor, fake: Tensor, members: Tensor) -> tuple[list[float], list[float]]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equation 1), k = 3.

    Args:
        real, fake: features `(N, d)`.
        members: which of them belong to each set that is measured, bool `(sets, N)`.
    """
    exact = "donot_use_mm_for_euclid_dist"
    distances = [torch.cdist(a, b, compute_mode=exact) for a, b in ((real, real), (fake, fake), (real, fake))]
    precision, recall = [], []
    for member in members:
        of_real, of_fake, between = (matrix[member][:, member] for matrix in distances)
        k = min(NEIGHBOURS + 1, len(between))  # the nearest of a picture is itself
        radius_real, radius_fake = (matrix.kthvalue(k, dim=1).values for matrix in (of_real, of_fake))
        precision.append((between <= radius_real[:, None]).any(0).float().mean().item())
        recall.append((between <= radius_fake[None]).any(1).float().mean().item())
    return precision, recall


def held_out(args: argparse.Namespace) -> Tensor:
    """The centre squares of the held-out pictures at 32²: uint8 `(N, 3, SIDE, SIDE)`."""
    dataset = make_dataset(args.held_out, Crops(size=SIDE, augment=False))
    return torch.cat([batch["image"] for batch in iterate_eval(dataset, batch_size=100, limit=args.limit)])


def score(systems: Sequence[System], args: argparse.Namespace) -> None:
    """Measure systems, and keep their first pictures beside the figures."""
    originals, where = held_out(args), device()
    scorer = Scorer(originals, where)
    write_file(args.out / "scores" / "originals.png", strip(originals).save)
    for system in systems:
        output = decoded(system.model, system.steps, originals, where)
        file = system.file(args.out)
        write_file(file.with_suffix(".png"), strip(output).save)
        found = {"pictures": len(originals), "figures": scorer.figures(output)}
        write_text(file, json.dumps(found) + "\n")
        means = ", ".join(f"{key} {value(found['figures'][key], key)[0]:.4g}" for key in PLACES)
        Console().print(f"{file.stem}: {means}", soft_wrap=True)


def strip(pictures: Tensor) -> Image.Image:
    """The first pictures in a column."""
    return tensor_to_pil(make_grid(pictures[:SHOWN], nrow=1, padding=0))


# ---- what they say --------------------------------------------------------------------------------------------------


def value(figures: Sequence[float] | np.ndarray, key: str) -> tuple[float, float]:
    """A figure and its standard error, of what `Scorer` gives or of a difference of two."""
    values = np.asarray(figures)
    if key in ("efflite", "psnr"):
        return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    return float(values[0]), float(values[1:].std(ddof=1))


class Table:
    """Scores by (row, steps), each an array `(seeds, values)` per figure."""

    def __init__(self, systems: Sequence[System], out: Path) -> None:
        self.systems = [system for system in systems if system.file(out).is_file()]
        self.rows: dict[tuple[str, int], dict[int, dict[str, np.ndarray]]] = {}
        self.crops = {system.name: system.crops for system in self.systems}
        for system in self.systems:
            found = json.loads(system.file(out).read_text(encoding="utf-8"))["figures"]
            kept = {key: np.asarray(values) for key, values in found.items()}
            self.rows.setdefault((system.name, system.steps), {})[system.seed] = kept

    def mean(self, key: tuple[str, int], figure: str) -> np.ndarray:
        """Averaged over seeds."""
        return np.mean([seed[figure] for seed in self.rows[key].values()], axis=0)

    def pairs(self, one: tuple[str, int], other: tuple[str, int], figure: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Values of both, seed by seed; what has one seed stands against each of the other's."""
        a, b = self.rows[one], self.rows[other]
        seeds = sorted(a.keys() & b.keys() if len(a) > 1 and len(b) > 1 else a.keys() | b.keys())
        return [(a.get(s, a[min(a)])[figure], b.get(s, b[min(b)])[figure]) for s in seeds]

    def best(self, name: str, numbers: Sequence[int]) -> tuple[str, int] | None:
        """The row's number of steps with the smallest Fréchet distance; None: it is not scored."""
        there = [(name, steps) for steps in numbers if (name, steps) in self.rows]
        return min(there, key=lambda key: self.mean(key, "fd")[0], default=None)

    def below(self, one: tuple[str, int], other: tuple[str, int]) -> tuple[bool, str]:
        """Whether the paired difference in FD is below −2 standard errors, and negative in every seed."""
        gaps = [a - b for a, b in self.pairs(one, other, "fd")]
        gap, error = value(np.mean(gaps, axis=0), "fd")
        each = ", ".join(f"{g[0]:+.1f}" for g in gaps)
        return gap < -2 * error and all(g[0] < 0 for g in gaps), f"{gap:+.1f} ± {error:.1f} (seeds: {each})"

    def no_worse(self, one: tuple[str, int], other: tuple[str, int]) -> tuple[bool, str]:
        """Whether the upper 95 % bound of the ratio in FD is at most 1.05."""
        ratio, error = value(np.mean([a / b for a, b in self.pairs(one, other, "fd")], axis=0), "fd")
        return ratio + 2 * error <= 1.05, f"ratio {ratio:.3f}, at most {ratio + 2 * error:.3f}"

    def close(self, one: tuple[str, int], other: tuple[str, int]) -> tuple[bool, str]:
        """Whether PSNR falls by at most 3 dB."""
        gap, error = value(np.mean([a - b for a, b in self.pairs(one, other, "psnr")], axis=0), "psnr")
        return gap >= -3, f"{gap:+.2f} ± {error:.2f} dB"


def show(systems: Sequence[System], args: argparse.Namespace) -> None:
    """The table and the criteria; the picture, if asked for."""
    table = Table(systems, args.out)
    if not table.rows:
        raise UserError(f"{args.out} holds no scores: run train and score first")
    lines = []
    for (name, steps), seeds in table.rows.items():
        cells = []
        for figure, places in PLACES.items():
            mean, error = value(table.mean((name, steps), figure), figure)
            cells.append(f"{mean:.{places}f} ± {error:.{places}f}")
        lines.append([name, str(table.crops[name]), str(steps), str(len(seeds)), *cells])
    sys.stdout.write(markdown(["row", "crops", "steps", "seeds", *LABELS.values()], lines))
    sys.stdout.write("\n" + "".join(f"- {line}\n" for line in verdicts(table, args.out)))
    if args.picture:
        draw(table, args)


def verdicts(table: Table, out: Path) -> list[str]:
    """The criteria of docs/mechanism.md, those whose rows are there."""
    found: list[str] = []

    def ask(one: tuple[str, int] | None, words: str, other: tuple[str, int] | None, test: Callable[..., Any]) -> None:
        if one in table.rows and other in table.rows:
            kept, figures = test(one, other)
            names = [f"{name} ({steps} step{'s' * (steps > 1)})" for name, steps in (one, other)]  # type: ignore[misc]
            found.append(f"{names[0]} {words} {names[1]}: {figures}: {'yes' if kept else 'NO'}")

    student = None
    if (file := out / "favoured.json").is_file():
        student = (json.loads(file.read_text(encoding="utf-8"))["chosen"], 1)
    for prefix, own in (("", student), ("f16-", ("f16-student-best-p", 1))):
        best, control = table.best(f"{prefix}teacher", (4, 8, 12)), (f"{prefix}ones", 1)
        ask(best, "below", (f"{prefix}teacher", 1), table.below)
        ask(best, "below", control, table.below)
        ask(own, "no worse than", best, table.no_worse)
        ask(own, "below", control, table.below)
        ask(own, "within 3 dB of", control, table.close)
    ask(("multi-student", 1), "no worse than", table.best("multi", (4, 8)), table.no_worse)
    # Beside the criteria.
    third = table.best("teacher@third", (4, 8, 12))
    ask(third, "below", ("ones", 1), table.below)
    ask(table.best("teacher-p", (4, 8, 12)), "below", ("teacher-p", 1), table.below)
    ask(("student-of-p", 1), "no worse than", table.best("teacher-p", (4, 8, 12)), table.no_worse)
    for other in ("ones-p", "continued", "energy", "kl", "kl-gan"):
        ask(student, "below", (other, 1), table.below)
    ask(("energy", 1), "below", ("ones-p", 1), table.below)
    ask(("student-of-p", 1), "below", ("ones-p", 1), table.below)
    ask(("student-of-p", 1), "below", ("kl-gan", 1), table.below)
    return found


def draw(table: Table, args: argparse.Namespace) -> None:
    """Columns, left to right: original, the teacher's one step, its 12 steps, the student, KL-VAE + discriminator."""
    student = json.loads((args.out / "favoured.json").read_text(encoding="utf-8"))["chosen"]
    names = ["originals", "teacher-seed0-1", "teacher-seed0-12", f"{student}-seed0-1", "kl-gan-seed0-1"]
    files = [args.out / "scores" / f"{name}.png" for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"--picture needs {', '.join(absent)} in {args.out / 'scores'}: run train and score first")
    columns = [Image.open(file).convert("RGB").resize((96, 96 * SHOWN), Image.Resampling.NEAREST) for file in files]
    sheet = Image.new("RGB", (100 * len(columns) - 4, columns[0].height), "white")
    for place, column in enumerate(columns):
        sheet.paste(column, (100 * place, 0))
    write_file(args.picture, sheet.save)
