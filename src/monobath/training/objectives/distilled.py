"""Distillation: one step of the student gives what many steps of the teacher give, without an adversary.

SSDD (arXiv 2510.04961), section 3.3: a frozen teacher samples x̂_T from (ε, z) in N Euler steps; the student, which
starts from the same weights, learns at t = 1, from the same ε, to give x̂_T: flow loss towards x̂_T, perceptual distance
to x̂_T, REPA to the real image. A student of k steps learns the same at its k times, on the straight line from x̂_T to
ε. What we added: the perceptual distance can be to the real image (`distill.perceptual_to`), as MSD has it.

A student of one step per stage runs through all stages, from noise, and is trained end to end towards a frozen teacher
that takes many steps in each (MSD, arXiv 2603.19570); MSD's own form is `loss.adversarial` and `scales.renoise`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...decoding import predictor
from ...errors import UserError
from ...sampling import euler, time_grid
from ...scales import ScaleSchedule, integrate
from ...tokenizer import Tokenizer
from ..config import DistillConfig, LossConfig, ScalesConfig
from .base import AutoencoderObjective, Batch, Draws, Losses, tap
from .staged import OTHER_STREAM, called, run_through


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
        return euler(
            lambda x_t, t: decoder(x_t, t, z).float(),
            noise,
            kind=decoder.prediction,
            steps=self.steps,
            power=self.power,
        )


class StagedDistillation(DistillationObjective):
    """One step a stage from many: the student runs through all stages, from noise and with hand-overs, end to end.

    At each stage the frozen teacher takes its N steps from the state that the student is in. The student learns the
    stage's clean image whose straight line from that state ends where the teacher's samples end; at one stage that is
    SSDD's v = x̂_T − ε. The loss is the sum of the stages' flow losses, the perceptual distance of the finished picture
    to the real image, and REPA at the last stage.

    With `scales.renoise` (MSD's form) the teacher starts from the student's image at each stage, noised anew to a time
    u ~ U(0, 1), and what it makes of that is learned with weight 1 / (1 + u).

    Args:
        tokenizer: the student.
        teacher: with as many stages. Its samples are guided if its checkpoint says so.
        loss: weights.
        config: how the teacher samples, `steps` at each stage.
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
        self.schedule, self.renoise = ScaleSchedule(ours), scales.renoise
        self.perceptual_to_image = True
        if tokenizer.decoder.config.null_latent:  # students are not guided
            tokenizer.decoder.null_latent.requires_grad_(False)

    def draw(self, draws: Draws, seed: int, rank: int, world: int) -> None:
        """The seed of the new noise."""
        draws.renoising = (seed ^ OTHER_STREAM, rank * len(draws.t), world * len(draws.t))

    def _decoder_losses(self, batch: Batch, z: Tensor) -> Losses:
        """`flow` is the sum of `flow_stage0`, ….  The student takes its steps from each stage's start."""
        x, noise, ones = batch.images, batch.draws.noise, torch.ones_like(batch.draws.t)
        decoder, kind = self.tokenizer.decoder, self.tokenizer.decoder.prediction
        predict, last = partial(called, decoder, z), len(self.schedule) - 1
        seed, first, count = batch.draws.renoising
        generator = torch.Generator(x.device).manual_seed(seed)  # of new noise, where there is any
        parts: dict[str, Tensor] = {"flow": x.new_zeros((), dtype=torch.float32)}

        def tapped(state: Tensor, level: Tensor, number: int) -> Tensor:
            with tap(self.repa if number == last else None, decoder):
                return predict(state, level, number)

        steps = run_through(tapped, self.schedule, noise, kind)
        for stage, state, prediction, clean in steps:
            if self.renoise:
                own = slice(first, first + len(x))
                u = torch.rand(count, generator=generator, device=x.device)[own]
                fresh = torch.randn(count, *state.shape[1:], generator=generator, device=x.device)[own]
                goal = self.teachers(stage.state(clean.detach(), fresh, u), z, stage.index, u)[1]
                error = (clean - goal).square() / (1 + u)[:, None, None, None]
            else:
                end, goal = self.teachers(state.detach(), z, stage.index, ones)
                line = end - state.detach()
                if kind == "x":
                    goal = stage.clean(line, state.detach(), ones, "v")
                error = (prediction - (goal if kind == "x" else line)).square()
            parts[f"flow_stage{stage.index}"] = error.mean()
            parts["flow"] = parts["flow"] + parts[f"flow_stage{stage.index}"]
        losses = Losses(total=self.loss.flow * parts["flow"], parts=parts, clean=clean, target=goal, real=x)
        return self._with_others(losses, batch.judge)

    @torch.no_grad()
    def teachers(self, state: Tensor, z: Tensor, stage: int, tau: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's N steps within a stage.

        Args:
            state: at local times tau `(B,)`, without gradients.

        Returns:
            The stage's end point, and the clean image that the last prediction means: float32 `(B, 3, h, w)`.
        """
        decoder, config = self.teacher.decoder, self.teacher.config
        given = predictor(decoder, z, config.sampler.guidance)
        grid = time_grid(self.steps, self.power).to(device=tau.device, dtype=torch.float32)
        return integrate(
            lambda x, level, number: given(x, level, number).float(),
            state.float(),
            self.schedule[stage],
            [tau * fraction for fraction in grid],
            decoder.prediction,
        )
