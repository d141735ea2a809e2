"""What multi-scale decoders learn.

MSD (arXiv 2603.19570): each sample of a batch trains one stage, on its path (`monobath.scales`); the perceptual
distance counts at the last stage only. What we changed: no discriminator by default (`loss.adversarial` has one that
judges patches, MSD one of DINO's features), and `UnionObjective`, which learns one step per stage without a teacher.
Distillation is in `distilled.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import flow
from ...decoders import PixelDecoder
from ...flow import Prediction, time_weight
from ...scales import Predict, ScaleSchedule, Stage, image_pyramid, noise_pyramid
from ...tokenizer import Tokenizer
from ..config import LossConfig, ScalesConfig
from .base import AutoencoderObjective, Batch, Draws, Losses, tap

OTHER_STREAM = 0x2545F491
"""Apart from the seeds of `Draws`, in the 32 bits that CPU generators use."""


def assign_stages(batch: int, stages: int, generator: torch.Generator) -> list[int]:
    """A stage for each sample: every `stages` consecutive samples have all of them, in random order."""
    groups = -(-batch // stages)
    return torch.rand(groups, stages, generator=generator).argsort(dim=1).flatten()[:batch].tolist()


def uniform_times(t: Tensor) -> Tensor:
    """Logit-normal times in (0, 1) → uniform ones: Φ(logit t). 1 stays 1."""
    return torch.special.ndtr(torch.logit(t))


def sigmoid_weight(t: Tensor, bias: float = -3.0, margin: float = 1e-3) -> Tensor:
    """e^b·sigmoid(λ − b) / (t·(1 − t)) with λ = 2·log((1 − t)/t), as MSD weighs the flow loss by a stage's own time:
    `(B,)`, float32.

    In logarithms, and with t kept `margin` away from 0 and 1: written out it is ∞·0 at t = 1.
    """
    t = t.float().clamp(margin, 1 - margin)
    log_t, log_rest = t.log(), (-t).log1p()
    return (bias + F.logsigmoid(2 * (log_rest - log_t) - bias) - log_t - log_rest).exp()


class StagedObjective(AutoencoderObjective):
    """`AutoencoderObjective` of a multi-scale decoder. With one stage the losses are the same, to the last bit.

    A sample's loss is that of its stage, at its own local time `draws.t`, and each stage's flow loss is logged as
    `flow_stage0`, …; perceptual distance, REPA and the adversarial loss are those of the samples at the last stage,
    whose share of the batch they are multiplied by. A stage takes its own size's part of the noise.

    Args:
        tokenizer: what trains.
        loss: weights.
        scales: times, weighting, dropped latents.
        train_encoder: see `AutoencoderObjective`.

    Raises:
        ValueError: (`forward`) no sample is at the last stage (the loop refuses batches that small).
    """

    def __init__(self, tokenizer: Tokenizer, loss: LossConfig, scales: ScalesConfig, *, train_encoder: bool) -> None:
        super().__init__(tokenizer, loss, train_encoder=train_encoder)
        self.scales, self.schedule = scales, ScaleSchedule(tokenizer.config.decoder.stages)

    def draw(self, draws: Draws, seed: int, rank: int, world: int) -> None:
        """Each sample's stage, and whether its latent is dropped."""
        generator, batch = torch.Generator().manual_seed(seed ^ OTHER_STREAM), len(draws.t)
        own = slice(rank * batch, (rank + 1) * batch)
        draws.stages = assign_stages(batch * world, len(self.schedule), generator)[own]
        draws.dropped = (torch.rand(batch * world, generator=generator) < self.scales.drop).tolist()[own]

    def _decoder_losses(self, batch: Batch, z: Tensor) -> Losses:
        x, t, noise = batch.images, batch.draws.t, batch.draws.noise
        stages, last = batch.draws.stages or [0] * len(x), len(self.schedule) - 1
        if last not in stages:
            raise ValueError(f"no sample of {len(x)} is at the last of {last + 1} stages")
        decoder, kind = self.tokenizer.decoder, self.tokenizer.decoder.prediction
        if self.scales.drop:  # also where none is: every process must use every parameter
            dropped = torch.tensor(batch.draws.dropped, device=z.device)
            z = torch.where(dropped[:, None, None, None], decoder.without(z), z)  # type: ignore[operator]
        if self.scales.times == "uniform":
            t = uniform_times(t)
        whites, images = noise_pyramid(noise, last + 1), image_pyramid(x, last + 1)
        parts = {"flow": x.new_zeros((), dtype=torch.float32)}
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
            if self.scales.weighting != "none":
                time = tau if self.scales.weighting == "sigmoid-local" else level
                error = error * sigmoid_weight(time, self.scales.bias)[:, None, None, None]
            if self.loss.time_power:
                error = error * time_weight(level, self.loss.time_power)
            value = error.mean()
            parts["flow"] = parts["flow"] + share * value
            if last:
                parts[f"flow_stage{stage.index}"] = value
        clean = stage.clean(prediction.float(), state, tau, kind)
        losses = Losses(total=self.loss.flow * parts["flow"], parts=parts, clean=clean, target=image, real=image)
        return self._with_others(losses, batch.judge, share=share)


def called(decoder: PixelDecoder, z: Tensor, state: Tensor, level: Tensor, stage: int, guidance: float = 1.0) -> Tensor:
    """A stage's prediction by the module itself, as it is compiled and wrapped; guided, it is called twice."""
    if guidance == 1:
        return decoder(state, level, z, stage)
    absent = decoder(state, level, decoder.without(z), stage)  # type: ignore[operator]
    return absent + guidance * (decoder(state, level, z, stage) - absent)


class StageStep(NamedTuple):
    """One step that is all of a stage."""

    stage: Stage
    state: Tensor
    """That it starts from, `(B, 3, h, w)`."""
    prediction: Tensor
    """Raw, float32."""
    clean: Tensor
    """The clean image that this means, float32."""


def run_through(predict: Predict, schedule: ScaleSchedule, noise: Tensor, kind: Prediction) -> Iterator[StageStep]:
    """One step a stage, through all of them, with gradients; `noise` is white, of the finished picture's size."""
    fields = noise_pyramid(noise, len(schedule))
    state, ones = fields[0], noise.new_ones(len(noise), dtype=torch.float32)
    for stage in schedule:
        prediction = predict(state, stage.level(ones), stage.index).float()
        yield StageStep(stage, state, prediction, stage.clean(prediction, state, ones, kind))
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

    def _decoder_losses(self, batch: Batch, z: Tensor) -> Losses:
        x, t, noise = batch.images, batch.draws.t, batch.draws.noise
        decoder, kind = self.tokenizer.decoder, self.tokenizer.decoder.prediction
        count = min(max(1, round(self.union * len(x))), len(x) - 1)
        images = image_pyramid(x[:count].float(), len(self.schedule))
        stages: dict[str, Tensor] = {}
        steps = run_through(partial(called, decoder, z[:count]), self.schedule, noise[:count], kind)
        for stage, _, _, finished in steps:
            stages[f"flow_stage{stage.index}"] = (finished - images[stage.index]).square().mean()
        start, ones = noise[count:], t.new_ones(len(x) - count)
        with tap(self.repa, decoder):
            prediction = decoder(start, ones, z[count:])
        at_once = flow.to_clean(prediction.float(), start, ones, kind)
        share, flow_at_once = count / len(x), (at_once - x[count:]).square().mean()
        total = share * sum(stages.values()) + (1 - share) * flow_at_once
        parts = {"flow": total, "flow_at_once": flow_at_once, **stages}
        clean = torch.cat([finished, at_once])
        losses = Losses(total=self.loss.flow * total, parts=parts, clean=clean, target=x, real=x)
        return self._with_others(losses, batch.judge, tapped=x[count:])
