"""Optimizers: AdamW, or schedule-free RAdam, which trains at one set of weights and is evaluated at another.

Schedule-free (Defazio et al. 2024, arXiv 2405.15682): gradients are taken at y, a blend of the fast weights z and of
their running average x; x is what is evaluated, averaged and saved. Between steps a module holds y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import imported
from .config import OptimizerConfig


def make_optimizer(
    module: nn.Module, config: OptimizerConfig, like: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a module's trainable parameters.

    Args:
        like: a checkpoint's state that is to be loaded: runs begun before relative-position tables were spared go on as
            they began.

    Raises:
        UserError: the package of a schedule-free optimizer is not installed.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim in (2, 4)]
    if like is not None and len(like["param_groups"][0]["params"]) > len(decayed):
        decayed = [p for p in trained if p.ndim >= 2]
    decays = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decays], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    lacking = "optimizer.kind radam_schedulefree needs schedulefree: pip install 'monobath[train]', or use adamw"
    optimizer = imported("schedulefree", lacking).RAdamScheduleFree(groups, lr=config.lr, betas=betas)
    optimizer.train()
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int, anew: int = 0) -> float:
    """Rate of step 0 … steps−1: linear warm-up, then a cosine to zero or a constant; schedule-free always constant.

    At `anew` the optimizer began again without what it knew (see `scripts/travel.py`): it warms up to the
    schedule once more.
    """
    if anew and config.kind == "adamw" and step - anew < config.warmup:
        return learning_rate(config, step, steps) * (step - anew + 1) / config.warmup
    if config.kind == "radam_schedulefree":
        return config.lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))


def is_schedule_free(optimizer: Any) -> bool:
    """True if the weights to evaluate are not the weights to train."""
    return hasattr(optimizer, "eval")


@contextlib.contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Within: the weights to evaluate, average and save. Afterwards: those to train, bit for bit.

    For AdamW both are the same, and this does nothing.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    kept = training_weights(optimizer)
    optimizer.eval()
    try:
        yield
    finally:
        restore_training_weights(optimizer, kept)


def training_weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of every parameter, in the optimizer's order."""
    return [p.detach().clone() for p in _parameters(optimizer)]


@torch.no_grad()
def restore_training_weights(optimizer: Any, kept: list[Tensor]) -> None:
    """Go on training from `kept`: the optimizer's own way back, `train()`, is right up to rounding only."""
    optimizer.train()
    parameters = _parameters(optimizer)
    torch._foreach_copy_(parameters, [k.to(p.device) for k, p in zip(kept, parameters, strict=True)])


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, of a file that may hold anything.

    Raises:
        ValueError: it does not fit the parameters, lacks a moment, or has values of unusual types (PyTorch: others).
    """
    fresh = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, usual in zip(optimizer.param_groups, fresh, strict=True):
        strange = [name for name, value in usual.items() if type(group.get(name)) is not type(value)]
        if strange:
            raise ValueError(f"its optimizer's {strange[0]} is {group.get(strange[0])!r}")
    needed = ("z", "exp_avg_sq") if is_schedule_free(optimizer) else ("step", "exp_avg", "exp_avg_sq")
    for parameter in _parameters(optimizer):
        if not (moments := optimizer.state[parameter]):
            continue  # it had no gradient so far
        for name in dict.fromkeys((*needed, *moments)):
            value, shape = moments.get(name), () if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                found = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ValueError(f"its {name} of a weight {tuple(parameter.shape)} is {found}")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
