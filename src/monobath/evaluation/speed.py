"""Time, operations and memory of systems, measured side by side in one process.

Everything runs in interleaved rounds (A B C, B C A, …), so that a machine that drifts favours nobody. Networks run
eagerly, never compiled, as the systems' own code runs them.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .. import resources
from ..devices import synchronize
from ..errors import check_least
from ..images import open_image, pil_to_tensor, to_float
from .results import Evaluation, Speed
from .system import System

logger = logging.getLogger(__name__)

Work = Callable[[], object]
Part = Literal["encode", "decode"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one piece of work, a value a round."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; of a single round, that round twice."""
        low, high = np.quantile(self.times, [0.25, 0.75]).tolist()
        return low, high


def measure(
    works: Mapping[str, Work], *, repeats: int = 5, warmup: int = 1, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time several pieces of work in interleaved rounds, without gradients.

    Each round runs every piece once, and starts one piece further than the round before. The device is waited for
    before and after each.

    Args:
        works: by name; what they return is dropped.
        repeats: timed rounds.
        warmup: rounds before them that do not count.

    Raises:
        UserError: repeats below 1.
    """
    check_least(1, {"repeats": repeats})
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for number in range(-warmup, repeats):
            first = number % max(1, len(names))
            for name in names[first:] + names[:first]:
                synchronize(device)
                start = time.perf_counter()
                works[name]()
                synchronize(device)
                if number >= 0:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def profile(work: Work, device: torch.device) -> tuple[float, float | None]:
    """(10⁹ operations, peak memory in 10⁶ bytes) of one call, without gradients. It serves as a warm-up, too."""
    counts: list[float] = []
    peak = peak_memory(lambda: counts.append(count_flops(work)), device)
    return counts[0] / 1e9, peak


def costs(
    works: Mapping[str, tuple[Work, torch.device]], what: str, *, repeats: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The fields of `Cost` for several pieces of work, interleaved; before the timed rounds each runs twice.

    Args:
        works: by name: a call, and the device it works on.
        what: they do, for people.
        repeats: timed rounds.
        progress: told in words what comes next.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, (work, device) in works.items():
        progress(f"{what}: operations and memory of {name}")
        with torch.no_grad():
            work()  # libraries load at the first call, whose memory is not the work's
        gflop, peak = profile(work, device)
        found[name] = {"gflop": gflop or None, "peak_mb": peak}
    waited = next((device for _, device in works.values() if device.type != "cpu"), None)
    progress(f"{what}: {repeats} rounds of {len(works)}")
    # That was a whole warm-up for a CPU; a GPU's clocks take longer.
    timings = measure(
        {name: work for name, (work, _) in works.items()}, repeats=repeats, warmup=2 if waited else 0, device=waited
    )
    for name, timing in timings.items():
        low, high = timing.quartiles
        found[name] |= {"ms": timing.median, "ms_low": low, "ms_high": high}
    return found


def count_flops(work: Work) -> int:
    """Floating-point operations of one call; a multiply-add counts two.

    Counted, as executed: convolutions, matrix products and attention's two products, with the padding and the halos
    that windowed attention computes and drops. Not counted: biases, norms, activations, softmax, resampling, noise,
    and everything outside PyTorch.
    """
    # PyTorch's counter lacks its CPU kernel of attention (2.14).
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def peak_memory(work: Work, device: torch.device) -> float | None:
    """Peak memory of one call above what was held before it, in 10⁶ bytes; None: cannot be measured here.

    CUDA: PyTorch's allocator. CPU: the process's resident memory on Linux with glibc (its high-water mark is reset
    before the call), libraries' buffers included; repeatable to about a tenth, while other threads are idle. In a
    process that has run much else before, what the call frees and allocates again may count twice: the allocator keeps
    freed blocks that lie between others.
    """
    with torch.no_grad():
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            work()
            synchronize(device)
            return (torch.cuda.max_memory_allocated(device) - before) / 1e6
        before_call = _reset_peak() if device.type == "cpu" else None
        work()
        return None if before_call is None else max(0, _status("VmHWM") - before_call) / 1e6


def _reset_peak() -> int | None:
    """Bytes resident now, having set the high-water mark to that; None where Linux's files or glibc are missing."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or else memory freed earlier would be used again unseen
        _CLEAR.write_text("5", encoding="ascii")  # "5" resets VmHWM, see proc_pid_clear_refs(5)
        return _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    return 1024 * int(lines[key].split()[0])


def system_speeds(
    systems: Iterable[System],
    size: tuple[int, int],
    batches: Sequence[int] = (1,),
    parts: Sequence[Part] = ("encode", "decode"),
    repeats: int = 5,
    *,
    progress: Callable[[str], None] = logger.info,
) -> dict[str, list[Speed]]:
    """Speed of several systems at one picture size, interleaved part by part.

    The packaged sample photos are encoded, repeated up to the batch: what a picture holds matters to codecs of files.

    Args:
        systems: with distinct names, all on one device.
        size: (H, W) in pixels.
        batches: pictures a call.
        progress: told in words what comes next.

    Returns:
        By system: batch by batch, each part. A codec's encoding time includes its search for the quality. Before the
        timed rounds each call ran twice: to warm up, and to count operations and memory.
    """
    systems = list(systems)
    found: dict[str, list[Speed]] = {system.name: [] for system in systems}
    images = sample_images(size)
    for batch, part in itertools.product(batches, parts):
        x = images[torch.arange(batch) % len(images)]
        works = {system.name: (_work(system, part, x), system.device) for system in systems}
        what = f"{part} {batch} × {size[0]} × {size[1]}"
        for name, cost in costs(works, what, repeats=repeats, progress=progress).items():
            found[name].append(Speed(part=part, size=size, batch=batch, repeats=repeats, **cost))
    return found


def add_speeds(
    evaluations: Iterable[Evaluation],
    systems: Sequence[System],
    batches: Sequence[int],
    *,
    repeats: int,
    progress: Callable[[str], None] = logger.info,
) -> None:
    """Measure the systems at the size of each evaluation, and put the figures into it; arguments as `system_speeds`."""
    for evaluation in evaluations:
        size = (evaluation.size, evaluation.size)
        speeds = system_speeds(systems, size, batches, repeats=repeats, progress=progress)
        for result in evaluation.systems:
            result.speed = speeds[result.name]


def _work(system: System, part: Part, x: Tensor) -> Work:
    if part == "encode":
        return lambda: system.encode(x)
    with torch.no_grad():
        code = system.encode(x)
    return lambda: system.decode(code, range(len(x)))


def sample_images(size: tuple[int, int]) -> Tensor:
    """The packaged sample photos, scaled (bicubic) and cropped to `size` = (H, W): `(N, 3, H, W)` in [-1, 1]."""
    fitted = [
        ImageOps.fit(open_image(path), (size[1], size[0]), Image.Resampling.BICUBIC)
        for path in resources.sample_paths()
    ]
    return to_float(torch.stack([pil_to_tensor(image) for image in fitted]))


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the time of an eager network holds for, besides the machine."""
    return {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "compiled": False,
        "memory_format": "contiguous",
        "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
    }
