"""A file or folder appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import faults
import pytest
from faults import at_operation, kill

from monobath import files
from monobath.errors import UserError
from monobath.files import write_file, write_folder, write_text


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def full_disk(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class SafetensorError(Exception):
    """Not an OSError, as in the library."""


def full_disk_in_rust(_: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_in_torch(_: Path) -> None:
    raise RuntimeError("basic_ios::clear: iostream error")


def test_text_and_parents(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert leftovers(path.parent) == []


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    seen = []

    def write(partial: Path) -> None:
        seen.append((partial.suffix, (tmp_path / "picture.png").exists()))
        partial.write_bytes(b"png")

    write_file(tmp_path / "picture.png", write)
    assert seen == [(".png", False)]


@pytest.mark.parametrize(
    ("failure", "words"),
    [(full_disk, "No space left"), (full_disk_in_rust, "No space left"), (full_disk_in_torch, "iostream error")],
)
def test_a_full_disk_keeps_the_old_file(tmp_path, failure, words):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write(partial: Path) -> None:
        partial.write_text("ne", encoding="utf-8")
        failure(partial)

    with pytest.raises(UserError, match=rf"{words}.*free some space") as error:
        write_file(path, write)
    assert str(path) in str(error.value)
    assert path.read_text(encoding="utf-8") == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_other_failures_pass_through_and_keep_the_old_file(tmp_path, failure):
    path = tmp_path / "note.txt"
    write_text(path, "old")

    def write(partial: Path) -> None:
        partial.write_text("ne", encoding="utf-8")
        raise failure

    with pytest.raises(failure):
        write_file(path, write)
    assert path.read_text(encoding="utf-8") == "old"
    assert leftovers(tmp_path) == []


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "one").write_text(text, encoding="utf-8")
        (folder / "two").write_text(text, encoding="utf-8")

    return write


def test_folder_is_written_again_in_place(tmp_path):
    path = tmp_path / "runs" / "model"
    write_folder(path, fill("old"))
    assert sorted(p.name for p in path.iterdir()) == ["one", "two"]
    write_folder(path, lambda folder: (folder / "three").write_text("new", encoding="utf-8"))
    assert sorted(p.name for p in path.iterdir()) == ["one", "three", "two"]
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("failure", [full_disk, full_disk_in_rust, KeyboardInterrupt])
def test_a_failure_keeps_the_old_folder(tmp_path, failure):
    path = tmp_path / "model"
    write_folder(path, fill("old"))

    def write(folder: Path) -> None:
        (folder / "one").write_text("new", encoding="utf-8")
        if isinstance(failure, type):
            raise failure
        failure(folder)

    with pytest.raises(failure if isinstance(failure, type) else UserError):
        write_folder(path, write)
    assert {p.name: p.read_text(encoding="utf-8") for p in path.iterdir()} == {"one": "old", "two": "old"}
    assert leftovers(tmp_path) == []


def test_a_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write_folder(path, fill("old"))
    rename = files.os.rename

    def refuse(source, target):
        if Path(source).name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", refuse)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)  # a system that cannot exchange folders at once
    with pytest.raises(UserError, match="Input/output"):
        write_folder(path, fill("new"))
    assert {p.read_text(encoding="utf-8") for p in path.iterdir()} == {"old"}
    assert leftovers(tmp_path) == []


def test_files_get_the_usual_permissions(tmp_path):
    def write(folder: Path) -> None:
        (folder / "private").touch(mode=0o600)
        (folder / "usual").touch()

    write_folder(tmp_path / "model", write)
    private, usual = ((tmp_path / "model" / name).stat().st_mode for name in ("private", "usual"))
    assert private == usual


def test_what_an_earlier_crash_left_is_cleared(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "junk").write_text("junk", encoding="utf-8")
    write_folder(tmp_path / "model", fill("new"))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["one", "two"]
    assert leftovers(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="file"):
        write_folder(tmp_path / "file" / "model", fill("new"))
    with pytest.raises(UserError, match="file"):
        write_text(tmp_path / "file" / "note.txt", "new")


def test_a_replaced_folder_keeps_what_else_lies_in_it(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "a").write_text("old")
    write_folder(folder, lambda partial: (partial / "a").write_text("new"))
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"README.md": "mine", "a": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_folder(tmp_path / "model", lambda partial: None)
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("at_once", [True, False])
def test_what_else_lies_in_a_folder_outlives_a_kill_at_any_operation(tmp_path, monkeypatch, at_once):
    """A user's files, links and folders, and whole contents: the old or the new ones, after the next call the new."""
    if not at_once:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    place = tmp_path / "place"

    def lay(folder: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        write_folder(folder, fill("old"))
        (folder / "notes").mkdir()
        (folder / "notes" / "a.md").write_text("mine")
        (folder / "README.md").symlink_to("notes/a.md")

    folder = place / "model"
    lay(folder)
    count, _ = faults.operations(lambda: write_folder(folder, fill("new")), place)
    assert count > 8
    for number in range(count):
        lay(folder)
        assert faults.forked(lambda: write_folder(folder, fill("new")), at_operation(place, number, kill)).killed
        if at_once:
            assert (folder / "one").read_text() == (folder / "two").read_text()
            assert (folder / "README.md").read_text() == "mine"
        write_folder(folder, fill("new"))
        assert (folder / "one").read_text() == (folder / "two").read_text() == "new"
        assert (folder / "README.md").is_symlink()
        assert (folder / "README.md").read_text() == "mine"
        assert leftovers(place) == []


def test_a_link_to_a_folder_stays_one(tmp_path):
    write_folder(tmp_path / "there", fill("old"))
    (tmp_path / "here").symlink_to("there")
    write_folder(tmp_path / "here", fill("new"))
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "there" / "one").read_text() == "new"
    assert leftovers(tmp_path) == []
