"""Several processes that evaluate together, started by `torchrun -m monobath eval …`; one alone needs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started (by its environment variables), for the time of the block.

    Yields:
        The device of this process: "cuda" becomes the GPU of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0: the one that writes files and shows progress."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def sum_over_processes(tensor: Tensor) -> None:
    """Replace the values, in place, by their sums over all processes."""
    if _joined():
        dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks, on every process. They must pickle."""
    if not _joined():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
