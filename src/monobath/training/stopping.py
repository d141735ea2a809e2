"""When a run stops before its end: Ctrl-C, a termination signal, or its time is up."""

from __future__ import annotations

import contextlib
import signal
import time
from types import FrameType


class Stopping:
    """Within: Ctrl-C and SIGTERM are remembered, so that the step can finish; a second one stops at once.

    Args:
        minutes: from now; 0: no limit.
    """

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.received: int | None = None

    @property
    def asked(self) -> bool:
        """Whether this process should stop."""
        return self.received is not None or time.monotonic() >= self.deadline

    def __enter__(self) -> None:
        self.kept = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self.kept = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.kept.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
