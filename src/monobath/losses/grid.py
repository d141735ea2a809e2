"""How much of an error stands still on a grid: the faint screen that pixel-shuffled outputs leave in flat areas."""

from __future__ import annotations

from torch import Tensor


def grid_energy(error: Tensor, period: int) -> Tensor:
    """Energy of the part of an error that repeats every `period` pixels, as a mean square of single pixels.

    The error's mean over all places of the same phase modulo the period, less its mean over all places, squared and
    averaged over phases, times the number of places a phase has. White noise gives its variance times 1 − 1/period².

    Args:
        error: `(B, C, H, W)`; rows and columns beyond a multiple of the period are left out.
        period: in pixels, at most H and W.

    Returns:
        `(B, C)`, of the error's type.

    Raises:
        ValueError: the error is smaller than the period.
    """
    rows, cols = error.shape[2] // period, error.shape[3] // period
    if not rows or not cols:
        raise ValueError(f"the error is {tuple(error.shape)}: a period of {period} needs sides of at least {period}")
    error = error[:, :, : rows * period, : cols * period]
    phases = error.unflatten(2, (rows, period)).unflatten(4, (cols, period)).mean((2, 4))  # (B, C, period, period)
    phases = phases - phases.mean((2, 3), keepdim=True)
    return phases.square().mean((2, 3)) * (rows * cols)
