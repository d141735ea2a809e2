"""The command line: what each verb writes and prints, and that its help costs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_tokenizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from monobath import __version__, cli, images, resources
from monobath.cli import main, parser_of
from monobath.cli.shared import MAX_PIXELS
from monobath.images import open_image, pil_to_tensor
from monobath.training import Interrupted, dump_recipe, load_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny-preview"
    recipe = {"name": "tiny", "training": {"batch_size": 3}, "data": {"size": 64}}
    tiny_tokenizer().save_pretrained(folder, extra={"recipe": recipe, "step": 7})
    return str(folder)


def photo(path: Path, width: int, height: int, seed: int = 0) -> str:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return str(path)


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---- help -------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_without_torch():
    code = f"""
import sys
from monobath.cli import main
for words in [["--help"], ["--version"], *([verb, "--help"] for verb in {list(cli.VERBS)})]:
    assert main(words) == 0, words
assert main([]) == 2
heavy = {{"torch", "torchvision", "accelerate", "PIL", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"usage: monobath {verb}" in done.stdout
    assert f"monobath {__version__}" in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_a_help_text(verb, capsys):
    assert main([verb, "--help"]) == 0
    parser = parser_of(cli.VERBS[verb])
    assert all(action.help for action in parser._actions)
    assert "==" not in capsys.readouterr().out


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "monobath", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"monobath {__version__}\n")
    done = subprocess.run([sys.executable, "-m", "monobath", "xyz"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("monobath: unknown verb 'xyz': choose from train, ")


def test_the_limit_named_in_the_help_is_the_real_one():
    assert MAX_PIXELS == images.MAX_PIXELS  # stated twice, since images imports torch


# ---- reconstruct ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 50), (64, 40)])
def test_reconstruct_keeps_odd_sizes(model, tmp_path, capsys, size):
    source = photo(tmp_path / "a.png", *size)
    assert main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model]) == 0
    assert Image.open(tmp_path / "out/a.png").size == size
    text = capsys.readouterr().out
    assert f"{size[0]}×{size[1]}" in text
    assert "dB" in text


def test_reconstruct_20000_by_30(model, tmp_path):
    source = photo(tmp_path / "long.png", 20_000, 30)
    assert main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model]) == 0
    assert Image.open(tmp_path / "out/long.png").size == (20_000, 30)


def test_reconstruct_is_what_the_tokenizer_does(model, tmp_path):
    source = photo(tmp_path / "a.png", 40, 27)
    options = ["--model", model, "--seed", "5", "--steps", "3"]
    assert main(["reconstruct", source, "--out", str(tmp_path / "out"), *options]) == 0
    tokenizer = tiny_tokenizer()
    posterior = tokenizer.encode(open_image(source))
    (expected,) = tokenizer.decode(posterior.mode(), size=posterior.size, seed=5, steps=3, output="pil")
    assert np.array_equal(pixels(tmp_path / "out/a.png"), np.asarray(expected))


def test_a_picture_does_not_depend_on_the_others(model, tmp_path):
    a, b = photo(tmp_path / "a.png", 24, 16), photo(tmp_path / "b.png", 24, 16, seed=1)
    main(["reconstruct", a, b, "--out", str(tmp_path / "both"), "--model", model])
    main(["reconstruct", b, "--out", str(tmp_path / "alone"), "--model", model])
    assert np.array_equal(pixels(tmp_path / "both/b.png"), pixels(tmp_path / "alone/b.png"))


def test_options_change_the_result(model, tmp_path):
    source, results = photo(tmp_path / "a.png", 24, 16), {}
    for words in ["", "--seed 1", "--noise zero", "--steps 2", "--dtype bfloat16"]:
        assert main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model, *words.split()]) == 0
        results[words] = pixels(tmp_path / "out/a.png").tobytes()
    assert len(set(results.values())) == len(results)


def test_size_crops_as_in_evaluation(model, tmp_path):
    source = photo(tmp_path / "a.png", 50, 30)
    assert main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model, "--size", "24"]) == 0
    assert Image.open(tmp_path / "out/a.png").size == (24, 24)


def test_folders_are_searched_and_equal_names_kept_apart(model, tmp_path):
    photo(tmp_path / "in/a.png", 8, 8)
    photo(tmp_path / "in/deep/a.jpg", 9, 8)
    photo(tmp_path / "in/deep/A.bmp", 10, 8)
    photo(tmp_path / "in/.hidden/b.png", 8, 8)
    (tmp_path / "in/notes.txt").write_text("no picture")
    extra = photo(tmp_path / "a-2.png", 11, 8)
    assert main(["reconstruct", str(tmp_path / "in"), extra, "--out", str(tmp_path / "out"), "--model", model]) == 0
    assert len(listing(tmp_path / "out")) == 4
    assert {Image.open(tmp_path / "out" / name).size[0] for name in listing(tmp_path / "out")} == {8, 9, 10, 11}


def test_names_with_markup_and_spaces(model, tmp_path, capsys):
    source = photo(tmp_path / "[bold] a photo.v2.png", 8, 8)
    assert main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model]) == 0
    assert listing(tmp_path / "out") == ["[bold] a photo.v2.png"]
    assert "[bold]" in capsys.readouterr().out


def test_the_first_bad_picture_stops_and_what_was_written_is_whole(model, tmp_path, capsys):
    a, z = photo(tmp_path / "a.png", 8, 8), photo(tmp_path / "z.png", 8, 8)
    (tmp_path / "b.png").write_bytes(b"nothing")
    assert main(["reconstruct", a, str(tmp_path / "b.png"), z, "--out", str(tmp_path / "out"), "--model", model]) == 2
    assert listing(tmp_path / "out") == ["a.png"]
    written = capsys.readouterr()
    assert "1 picture in" in written.out
    assert "b.png is not a picture" in written.err


# ---- encode and decode ------------------------------------------------------------------------------------------


def test_encode_then_decode_is_reconstruct(model, tmp_path):
    sources = [photo(tmp_path / f"{w}x{h}.png", w, h, seed=w) for w, h in [(1, 1), (33, 21), (16, 64)]]
    options = ["--model", model, "--dtype", "bfloat16"]
    assert main(["reconstruct", *sources, "--out", str(tmp_path / "direct"), *options, "--seed", "3"]) == 0
    assert main(["encode", *sources, "--out", str(tmp_path / "latents"), *options]) == 0
    # The file says which model made it.
    decode = ["decode", str(tmp_path / "latents"), "--out", str(tmp_path / "back")]
    assert main([*decode, "--dtype", "bfloat16", "--seed", "3"]) == 0
    assert listing(tmp_path / "back") == listing(tmp_path / "direct")
    for name in listing(tmp_path / "direct"):
        assert np.array_equal(pixels(tmp_path / "direct" / name), pixels(tmp_path / "back" / name))


def test_latents_of_another_model_name_a_packaged_one(packaged, tmp_path, capsys):
    source, latents = photo(tmp_path / "a.png", 24, 16), str(tmp_path / "latents")
    assert main(["encode", source, "--out", latents, "--model", "f8c4"]) == 0
    out = str(tmp_path / "out")
    assert main(["decode", latents, "--out", out]) == 0  # the file names its own
    assert main(["decode", latents, "--out", out, "--model", "default"]) == 2
    words = "latents are (1, 4, 2, 3): this tokenizer (f8c16) needs (B, 16, h, w); f8c4 is packaged for 4 channels"
    assert words in capsys.readouterr().err


def test_what_a_latent_file_holds(model, tmp_path):
    source = photo(tmp_path / "a.png", 33, 21)
    assert main(["encode", source, "--out", str(tmp_path), "--model", model]) == 0
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        latent, facts = file.get_tensor("latent"), file.metadata()
    assert facts == {"format": "monobath-latent-1", "size": "21x33", "factor": "8", "model": model}
    expected = tiny_tokenizer().encode(pil_to_tensor(open_image(source))).mode()[0]
    assert latent.shape == (4, 3, 5)
    assert torch.equal(latent, expected)


def test_sampling_is_seeded(model, tmp_path):
    source, found = photo(tmp_path / "a.png", 16, 16), []
    for words in ["", "--sample", "--sample --seed 1", "--sample"]:
        assert main(["encode", source, "--out", str(tmp_path), "--model", model, *words.split()]) == 0
        found.append(load_file(tmp_path / "a.safetensors")["latent"])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


# ---- info -------------------------------------------------------------------------------------------------------


def test_info(model, capsys):
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tokenizer = tiny_tokenizer()
    assert facts["encoder"] == "f8c4"
    assert facts["encoder_parameters"] == sum(p.numel() for p in tokenizer.encoder.parameters())
    assert facts["decoder_parameters"] == sum(p.numel() for p in tokenizer.decoder.parameters())
    assert facts["latent_of_256"] == [4, 32, 32]
    assert facts["pixel_values_per_latent_value"] == 48
    assert facts["training"] == {
        "recipe": "tiny", "steps": 7, "batch_size": 3, "crop": 64, "started_from": None
    }  # fmt: skip
    assert main(["info", model]) == 0
    text = capsys.readouterr().out
    assert "f8c4" in text
    assert f"{facts['decoder_parameters']:,}" in text


def test_info_of_a_single_file(model, capsys):
    assert main(["info", f"{model}/model.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["recipe"] == "tiny"


@pytest.mark.skipif("default" not in resources.weights_names(), reason="no packaged weights")
def test_info_without_a_name_lists_what_is_packaged(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packaged"] == resources.weights_names()
    assert facts["name"] in facts["packaged"]


# ---- train ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", resources.recipe_names())
def test_print_config_is_the_recipe_again(name, tmp_path, capsys):
    words = ["--data", "one", "two words", "--run=x", "--optimizer.lr", "2e-3", "--data.flip=false"]
    assert main(["train", name, *words, "--data", "three", "--print_config"]) == 0
    (tmp_path / "config.yaml").write_text(text := capsys.readouterr().out)
    recipe = load_recipe(str(tmp_path / "config.yaml"))
    assert recipe.data.source == ["one", "two words", "three"]
    assert (recipe.run, recipe.optimizer.lr, recipe.data.flip) == ("x", 2e-3, False)
    assert dump_recipe(recipe) == text


def test_overrides_reach_every_type():
    overrides = [
        "name=123", "training.steps=5", "loss.kl=1e-3", "training.compile=true", "data.scale=[64, 96]",
        "data.size=64", "data.validation=photos", 'data.source=["a b", "c"]', "loss.space=v",
        "model.encoder.base=32", "model.sampler.noise=zero",
    ]  # fmt: skip
    recipe = load_recipe("cpu-default", overrides)
    assert (recipe.name, recipe.training.steps, recipe.loss.kl, recipe.training.compile) == ("123", 5, 1e-3, True)
    assert (recipe.data.scale, recipe.data.size, recipe.loss.space) == ([64, 96], 64, "v")
    assert (recipe.data.validation, recipe.data.source) == (["photos"], ["a b", "c"])
    assert (recipe.model.encoder.base, recipe.model.sampler.noise) == (32, "zero")


def test_a_size_fills_in_only_what_the_recipe_leaves_open(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {decoder: {size: XS/2, heads: 2}}\ntraining:\n")
    decoder = load_recipe(str(tmp_path / "r.yaml")).model.decoder
    assert (decoder.patch, decoder.channels, decoder.heads, decoder.prediction) == (2, [64, 96, 96], 2, "x")


TINY_RECIPE = {
    "model": {
        "encoder": {"base": 8, "patch": 2, "multipliers": [2, 3, 3], "blocks": 1},
        "decoder": {"size": "custom", "patch": 4, "channels": [16, 24], "middle_blocks": 1, "heads": 2},
    },
    "data": {"size": 16, "workers": 0},
    "loss": {"perceptual": 0.0},
    "training": {"steps": 2, "batch_size": 2, "samples": 2, "log_every": 1},
}


def test_train_writes_a_model_that_reconstructs(tmp_path, capsys):
    for number in range(3):
        photo(tmp_path / f"photos/{number}.png", 40, 30, seed=number)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    run = tmp_path / "run"
    words = ["train", str(tmp_path / "r.yaml"), "--data", str(tmp_path / "photos"), "--run", str(run)]
    assert main([*words, "--training.sample_every", "0"]) == 0
    assert f"model: {run / 'model'}" in capsys.readouterr().out
    recipe = load_recipe(str(run / "config.yaml"))
    assert recipe == load_recipe(
        str(tmp_path / "r.yaml"),
        [f"data.source={tmp_path / 'photos'}", f"run={run}", "training.sample_every=0"],
    )
    source = str(tmp_path / "photos/0.png")
    assert main(["reconstruct", source, "--model", str(run / "model"), "--out", str(tmp_path / "out")]) == 0
    assert main(["info", str(run / "model"), "--json"]) == 0


def test_interruption_is_one_line_and_130(tmp_path, capsys, monkeypatch):
    from monobath.training import run

    def stop(recipe):
        raise Interrupted("stopped at step 1 of 2; saved: the same command goes on")

    monkeypatch.setattr(run, "train", stop)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY_RECIPE))
    assert main(["train", str(tmp_path / "r.yaml"), "--data", str(tmp_path)]) == 130
    expected = "monobath train: stopped at step 1 of 2; saved: the same command goes on\n"
    assert capsys.readouterr().err == expected


def test_a_bug_keeps_its_traceback(model, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("monobath.tokenizer.Tokenizer.decode", broken)
    source = photo(tmp_path / "a.png", 8, 8)
    with pytest.raises(ZeroDivisionError):
        main(["reconstruct", source, "--out", str(tmp_path / "out"), "--model", model])
