"""Rows of `mechanism.py`: what each trains, from what, in which order, and what it costs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from monobath.decoders import ConvConfig, DecoderConfig, KLConfig, UViTConfig, make_decoder
from monobath.models.encoder import Encoder, EncoderConfig
from monobath.tokenizer import SamplerConfig, TokenizerConfig
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
NETWORK: dict[str, Any] = {"size": "XS/1"}
KL_CHANNELS = [64, 128, 128, 160]
"""5.04 M parameters, 1 % more than XS/1."""


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
    energy: bool = False
    """One step by an energy score (`energy.py`), whose feature maps have the weight `perceptual`."""
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
    "energy": Row(what="XS/1 at t = 1 only, an energy score", ones=1.0, perceptual=0.1, energy=True),
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
    ("multi", 0), ("multi-student", 0), ("multi-student", 1), ("multi-student", 2),
    ("continued", 0), ("kl-gan", 0), ("kl", 0), ("energy", 0), ("ones-p", 0),
    ("teacher-p", 0), (f"{BEST}teacher-p", 0), ("student-of-p", 0),
    ("continued", 1), ("continued", 2), ("ones-p", 1), ("ones-p", 2), ("energy", 1), ("energy", 2),
    ("student-of-p", 1), ("student-of-p", 2), ("kl-gan", 1), ("kl-gan", 2), ("kl", 1), ("kl", 2),
    ("f16-encoder", 0), ("f16-teacher", 0), ("f16-ones", 0), (f"{BEST}f16-teacher", 0), ("f16-student-best-p", 0),
]  # fmt: skip
"""(row or choice, seed), the most important first."""
Item = tuple[str, int]


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
        return KLConfig(channels=KL_CHANNELS)
    return UViTConfig(factor=row.factor, stages=row.stages, **NETWORK)


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
        return encoder + 3.0 * (1 + row.energy) * sum(parts) / row.stages
    return float(encoder + (3 + (row.steps or 8)) * sum(parts))


def cost(item: Item, scale: float) -> float:
    """Operations of an item of the plan, all crops times `scale`."""
    if is_choice(item):
        return 0.0
    return ROWS["student-best" if item[0] == FAVOURED else item[0]].crops * scale * flops(item[0])
