"""Devices: which one to use, and waiting for it."""

from __future__ import annotations

import torch

from .errors import explained_as


def usable_device(device: str) -> str:
    """`device`, or for "auto" a GPU if there is one.

    Raises:
        UserError: it cannot be used here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with explained_as(f"--device {device} cannot be used here", "choose cpu, or leave it out"):
        torch.empty(1, device=device)
    return device


def synchronize(device: torch.device | None) -> None:
    """Wait for the device's queue; nothing to do on a CPU."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
