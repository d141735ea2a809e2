"""Where bulk work writes: a folder on this machine, or one behind a URL that fsspec opens (s3://, gs://, sftp://, …).

A file appears under its name when it is whole: it is written under another name, in `partial`, and moved. One process
at a time gives out the work of a folder: it holds `.lock`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import write_file

LOCK, PARTIAL = ".lock", "partial"
READ_ONLY = ("http", "https", "hf")
"""What takes no files one by one: a commit of the Hugging Face Hub is not made for thousands."""


class Folder:
    """A folder that this machine has, or all machines of a cluster.

    Args:
        where: its path.
    """

    def __init__(self, where: Path) -> None:
        self.where: Path | str = where
        self._path = where

    def __str__(self) -> str:
        return str(self.where)

    def join(self, name: str) -> str:
        """Path or URL of what is in it."""
        return str(self._path / name)

    def names(self, inside: str = "") -> set[str]:
        """What is in it, or in a folder inside."""
        folder = self._path / inside
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def has(self, name: str) -> bool:
        """A file is in it."""
        return (self._path / name).is_file()

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """Contents of files, None for one that is not there."""
        paths = [self._path / name for name in names]
        return [path.read_bytes() if path.is_file() else None for path in paths]

    def write(self, name: str, write: Callable[[Path], object]) -> int:
        """What `write` writes to the path that it is given, under a name. Returns its bytes.

        Raises:
            UserError: it cannot be written; what had the name is as it was before.
        """
        path = self._path / name
        # A name of its own: a worker that is thought to be lost may still be writing the same shard.
        partial = self._path / PARTIAL / f"{uuid.uuid4().hex}{path.suffix}"
        write_file(partial, write)
        size = partial.stat().st_size
        os.replace(partial, path)
        return size

    def write_text(self, name: str, text: str) -> None:
        """The same for text, as UTF-8."""
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def make(self, inside: str) -> None:
        """A folder inside, if it is not there: files are written into such only."""
        (self._path / inside).mkdir(exist_ok=True)

    def remove(self, inside: str) -> None:
        """A folder inside, if it is there."""
        shutil.rmtree(self._path / inside, ignore_errors=True)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within: no other process has it.

        Raises:
            UserError: another has, or it cannot be written to.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self._path / LOCK)
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self} is being written by another command: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"could not write to {self} ({error}): choose another folder") from None
        try:
            yield
        finally:
            lock.release()


class RemoteFolder(Folder):
    """The same behind a URL.

    Args:
        where: the URL; credentials are fsspec's matter.

    Raises:
        UserError: nothing that can be written to.
    """

    def __init__(self, where: str) -> None:
        kind = where.partition("://")[0]
        if kind in READ_ONLY:
            raise UserError(
                f"{where}: files cannot be written to {kind}:// one by one; write to a folder, and upload it"
            )
        self.where = where.rstrip("/")
        with self._explained():
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(self.where)

    def join(self, name: str) -> str:
        return f"{self.where}/{name}"

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def names(self, inside: str = "") -> set[str]:
        with self._explained():
            self._system.invalidate_cache()  # what others wrote meanwhile counts
            try:
                return {
                    path.rstrip("/").rpartition("/")[2] for path in self._system.ls(self._place(inside), detail=False)
                }
            except FileNotFoundError:
                return set()

    def has(self, name: str) -> bool:
        with self._explained():
            self._system.invalidate_cache()
            return self._system.exists(self._place(name))

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        with self._explained():
            places = [self._place(name) for name in names]
            found = self._system.cat(places, on_error="return") if places else {}  # many at once, where it can
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
            return [None if isinstance(found[place], Exception) else found[place] for place in places]

    def write(self, name: str, write: Callable[[Path], object]) -> int:
        with tempfile.TemporaryDirectory(prefix="monobath-") as folder:
            local = Path(folder, f"whole{Path(name).suffix}")
            write(local)
            partial = self._place(f"{PARTIAL}/{uuid.uuid4().hex}")
            with self._explained():
                self._system.put_file(str(local), partial)
                self._system.mv(partial, self._place(name))
            return local.stat().st_size

    def make(self, inside: str) -> None:
        with self._explained():
            self._system.makedirs(self._place(inside), exist_ok=True)  # object stores have none, and need none

    def remove(self, inside: str) -> None:
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self._system.rm(self._place(inside), recursive=True)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        key = uuid.uuid4().hex
        mine = json.dumps({"host": platform.node(), "process": os.getpid(), "key": key}).encode()
        with self._explained():
            self._system.makedirs(self._root, exist_ok=True)
        holder = self._take(mine)
        if holder != mine:
            told = json.loads(holder)
            raise UserError(
                f"{self} is being written by another command (process {told['process']} on {told['host']}): wait for "
                f"it; if it is not running any more, delete {self.join(LOCK)}"
            )
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            with self._explained(), contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._place(LOCK))

    def _take(self, mine: bytes) -> bytes:
        """Write `.lock`, unless a process that may be running has; returns what is in it."""
        (holder,) = self.read([LOCK])
        with self._explained():
            if holder is not None and _gone(holder):
                self._system.rm_file(self._place(LOCK))
                holder = None
            if holder is None:
                with contextlib.suppress(FileExistsError):
                    self._system.pipe_file(self._place(LOCK), mine, mode="create")
        return self.read([LOCK])[0] or mine

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Within: what a file system raises, each its own classes, is a mistake that names the URL."""
        try:
            yield
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"{self} cannot be opened ({error}): install the package that it names") from None
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self} cannot be used ({reason}): check the address and your credentials") from None


_held: set[str] = set()
"""Keys of the locks that this process has."""


def open_folder(where: Path | str) -> Folder:
    """What a path, or a URL, leads to; it need not be there.

    Raises:
        UserError: as `RemoteFolder`.
    """
    text = str(where)
    if isinstance(where, str) and "://" in text and not text.startswith("file://"):
        return RemoteFolder(text)
    return Folder(Path(text.removeprefix("file://")).expanduser().absolute())


def _gone(lock: bytes) -> bool:
    """The process that wrote a lock ran on this machine, and does not any more."""
    try:
        holder = json.loads(lock)
        if os.name != "posix" or holder["host"] != platform.node():
            return False
        if holder["process"] != os.getpid():
            os.kill(holder["process"], 0)
            return False
        return holder["key"] not in _held  # an earlier process may have had our number
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
