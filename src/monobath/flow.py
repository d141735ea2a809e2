"""Flow matching between an image and noise: the path, times, conversions and the loss.

SSDD (arXiv 2510.04961), section 3. t = 0 is the clean image and t = 1 pure noise:

    x_t = (1 − t)·x + t·ε,   v = x − ε,   so that x = x_t + t·v and ε = x_t − (1 − t)·v.

Images and noise are `(B, 3, H, W)`, times are `(B,)`. Everything here is a pure function; randomness comes from
an explicit generator. A decoder predicts either v or the clean image x̂ (`prediction: v | x`); the conversions
below are each other's inverses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["v", "x"]

MIN_TIME = 0.05
"""Smallest t by which a v-space loss of an x-prediction divides."""


def _over(t: Tensor, x: Tensor) -> Tensor:
    """Times `(B,)` shaped so that they broadcast over images `(B, C, H, W)`."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The path: x_t = (1 − t)·x + t·ε."""
    t = _over(t, x)
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The target v = x − ε (it points to the image)."""
    return x - noise


def clean_from_velocity(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x̂ = x_t + t·v."""
    return x_t + _over(t, x_t) * v


def velocity_from_clean(x_t: Tensor, x: Tensor, t: Tensor, min_time: float = 0.0) -> Tensor:
    """v = (x̂ − x_t) / t; t is clamped from below at `min_time` (0/0 at t = 0 is for the caller to avoid)."""
    return (x - x_t) / _over(t, x_t).clamp_min(min_time)


def to_clean(prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction) -> Tensor:
    """A decoder's raw prediction, of either kind, as a clean image."""
    return prediction if kind == "x" else clean_from_velocity(x_t, prediction, t)


def euler_step(prediction: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, kind: Prediction) -> Tensor:
    """One Euler step from t to t_next < t.

    v-prediction adds (t − t')·v; x-prediction is the same step written without a division by small t:
    x_{t'} = (t'/t)·x_t + (1 − t'/t)·x̂.
    """
    if kind == "v":
        return x_t + _over(t - t_next, x_t) * prediction
    ratio = _over(t_next / t, x_t)
    return ratio * x_t + (1 - ratio) * prediction


def sample_times(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    ones: float = 0.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Training times `(batch,)` in (0, 1]: logit-normal, t = sigmoid(n) with n ~ N(mean, std²) (SSDD section 3: 0, 1).

    Args:
        ones: fraction of the samples set to t = 1 exactly, so that one step from pure noise is trained too.
            Spread over the batch without randomness: of k samples, ⌊k·ones⌋ or one more are 1.
    """
    if not 0 <= ones <= 1:
        raise ValueError(f"ones={ones}: the fraction of samples at t = 1 must lie in [0, 1]")
    source = generator.device if generator is not None else None
    t = torch.sigmoid(mean + std * torch.randn(batch, generator=generator, device=source))
    offset = torch.rand((), generator=generator, device=source)  # which samples, and how a fraction is rounded
    positions = torch.arange(batch + 1, device=t.device) * ones + offset
    is_one = positions[1:].floor() > positions[:-1].floor()
    return torch.where(is_one, 1.0, t)


def flow_loss(
    prediction: Tensor,
    x: Tensor,
    noise: Tensor,
    x_t: Tensor,
    t: Tensor,
    kind: Prediction,
    space: Prediction,
    time_power: float = 0.0,
) -> Tensor:
    """Mean squared error, a float32 scalar, of a raw prediction of `kind`, measured in `space`.

    v in v-space is SSDD's L_FM = ‖v_θ − (x − ε)‖²; x in x-space is ‖x̂ − x‖². An x-prediction measured in v-space
    clamps t at `MIN_TIME` in prediction and target alike. A sample counts t^-`time_power` times, t clamped there,
    too: v-space is x-space with power 2, and powers between them lie between.
    """
    if space == "x":
        error = to_clean(prediction, x_t, t, kind).float() - x.float()
    elif kind == "v":
        error = prediction.float() - velocity(x, noise).float()
    else:
        error = (
            velocity_from_clean(x_t, prediction, t, MIN_TIME).float() - velocity_from_clean(x_t, x, t, MIN_TIME).float()
        )
    if time_power:
        return (error.square() * time_weight(t, time_power)).mean()
    return error.square().mean()


def time_weight(t: Tensor, power: float) -> Tensor:
    """t^-power, with t at least `MIN_TIME`: `(B,)` → float32 `(B, 1, 1, 1)`, for squared errors of images."""
    return t.float().clamp(min=MIN_TIME)[:, None, None, None] ** -power
