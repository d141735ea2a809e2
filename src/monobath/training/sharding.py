"""Networks whose weights, optimizer and average are spread over the processes: FSDP2 (Zhao et al. 2023, arXiv
2304.11277), the same on CPUs and GPUs.

Every process holds a part of every parameter, and gathers a block's whole ones for the time it computes with them.
accelerate starts the processes and gives the device; it is not asked to shard, since it does on GPUs only, and on CPUs
falls back to copies without a word. Checkpoints are torch.distributed.checkpoint's: each process writes its part, and
any number of processes reads them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..errors import UserError, explained_as
from ..models.frozen import ForeignEncoder
from ..models.loading import load_strictly
from .checkpoints import SHARDED, prune
from .ema import EMA
from .objectives.base import Losses

UNIT = 2**18
"""Blocks with at least so many parameters are gathered by themselves; what is smaller, with what holds it."""

DAMAGED = (OSError, ValueError, KeyError, RuntimeError, dcp.CheckpointException)
"""What reading a checkpoint may raise."""
torch.export.register_dataclass(Losses)  # FSDP2 looks for the loss in what the objective returns


def shard(module: nn.Module, device: torch.device) -> None:
    """Spread a module's parameters over all processes, in place: its larger blocks, then the rest.

    Args:
        module: called as a whole; the same on every process. Its blocks are those of its `nn.ModuleList`s.
        device: where it is; cpu or cuda.
    """
    if not dist.is_initialized():  # one process alone
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [block for holder in module.modules() if isinstance(holder, nn.ModuleList) for block in holder]
    for block in reversed(blocks):  # from the inside out
        called = type(block).forward is not nn.Module.forward  # others only hold blocks
        if called and sum(p.numel() for p in block.parameters()) >= UNIT:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Sharding:
    """What a run does otherwise where `training.shard` is set.

    Args:
        recipe: of the run.
        objective, ema: of the run, on their device; they are sharded in place.
        accelerator: of the run.

    Attributes:
        model: what is trained.
    """

    def __init__(self, recipe: Any, objective: Any, model: Any, ema: EMA, accelerator: Any) -> None:
        check(recipe)
        self.recipe, self.objective, self.model, self.ema, self.accelerator = recipe, objective, model, ema, accelerator
        self.kind = type(ema.model)  # before FSDP2 gives it a class of its own
        for module in (objective, ema.model):
            shard(module, accelerator.device)

    def __call__(self, batch: Any, *, syncing: bool) -> Losses:
        """The objective's losses; gradients are averaged over processes in the backward pass that is `syncing`."""
        self.objective.set_requires_gradient_sync(syncing)
        with self.accelerator.autocast():
            return self.objective(batch)

    def averaged(self) -> Any:
        """The averaged model in one piece, on the main process; None on the others. All processes must ask for it."""
        main, state = self.accelerator.is_main_process, {}
        for name, value in self.ema.model.state_dict().items():
            gathered = whole(value)
            if main:
                state[name] = gathered.cpu()
        if not main:
            return None
        model = self.kind(self.ema.model.config)
        load_strictly(model, state, "the average")
        if isinstance(getattr(self.model, "encoder", None), ForeignEncoder):
            model.encoder = self.model.encoder
        return model.to(self.accelerator.device).requires_grad_(False).eval()

    # ---- checkpoints ----------------------------------------------------------------------------

    def _state(self, optimizer: Any, losses: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "losses": losses,
            "optimizer": get_optimizer_state_dict(self.objective, optimizer),
        }

    def save(self, run: Path, step: int, optimizer: Any, losses: dict[str, Tensor], anew: int) -> None:
        """Write `checkpoints/step-N/`, each process its part, and remove all but the newest `training.keep`.

        Args:
            optimizer: torch's own.
            losses: what trains but is no part of the model.
            anew: see `optimizers.learning_rate`.

        Raises:
            UserError: it cannot be written; the checkpoint before is whole.
        """
        path = run / "checkpoints" / f"step-{step:08d}"
        partial = path.with_name(f".{path.name}.partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with explained_as(
            f"could not write {path}", "free some space or choose another folder", (OSError, dcp.CheckpointException)
        ):
            dcp.save(self._state(optimizer, losses), checkpoint_id=partial)
        if self.accelerator.is_main_process:
            facts = {"step": step, "ema_updates": self.ema.updates, "recipe": self.recipe.to_dict(), "anew": anew}
            (partial / "state.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
            prune(run, self.recipe.training.keep)

    def load(self, path: Path, optimizer: Any, losses: dict[str, Tensor]) -> dict[str, Any]:
        """Restore everything, from any number of processes; returns what `state.json` says.

        Raises:
            UserError: a checkpoint of another architecture, a corrupt one, or one that is not sharded.
        """
        if not (path / SHARDED).is_file():
            raise UserError(f"checkpoint {path} is not sharded: leave training.shard out, or choose another --run")
        state = self._state(optimizer, losses)
        remedy = "choose another --run, or delete it to go on from the one before"
        with explained_as(f"checkpoint {path} does not fit this recipe or is damaged", remedy, DAMAGED):
            facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
            dcp.load(state, checkpoint_id=path)
            self.ema.updates = facts["ema_updates"]
        for module, name in ((self.model, "model"), (self.ema.model, "ema")):
            module.load_state_dict(state[name])
        with torch.no_grad():
            for name, parameter in losses.items():
                parameter.copy_(state["losses"][name])
        set_optimizer_state_dict(self.objective, optimizer, state["optimizer"])
        return facts


def check(recipe: Any) -> None:
    """Refuse what cannot be sharded.

    Raises:
        UserError: the message says what.
    """
    training, loss = recipe.training, getattr(recipe, "loss", None)
    for wrong, what in (
        (training.precision == "fp16", 'training.precision "fp16" (use bf16 or fp32)'),
        (recipe.optimizer.kind != "adamw", f"optimizer.kind {recipe.optimizer.kind} (use adamw)"),
        (loss is not None and loss.adversarial, "loss.adversarial (set it to 0)"),
    ):
        if wrong:
            raise UserError(f"training.shard does not go with {what}")
