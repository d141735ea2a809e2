"""Atomic writing: a file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename to `path`. On any failure the temporary file is removed.

    The temporary name keeps the suffix, since image writers choose the format by it.

    Raises:
        UserError: the disk is full or the folder cannot be written; `path` is as it was before.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error to report is the first one
            partial.unlink(missing_ok=True)
        _explain(error, path)
        raise


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary folder)`, then rename it to `path`.

    A folder that is there already is replaced only at the end, and keeps whatever else lies in it. A process that is
    killed leaves the old one or the new one; the next call removes what else it left.

    Raises:
        UserError: the disk is full, the folder cannot be written, or a file has its name; `path` is as it was before.
    """
    path = path.resolve()  # of a link: what it leads to is replaced
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: choose another name for the folder")
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        if old.exists() and not path.exists():  # a process was killed between the two renames of `_swap`
            os.rename(old, path)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.iterdir():
            _flush(file)
        if path.exists():
            _carry_over(path, partial)
            _swap(partial, path, old)
            for replaced in (partial, old):
                shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                os.rename(old, path)
        _explain(error, path)
        raise


def _carry_over(path: Path, partial: Path) -> None:
    """What else lies in a folder, into the one that will replace it, as links, so that it is never in neither."""
    for other in path.iterdir():
        if other.is_dir() and not other.is_symlink() and not (partial / other.name).exists():
            shutil.copytree(other, partial / other.name, symlinks=True, copy_function=_link)
        elif not os.path.lexists(partial / other.name):
            _link(other, partial / other.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # some file systems have no links
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(partial: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another: at once where the system can, which is Linux, else in two renames."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange is None or exchange(here, os.fsencode(partial), here, os.fsencode(path), swap) != 0:
        os.rename(path, old)
        os.rename(partial, path)


def write_text(path: Path, text: str) -> None:
    """Atomically write UTF-8 text."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Atomically write plain values as JSON, indented."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


_MODE = 0o666 & ~_umask()  # read once: it can only be read by setting it


def _flush(path: Path) -> None:
    """Everything on the disk before the rename, readable as any new file is (safetensors makes files private)."""
    if path.is_file():
        os.chmod(path, _MODE)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _explain(error: BaseException, path: Path) -> None:
    # safetensors and torch.save report a full disk with error classes of their own; the text tells.
    text = str(error)
    signs = ("os error", "no space left", "pytorchstreamwriter", "inline_container", "iostream error")
    if isinstance(error, OSError) or any(sign in text.lower() for sign in signs):
        raise UserError(f"could not write {path} ({text}): free some space or choose another folder") from error
