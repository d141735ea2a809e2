"""What users get wrong: one line on stderr that names it, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file

import monobath.store
from monobath.cli import VERBS, main
from monobath.errors import UserError
from monobath.training import checkpoints

RECIPE = {
    "model": {
        "encoder": {"base": 8, "patch": 2, "multipliers": [2, 3, 3], "blocks": 1},
        "decoder": {"size": "custom", "patch": 4, "channels": [16, 24], "middle_blocks": 1, "heads": 2},
    },
    "data": {"size": 16, "workers": 0},
    "loss": {"perceptual": 0.0},
    "training": {"steps": 1, "batch_size": 2, "sample_every": 0},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tiny model, three pictures, a recipe, latents, and what is wrong with each."""
    root = tmp_path_factory.mktemp("prepared")
    tiny_tokenizer().save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for number in range(3):
        values = rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / f"photos/{number}.png")
    (root / "empty").mkdir()
    (root / "text.jpg").write_text("not a picture at all")
    whole = (root / "photos/0.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "bomb.png").write_bytes(bomb(50_000, 50_000))
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (root / "stepz.yaml").write_text(yaml.safe_dump({"training": {"stepz": 3}}))
    (root / "type.yaml").write_text(yaml.safe_dump({"training": {"steps": "many"}}))
    (root / "section.yaml").write_text(yaml.safe_dump({"training": 3}))
    (root / "syntax.yaml").write_text("training: [")
    (root / "empty.yaml").write_text("")
    (root / "list.yaml").write_text("- 1")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    make_models(root)
    make_latents(root)
    return root


def make_models(root: Path) -> None:
    whole = (root / "model/model.safetensors").read_bytes()
    for name in ("truncated", "other", "broken-config", "foreign", "unnamed"):
        shutil.copytree(root / "model", root / name)
    (root / "truncated/model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((root / "model/config.json").read_text())
    other = json.loads(json.dumps(config))
    other["decoder"] |= {"channels": [16, 32], "middle_blocks": 1}
    (root / "other/config.json").write_text(json.dumps(other))
    (root / "broken-config/config.json").write_text("{")
    (root / "foreign/config.json").write_text(json.dumps({"format": "something-else"}))
    unnamed = json.loads(json.dumps(config))
    unnamed["decoder"]["colour"] = "blue"
    (root / "unnamed/config.json").write_text(json.dumps(unnamed))


def make_latents(root: Path) -> None:
    folder = root / "latents"
    folder.mkdir()
    facts = {"format": "monobath-latent-1", "size": "16x24", "factor": "8", "model": str(root / "model")}
    z = torch.zeros(4, 2, 3)
    bad = z.clone()
    bad[1, 1, 1] = float("nan")
    cases = {
        "good": (z, {}), "channels": (torch.zeros(5, 2, 3), {}), "ndim": (z[None], {}), "nan": (bad, {}),
        "integer": (z.int(), {}), "size": (z, {"size": "17x24"}), "zero": (z, {"size": "0x24"}),
        "words": (z, {"size": "large"}), "factor": (z, {"factor": "16"}), "nowhere": (z, {"model": "no-such-model"}),
    }  # fmt: skip
    for name, (latent, changes) in cases.items():
        save_file({"latent": latent}, folder / f"{name}.safetensors", metadata=facts | changes)
    for missing in ("size", "factor", "model"):
        rest = {k: v for k, v in facts.items() if k != missing}
        save_file({"latent": z}, folder / f"no-{missing}.safetensors", metadata=rest)
    save_file({"weights": z}, folder / "unrelated.safetensors")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-5])
    (folder / "noise.safetensors").write_bytes(b"\x00\x01\x02")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- the table --------------------------------------------------------------------------------------------------

RECONSTRUCT = "reconstruct {0} --model P/model --out OUT"
MODEL = "reconstruct P/photos --out OUT --model "
DECODE = "decode P/latents/{0}.safetensors --out OUT"
TRAIN = "train {0} --data P/photos --run OUT/run"

TABLE: list[tuple[str, str, str]] = [
    # what is wrong, the command (P: the prepared folder), what the message says
    ("no verb", "", "no verb given: choose from train, "),
    ("unknown verb", "reconstuct a.png", "did you mean reconstruct?"),
    ("unknown option", "info --bold", "unrecognized arguments: --bold"),
    ("missing argument", "reconstruct --out OUT", "required: photo"),
    ("wrong type of option", f"{RECONSTRUCT.format('P/photos')} --seed x", "--seed is 'x': expected int"),
    ("wrong choice", f"{RECONSTRUCT.format('P/photos')} --noise pink", "--noise is 'pink': expected "),
    # pictures
    ("missing file", RECONSTRUCT.format("P/none.jpg"), "none.jpg does not exist"),
    ("not an image", RECONSTRUCT.format("P/text.jpg"), "text.jpg is not a picture that can be read"),
    ("image cut short", RECONSTRUCT.format("P/cut.png"), "cut.png cannot be read as a picture"),
    (
        "above max_pixels",
        f"{RECONSTRUCT.format('P/photos')} --max_pixels 900",
        "40x24 = 960 pixels, above max_pixels=900",
    ),
    ("decompression bomb", RECONSTRUCT.format("P/bomb.png"), "max_pixels=64,000,000"),
    ("empty folder", RECONSTRUCT.format("P/empty"), "no pictures in "),
    ("empty folder, encode", "encode P/empty --model P/model --out OUT", "no pictures in "),
    ("size 0", f"{RECONSTRUCT.format('P/photos')} --size 0", "--size is 0: it must be at least 1"),
    ("size too large", f"{RECONSTRUCT.format('P/photos')} --size 9000", "above max_pixels=64,000,000"),
    ("steps 0", f"{RECONSTRUCT.format('P/photos')} --steps 0", "steps=0: sampling needs at least one step"),
    ("device", f"{RECONSTRUCT.format('P/photos')} --device abacus", "--device abacus cannot be used here"),
    ("device index", f"{RECONSTRUCT.format('P/photos')} --device cuda:99", "--device cuda:99 cannot be used here"),
    ("output is an input", "reconstruct P/photos --model P/model --out P/photos", "would overwrite an input file"),
    ("output is a file", "reconstruct P/photos --model P/model --out P/text.jpg", "text.jpg is a file"),
    ("output under a file", "demo --model P/model --out P/text.jpg/x", "text.jpg is a file"),
    # models
    ("unknown model, offline", f"{MODEL}nobody/nothing", "no tokenizer 'nobody/nothing'"),
    ("unknown model, info", "info no-such-model", "no tokenizer 'no-such-model'"),
    ("corrupt checkpoint", f"{MODEL}P/truncated", "truncated is corrupt or not a monobath checkpoint"),
    ("another architecture", f"{MODEL}P/other", "does not fit the model: unexpected: decoder."),
    ("misshapen", f"{MODEL}P/other", " instead of ("),
    ("corrupt config", f"{MODEL}P/broken-config", "broken-config is corrupt"),
    ("another format", f"{MODEL}P/foreign", "(format 'something-else', expected 'monobath-tokenizer-1')"),
    ("unknown config key", f"{MODEL}P/unnamed", "'colour'"),
    ("folder without a model", f"{MODEL}P/empty", "holds no model.safetensors"),
    # latents
    ("latents of wrong shape", DECODE.format("channels"), "latents are (1, 5, 2, 3): this tokenizer (f8c4) needs"),
    ("latents of wrong rank", DECODE.format("ndim"), "expected a float latent (c, h, w)"),
    ("latents of wrong type", DECODE.format("integer"), "holds torch.int32"),
    ("latents NaN", DECODE.format("nan"), "latents contain NaN or infinity"),
    ("latents too small for the size", DECODE.format("size"), "size=(17, 24) does not fit"),
    ("latents with size 0", DECODE.format("zero"), "size=(0, 24) does not fit"),
    ("latents with size in words", DECODE.format("words"), "is not a readable latent file"),
    ("latents of another factor", DECODE.format("factor"), "has factor 16, but "),
    ("latents of an unknown model", DECODE.format("nowhere"), "no tokenizer 'no-such-model'"),
    ("latents without size", DECODE.format("no-size"), "lacks the metadata 'size'"),
    ("latents without factor", DECODE.format("no-factor"), "lacks the metadata 'factor'"),
    ("latents without model", DECODE.format("no-model"), "lacks the metadata 'model'"),
    ("no latents inside", DECODE.format("unrelated"), "is not a latent file"),
    ("latents cut short", DECODE.format("cut"), "cut.safetensors is not a readable latent file"),
    ("latents corrupt", DECODE.format("noise"), "noise.safetensors is not a readable latent file"),
    ("latents missing", DECODE.format("none"), "none.safetensors does not exist"),
    ("no latents in the folder", "decode P/photos --out OUT", "no latents in "),
    # recipes and training
    ("unknown recipe", TRAIN.format("cpu-defualt"), "did you mean cpu-default?"),
    ("recipe is a folder", TRAIN.format("P/empty"), "is a folder"),
    (
        "unknown recipe key",
        TRAIN.format("P/stepz.yaml"),
        "training.stepz in P/stepz.yaml: the nearest valid one is training.steps",
    ),
    (
        "wrong type in recipe",
        TRAIN.format("P/type.yaml"),
        "training.steps is 'many' in P/type.yaml: expected an integer",
    ),
    ("value instead of section", TRAIN.format("P/section.yaml"), "training is 3 in P/section.yaml: expected a mapping"),
    ("YAML syntax", TRAIN.format("P/syntax.yaml"), "syntax.yaml is not valid YAML"),
    ("empty recipe", TRAIN.format("P/empty.yaml"), "empty.yaml is empty"),
    ("recipe is a list", TRAIN.format("P/list.yaml"), "list.yaml is a list"),
    ("recipe is not text", TRAIN.format("P/binary.yaml"), "binary.yaml cannot be read"),
    (
        "unknown override",
        f"{TRAIN.format('P/recipe.yaml')} --training.stepz 3",
        "the nearest valid one is training.steps",
    ),
    ("override in no section", f"{TRAIN.format('P/recipe.yaml')} --lr=3", "the nearest valid one is optimizer.lr"),
    (
        "override of a section",
        f"{TRAIN.format('P/recipe.yaml')} --optimizer=3",
        "optimizer is a section: give one of its keys",
    ),
    ("override without value", f"{TRAIN.format('P/recipe.yaml')} --training.steps", "--training.steps has no value"),
    (
        "wrong type of override",
        f"{TRAIN.format('P/recipe.yaml')} --training.steps x",
        "training.steps is 'x': expected an integer",
    ),
    (
        "NaN as override",
        f"{TRAIN.format('P/recipe.yaml')} --optimizer.lr=.nan",
        "optimizer.lr is '.nan': expected a number",
    ),
    ("value out of range", f"{TRAIN.format('P/recipe.yaml')} --training.steps=0", "it must be at least 1"),
    ("no data", "train P/recipe.yaml --run OUT/run", "names no pictures: add --data FOLDER"),
]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


def fails(capsys, arguments: list[str]) -> str:
    """The one line that a command that must fail writes to stderr."""
    code = main(arguments)
    written = capsys.readouterr()
    assert code == 2, written
    verb = f" {arguments[0]}" if arguments and arguments[0] in VERBS else ""
    assert written.err.startswith(f"monobath{verb}: "), written.err
    assert written.err.count("\n") == 1, written.err
    assert written.err.endswith("\n")
    assert "Traceback" not in written.err + written.out
    return written.err


@pytest.mark.parametrize(("command", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_one_line_exit_2_and_nothing_written(command, words, prepared, tmp_path, capsys):
    before = listing(prepared)
    arguments = [
        w.replace("P/", f"{prepared}/").replace("OUT", str(tmp_path / "out")) for w in command.split()
    ]  # fmt: skip
    message = fails(capsys, arguments)
    assert words.replace("P/", f"{prepared}/") in message
    assert listing(prepared) == before
    assert listing(tmp_path) == []


def test_training_on_an_empty_folder_leaves_no_checkpoint(prepared, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", str(prepared / "recipe.yaml"), "--data", str(prepared / "empty"), "--run", str(run)]
    assert "no pictures found in" in fails(capsys, arguments)
    assert {name for name, _ in listing(tmp_path)} <= {"run", "run/config.yaml"}


# ---- a full disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[object, str], None]:
    """`full_disk(owner, name)`: from now on, owner.name leaves half a file and raises what a full disk raises."""

    def during(owner: object, name: str) -> None:
        def write(*args, **kwargs):
            for place in args:
                if isinstance(place, (str, Path)) and "partial" in str(place):
                    with open(place, "wb") as file:
                        file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(owner, name, write)

    return during


def files_under(folder: Path) -> list[str]:
    return [name for name, _ in listing(folder) if (folder / name).is_file()]


def test_full_disk_reconstruct(prepared, tmp_path, capsys, full_disk):
    out = tmp_path / "out"
    command = ["reconstruct", str(prepared / "photos"), "--model", str(prepared / "model"), "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    before = {name: (out / name).read_bytes() for name in files_under(out)}
    full_disk(Image.Image, "save")
    assert "No space left on device" in fails(capsys, command)
    assert {name: (out / name).read_bytes() for name in files_under(out)} == before


def test_full_disk_encode(prepared, tmp_path, capsys, full_disk):
    command = ["encode", str(prepared / "photos"), "--model", str(prepared / "model"), "--out", str(tmp_path / "out")]
    full_disk(monobath.store, "save_file")
    assert "No space left on device" in fails(capsys, command)
    assert files_under(tmp_path) == []


def test_full_disk_demo(prepared, tmp_path, capsys, full_disk, monkeypatch):
    monkeypatch.setattr("monobath.resources.sample_paths", lambda: sorted((prepared / "photos").iterdir()))
    full_disk(Path, "write_text")  # the second file
    command = ["demo", "--model", str(prepared / "model"), "--out", str(tmp_path / "out")]
    assert "could not write" in fails(capsys, command)
    assert files_under(tmp_path) == ["out/comparison.png"]
    Image.open(tmp_path / "out/comparison.png").load()


def test_full_disk_save_pretrained(prepared, tmp_path, full_disk):
    tokenizer, folder = tiny_tokenizer(), tmp_path / "model"
    tokenizer.save_pretrained(folder)
    before = listing(tmp_path)
    full_disk(monobath.store, "save_file")
    with pytest.raises(UserError, match="No space left on device"):
        tokenizer.save_pretrained(folder)
    assert listing(tmp_path) == before


def test_full_disk_checkpoint_keeps_the_one_before(prepared, tmp_path, capsys, monkeypatch, full_disk):
    run = tmp_path / "run"
    command = ["train", str(prepared / "recipe.yaml"), "--data", str(prepared / "photos"), "--run", str(run)]
    assert main([*command, "--training.steps", "1"]) == 0
    capsys.readouterr()
    before = {name for name in files_under(run) if name.startswith(("checkpoints", "model"))}
    assert any(name.startswith("checkpoints/step-00000001") for name in before)
    full_disk(checkpoints, "save_file")
    assert main([*command, "--training.steps", "2"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("monobath train: could not write ")
    assert "No space left on device" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert {name for name in files_under(run) if name.startswith(("checkpoints", "model"))} == before
    assert not any("partial" in name for name in files_under(run))


# ---- what looks wrong but is not --------------------------------------------------------------------------------


def unusual() -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    yield "1x1", lambda: Image.new("RGB", (1, 1))
    yield "palette", lambda: Image.new("P", (9, 7))
    yield "transparent", lambda: Image.new("RGBA", (9, 7), (0, 0, 0, 0))
    yield "16-bit", lambda: Image.fromarray(np.full((7, 9), 40_000, dtype=np.uint16))


@pytest.mark.parametrize("make", [m for _, m in unusual()], ids=[n for n, _ in unusual()])
def test_unusual_pictures_reconstruct(make, prepared, tmp_path):
    image, file = make(), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    command = [
        "reconstruct",
        str(tmp_path / "a.png"),
        "--model",
        str(prepared / "model"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    assert Image.open(tmp_path / "out/a.png").size == image.size
