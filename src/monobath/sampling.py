"""Euler sampling from noise to image, and the noise itself.

SSDD (arXiv 2510.04961), section 3: Euler over `linspace(1, 0, steps + 1) ** power`; one step from t = 1 is
x̂ = ε + v(ε, 1, z).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .errors import UserError, check_choice
from .flow import Prediction, euler_step

Noise = Literal["gaussian", "zero"]
MOST_STEPS = 10_000
"""A file that asks for more could keep a processor busy for minutes."""


def time_grid(steps: int, power: float = 2.0) -> Tensor:
    """The `steps + 1` times of the sampler, from 1 to 0, float64. power > 1 puts more steps near the image."""
    if not 1 <= steps <= MOST_STEPS:
        raise UserError(f"steps={steps}: sampling needs at least one step, and takes at most {MOST_STEPS:,}")
    if not 0 < power < math.inf:
        raise UserError(f"power={power}: the exponent of the time grid must be positive")
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** float(power)


def seeds_for(seed: int | Sequence[int], batch: int) -> list[int]:
    """One seed a sample: an int s means s, s + 1, …; a sequence is taken as it is.

    Raises:
        UserError: a sequence of another length than the batch.
    """
    if not hasattr(seed, "__len__") or getattr(seed, "ndim", 1) == 0:
        first = operator.index(seed)  # type: ignore[arg-type]  # any integer type, numpy's and 0-d tensors too
        return [first + i for i in range(batch)]
    seeds = [operator.index(s) for s in seed]  # type: ignore[union-attr]
    if len(seeds) != batch:
        raise UserError(f"seed has {len(seeds)} entries for a batch of {batch}: give one a sample, or one int")
    return seeds


def draw_noise(shape: Sequence[int], seeds: Sequence[int], kind: Noise = "gaussian") -> Tensor:
    """Noise of `shape` (without the batch) for each seed: `(len(seeds), *shape)`, float32, on the CPU.

    Each sample has a stream of its own, so that an image never depends on its batch neighbours or its device.
    """
    if kind == "zero":
        return torch.zeros(len(seeds), *shape)
    check_choice("noise", kind, Noise)
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def euler(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    kind: Prediction,
    steps: int = 1,
    power: float = 2.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate from pure noise to the image.

    Args:
        predict: `(x_t (B, 3, H, W), t (B,)) → raw prediction (B, 3, H, W)`, of the given kind.
        noise: ε, the state at t = 1.
        callback: called after each step with (steps done, state).

    Returns:
        The state at t = 0: `(B, 3, H, W)`, not clipped.
    """
    times = time_grid(steps, power).to(device=noise.device, dtype=torch.float32)
    x = noise
    for i in range(steps):
        t, t_next = times[i].expand(len(x)), times[i + 1].expand(len(x))
        x = euler_step(predict(x, t), x, t, t_next, kind)
        if callback is not None:
            callback(i + 1, x)
    return x
