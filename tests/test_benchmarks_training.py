"""The benchmarks that compare trainings, at tiny size: their rows, and that what is done is not done again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_tokenizer
from PIL import Image
from test_training import photos as photos  # the fixture
from test_training import tiny_recipe
from test_union import union_recipe

from monobath import Tokenizer, UserError
from monobath.evaluation import frechet
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.system import TokenizerSystem
from monobath.training import Run, train

pytest.importorskip("diffusers")

SMALL = ["--size", "32", "--batch", "2", "--precision", "fp32"]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name. One crop a picture and few half-samples: a Fréchet distance in a second."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    monkeypatch.setattr(frechet, "CROPS", 1)
    monkeypatch.setattr(frechet, "HALVES", 3)
    return importlib.import_module


@pytest.fixture(scope="module")
def start(tmp_path_factory, photos) -> str:
    """A model that carries its recipe."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("start") / "run", photos, loss={"perceptual": 0.02}, steps=2)
    return str(train(recipe))


def forbid_training(monkeypatch) -> None:
    def trained_again(self):
        raise AssertionError("trained again")

    monkeypatch.setattr(Run, "train", trained_again)


def table(text: str) -> list[list[str]]:
    """Cells of a Markdown table's body."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def test_distillation(tmp_path, photos, start, benchmark, monkeypatch, capsys):
    main = benchmark("distillation").main
    out = ["--out", str(tmp_path / "out")]
    train = ["train", *out, "--data", str(photos), "--start", start, "--steps", "2", "--teacher-steps", "2", *SMALL]
    score = ["score", *out, "--data", str(photos), "--score-size", "32", "--limit", "4", "--repeats", "1"]
    few = ["--teacher-rows", "1", "2", "--against", "2"]
    assert main([*train, "--cache"]) == 0
    assert len(list((tmp_path / "out" / "teacher-samples").rglob("*.safetensors"))) == 2
    assert main([*train, "--name", "gaussian", "--zero-noise", "0"]) == 0
    assert main([*train, "--name", "control", "--zero-noise", "0", "--no-teacher"]) == 0
    students = {path.parent.name for path in (tmp_path / "out").glob("*/facts.json")}
    assert students == {"student", "gaussian", "control", "undistilled-2-lr0.0001-crop32x2-seed0"}  # both share (a)
    assert main([*score, *few]) == 0
    capsys.readouterr()
    assert main(["show", *out, *few]) == 0
    rows, differences = map(table, capsys.readouterr().out.split("\n\n"))
    plain = "undistilled-2-lr0.0001-crop32x2-seed0"
    assert [row[:3] for row in rows] == [
        ["teacher", "1", "gaussian"], ["teacher", "2", "gaussian"], ["teacher", "1", "zero"],
        [plain, "1", "gaussian"], [plain, "1", "zero"],
        ["control", "1", "gaussian"],
        ["gaussian", "1", "gaussian"], ["student", "1", "gaussian"], ["student", "1", "zero"],
    ]  # fmt: skip
    assert all("±" in cell for row in rows for cell in row[3:7])
    assert all(float(row[7]) > 0 for row in rows)
    assert [row[0] for row in differences] == [
        f"control (gaussian) − {plain} (1 step, gaussian)",
        "control (gaussian) − teacher (2 steps, gaussian)",
        f"gaussian (gaussian) − {plain} (1 step, gaussian)",
        "gaussian (gaussian) − teacher (2 steps, gaussian)",
        f"student (gaussian) − {plain} (1 step, gaussian)",
        "student (gaussian) − teacher (2 steps, gaussian)",
        f"student (zero) − {plain} (1 step, zero)",
        "student (zero) − teacher (2 steps, gaussian)",
    ]

    forbid_training(monkeypatch)
    monkeypatch.setattr(Tokenizer, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert main([*train, "--cache"]) == 0
    assert main([*score, *few]) == 0
    with pytest.raises(UserError, match="another name"):
        main([*train, "--loss.perceptual", "0.5"])
    with pytest.raises(UserError, match="another --out"):
        main([*train, "--start", "default"])


def test_texture(tmp_path, photos, benchmark, capsys):
    bench, start = benchmark("texture"), str(train(union_recipe(tmp_path / "run", photos, steps=1)))
    out = ["--out", str(tmp_path / "out"), "--data", str(photos)]
    small = [*SMALL, "--start", start, "--crops", "4", "--rows", "pooled-0.2", "energy-latent"]
    assert bench.main(["train", *out, *small]) == 0
    assert bench.main(["score", *out, "--score-size", "32", "--limit", "4"]) == 0
    capsys.readouterr()
    assert bench.main(["show", *out]) == 0
    noisy = [["energy-latent", scale] for scale in ("0", "0.5", "1")]
    assert [row[:2] for row in table(capsys.readouterr().out)] == [["pooled-0.2", "0"], *noisy]

    energy = benchmark("energy")
    noise = energy.noise_like(torch.zeros(2, 3, 16, 24), bench.ROWS["energy-latent"].latent_step)
    assert torch.equal(noise, noise[:, :, ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    # Proper: of flat pictures of random colours, samples of the right spread score better than their mean or twice it.
    colours = torch.randn(3, 400, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    truth, first, second = colours.expand(3, 400, 3, 16, 16)

    def score(spread: float) -> torch.Tensor:
        d = [energy.distance(a, b, lambda x: [x], 0.0) for a, b in ((spread * first, truth), (spread * second, truth))]
        return sum(d) / 2 - energy.distance(spread * first, spread * second, lambda x: [x], 0.0) / 2

    assert score(1) < min(score(0), score(2))


def test_denoising(photos, start, benchmark, capsys):
    bench = benchmark("denoising")
    assert bench.main([start, "--data", str(photos), "--size", "32", "--limit", "4", "--times", "0.1", "1"]) == 0
    first, last, *_ = table(capsys.readouterr().out)
    assert float(first[1]) == pytest.approx((0.1 / 0.9) ** 2, rel=0.05)
    assert float(first[2]) <= float(first[1])
    assert last[1:3] == ["", ""]
    tokenizer = Tokenizer.from_pretrained(start)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = 0.1 * tokenizer.encode(x).mode()
    whole = bench.clean_error(tokenizer, x, torch.zeros_like(x), z, 1.0)
    # At t = 1 without noise, the clean image is what decoding gives, but for clipping.
    picture = tokenizer.decode(z, steps=1, noise="zero")
    assert picture.abs().max() < 1
    assert whole == pytest.approx((picture - x).square().mean().item(), rel=1e-5)


def test_figures_are_those_of_monobath_eval(tmp_path, photos, start, benchmark):
    trainings = benchmark("trainings")
    judge = trainings.Judge([str(photos)], size=32, limit=6)
    one, two = TokenizerSystem(start, steps=1), TokenizerSystem(start, steps=3)
    found, _ = evaluate([one, two], str(photos), Settings(size=32, limit=6, metrics=list(trainings.FIGURES), keep=1))
    scores = [judge.score(tmp_path / f"{i}.json", lambda s=system: s) for i, system in enumerate((one, two))]
    for key in trainings.FIGURES:
        for score, expected in zip(scores, found.systems, strict=True):
            assert trainings.estimate(score, key).value == pytest.approx(expected.figures[key].value, rel=1e-6)
        gap, expected = trainings.estimate(scores[1], key, scores[0]), found.systems[1].differences[key]
        assert (gap.value, gap.low, gap.high) == pytest.approx((expected.value, expected.low, expected.high), rel=1e-5)


def test_equal_budget(tmp_path, photos, start, benchmark, monkeypatch, capsys):
    main = benchmark("equal_budget").main
    out = ["--out", str(tmp_path / "out")]
    train = ["train", *out, "--data", str(photos), "--encoder", start, "--kl-channels", "8", "8", "16", "16", *SMALL]
    train += ["--crops", "4", "--rows", "one-step", "kl", "kl-gan", "f8c4", "f16c4", "--lr", "kl=1e-3", "kl=2e-3"]
    score = ["score", *out, "--data", str(photos), "--score-size", "32", "--limit", "4", "--repeats", "1"]
    assert main([*train, "--seeds", "0"]) == 0
    assert main([*train, "--seeds", "0", "1", "--rows", "one-step", "kl"]) == 0
    assert main(score) == 0
    capsys.readouterr()
    assert main(["show", *out]) == 0
    rows, differences = map(table, capsys.readouterr().out.split("\n\n"))
    assert [(row[0], row[5]) for row in rows] == [
        ("one-step-4-lr0.0006-p0.02", "2"), ("kl-4-lr0.001-p0.1", "2"), ("kl-4-lr0.002-p0.1", "2"),
        ("kl-gan-4-lr0.0004-p0.1", "1"), ("f8c4-4-lr0.0006-p0.02", "1"), ("f16c4-4-lr0.0006-p0.02", "1"),
    ]  # fmt: skip
    assert all(("±" in cell) == (row[5] == "2") for row in rows for cell in row[6:10])
    assert [row[1] for row in differences] == ["2", "2", "1", "1", "1"]
    assert main([*score, "--crop", "16"]) == 0
    capsys.readouterr()
    assert main(["show", *out, "--crop", "16"]) == 0
    apart = table(capsys.readouterr().out.split("\n\n")[0])
    assert [row[0] for row in apart] == [row[0] for row in rows]
    assert all(one[6] != other[6] for one, other in zip(rows, apart, strict=True))

    folders = {path.name: path for path in (tmp_path / "out").glob("*-seed0")}
    encoder = Tokenizer.from_pretrained(start).encoder.state_dict()
    for name, folder in folders.items():
        tokenizer = Tokenizer.from_pretrained(folder / "model")
        frozen = name.startswith(("one-step", "kl"))
        assert tokenizer.factor == (16 if name.startswith("f16") else 8)
        if tokenizer.factor == 8:
            kept = all(v.equal(encoder[k]) for k, v in tokenizer.encoder.state_dict().items())
            assert kept == frozen
        assert (tokenizer.config.decoder.kind == "kl") == name.startswith("kl")
    logged = (folders["kl-gan-4-lr0.0004-p0.1-seed0"] / "metrics.jsonl").read_text().splitlines()
    assert any("discriminator" in json.loads(line) for line in logged)

    forbid_training(monkeypatch)
    assert main([*train, "--seeds", "0"]) == 0
    monkeypatch.setattr(Tokenizer, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert main(score) == 0


def test_our_decoder_starts_from_random_weights(tmp_path, photos, start, benchmark, monkeypatch):
    """Although it may have the very shape of the decoder that the encoder came with."""
    equal_budget = benchmark("equal_budget")
    seen = {}
    monkeypatch.setattr(Run, "train", lambda run: seen.update(run.model.decoder.state_dict()))
    arguments = ["--out", str(tmp_path / "out"), "--data", str(photos), "--encoder", start, "--crops", "4", *SMALL]
    equal_budget.main(["train", *arguments, "--rows", "one-step", "--seeds", "0"])
    source = Tokenizer.from_pretrained(start).decoder.state_dict()
    assert seen.keys() == source.keys()
    assert not any(v.equal(source[k]) for k, v in seen.items() if v.ndim == 4 and v.any())


def test_our_decoder_can_have_another_shape(tmp_path, photos, start, benchmark):
    equal_budget = benchmark("equal_budget")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(photos), "--encoder", start, "--crops", "4", *SMALL]
    shape = ["size=custom", "patch=8", "channels=[16]", "middle_blocks=0", "norm=local"]
    train = ["train", *arguments, "--rows", "one-step", "--seeds", "0", "--decoder", *shape]
    equal_budget.main([*train, "--name", "all-coarse", "--set", "loss.grid=0.5"])
    (run,) = out.glob("all-coarse-*")
    assert "grid" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    decoder = Tokenizer.from_pretrained(run / "model").config.decoder
    assert (decoder.patch, decoder.norm, decoder.prediction) == (8, "local", "x")
    with pytest.raises(UserError, match="give fields of a decoder"):
        equal_budget.main(["train", *arguments, "--rows", "one-step", "--decoder", "width=3"])


def test_stages_prints_a_row_a_stage(capsys, benchmark):
    """Of one tiny stage, measured in its own process."""
    main = benchmark("stages").main
    tiny = ["model.encoder.base=8", "data.size=32", "data.scale=[32, 40]", "distill.steps=2", "loss.repa=0"]
    assert main(["--stages", "distill", "--devices", "cpu", "--decoder", "XS/4", "--steps", "1", *tiny]) == 0
    (row, *_) = table(capsys.readouterr().out)
    assert row[:3] == ["distillation, 256²", "cpu", "2"]
    assert float(row[3]) > 0
    assert float(row[4]) > 0.1


def test_generation(tmp_path, benchmark, monkeypatch, capsys):
    """Rows, and what is kept; features that are quick to find stand in for the network's."""
    generation = benchmark("generation")
    rng = np.random.default_rng(0)
    for name, count in (("labelled", 12), ("held-out", 6)):
        for i in range(count):
            colours = rng.integers(0, 60, (16, 16, 3)) + 190 * (i % 3 == np.arange(3))
            (tmp_path / name / str(i % 3)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(tmp_path / name / str(i % 3) / f"{i}.png")
    for name in ("one", "other"):  # one encoder, two decoders
        tokenizer = tiny_tokenizer()
        randomise(tokenizer.decoder, seed=len(name))
        tokenizer.save_pretrained(tmp_path / name)

    def features(images):
        return images.float().mean((2, 3)) / 255

    monkeypatch.setitem(generation.FEATURES, "fd_efflite", lambda: features)
    main, data = generation.main, ["--data", str(tmp_path / "labelled")]
    common = ["--out", str(tmp_path / "out"), "--size", "16", "--batch", "4"]
    tiny = ["generator.dit.width=16", "generator.dit.depth=1", "generator.dit.heads=2", "training.sample_every=0",
            "training.steps=2", "training.batch_size=4", "generator.dit.patch=2"]  # fmt: skip
    train = [
        "train",
        *common,
        *data,
        "--tokenizer",
        str(tmp_path / "one"),
        "--classes",
        "0",
        "2",
        "--copies",
        "1",
        *tiny,
    ]
    sample = ["sample", *common, "--count", "8", "--steps", "2", "--interval", "0", "0.5"]
    score = ["score", *common, *data, "--held-out", str(tmp_path / "held-out"), "--repeats", "1"]
    score += ["--decoders", f"first={tmp_path / 'one'}", f"second={tmp_path / 'other'}:3"]
    assert main(train) == 0
    assert main([*sample, "--guidance", "3"]) == 0
    assert main([*sample, "--guidance", "1"]) == 0
    assert main(score) == 0
    capsys.readouterr()
    assert main(["show", *common]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[:4] for row in rows] == [
        ["first", "2", "1 in (0, 0.5]", "8"], ["second", "2", "1 in (0, 0.5]", "8"],
        ["first", "2", "3 in (0, 0.5]", "8"], ["second", "2", "3 in (0, 0.5]", "8"],
        ["held-out pictures", "", "", ""], ["held-out pictures through first", "", "", ""],
        ["held-out pictures through second", "", "", ""],
    ]  # fmt: skip
    assert all("±" in cell for row in rows for cell in row[7:9])
    assert all(float(cell) >= 0 for row in rows[:4] for cell in row[4:7])
    assert all(row[4] == row[6] == "" for row in rows[4:])
    assert rows[4][8].startswith("100.0%")  # the colours are the classes
    assert len(list((tmp_path / "out" / "samples").glob("*/*.png"))) == 4

    forbid_training(monkeypatch)
    monkeypatch.setattr(Tokenizer, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
    for words in (train, [*sample, "--guidance", "3"], score):
        assert main(words) == 0
    with pytest.raises(UserError, match="write NAME=MODEL"):
        main([*score[:-3], "--decoders", "nameless"])


def test_padding(tmp_path, photos, benchmark, monkeypatch, capsys):
    main = benchmark("padding").main
    out = ["--out", str(tmp_path / "out"), "--seeds", "0", "--channels", "4"]
    small = ["--size", "32", "--batch", "2", "--crops", "20", "--kl-channels", "8", "8", "8", "16"]
    train = [
        "train",
        *out,
        *small,
        "--data",
        str(photos),
        "--rows",
        "reflect",
        "rim",
        "replicate-grows",
        "kl-replicate",
    ]
    score = ["--sizes", "32", "64", "--limit", "4"]
    assert main(train) == 0
    assert main(["score", *out, "--data", str(photos), *score]) == 0
    forbid_training(monkeypatch)
    assert main(train) == 0
    capsys.readouterr()
    assert main(["show", *out, *score]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["reflect", "rim", "replicate-grows", "kl-replicate"]
    assert all(float(row[4]) > 5 and float(row[5]) < 1 for row in rows)
    grown = Tokenizer.from_pretrained(str(tmp_path / "out" / "replicate-grows-20-seed0-part2" / "model"))
    assert (grown.config.encoder.padding, grown.config.decoder.padding) == ("replicate", "replicate")
