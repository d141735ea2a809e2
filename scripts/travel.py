"""Checkpoints that travel: the newest one of a run as a few small files, and back.

    parts = pack(Path("runs/default"), Path("out/state"))   # state.00, state.01, …
    unpack(Path("out/state"), Path("runs/default"))         # on another machine: the same command goes on there

A run that moves between machines may have little room to do so. What does not fit is left out from the end of this
list: exact moments of the optimizer, any moments, trained weights; the averaged weights always travel, in bfloat16.
Without moments the optimizer starts anew and the learning rate warms up again; without trained weights, training goes
on from the average.
"""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from monobath.errors import UserError
from monobath.files import write_file, write_folder
from monobath.training import checkpoints

PART = 15_000_000
"""Largest part, in bytes."""
PARTS = 8
"""Most parts."""
TOTAL = 62_000_000
"""Bytes of all parts."""

LEVELS = ("everything", "moments in bfloat16", "weights alone", "the average alone")


def pack(
    run: Path, folder: Path, *, part: int = PART, parts: int = PARTS, total: int = TOTAL
) -> tuple[list[Path], str]:
    """Write the newest checkpoint of `run` to `folder` as `state.00`, `state.01`, …

    Args:
        part, total: bytes of one part and of all.
        parts: at most so many.

    Returns:
        The parts in order, and which of `LEVELS` they hold.

    Raises:
        UserError: the run has no checkpoint, or has a discriminator, or not even the averaged weights fit.
    """
    path = checkpoints.latest(run)
    if path is None:
        raise UserError(f"{run} holds no checkpoint to pack: train first")
    weights, average = (load_file(path / f"{name}.safetensors") for name in ("model", "ema"))
    trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    if trainer.get("adversary") is not None:
        raise UserError(f"{run} trains with a discriminator, whose state does not travel: train it in one sitting")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    average = _cast(average)
    anew = trainer | {"optimizer": None, "training_weights": None}
    for level, held in zip(
        LEVELS,
        (
            {"weights": weights, "average": average, "trainer": trainer},
            {
                "weights": weights,
                "average": average,
                "trainer": trainer | {"optimizer": _smaller(trainer["optimizer"])},
            },
            {"weights": weights, "average": average, "trainer": anew},
            {"average": average, "trainer": anew},
        ),
        strict=True,
    ):
        buffer = io.BytesIO()
        torch.save(held | {"state": state, "level": level}, buffer)
        size = buffer.tell()
        if size <= min(total, part * parts):
            break
    else:
        raise UserError(f"the averaged weights of {run} take {size:,} bytes, more than {min(total, part * parts):,}")
    data = buffer.getvalue()
    found = []
    for number, start in enumerate(range(0, size, part)):
        found.append(folder / f"state.{number:02d}")
        write_file(found[-1], partial(Path.write_bytes, data=data[start : start + part]))
    for old in set(folder.glob("state.*")) - set(found):
        old.unlink()
    return found, level


def unpack(folder: Path, run: Path) -> int:
    """Make the newest checkpoint of `run` of what `pack` wrote; a newer one that is there already stays.

    Returns:
        The step that the run is at.

    Raises:
        UserError: no parts, or damaged or missing ones.
    """
    data = b"".join(file.read_bytes() for file in sorted(folder.glob("state.*")))
    if not data:
        raise UserError(f"{folder} holds no state.00, state.01, …: give the folder that was packed")
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        average, state, trainer = _cast(held["average"], torch.float32), held["state"], held["trainer"]
        step = int(state["step"])
    except Exception as error:  # damaged files make torch raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UserError(f"the state in {folder} is damaged, or parts of it are missing ({reason})") from None
    newest = checkpoints.latest(run)
    if newest is not None and int(newest.name.rpartition("-")[2]) >= step:
        return int(newest.name.rpartition("-")[2])

    def write(made: Path) -> None:
        save_file(held.get("weights", average), made / "model.safetensors")
        save_file(average, made / "ema.safetensors")
        torch.save(trainer, made / "trainer.pt")
        (made / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")

    write_folder(run / "checkpoints" / f"step-{step:08d}", write)
    return step


def _smaller(optimizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """An optimizer's state with its moments in bfloat16; all else, such as steps and iterates, stays exact."""
    if optimizer is None:
        return None
    moments = ("exp_avg", "exp_avg_sq")
    states = {
        number: {k: v.to(torch.bfloat16) if k in moments else v for k, v in state.items()}
        for number, state in optimizer["state"].items()
    }
    return optimizer | {"state": states}


def _cast(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights in another precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
