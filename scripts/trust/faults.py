"""Faults of a forked child: killed, or an error of the operating system, at the n-th file operation or the n-th byte.

    ended = forked(lambda: save(folder), at_operation(folder, 7, kill))

A fork starts with all that this process has imported: a thousand of them take minutes. Python tells every opening,
renaming and removing of a file to audit hooks, which may raise or kill. Bytes are limited by the system
(RLIMIT_FSIZE), so that writing fails, or kills, inside of safetensors and of torch too.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from monobath.errors import UserError

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"}

Fault = Callable[[], None]
"""Called in the child before its work: prepares what will happen to it."""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    killed: bool
    """By a signal."""
    message: str
    """Of the `UserError` or `OSError` that it ended with; empty: none."""
    seconds: float
    said: str
    """Traceback of any other error; empty: none."""


def forked(work: Callable[[], object], fault: Fault | None = None, after: float | None = None) -> Ended:
    """Run `work` in a child.

    Args:
        fault: prepared in the child before.
        after: kill the child after so many seconds.
    """
    told, tell = os.pipe()
    began = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _child(work, fault, tell)
    os.close(tell)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with open(told, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    kind, _, text = said.partition(":")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGXFSZ):
        text, kind = f"died of signal {os.WTERMSIG(status)}", "other"
    return Ended(
        killed=os.WIFSIGNALED(status),
        message=text if kind == "user" else "",
        seconds=time.perf_counter() - began,
        said=text if kind == "other" else "",
    )


def _child(work: Callable[[], object], fault: Fault | None, tell: int) -> None:
    logging.disable(logging.CRITICAL)
    said = "done:"
    try:
        if fault is not None:
            fault()
        work()
    except (UserError, OSError) as error:  # the command line tells both in one line
        said = f"user:{error}"
    except BaseException:
        said = f"other:{traceback.format_exc()}"
    # A limit of bytes does not count for pipes; a parent that is gone needs no answer.
    os.write(tell, said.encode()[:60_000])
    os._exit(0)


def operations(work: Callable[[], object], folder: Path) -> tuple[int, float]:
    """How many file operations below `folder` the work takes, in a child, and how many seconds."""
    counted = folder.parent / f"{folder.name}.operations"

    def count() -> None:
        seen = 0

        def note() -> None:
            nonlocal seen
            seen += 1

        _listen(folder, note)
        work()
        counted.write_text(str(seen))

    ended = forked(count)
    if ended.said or ended.message:
        raise UserError(f"the work fails without any fault: {ended.said or ended.message}")
    found = int(counted.read_text())
    counted.unlink()
    return found, ended.seconds


def _listen(folder: Path, note: Callable[[], None]) -> None:
    """Call `note` before each file operation below `folder`, in this process, for good."""
    below, busy = str(folder), False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal busy
        if event in OPERATIONS and not busy and arguments and str(arguments[0]).startswith(below):
            busy = True
            try:
                note()
            finally:
                busy = False

    sys.addaudithook(hook)


def at_operation(folder: Path, number: int, happens: Callable[[], None], *, lasting: bool = False) -> Fault:
    """`happens` at that file operation below `folder`, counted from 0; lasting: and at all later ones."""

    def prepare() -> None:
        seen = -1

        def note() -> None:
            nonlocal seen
            seen += 1
            if seen == number or (lasting and seen > number):
                happens()

        _listen(folder, note)

    return prepare


def kill() -> None:
    """This process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[], None]:
    """An error of the operating system, such as errno.ENOSPC."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def at_byte(number: int, *, deadly: bool) -> Fault:
    """No file grows beyond so many bytes: writing fails with EFBIG, or kills."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return prepare
