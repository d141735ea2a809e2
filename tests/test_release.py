"""The kit that trains release weights in sittings, as its one command; on tiny networks."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from test_training import photos as photos  # the fixture

from monobath import Tokenizer
from monobath.models import taesd
from monobath.training import load_recipe

ROOT = Path(__file__).parent.parent
TINY = {
    "name": "tiny",
    "model": {
        "encoder": {"base": 8, "multipliers": [1, 1], "blocks": 1, "patch": 4, "middle_attention": False},
        "decoder": {"size": "custom", "patch": 4, "channels": [16, 32], "middle_blocks": 0, "norm": "local"},
        "sampler": {"steps": 1, "noise": "zero"},
    },
    "data": {"size": 32, "workers": 0},
    "loss": {"perceptual": 0},
    "training": {"steps": 3, "batch_size": 4, "sample_every": 0},
}


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return file


def call(*command, **environment):
    own = {"PYTHON": sys.executable, "LUGGAGE": "/nowhere", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True
    )


def release(*arguments):
    return call(sys.executable, "scripts/release.py", *arguments)


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell script")
def test_sittings_end_in_a_model(recipe, photos, tmp_path):
    train = ["scripts/train_release.sh", recipe, photos]
    first = call(*train, tmp_path / "one", "--minutes", "0.00001", "--limit", "4")
    assert first.returncode == 0, first.stderr
    assert "checked in" in first.stdout
    figures = json.loads((tmp_path / "one/back/figures.json").read_text(encoding="utf-8"))
    assert (figures["step"], figures["of"], figures["state"]) == (1, 3, "everything")
    assert figures["psnr"] > 5
    second = call(*train, tmp_path / "two", "--state", tmp_path / "one/back", "--minutes", "0", "--limit", "4")
    assert second.returncode == 0, second.stderr
    figures = json.loads((tmp_path / "two/back/figures.json").read_text(encoding="utf-8"))
    assert (figures["step"], figures["steps in this sitting"]) == (3, 2)
    made = release("export", tmp_path / "two/back", "--out", tmp_path / "model")
    assert made.returncode == 0, made.stderr
    assert "averaged weights of step 3" in made.stdout
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.config.decoder.channels == [16, 32]
    facts = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert facts["training"]["step"] == 3
    assert facts["training"]["recipe"]["data"]["source"] == [photos.name]
    assert str(tmp_path) not in json.dumps(facts)


def test_a_decoder_of_foreign_latents_in_sittings(photos, tmp_path):
    """From latents that are cached first, by the family's own encoder, with a trunk."""
    folder = tmp_path / "family"
    folder.mkdir()
    for part, module in (("encoder", taesd.taesd_encoder(6, channels=8)), ("decoder", taesd.taesd_decoder(6))):
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / f"taef2_{part}.safetensors")
    small = ["data.size=32", "data.scale=[48, 56]", "loss.perceptual=0", "training.steps=2", "training.batch_size=2"]
    small += ["training.compile=false", "training.precision=fp32", "data.workers=0"]
    given = ["train", "flux2-slim", "--data", photos, "--minutes", "0", "--limit", "4", "--encode-size", "48"]
    found = release(*given, "--out", tmp_path / "out", "--encoder", f"taef2={folder}", "--set", *small)
    assert found.returncode == 0, found.stderr
    assert "latents cached in" in found.stdout
    figures = json.loads((tmp_path / "out/back/figures.json").read_text(encoding="utf-8"))
    assert (figures["step"], figures["photos"]) == (2, 4)
    assert release("export", tmp_path / "out/back", "--out", tmp_path / "model").returncode == 0
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    assert (config["encoder"]["family"], config["encoder"]["source"]) == ("taef2", "family")
    assert str(tmp_path) not in json.dumps(config)
    Tokenizer.from_pretrained(tmp_path / "model", encoder=f"taef2={folder}")(torch.zeros(1, 3, 24, 32))
    found = release(*given, "--out", tmp_path / "other")
    assert found.returncode == 2
    assert "add --encoder KIND=WHERE" in found.stderr


def test_as_many_steps_as_fit(photos, tmp_path):
    """A decoder with a context, its encoder run in each step: the schedule ends with the sitting."""
    save_file(taesd.taesd_encoder(6, channels=8).state_dict(), tmp_path / "taef2_encoder.safetensors")
    small = ["data.size=32", "data.scale=[32, 48]", "data.workers=0", "loss.perceptual=0", "training.batch_size=2",
             "training.precision=fp32", "model.decoder.size=custom", "model.decoder.patch=4", "model.decoder.context=4",
             "model.decoder.channels=[8, 8]", "model.decoder.up=[1, 1]"]  # fmt: skip
    given = ["train", "flux2", "--data", photos, "--encoder", f"taef2={tmp_path}", "--fill", "--limit", "4"]
    found = release(*given, "--minutes", "0.02", "--out", tmp_path / "out", "--set", *small)
    assert found.returncode == 0, found.stderr
    figures = json.loads((tmp_path / "out/back/figures.json").read_text(encoding="utf-8"))
    assert 1 <= figures["step"] == figures["of"] < 16000


@pytest.mark.parametrize(("first", "pace", "steps"), [(1, 1, 60), (4, 4, 15), (100, 100, 1), (51, 1, 10)])
def test_the_schedule_follows_the_clock(first, pace, steps, photos, tmp_path, monkeypatch):
    """After 60 s it ends, however long its first step takes; at an even pace, the rate is that of as many steps."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from release import Timed

    settings = TINY | {"optimizer": {"warmup": 0, "lr": 1.0e-3}, "run": str(tmp_path / "run")}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    # Read twice before the first step, and then after each.
    ticks = itertools.chain([0.0, 0.0], itertools.count(first, pace))
    timed = Timed(load_recipe(str(file), [f"data.source=[{photos}]", "training.log_every=1"]), 60.0, ticks.__next__)
    timed.train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert timed.done == timed.recipe.training.steps == len(rates) == steps
    if first == pace:
        expected = [0.5e-3 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
        assert rates[1:] == pytest.approx(expected[1:], abs=1e-9)  # the first is that of the recipe's own steps


def test_mistakes_are_one_line(recipe, photos, tmp_path):
    for arguments, words in (
        (["train", "no-such-recipe", "--data", photos, "--out", tmp_path / "out"], "is neither packaged nor"),
        (["train", recipe, "--data", tmp_path / "nothing", "--out", tmp_path / "out"], "nothing"),
        (["train", recipe, "--data", photos, "--out", tmp_path / "out", "--fill", "--minutes", "0"], "--fill takes"),
        (["export", tmp_path, "--out", tmp_path / "model"], "holds no state.00"),
        (["luggage", "--out", tmp_path / "bag", "--files", tmp_path / "nothing", "--no-wheels"], "does not exist"),
    ):
        found = release(*arguments)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert "Traceback" not in found.stderr


def test_luggage_is_weighed(tmp_path):
    (tmp_path / "photos.tar").write_bytes(bytes(2_000_000))
    found = release("luggage", "--out", tmp_path / "bag", "--files", tmp_path / "photos.tar", "--no-wheels")
    assert found.returncode == 0, found.stderr
    assert ": 2.0 MB; the repository's files: " in found.stdout
    found = release("luggage", "--out", tmp_path / "bag", "--no-wheels", "--limit", "1")
    assert found.returncode == 2
    assert "more than 1 MB" in found.stderr


def test_luggage_that_is_made_to_fit(tmp_path):
    """Whole samples, evenly, byte for byte; no more than the limit, and hardly less."""
    shard, random = tmp_path / "photos.tar", torch.Generator().manual_seed(0)
    sizes = torch.randint(1_000, 40_000, (100,), generator=random).tolist()
    with tarfile.open(shard, "w") as tar:
        for i, size in enumerate(sizes):
            for kind, content in (("webp", bytes([i]) * size), ("cls", b"7")):
                member = tarfile.TarInfo(f"{i:03d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    line = ["luggage", "--out", tmp_path / "bag", "--files", shard, "--no-wheels", "--fit", "--limit"]
    told = release(*line, "1000").stdout
    tree = float(told.partition("files: ")[2].split()[0])
    assert (tmp_path / "bag/photos.tar").read_bytes() == shard.read_bytes()
    found = release(*line, f"{tree + 1.2}")
    assert found.returncode == 0, found.stderr
    with tarfile.open(tmp_path / "bag/photos.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    kept = sorted({name.partition(".")[0] for name in members})
    assert f": {len(kept)} of 100 photos" in found.stdout
    assert 1.0e6 < (tmp_path / "bag/photos.tar").stat().st_size <= 1.25e6
    assert all(members[f"{key}.webp"] == bytes([int(key)]) * sizes[int(key)] for key in kept)
    assert all(members[f"{key}.cls"] == b"7" for key in kept)
    gaps = [int(b) - int(a) for a, b in itertools.pairwise(kept)]
    assert max(gaps) <= min(gaps) + 1
    assert "raise --limit" in release(*line, f"{tree - 1}").stderr


def test_the_releases_have_recipes():
    default, baseline = load_recipe("default"), load_recipe("kl-baseline")
    assert default.model.decoder.size == "CM/4"
    assert baseline.model.decoder.kind == "kl"
    assert default.model.encoder == baseline.model.encoder
    for name in ("data", "training"):
        assert getattr(default, name) == getattr(baseline, name)
    progressive, flux2 = load_recipe("progressive"), load_recipe("flux2-slim")
    assert (progressive.model.decoder.stages, progressive.model.sampler.stages) == (3, 1)
    assert progressive.scales.union
    same = dataclasses.replace(progressive.model.decoder, stages=1)
    assert (same, progressive.model.encoder) == (default.model.decoder, default.model.encoder)
    assert default.model.encoder == Tokenizer.from_pretrained("default").config.encoder
    assert (flux2.model.decoder.slim, flux2.model.decoder.trunk) == (64, 16)
