"""The run folder: whose it is, and its checkpoints, which hold all that a run needs to go on, written atomically."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..files import write_folder, write_text
from ..models.loading import load_strictly
from .ema import EMA

log = logging.getLogger(__name__)

SHARDED = ".metadata"
"""What a checkpoint of `sharding.Sharding` has, and no other."""
UNREADABLE = (
    OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile
)  # fmt: skip
"""What reading a damaged file of weights raises."""


def claim(run: Path, recipe: dict[str, Any], has_model: Callable[[Mapping[str, Any]], bool]) -> None:
    """Store the resolved recipe as `config.yaml`, and log which of its parts changed since the run began.

    Args:
        has_model: whether a stored recipe has the model of this one.

    Raises:
        UserError: the folder holds a run of another model, or a corrupt recipe.
    """
    file, recipe = run / "config.yaml", json.loads(json.dumps(recipe))
    if file.is_file():
        try:
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is corrupt ({error}): choose another --run") from None
        try:
            ours = has_model(before)
        except (UserError, TypeError, KeyError, AttributeError):
            ours = False
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


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder."""
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def save(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: EMA,
    trainer: dict[str, Any],
    recipe: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoints/step-N/` and remove all but the newest `keep`.

    Holds `model.safetensors`, `ema.safetensors`, `trainer.pt` (tensors and plain values: optimizer, gradient
    scaler, what losses train) and `state.json`. A killed process leaves the previous checkpoint whole.
    """
    state = {"step": step, "ema_updates": ema.updates, "recipe": recipe}
    path = run / "checkpoints" / f"step-{step:08d}"

    def write(folder: Path) -> None:
        save_file(_plain(model), folder / "model.safetensors")
        save_file(_plain(ema.model), folder / "ema.safetensors")
        torch.save(trainer, folder / "trainer.pt")
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    write_folder(path, write)
    remove_old(run, keep)
    return path


def remove_old(run: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep`."""
    old = sorted((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    for folder in old[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def load(path: Path, *, model: nn.Module, ema: EMA) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore `model` and `ema`; returns (`state.json`, the trainer's dict).

    Raises:
        UserError: a file is missing or corrupt, or the checkpoint belongs to another architecture.
    """
    if (path / SHARDED).exists():
        raise UserError(f"checkpoint {path} is sharded: set training.shard to true, or choose another --run")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights, averaged = load_file(path / "model.safetensors"), load_file(path / "ema.safetensors")
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is corrupt ({reason}): delete it to go on from the one before") from None
    load_strictly(model, weights, f"checkpoint {path}")
    load_strictly(ema.model, averaged, f"checkpoint {path}")
    ema.updates = state["ema_updates"]
    return state, trainer


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
