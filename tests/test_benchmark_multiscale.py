"""The multi-scale benchmark at tiny size: its rows, and that what is done is not done again."""

from __future__ import annotations

import pytest
from PIL import Image
from test_benchmarks_training import benchmark as benchmark  # the fixture
from test_benchmarks_training import forbid_training
from test_training import photos as photos  # the fixture

from monobath import Tokenizer, UserError

SMALL = ["data.size=32", "data.scale=[32, 40]", "training.batch_size=6", "training.precision=fp32"]


def test_all_of_it_in_one_run(benchmark, photos, tmp_path, monkeypatch, capsys):
    bench = benchmark("multiscale")
    slow, reference = (bench.Row(name, "full", steps) for name, steps in ((bench.SLOW, 3), (bench.REFERENCE, 2)))
    others = [bench.Row("multi, 2 steps a stage", "multi", 2), bench.Row(bench.FAST, "student", 1)]
    monkeypatch.setattr(bench, "ROWS", [slow, reference, *others])
    out = tmp_path / "out"
    command = ["all", "--out", str(out), "--data", str(photos), "--held-out", str(photos), "--steps", "3"]
    command += ["--share", "0.34", "--set", *SMALL, "--set-student", *SMALL, "distill.steps=2"]
    command += ["--size", "32", "--limit", "4", "--repeats", "1"]
    assert bench.main([*command, "--picture", str(tmp_path / "stages.png"), "--shown", "2"]) == 0
    text = capsys.readouterr().out
    calls = {row.name: line.split("|")[2].strip() for row in bench.ROWS for line in text.splitlines()
             if line.startswith(f"| {row.name} ")}  # fmt: skip
    assert calls == {slow.name: "3", reference.name: "2", others[0].name: "6", others[1].name: "3"}
    assert text.count("as asked") == 4
    assert "| full | 18 |" in text
    assert "| multi | 12 |" in text
    assert "| student | 6 |" in text
    assert Tokenizer.from_pretrained(out / "full/model").config.decoder.stages == 1
    assert Tokenizer.from_pretrained(out / "student/model").config.sampler.steps == 1
    assert Image.open(tmp_path / "stages.png").size == (4 * 34 + 2, 2 * 34 + 2)

    forbid_training(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert bench.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.json")} == before
    with pytest.raises(UserError, match="other settings"):
        bench.main([*command, "--seed", "1"])


def test_the_gain_grows_with_the_number_of_stages(benchmark, tmp_path, monkeypatch, capsys):
    bench = benchmark("multiscale")
    given = ["curve", "--out", str(tmp_path), "--decoder", "CS/4", "--smallest", "16", "--repeats", "1"]
    assert bench.main(given) == 0
    text = capsys.readouterr().out
    rows = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["16²", "32²", "64²", "128²", "256²"]
    formula, counted = ([float(row[column]) for row in rows] for column in (4, 5))
    assert formula == pytest.approx([1, 1.6, 2.29, 3.01, 3.75], abs=0.01)
    assert counted == pytest.approx(formula, rel=0.05)
    monkeypatch.setattr(bench, "measure", None)  # kept: nothing is timed again
    assert bench.main(given) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["train"], "train needs --data"), (["score", "--data", "."], "no training"), (["show"], "no training")],
)
def test_mistakes(benchmark, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        benchmark("multiscale").main([*arguments, "--out", str(tmp_path / "out")])
