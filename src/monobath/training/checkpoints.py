"""The run folder: whose it is, and its checkpoints, which hold all that a run needs to go on, written atomically."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError, explained_as, reason
from ..files import write_folder, write_text
from ..models.loading import load_strictly
from .ema import EMA
from .recipe import Recipe

log = logging.getLogger(__name__)

SHARDED = ".metadata"
"""What a checkpoint of `sharding.Sharding` has, and no other."""


def claim(run: Path, recipe: dict[str, Any], has_model: Callable[[Mapping[str, Any]], bool]) -> None:
    """Store the resolved recipe as `config.yaml`, and log which of its parts changed since the run began.

    Args:
        has_model: whether a stored recipe has the model of this one.

    Raises:
        UserError: the folder holds a run of another model, or a corrupt recipe.
    """
    file, recipe = run / "config.yaml", json.loads(json.dumps(recipe))
    if file.is_file():
        with explained_as(f"{file} is corrupt", "choose another --run"):
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        ours = False
        with contextlib.suppress(UserError, TypeError, KeyError, AttributeError):
            ours = has_model(before)
        if latest(run) and not ours:
            raise UserError(f"{run} holds a run of another model: choose another --run, or delete that folder")
        changed = [name for name in recipe if name != "trains" and _differ(before, recipe, name)]
        if changed:
            log.warning("%s: the recipe changed since this run began, in: %s", run, ", ".join(changed))
    write_text(file, yaml.safe_dump(recipe, sort_keys=False))


def _differ(before: Any, now: Any, name: str) -> bool:
    """Whether both have a value of that name, and not the same; a time limit may differ from one part to the next."""
    if not isinstance(before, dict) or name not in before or name == "minutes":
        return False
    if isinstance(now[name], dict):
        return any(_differ(before[name], now[name], inner) for inner in now[name])
    return before[name] != now[name]


class Damaged(UserError):
    """A checkpoint that cannot be read."""


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    return next(iter(_newest_first(run)), None)


def _newest_first(run: Path) -> list[Path]:
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def save(run: Path, step: int, recipe: Recipe, *, model: nn.Module, ema: EMA, trainer: dict[str, Any]) -> None:
    """Write `checkpoints/step-N/` and remove all but the newest `training.keep`.

    Holds `model.safetensors`, `ema.safetensors`, `trainer.pt` (tensors and plain values: optimizer, gradient
    scaler, what losses train) and `state.json`. A killed process leaves the previous checkpoint whole.
    """
    state = {"step": step, "ema_updates": ema.updates, "recipe": recipe.to_dict()}

    def write(folder: Path) -> None:
        save_file(_plain(model), folder / "model.safetensors")
        save_file(_plain(ema.model), folder / "ema.safetensors")
        torch.save(trainer, folder / "trainer.pt")
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    write_folder(run / "checkpoints" / f"step-{step:08d}", write)
    prune(run, recipe.training.keep)


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`, and what a killed process left of one."""
    for folder in [*_newest_first(run)[keep:], *(run / "checkpoints").glob(".step-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def load_latest(run: Path, *, model: nn.Module, ema: EMA) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Restore from the newest checkpoint that can be read; None: there is none at all.

    Returns:
        Its folder, and what `load` returns.

    Raises:
        UserError: all are damaged (the newest is named), or it belongs to another architecture.
    """
    first: Damaged | None = None
    for path in _newest_first(run):
        try:
            return path, *load(path, model=model, ema=ema)
        except Damaged as error:
            first = first or error
            log.warning("%s", error)
    if first is not None:
        raise first
    return None


def load(path: Path, *, model: nn.Module, ema: EMA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore `model` and `ema`; returns (`state.json`, the trainer's dict).

    Raises:
        Damaged: a file is missing or corrupt.
        UserError: the checkpoint belongs to another architecture.
    """
    if (path / SHARDED).exists():
        raise UserError(f"checkpoint {path} is sharded: set training.shard to true, or choose another --run")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights, averaged = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
        updates, step = state["ema_updates"], state["step"]
        if not (isinstance(trainer, dict) and isinstance(updates, int) and isinstance(step, int)):
            raise ValueError("it holds no run's state")
    except Exception as error:  # a damaged file makes libraries raise nearly anything
        told = f"checkpoint {path} is corrupt ({reason(error)}): delete it to go on from the one before"
        raise Damaged(told) from None
    load_strictly(model, weights, f"checkpoint {path}")
    load_strictly(ema.model, averaged, f"checkpoint {path}")
    ema.updates = updates
    return state, trainer


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
