"""Devices: which one to use, and waiting for it."""

from __future__ import annotations

import torch

from .errors import UserError


def usable_device(device: str) -> str:
    """`device`, or for "auto" a GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {device} cannot be used here ({reason}): choose cpu, or leave it out") from None
    return device


def synchronize(device: torch.device | None) -> None:
    """Wait for the device's queue; nothing to do on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device is not None and device.type == "mps":
        torch.mps.synchronize()
