"""The README and the docs are true: their code runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
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
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


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
