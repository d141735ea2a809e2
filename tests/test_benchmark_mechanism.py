"""The benchmark of the papers' mechanism at tiny size: its rows, choices, verdicts, and that nothing is done twice."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmarks_training import benchmark as benchmark  # the fixture
from test_benchmarks_training import forbid_training, table
from test_training import photos as photos  # the fixture

from monobath import Tokenizer, UserError
from monobath.training import load_recipe

pytest.importorskip("diffusers")


@pytest.fixture
def bench(benchmark, monkeypatch):
    """With small networks."""
    rows = benchmark("mechanism_rows")
    network = {"size": "custom", "patch": 1, "channels": [8, 16], "middle_blocks": 1, "heads": 2}
    monkeypatch.setattr(rows, "NETWORK", network)
    monkeypatch.setattr(rows, "KL_CHANNELS", [8, 8, 8, 8])
    module = benchmark("mechanism")
    monkeypatch.setattr(module, "STEPS", (1, 8, 12))
    return module


def test_all_of_it(bench, photos, tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "out"), "--limit", "4"]
    students = [*bench.STUDENTS, bench.FAVOURED]
    rows = ["encoder", "teacher", "best-of-teacher", *students, "energy", "kl-gan", "multi", "multi-student"]
    train = ["train", *out, "--data", str(photos), "--budget-scale", "0.00004", "--batch", "2", "--precision", "fp32"]
    train += ["--seeds", "0", "1", "--rows", *rows]
    score = ["score", *out, "--held-out", str(photos)]
    assert bench.main(train) == 0
    assert "core-hours" in capsys.readouterr().out
    favoured = json.loads((tmp_path / "out" / "favoured.json").read_text())["chosen"]
    assert (tmp_path / "out" / f"{favoured}-seed1" / "facts.json").is_file()
    assert bench.main([*score, "--jobs", "2"]) == 0
    capsys.readouterr()
    assert bench.main(["show", *out, "--picture", str(tmp_path / "sheet.png")]) == 0
    shown, verdicts = capsys.readouterr().out.split("\n\n")
    found = table(shown)
    several = [["1"], ["8"], ["12"]]
    assert [row[2:3] for row in found if row[0] == "teacher"] == several
    assert [row[1] for row in found if row[0] == "teacher@third"] == ["12"] * 3
    assert [row[3] for row in found if row[0] == favoured] == ["2"]
    for words in ("teacher (1 step)", "no worse than teacher", "multi-student (1 step) no worse"):
        assert words in verdicts
    assert Image.open(tmp_path / "sheet.png").width == 496

    folder = tmp_path / "out"
    encoder = Tokenizer.from_pretrained(folder / "encoder-seed0" / "model").encoder.state_dict()
    for name in ("teacher", "multi-student", "kl-gan"):
        tokenizer = Tokenizer.from_pretrained(folder / f"{name}-seed0" / "model")
        assert all(value.equal(encoder[key]) for key, value in tokenizer.encoder.state_dict().items())
    whole, third = (
        Tokenizer.from_pretrained(folder / "teacher-seed0" / kind).decoder.conv_in.weight
        for kind in ("model", "model-third")
    )
    assert not whole.equal(third)

    assert bench.main(["pack", *out, "--to", str(tmp_path / "kept"), "--models", "teacher"]) == 0
    assert Tokenizer.from_pretrained(tmp_path / "kept" / "teacher").config.decoder.prediction == "v"
    forbid_training(monkeypatch)
    monkeypatch.setattr(Tokenizer, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert bench.main(train) == 0
    assert bench.main(score) == 0
    with pytest.raises(UserError, match="other crops"):
        bench.main([*train[:6], "0.0001"])


def test_crops_are_the_librarys_and_each_seed_has_its_order(bench, photos, tmp_path):
    common = ["train", "--out", str(tmp_path), "--data", str(photos), "--batch", "4", "--precision", "fp32"]
    assert bench.main([*common, "--budget-scale", "0.0001", "--rows", "encoder", "--seeds", "0", "--jobs", "2"]) == 0
    crops = bench.read_crops(tmp_path)
    dataset = bench.make_dataset([str(photos)], bench.Crops(size=32, scale=(32, 64)), cache=True)
    last = len(crops) - 1
    assert crops[last].equal(dataset[divmod(last, len(dataset))]["image"])
    recipe = load_recipe(str(tmp_path / "encoder-seed0" / "config.yaml"))
    batches = list(bench.CropRun(dataclasses.replace(recipe, run=str(tmp_path / "again"))).batches())
    assert len(batches) == recipe.training.steps
    assert all(any(image.equal(crop) for crop in crops) for image in batches[0]["image"])


def test_a_row_without_what_it_starts_from(bench, photos, tmp_path):
    with pytest.raises(UserError, match="not done: ones-seed0"):
        bench.main(["train", "--out", str(tmp_path), "--data", str(photos), "--budget-scale", "1e-5", "--rows", "ones"])


def test_precision_and_recall(benchmark):
    """Of equal sets both are 1; of what lies among the originals but misses half of them, recall is less."""
    scores = benchmark("mechanism_scores")
    real = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    real[20:] += 100
    every = torch.ones(1, 40, dtype=torch.bool)
    assert scores.precision_recall(real, real, every) == ([1.0], [1.0])
    one_mode = torch.cat([real[:20], real[:20] + 1e-3])
    precision, recall = scores.precision_recall(real, one_mode, every)
    assert precision == [1.0]
    assert recall == [0.5]
    assert scores.precision_recall(real, real - 1000, every) == ([0.0], [0.0])


def test_verdicts(benchmark):
    """Noise that both share cancels; one seed of the wrong sign is enough for no."""
    scores = benchmark("mechanism_scores")
    noise = np.random.default_rng(0).normal(size=20) * 5
    own = scores.Table([], None)

    def seeds(*means):
        return {seed: {"fd": np.concatenate([[mean], mean + noise])} for seed, mean in enumerate(means)}

    own.rows = {("a", 4): seeds(100), ("b", 1): seeds(103, 104), ("c", 1): seeds(120, 99)}
    assert own.below(("a", 4), ("b", 1))[0]
    assert not own.below(("b", 1), ("a", 4))[0]
    assert not own.below(("a", 4), ("c", 1))[0]
    assert own.no_worse(("b", 1), ("a", 4))[0]
    assert not own.no_worse(("c", 1), ("b", 1))[0]
