"""What a run shows and records: a rich progress bar, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from ..files import write_text

log = logging.getLogger(__name__)


class Progress(contextlib.ExitStack):
    """Progress of a run, from `start` to `steps`.

    In a terminal: a bar with images/s and the time left. Elsewhere: a log line at most every 30 seconds. Lines of
    `metrics.jsonl` beyond `start`, of a run that was killed after its last checkpoint, are removed first.
    """

    def __init__(self, steps: int, start: int, run: Path, *, enabled: bool) -> None:
        super().__init__()
        self.steps, self.step, self.run, self.enabled = steps, start, run, enabled
        self.images, self.began = 0, time.perf_counter()
        self.latest: dict[str, float] = {}
        self.told = 0.0
        self.board: Any = None

    def __enter__(self) -> Progress:
        if not self.enabled:
            return self
        _trim(self.run / "metrics.jsonl", self.step or -1)  # a run that starts anew writes its step 0 anew
        self.file = self.enter_context(open(self.run / "metrics.jsonl", "a", encoding="utf-8"))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = self.enter_context(SummaryWriter(str(self.run), purge_step=self.step))
        except ImportError:
            log.warning("TensorBoard is not installed: only metrics.jsonl is written")
        console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal, speed_estimate_period=300,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=self.steps, completed=self.step)
        self.enter_context(self.bar)
        return self

    @property
    def rate(self) -> float:
        """Images per second since this process began training."""
        return self.images / max(1e-9, time.perf_counter() - self.began)

    def advance(self, images: int) -> None:
        """One step of so many images is done."""
        self.images += images
        self.step += 1
        if not self.enabled:
            return
        text = " ".join(f"{k} {self.latest[k]:.4g}" for k in ("loss", "sample_psnr") if k in self.latest)
        self.bar.update(self.task, completed=self.step, description=f"{text} · {self.rate:.1f} images/s")
        now = time.perf_counter()
        if self.bar.disable and (now - self.told > 30 or self.step == self.steps):
            self.told = now
            left = datetime.timedelta(seconds=round((self.steps - self.step) * images / max(1e-9, self.rate)))
            log.info("step %d/%d %s, %.1f images/s, %s left", self.step, self.steps, text, self.rate, left)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line of figures."""
        self.latest |= values
        if not self.enabled:
            return
        row = {"step": step, **values, "images_per_second": round(self.rate, 2)}
        # JSON has no NaN: a figure that is not finite is written as null.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def image(self, step: int, grid: Tensor) -> None:
        """Show a uint8 `(3, H, W)` picture in TensorBoard."""
        if self.board is not None:
            self.board.add_image("samples", grid.to(torch.uint8), step)


def _trim(file: Path, step: int) -> None:
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the line a killed process left half-written
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(file, "".join(line + "\n" for line in kept))
