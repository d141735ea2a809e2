"""The README and the docs are true: their code runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monobath import resources
from monobath.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language ("" for none). Fences alternate: every second part lies between two of them."""
    parts = re.split(r"^```(\w*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [text for opening, text in zip(parts[1::4], parts[2::4], strict=True) if opening == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


def test_readme_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = resources.sample_paths()
    shutil.copy(photos[0], "photo.jpg")  # the content decides what it is, not the name
    Path("my-photos").mkdir()
    for number in range(20):
        shutil.copy(photos[number % len(photos)], f"my-photos/{number}.png")
    lines = [line for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    commands = [shlex.split(line.partition("#")[0])[1:] for line in lines if line.startswith("monobath ")]
    verbs = {"reconstruct", "encode", "decode", "info", "train", "eval", "bench", "export"}
    assert verbs <= {command[0] for command in commands}
    smaller = {
        "train": ["--training.steps", "1", "--training.batch_size", "2", "--training.sample_every", "0"],
        "eval": ["--limit", "4", "--size", "64", "--repeats", "0", "--no_baselines"],
        "bench": ["--sizes", "64", "--repeats", "1"],
    }
    for command in commands:
        command += smaller.get(command[0], [])
        assert main(command) == 0, command
    assert Path("out/photo.png").is_file()
    assert Path("runs/mine/model/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_tables_are_those_of_the_figures():
    """docs/figures.json is the one place of the packaged models' figures; scripts/figures.py writes the tables."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "figures.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_site_has_every_page_and_its_links_stay(monkeypatch, tmp_path):
    """What scripts/docs.py gathers: no link leads out of the site, each page is in the index's lists."""
    import docs

    monkeypatch.setattr(docs, "SOURCE", tmp_path / "site")
    docs.gather()
    pages = sorted((tmp_path / "site").rglob("*.md"))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {path.name for path in pages}
    index = (tmp_path / "site" / "index.md").read_text(encoding="utf-8")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?<!!)\]\(([^)\s]+)\)", text):
            path = target.partition("#")[0]
            place = (tmp_path / "site" / path[1:]) if path.startswith("/") else page.parent / path
            assert target.startswith(("http", "#")) or place.exists(), f"{page.name}: {target}"
        if page.parent == tmp_path / "site" and page.name != "index.md":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), page.name
