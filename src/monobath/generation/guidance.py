"""Classifier-free guidance within an interval of times.

Ho & Salimans 2022, arXiv 2207.12598: v = v_null + s·(v_class − v_null); s = 1 is the plain conditional velocity.
Kynkäänniemi et al. 2024, arXiv 2404.07724: only at the noise levels in the middle does guidance help; at high ones it
costs variety, at low ones nothing but time. Here the level is flow matching's time, 1 for pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def guided(
    network: Callable[[Tensor, Tensor, Any], Tensor],
    labels: Tensor | None,
    null: int,
    *,
    scale: float,
    interval: Sequence[float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """A velocity `(x_t, t) → v` for `sampling.euler`, whose times all samples share.

    Args:
        network: `(x_t (B, c, h, w), t (B,), labels (B,)) → v`.
        labels: `(B,)`, each sample's class; None: the network knows none, and the scale is 1.
        null: the label that stands for none.
        scale: s; at 1 the network runs once a step, else twice, as one batch.
        interval: (low, high): guided is low < t ≤ high, so that low = high is never; elsewhere s is 1.
    """

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        low, high = torch.tensor(interval, dtype=t.dtype).tolist()  # 0.4 as a time is not 0.4 as a Python number
        if scale == 1 or not low < t[0].item() <= high:
            return network(x_t, t, labels)
        assert labels is not None
        both = network(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null)]))
        v_class, v_null = both.chunk(2)
        return v_null + scale * (v_class - v_null)

    return velocity
