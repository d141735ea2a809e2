"""`monobath export`, and decoding with what it wrote."""

import importlib.util
import json
import typing

import pytest
from conftest import tiny_tokenizer
from PIL import Image

from monobath import resources
from monobath.cli import main, using
from monobath.export import FILES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer(decoder={"middle_blocks": 1}, noise="zero").save_pretrained(folder / "m")
    return folder / "m"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "p.png"
    with Image.open(resources.sample_paths()[0]) as image:
        image.resize((50, 35)).save(path)
    return path


def test_exported_model_reconstructs_like_the_original(model, photo, tmp_path, capsys):
    for package in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "exported"
    assert main(["export", str(model), "--out", str(out), "--engine", "onnxruntime"]) == 0
    assert str(out / "decoder.onnx") in capsys.readouterr().out
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    assert main(["reconstruct", str(photo), "--model", str(model), "--out", str(plain)]) == 0
    engine = ["--engine", "onnxruntime"]
    assert main(["reconstruct", str(photo), "--model", str(out), "--out", str(fast), *engine]) == 0
    pictures = [Image.open(folder / "p.png").convert("RGB") for folder in (plain, fast)]
    assert pictures[0].size == (50, 35)
    gaps = [abs(a - b) for x, y in zip(*(p.tobytes() for p in pictures), strict=True) for a, b in [(x, y)]]
    assert max(gaps) <= 1  # one 8-bit level of rounding


def test_folded_torch_engine_from_the_command_line(model, photo, tmp_path):
    arguments = ["reconstruct", str(photo), "--model", str(model), "--out", str(tmp_path), "--engine", "torch"]
    assert main(arguments) == 0
    assert Image.open(tmp_path / "p.png").size == (50, 35)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reconstruct", "PHOTO", "--out", "o", "--engine", "tensorrt"], "--engine is 'tensorrt'"),
        (["reconstruct", "PHOTO", "--out", "o", "--engine", "torch", "--steps", "2"], "optimized for 1 step"),
        (["export", "--out", "o", "--engine", "torch"], "--engine"),
        (["bench", "--engine", "torch", "--device", "auto"], "add --cpu"),
    ],
)
def test_mistakes_are_one_line(model, photo, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main([str(photo) if a == "PHOTO" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_names_of_engines_are_the_engines():
    assert set(typing.get_args(using.FileEngine)) <= set(FILES)


def test_bench_times_models_and_a_peer_under_an_engine(model, tmp_path, capsys):
    arguments = ["bench", "--cpu", "--sizes", "32", "--decoders", "XS/4", "--repeats", "1", "--engine", "torch"]
    assert main([*arguments, "--model", str(model), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]
    named = {row["name"]: row for row in rows}
    assert set(named) >= {str(model), f"{model}, torch", "AutoencoderTiny, torch"}
    assert named["AutoencoderTiny, torch"]["parameters"] == named["AutoencoderTiny"]["parameters"]
