"""The processes of a run: accelerate, and joining each other again after `torchrun --max-restarts`."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError, imported
from .recipe import Recipe


def make_accelerator(recipe: Recipe) -> Any:
    """What accelerate knows of the processes and their precision.

    Raises:
        UserError: accelerate is not installed, or float16 without a GPU.
    """
    accelerate = imported("accelerate", "training needs accelerate: pip install 'monobath[train]'")
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.training.precision]
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError('training.precision is "fp16", which needs a GPU: use bf16 or fp32')
    # accelerate remembers the precision of a process' first run; a second run may want another.
    accelerate.state.AcceleratorState._reset_state()
    _rejoin()
    kept_apart = accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)
    return accelerate.Accelerator(mixed_precision=precision, kwargs_handlers=[kept_apart])


def _rejoin() -> None:
    """Form the process group of a restart; nothing to do before the first one.

    torchrun's store outlives the processes, and with it the addresses at which gloo found them: torch 2.14 reads those
    of the dead. Under a prefix of its own, each restart sees only its own.
    """
    attempt, shared = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if attempt == "0" or shared != "True" or dist.is_initialized():
        return
    backend, world = "gloo", int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"restart-{attempt}", store), rank=int(os.environ["RANK"]), world_size=world
    )
