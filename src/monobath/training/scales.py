"""Training of multi-scale decoders, and their distillation to one step a stage.

MSD (arXiv 2603.19570): each sample of a batch trains one stage, on its path (`monobath.scales`); the perceptual
distance counts at the last stage only. A student of one step a stage runs through all of them, from noise, and is
trained end to end towards a frozen teacher that takes many steps in each. What we changed: no discriminator by default,
as SSDD distils (arXiv 2510.04961, section 3.3); MSD's own form is `loss.adversarial` and `scales.renoise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import flow
from ..decoders import PixelDecoder
from ..decoding import predictor
from ..errors import UserError
from ..flow import Prediction, time_weight
from ..sampling import time_grid
from ..scales import Predict, ScaleSchedule, Stage, image_pyramid, integrate, noise_pyramid
from ..tokenizer import Tokenizer
from .config import DistillConfig, LossConfig, ScalesConfig
from .distillation import DistillationObjective
from .objectives import AutoencoderObjective, tap

_OTHER_STREAM = 0x2545F491
"""Apart from the seeds of `Draws`, in the 32 bits that CPU generators use."""


def assign_stages(batch: int, stages: int, generator: torch.Generator) -> list[int]:
    """A stage for each sample: every `stages` consecutive samples have all of them, in random order."""
    groups = -(-batch // stages)
    return torch.rand(groups, stages, generator=generator).argsort(dim=1).flatten()[:batch].tolist()


def uniform_times(t: Tensor) -> Tensor:
    """Logit-normal times in (0, 1) → uniform ones: Φ(logit t). 1 stays 1."""
    return torch.special.ndtr(torch.logit(t))


def sigmoid_weight(t: Tensor, bias: float = -3.0, margin: float = 1e-3) -> Tensor:
    """e^b·sigmoid(λ − b) / (t·(1 − t)) with λ = 2·log((1 − t)/t), as MSD weighs the flow loss: `(B,)`, float32.

    In logarithms, and with t kept `margin` away from 0 and 1: written out it is ∞·0 at t = 1.
    """
    t = t.float().clamp(margin, 1 - margin)
    log_t, log_rest = t.log(), (-t).log1p()
    return (bias + F.logsigmoid(2 * (log_rest - log_t) - bias) - log_t - log_rest).exp()


class ScalesObjective(AutoencoderObjective):
    """`AutoencoderObjective` of a multi-scale decoder. With one stage the losses are the same, to the last bit.

    A sample's loss is that of its stage; perceptual distance, REPA and the adversarial loss are those of the samples at
    the last stage, whose share of the batch they are multiplied by.

    Args:
        tokenizer: what trains.
        loss: weights.
        scales: times, weighting, dropped latents.
        train_encoder: see `AutoencoderObjective`.
    """

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, scales: ScalesConfig, *, train_encoder: bool) -> None:
        super().__init__(tokenizer, loss, train_encoder=train_encoder)
        self.scales, self.schedule = scales, ScaleSchedule(tokenizer.config.decoder.stages)

    def more_draws(self, seed: int, batch: int, rank: int, world: int) -> tuple[Any, ...]:
        """Each sample's stage, and whether its latent is dropped."""
        generator = torch.Generator().manual_seed(seed ^ _OTHER_STREAM)
        own = slice(rank * batch, (rank + 1) * batch)
        stages = assign_stages(batch * world, len(self.schedule), generator)[own]
        dropped = (torch.rand(batch * world, generator=generator) < self.scales.drop).tolist()[own]
        return tuple(stages), tuple(dropped)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        latent_noise: Tensor,
        moments: Tensor | None = None,
        target: Tensor | None = None,
        stages: tuple[int, ...] = (),
        dropped: tuple[bool, ...] = (),
    ) -> dict[str, Tensor]:
        """Losses of a batch: those of `AutoencoderObjective`, and each stage's flow loss as `flow_stage0`, ….

        Args:
            t: local times of each sample's stage.
            noise: white, of the images' size; a stage takes its own size's part of it.
            target: none: the images are.
            stages, dropped: see `more_draws`; default: all at the first stage, none dropped.

        Raises:
            ValueError: no sample is at the last stage (the loop refuses batches that small).
        """
        assert target is None
        posterior, z = self._encoded(x, latent_noise, moments)
        if self.scales.drop:  # also where none is: every process must use every parameter
            decoder = self.tokenizer.decoder
            absent = decoder.without(z)  # type: ignore[operator]
            z = torch.where(torch.tensor(dropped, device=z.device)[:, None, None, None], absent, z)
        if self.scales.times == "uniform":
            t = uniform_times(t)
        return self._with_kl(self._stage_losses(x, t, noise, z, stages or (0,) * len(x)), posterior)

    def _stage_losses(
        self, x: Tensor, t: Tensor, noise: Tensor, z: Tensor, stages: tuple[int, ...]
    ) -> dict[str, Tensor]:
        decoder = self.tokenizer.decoder
        kind = decoder.prediction
        last = len(self.schedule) - 1
        whites = noise_pyramid(noise, len(self.schedule))
        images = image_pyramid(x, len(self.schedule))
        flows: dict[int, Tensor] = {}
        losses: dict[str, Tensor] = {}
        total = x.new_zeros((), dtype=torch.float32)
        for stage in self.schedule:
            places = [i for i, s in enumerate(stages) if s == stage.index]
            if not places:
                continue
            share = len(places) / len(stages)
            image, white, tau, latent = images[stage.index], whites[stage.index], t, z
            if share < 1:
                rows = torch.tensor(places, device=x.device)
                image, white, tau, latent = image[rows], white[rows], t[rows], z[rows]
            state, level = stage.state(image, white, tau), stage.level(tau)
            with tap(self.repa if stage.index == last else None, decoder):
                prediction = decoder(state, level, latent, stage.index)
            goal = image if kind == "x" else stage.velocity(image, white)
            error = (prediction.float() - goal.float()).square()
            if self.scales.weighting == "sigmoid":
                error = error * sigmoid_weight(level, self.scales.bias)[:, None, None, None]
            if self.loss.time_power:
                error = error * time_weight(level, self.loss.time_power)
            flows[stage.index] = error.mean()
            total = total + share * flows[stage.index]
            if stage.index == last:
                kept, real, clean = share, image, stage.clean(prediction.float(), state, tau, kind)
        losses["flow"] = total
        if len(self.schedule) > 1:
            losses |= {f"flow_stage{s}": value for s, value in flows.items()}
        if last not in flows:
            raise ValueError(f"no sample of {len(stages)} is at the last of {len(self.schedule)} stages")
        return self._with_others(losses, self.loss.flow * total, clean, real, real, share=kept)


def run_through(
    predict: Predict, schedule: ScaleSchedule, noise: Tensor, kind: Prediction
) -> Iterator[tuple[Stage, Tensor, Tensor, Tensor]]:
    """One step a stage, through all of them, with gradients.

    Args:
        noise: white, of the finished picture's size `(B, 3, H, W)`.

    Yields:
        Each stage, the state that it starts from, the raw prediction there, and the clean image that this means, both
        float32.
    """
    fields = noise_pyramid(noise, len(schedule))
    state, ones = fields[0], noise.new_ones(len(noise), dtype=torch.float32)
    for stage in schedule:
        prediction = predict(state, stage.level(ones), stage.index).float()
        yield stage, state, prediction, stage.clean(prediction, state, ones, kind)
        if stage.index < len(schedule) - 1:
            state = stage.step(prediction, state, ones, torch.zeros_like(ones), kind)
            state = schedule.hand_over(state, stage.index, fields[stage.index + 1])


class UnionObjective(AutoencoderObjective):
    """One step, and one step a stage, of one network, without a teacher: `scales.union` of the samples runs through all
    stages and learns each stage's image from the state that the network itself has led to; the rest learns the
    picture in one step at full resolution, as the last stage's from t = 1.

    A step's flow loss is that of its clean image, a sample's the sum of its steps'. Perceptual distance and adversarial
    loss are those of all finished pictures, REPA that of the pictures made in one step.

    Args:
        tokenizer: what trains.
        loss: weights.
        scales: `union`.
        train_encoder: see `AutoencoderObjective`.
    """

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, scales: ScalesConfig, *, train_encoder: bool) -> None:
        super().__init__(tokenizer, loss, train_encoder=train_encoder)
        self.schedule, self.union = ScaleSchedule(tokenizer.config.decoder.stages), scales.union

    def _decoder_losses(self, x: Tensor, target: Tensor, t: Tensor, noise: Tensor, z: Tensor) -> dict[str, Tensor]:
        decoder, kind = self.tokenizer.decoder, self.tokenizer.decoder.prediction
        count = min(max(1, round(self.union * len(x))), len(x) - 1)
        images = image_pyramid(target[:count].float(), len(self.schedule))
        stages: dict[str, Tensor] = {}
        steps = run_through(partial(_called, decoder, z[:count]), self.schedule, noise[:count], kind)
        for stage, _, _, finished in steps:
            stages[f"flow_stage{stage.index}"] = (finished - images[stage.index]).square().mean()
        start, ones = noise[count:], t.new_ones(len(x) - count)
        with tap(self.repa, decoder):
            prediction = decoder(start, ones, z[count:])
        at_once = flow.to_clean(prediction.float(), start, ones, kind)
        share, flow_at_once = count / len(x), (at_once - target[count:]).square().mean()
        losses = {"flow": share * sum(stages.values()) + (1 - share) * flow_at_once, "flow_at_once": flow_at_once}
        losses |= stages
        total, clean = self.loss.flow * losses["flow"], torch.cat([finished, at_once])
        return self._with_others(losses, total, clean, target, x, tapped=x[count:])


class ScaleDistillation(DistillationObjective):
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

    def more_draws(self, seed: int, batch: int, rank: int, world: int) -> tuple[Any, ...]:
        """The seed of the new noise."""
        return ((seed ^ _OTHER_STREAM, rank * batch, world * batch),) if self.renoise else ()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        latent_noise: Tensor,
        moments: Tensor | None = None,
        target: Tensor | None = None,
        renoising: tuple[int, int, int] = (0, 0, 0),
    ) -> dict[str, Tensor]:
        """Losses of a batch: `loss`, `flow` (the stages' sum), `flow_stage0`, …, and those of `LossConfig`.

        Args:
            t: ones: the student takes its step from a stage's start.
            noise: white, of the images' size: the student's and the teacher's.
            target: none: the teacher's depends on the student.
            renoising: see `more_draws`: seed, this process' first sample, and samples of all processes.
        """
        assert target is None
        _, z = self._encoded(x, latent_noise, moments)
        decoder, kind = self.tokenizer.decoder, self.tokenizer.decoder.prediction
        predict, last, ones = partial(_called, decoder, z), len(self.schedule) - 1, torch.ones_like(t)
        seed, first, count = renoising
        generator = torch.Generator(x.device).manual_seed(seed)  # of new noise, where there is any
        losses: dict[str, Tensor] = {"flow": x.new_zeros((), dtype=torch.float32)}

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
            losses[f"flow_stage{stage.index}"] = error.mean()
            losses["flow"] = losses["flow"] + losses[f"flow_stage{stage.index}"]
        return self._with_others(losses, self.loss.flow * losses["flow"], clean, goal, x)

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


def _called(decoder: PixelDecoder, z: Tensor, state: Tensor, level: Tensor, stage: int) -> Tensor:
    """A stage's prediction by the module itself, as it is compiled and wrapped."""
    return decoder(state, level, z, stage)
