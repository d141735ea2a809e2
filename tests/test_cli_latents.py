"""`monobath stats` and `monobath cache-latents`: what they write and print, and what they refuse."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file
from test_import_ssdd import small, to_ssdd
from test_training import rows

from monobath import Tokenizer
from monobath.cli import main
from monobath.data.statistics import latent_statistics

RECIPE = {
    "model": {
        "encoder": {"base": 8, "patch": 2, "multipliers": [2, 3, 3], "blocks": 1},
        "decoder": {"size": "custom", "patch": 4, "channels": [16, 24], "middle_blocks": 1, "heads": 2},
    },
    "data": {"size": 16, "workers": 0},
    "loss": {"perceptual": 0.0},
    "training": {"steps": 2, "batch_size": 2, "sample_every": 0, "log_every": 1},
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(40, 24), (24, 31), (30, 30), (26, 50)]):
        values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    folder = tmp_path / "models/tiny"
    tiny_tokenizer().save_pretrained(folder, extra={"step": 7})
    return str(folder)


def fails(capsys, arguments: list[str]) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.err.startswith(f"monobath {arguments[0]}: ")
    assert written.err.count("\n") == 1
    assert "Traceback" not in written.err + written.out
    return written.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- stats ------------------------------------------------------------------------------------------------------


def test_stats_prints_and_stores(model, photos, tmp_path, capsys):
    expected = latent_statistics(tiny_tokenizer(), photos, size=24)
    before = files(Path(model))
    command = ["stats", "--data", photos, "--model", model, "--size", "24"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert files(Path(model)) == before
    assert f"{expected.overall_mean:.6f}" in printed
    assert all(f"{value:.6f}" in printed for value in (*expected.mean, *expected.std))
    assert "4 pictures at 24²" in printed
    assert "variance of posterior means + mean of posterior variances" in printed
    assert main([*command, "--out", str(tmp_path / "new")]) == 0
    assert files(Path(model)) == before
    assert main([*command, "--in-place"]) == 0
    for folder in (tmp_path / "new", Path(model)):
        config = Tokenizer.from_pretrained(folder).config
        assert (config.shift_factor, config.scaling_factor) == (expected.overall_mean, 1 / expected.overall_std)
        assert (config.latent_mean, config.latent_std) == (expected.mean, expected.std)
        training = json.loads((folder / "config.json").read_text())["training"]
        assert training["step"] == 7
        assert training["latent_statistics"] == {"pictures": 4, "data": [photos], "size": 24, "model": model}
    assert main(["info", model, "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["shift_factor"] == expected.overall_mean
    )


def test_the_factors_change_no_picture(model, photos, tmp_path):
    for name, source in (("a", model), ("b", str(tmp_path / "scaled"))):
        if name == "b":
            assert main(["stats", "--data", photos, "--model", model, "--size", "24", "--out", source]) == 0
        assert main(["reconstruct", photos, "--model", source, "--out", str(tmp_path / name)]) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--in_place --out OUT", "--out OUT and --in_place contradict one another"),
        ("--out MODEL", "holds a model already: choose a new folder, or --in_place"),
        ("--in-place --model default", "default is packaged and cannot be changed in place"),
        ("--in_place --model MODEL/model.safetensors", "is not a model folder on this machine"),
        ("--in_place --model nobody/nothing", "is not a model folder on this machine"),
        ("--size 0", "--size is 0: it must be at least 1"),
        ("--limit 0", "--limit is 0: it must be at least 1"),
        ("--data EMPTY", "no pictures found in EMPTY"),
        ("--data PHOTOS/none.tar", "none.tar does not exist"),
        ("--max_pixels 10", "none of the 4 pictures"),
        ("--bold", "unrecognized arguments: --bold"),
    ],
)
def test_stats_refuses(model, photos, tmp_path, capsys, options, words):
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(tmp_path / "out"), "MODEL": model, "EMPTY": str(tmp_path / "empty"), "PHOTOS": photos}
    for name, path in places.items():
        options, words = options.replace(name, path), words.replace(name, path)
    given = options.split()
    given += [] if "--data" in given else ["--data", photos]
    given += [] if "--model" in given else ["--model", model]
    before = files(tmp_path)
    assert words in fails(capsys, ["stats", *given])
    assert files(tmp_path) == before


def test_stats_needs_data(capsys):
    assert "data" in fails(capsys, ["stats"])


# ---- cache-latents ----------------------------------------------------------------------------------------------


def test_cache_then_train_from_it(model, photos, tmp_path, capsys):
    out, run = tmp_path / "cache", tmp_path / "run"
    command = ["cache-latents", "--data", photos, "--model", model, "--out", str(out), "--size", "16", "--copies", "2"]
    assert main([*command, "--scale", "16", "24", "--no-flip", "--shard-mb", "0.04"]) == 0
    assert "8 crops of 4 pictures in 2 shards" in capsys.readouterr().out
    assert sorted(files(out)) == ["latents-000000.tar", "latents-000001.tar", "latents.json"]
    facts = json.loads((out / "latents.json").read_text())
    assert (facts["scale"], facts["flip"], facts["model"], facts["copies"]) == ([16, 24], False, model, 2)
    before = files(out)
    assert main([*command, "--scale", "16", "24", "--no_flip", "--shard_mb", "0.04", "--batch", "5"]) == 0
    assert files(out) == before
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    train = ["train", str(tmp_path / "r.yaml"), "--data", str(out), "--run", str(run), "--data.latents", "true"]
    train += ["--training.train_encoder", "false", "--init", model]
    capsys.readouterr()
    assert 'add --data.scale "[16, 24]"' in fails(capsys, train)
    train += ["--data.scale", "[16, 24]", "--data.flip", "false"]
    assert main(train) == 0
    assert len([row for row in rows(run) if "loss" in row]) == 2
    trained, source = Tokenizer.from_pretrained(run / "model"), Tokenizer.from_pretrained(model)
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(trained.encoder.state_dict()[name], tensor)


def test_a_lower_precision_of_the_encoder_is_still_its_cache(model, photos, tmp_path):
    command = ["cache-latents", "--data", photos, "--model", model, "--size", "16"]
    for dtype in ("float32", "bfloat16"):
        assert main([*command, "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
    a, b = (json.loads((tmp_path / dtype / "latents.json").read_text()) for dtype in ("float32", "bfloat16"))
    assert a["encoder_sha256"] == b["encoder_sha256"]
    assert (a["dtype"], b["dtype"]) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--size 20", "size=20 must be divisible by the encoder's factor 8"),
        ("--size 0", "--size is 0: it must be at least 1"),
        ("--scale 16", "--scale is 16: give two lengths"),
        ("--scale 8 24", "scale=(8, 24) does not fit size=16"),
        ("--copies 0", "--copies is 0: it must be at least 1"),
        ("--shard_mb 0", "shard_mb is 0"),
        ("--data EMPTY", "no pictures found in EMPTY"),
        ("--data https://example.org/a.tar", "cannot be cached; give local folders or shards"),
        ("--model no-such-model", "no tokenizer 'no-such-model'"),
        ("--min_side 100", "none of the 4 pictures"),
        ("--min_side 100 --workers 1", "none of the 4 pictures"),
        ("--out FILE", "FILE is a file"),
        ("--size many", "--size is 'many': expected int"),
    ],
)
def test_cache_latents_refuses(model, photos, tmp_path, capsys, options, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("EMPTY", "FILE"):
        path = str(tmp_path / name.lower())
        options, words = options.replace(name, path), words.replace(name, path)
    given = options.split()
    for option, value in (("--data", photos), ("--model", model), ("--out", str(tmp_path / "out")), ("--size", "16")):
        given += [] if option in given else [option, value]
    assert words in fails(capsys, ["cache-latents", *given])
    assert not list(tmp_path.glob("out/*"))


def test_another_cache_is_not_overwritten(model, photos, tmp_path, capsys):
    command = ["cache-latents", "--data", photos, "--model", model, "--out", str(tmp_path / "c"), "--size", "16"]
    assert main(command) == 0
    capsys.readouterr()
    before = files(tmp_path / "c")
    message = fails(capsys, [*command, "--seed", "1", "--copies", "2"])
    assert "made otherwise (seed 1 instead of 0, copies 2 instead of 1" in message
    assert files(tmp_path / "c") == before


def test_recipes_refuse_what_is_no_cache(model, photos, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    train = ["train", str(tmp_path / "r.yaml"), "--data", photos, "--run", str(tmp_path / "run"), "--init", model]
    assert "cached latents are those of a frozen encoder" in fails(capsys, [*train, "--data.latents", "true"])
    train += ["--training.train_encoder", "false", "--data.latents", "true"]
    assert "holds no latents.json" in fails(capsys, train)
    assert not (tmp_path / "run").exists()


# ---- the docs ---------------------------------------------------------------------------------------------------


def test_the_commands_in_the_docs_run(photos, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/training.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    wanted = ("Cached latents", "Latent statistics", "Published SSDD checkpoints")
    text = "".join(section for section in sections if section.startswith(wanted))
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("monobath ")]
    assert [command[0] for command in commands] == ["cache-latents", "train", "stats", "import-ssdd"]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "my-photos")
    save_file({k: v.contiguous() for k, v in to_ssdd(small()).items()}, "published.safetensors")
    smaller = {"train": ["--training.steps", "1", "--training.batch_size", "2", "--training.sample_every", "0"]}
    for command in commands:
        assert main([*command, *smaller.get(command[0], [])]) == 0, command
    assert Tokenizer.from_pretrained("runs/from-latents/model").config.latent_std
    assert Tokenizer.from_pretrained("runs/imported").factor == 8
