"""Distillation: one step of the student gives what many steps of the teacher give, without an adversary.

SSDD (arXiv 2510.04961), section 3.3: a frozen teacher samples x̂_T from (ε, z) in N Euler steps; the student, which
starts from the same weights, learns at t = 1, from the same ε, to give x̂_T: flow loss towards x̂_T, perceptual distance
to x̂_T, REPA to the real image. A student of k steps learns the same at its k times, on the straight line from x̂_T to
ε. What we added: the perceptual distance can be to the real image (`distill.perceptual_to`), as MSD has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import write_file, write_text
from ..sampling import euler, time_grid
from ..tokenizer import Tokenizer
from .config import DistillConfig, LossConfig
from .objectives import AutoencoderObjective


class DistillationObjective(AutoencoderObjective):
    """`AutoencoderObjective` whose target is the teacher's sample.

    Args:
        tokenizer: the student; its encoder is not trained.
        teacher: kept in evaluation mode whatever happens to this module, and left out of its parameters.
        loss: weights.
        config: how the teacher samples.

    Attributes:
        grid: the times that the student is made for, from 1 down, without 0.

    Raises:
        UserError: student and teacher do not share a latent space, or one of them has a KL-VAE decoder.
    """

    def __init__(self, tokenizer: Tokenizer, teacher: Tokenizer, loss: LossConfig, config: DistillConfig) -> None:
        super().__init__(tokenizer, loss, train_encoder=False)
        for role, model in (("student", tokenizer), ("teacher", teacher)):
            if model.config.decoder.kind == "kl":
                raise UserError(f"distill: the {role} has a KL-VAE decoder, which takes no steps")
        if teacher.config.encoder != tokenizer.config.encoder:
            raise UserError(
                f"distill.teacher {config.teacher} encodes with {teacher.config.encoder}, the student with "
                f"{tokenizer.config.encoder}: they must share their latents"
            )
        self._teacher = (teacher.requires_grad_(False).eval(),)  # in a tuple: no submodule, so never train()
        self.steps, self.power = config.steps, config.power or teacher.config.sampler.power
        self.perceptual_to_image = config.perceptual_to == "image"
        self.grid = time_grid(config.student_steps, tokenizer.config.sampler.power)[:-1].tolist()

    @property
    def teacher(self) -> Tokenizer:
        """The frozen teacher."""
        return self._teacher[0]

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationObjective:
        # Devices and memory formats reach the teacher too, although it is no submodule.
        self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def target_of(self, x: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """The teacher's N-step sample from (noise, z): float32 `(B, 3, H, W)`, not clipped."""
        decoder, kind = self.teacher.decoder, self.teacher.decoder.prediction
        return euler(
            lambda x_t, t: decoder(x_t, t, z).float(),
            noise,
            kind=kind,
            steps=self.steps,
            power=self.power,
        )


class SampleCache:
    """Teacher samples on disk, a file for each batch, float16: what is there is not sampled again.

    Args:
        folder: made if missing.
        facts: everything that decides the samples; a folder made with other facts is refused.

    Raises:
        UserError: the folder holds other samples, or cannot be written.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "samples.json"
        facts = json.loads(json.dumps(facts))
        if file.is_file():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} is corrupt ({error}): choose another distill.cache") from None
            differing = sorted(key for key in facts.keys() | before.keys() if facts.get(key) != before.get(key))
            if differing:
                raise UserError(
                    f"distill.cache {folder} holds samples made with another {', '.join(differing)}: choose another "
                    "folder, or delete that one"
                )
        else:
            write_text(file, json.dumps(facts, indent=2) + "\n")

    def path(self, position: int, rank: int) -> Path:
        """File of a process' batch."""
        return self.folder / f"{position // 1000:05d}" / f"{position:08d}-{rank}.safetensors"

    def read(self, position: int, rank: int) -> Tensor | None:
        """Samples of a batch, float32; None if they are not there, or not whole."""
        try:
            return load_file(self.path(position, rank))["samples"].float()
        except (OSError, SafetensorError, KeyError):
            return None

    def write(self, position: int, rank: int, samples: Tensor) -> None:
        """Keep the samples of a batch."""
        kept = {"samples": samples.half().cpu().contiguous()}
        write_file(self.path(position, rank), lambda partial: save_file(kept, partial))
