"""The guide is true: its blocks run in order, at tiny size, and leave what they promise."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from monobath import Tokenizer, resources
from monobath.cli import main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from-photos-to-one-step.md"
TRAINING = ["--training.steps", "2", "--training.batch_size", "2", "--training.sample_every", "0"]
SMALLER = {
    "train": TRAINING,
    "distill": [*TRAINING, "--distill.steps", "2"],
    "stats": ["--size", "64", "--limit", "4"],
    "cache-latents": ["--copies", "1"],
    "eval": ["--limit", "4", "--size", "32", "--repeats", "0", "--metrics", "psnr"],
}


def test_the_guide_runs_from_photos_to_an_exported_student(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    photos = resources.sample_paths()
    for folder, count in (("my-photos", 20), ("held-out", 4)):
        Path(folder).mkdir()
        for number in range(count):
            shutil.copy(photos[number % len(photos)], f"{folder}/{number}.png")
    shutil.copy(photos[0], "photo.jpg")  # the content decides what it is, not the name

    verbs = []
    for language, block in blocks(PAGE):
        if language == "py":
            exec(compile(block, PAGE.name, "exec"), {})
        elif language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block)
            assert name, "a recipe begins with the name of its file"
            Path(name[1]).write_text(block, encoding="utf-8")
        else:
            assert language == ""
            for line in block.splitlines():
                program, verb, *rest = shlex.split(line)
                if program == "pip":
                    continue
                assert program == "monobath"
                assert main([verb, *rest, *SMALLER.get(verb, [])]) == 0, line
                verbs.append(verb)

    assert verbs == ["train", "stats", "cache-latents", "train", "distill", "eval", "eval", "export", "reconstruct"]
    assert Path("crops.png").is_file()
    assert Path("out/photo.png").is_file()
    assert Path("runs/eval-distillation/report.html").is_file()
    base, teacher, student = (
        Tokenizer.from_pretrained(f"runs/{name}/model") for name in ("base", "teacher", "student")
    )
    assert student.config.sampler.steps == 1
    assert student.config.decoder == teacher.config.decoder != base.config.decoder
    assert student.config.scaling_factor == base.config.scaling_factor != 1.0  # measured once, inherited since
    frozen = base.encoder.state_dict()
    assert all(value.equal(frozen[name]) for name, value in student.encoder.state_dict().items())


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks, in order. Fences alternate: every second part lies between two of them."""
    parts = re.split(r"^```(\w*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::4], parts[2::4], strict=True))
