"""Exponential moving average of a model's weights and buffers."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Averaged copy of a model, for evaluation and for the weights that are kept.

    The decay is warmed up: min(decay, (1 + n) / (10 + n)) after n updates. Buffers are copied.

    Args:
        warmup: False: the decay is constant, so that the weights it starts from keep a share of decayⁿ.

    Attributes:
        model: the averaged model, in evaluation mode, without gradients.
        updates: how many steps have been averaged.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        self._blend(model, 1 - decay)

    @torch.no_grad()
    def copy(self, model: nn.Module) -> None:
        """Make the average equal to `model` (before averaging starts)."""
        self._blend(model, 1.0)

    def _blend(self, model: nn.Module, weight: float) -> None:
        own: list[torch.Tensor] = [_local(p) for p in self.model.parameters()]
        other = [_local(p.detach()) for p in model.parameters()]
        if weight == 1.0:
            torch._foreach_copy_(own, other)
        else:
            torch._foreach_lerp_(own, other, weight)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process' part of a sharded tensor; both models are sharded alike."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
