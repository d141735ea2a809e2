"""Distillation: one step of the student gives what many steps of the teacher give, without an adversary.

SSDD (arXiv 2510.04961), section 3.3: a frozen teacher samples x̂_T from (ε, z) in N Euler steps; the student, which
starts from the same weights, learns at t = 1, from the same ε, to give x̂_T: flow loss towards x̂_T, perceptual distance
to x̂_T, REPA to the real image. A student of k steps learns the same at its k times, on the straight line from x̂_T to
ε. What we added: the perceptual distance can be to the real image (`distill.perceptual_to`), as MSD has it.

A student of one step per stage runs through all stages, from noise, and is trained end to end towards a frozen teacher
that takes many steps in each, after MSD (arXiv 2603.19570), whose published form is `scales.renoise`.
"""

from __future__ import annotations

import itertools
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from ... import flow
from ...decoding import predictor
from ...errors import UserError
from ...sampling import euler, time_grid
from ...scales import ScaleSchedule, image_pyramid, noise_pyramid
from ...tokenizer import Tokenizer
from ..config import DistillConfig, LossConfig, ScalesConfig
from .base import AutoencoderObjective, Batch, Draws, Losses, tap
from .staged import OTHER_STREAM, StageStep, called, run_through


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

    def target_of(self, batch: Batch, z: Tensor) -> Tensor:
        """The teacher's sample."""
        return self.sample(batch.draws.noise, z) if batch.target is None else batch.target

    @torch.no_grad()
    def sample(self, noise: Tensor, z: Tensor) -> Tensor:
        """The teacher's N-step sample from (noise, z): float32 `(B, 3, H, W)`, not clipped."""
        decoder = self.teacher.decoder
        predict = lambda x_t, t: decoder(x_t, t, z).float()  # noqa: E731
        return euler(predict, noise, kind=decoder.prediction, steps=self.steps, power=self.power)


class StagedDistillation(DistillationObjective):
    """One step a stage from many: the student runs through all stages, from noise and with hand-overs, end to end.

    Ours: at each stage the frozen teacher takes its N steps from the state that the student is in. The student learns
    the stage's clean image whose straight line from that state ends where the teacher's samples end; at one stage that
    is SSDD's v = x̂_T − ε. The flow loss is the sum of the stages'.

    MSD's published form (`scales.renoise`): a level u ~ U(0, 1), one per batch, says at which stage the teacher begins,
    the one with u in its window of the time axis. The student's finished picture, averaged down to that stage's size,
    is noised to (1 − u)·x + u·n, and the teacher goes on from there through all stages that are left, N steps each (1
    as published). The flow loss is the sum of squared errors between the states in which student and teacher end these
    stages, times 1 / (1 + u). What we chose: n and the block noise are the student's own, so that the states differ by
    the pictures alone.

    In both, the perceptual distance of the finished picture is to the real image, and REPA acts at the last stage.

    Args:
        tokenizer: the student.
        teacher: with as many stages. Its samples are guided if its checkpoint says so.
        loss: weights.
        config: how the teacher samples, `steps` at each stage, and the student's guidance.
        scales: `renoise`.

    Raises:
        UserError: as `DistillationObjective`, or the numbers of stages differ.
    """

    def __init__(
        self, tokenizer: Tokenizer, teacher: Tokenizer, loss: LossConfig, config: DistillConfig, scales: ScalesConfig
    ) -> None:
        super().__init__(tokenizer, teacher, loss, config)
        ours, theirs = (model.config.decoder.stages for model in (tokenizer, teacher))
        if ours != theirs:
            raise UserError(f"distill: the teacher has {theirs} stages, the student {ours}: they must be equal")
        self.schedule, self.renoise, self.guidance = ScaleSchedule(ours), scales.renoise, config.student_guidance
        self.perceptual_to_image = True
        if tokenizer.decoder.config.null_latent and self.guidance == 1:
            tokenizer.decoder.null_latent.requires_grad_(False)

    def draw(self, draws: Draws, seed: int, rank: int, world: int) -> None:
        """The batch's noise level."""
        draws.level = 1 - torch.rand((), generator=torch.Generator().manual_seed(seed ^ OTHER_STREAM)).item()  # never 0

    def _decoder_losses(self, batch: Batch, z: Tensor) -> Losses:
        x, noise, decoder = batch.images, batch.draws.noise, self.tokenizer.decoder
        predict, last = partial(called, decoder, z, guidance=self.guidance), len(self.schedule) - 1

        def tapped(state: Tensor, level: Tensor, number: int) -> Tensor:
            with tap(self.repa if number == last else None, decoder):
                return predict(state, level, number)

        steps = list(run_through(tapped, self.schedule, noise, decoder.prediction))
        if self.renoise:
            parts, goal = self._flow_renoised(steps, z, noise, batch.draws.level)
        else:
            parts, goal = self._flow_followed(steps, z)
        total, clean = self.loss.flow * parts["flow"], steps[-1].clean
        return self._with_others(Losses(total=total, parts=parts, clean=clean, target=goal, real=x), batch.judge)

    def _flow_followed(self, steps: list[StageStep], z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Our flow loss, `flow`, the sum of `flow_stage0`, …, and the last goal."""
        parts, kind = {}, self.tokenizer.decoder.prediction
        for stage, state, prediction, _ in steps:
            start, ones = state.detach(), state.new_ones(len(state))
            goal = line = self.teachers(start, z, stage.index, ones) - start
            if kind == "x":
                goal = stage.clean(line, start, ones, "v")
            parts[f"flow_stage{stage.index}"] = (prediction - goal).square().mean()
        return {"flow": reduce(torch.add, parts.values()), **parts}, goal

    def _flow_renoised(
        self, steps: list[StageStep], z: Tensor, noise: Tensor, u: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """MSD's flow loss, and the teacher's picture."""
        stages, kind = len(self.schedule), self.tokenizer.decoder.prediction
        first = min(int((1 - u) * stages), stages - 1)
        fields, picture = noise_pyramid(noise, stages), image_pyramid(steps[-1].clean.detach(), stages)[first]
        ones, begun = picture.new_ones(len(picture)), self.schedule[first]
        state, tau = flow.interpolate(picture, fields[first], u * ones), (u - begun.end) / (begun.start - begun.end)
        errors = []
        for stage, start, prediction, _ in steps[first:]:
            goal = self.teachers(state, z, stage.index, tau * ones)
            errors.append((stage.step(prediction, start, ones, 0 * ones, kind) - goal).square().mean())
            if stage.index < stages - 1:
                state, tau = self.schedule.hand_over(goal, stage.index, fields[stage.index + 1]), 1.0
        return {"flow": reduce(torch.add, errors) / (1 + u)}, goal

    @torch.no_grad()
    def teachers(self, state: Tensor, z: Tensor, stage: int, tau: Tensor) -> Tensor:
        """Where the teacher's N steps end a stage: float32 `(B, 3, h, w)`.

        Args:
            state: at local times tau `(B,)`, without gradients.
        """
        decoder, config = self.teacher.decoder, self.teacher.config
        given = predictor(decoder, z, config.sampler.guidance)
        grid, path, state = (
            time_grid(self.steps, self.power).float().to(tau.device),
            self.schedule[stage],
            state.float(),
        )
        for now, after in itertools.pairwise(tau * fraction for fraction in grid):
            prediction = given(state, path.level(now), stage).float()
            state = path.step(prediction, state, now, after, decoder.prediction)
        return state
