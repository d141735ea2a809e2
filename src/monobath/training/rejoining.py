"""Joining the other processes again, after `torchrun --max-restarts` has restarted all of them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def rejoin() -> None:
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
