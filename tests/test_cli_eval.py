"""`monobath eval` and `monobath bench`, end to end on tiny models and real photos."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_tokenizer
from PIL import Image

from monobath import resources
from monobath.cli import main
from monobath.data.transforms import center_crop
from monobath.evaluation.bench import DECODERS
from monobath.images import open_image


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two tiny models and three photos, one of them not square."""
    root = tmp_path_factory.mktemp("prepared")
    tiny_tokenizer().save_pretrained(root / "first")
    tiny_tokenizer(seed=1).save_pretrained(root / "run/model")
    (root / "photos").mkdir()
    for path in resources.sample_paths()[:2]:
        shutil.copy(path, root / "photos")
    open_image(resources.sample_paths()[2]).resize((90, 64)).save(root / "photos/wide <b>.png")
    return root


def command(prepared: Path, out: Path, *more: str) -> list[str]:
    words = ["eval", "--data", str(prepared / "photos"), "--model", str(prepared / "first"), "--size", "64"]
    return [*words, "--metrics", "psnr", "ssim", "--repeats", "1", "--out", str(out), *more]


@pytest.fixture(scope="module")
def done(prepared, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("eval") / "out"
    more = [str(prepared / "run/model"), "--steps", "1", "2", "--peer", "jpeg=0.5", "--rates", "2"]
    words = command(prepared, out)
    words[words.index("--size") : words.index("--size")] = [more.pop(0)]
    assert main([*words, *more]) == 0
    return out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_what_is_written(done):
    out, results = done
    assert sorted(p.name for p in out.iterdir()) == ["comparison.png", "report.html", "results.json"]
    Image.open(out / "comparison.png").load()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert results["command"].startswith("monobath eval --data ")
    assert results["command"].endswith("--peer jpeg=0.5 --rates 2")
    assert "wide &lt;b&gt;" in page
    assert "wide <b>" not in page
    assert len(page) < 6_000_000


def test_systems_are_those_asked_for_and_the_baselines(done):
    _, results = done
    names = [system["name"] for system in results["systems"]]
    codecs = [name for name in names if "bit/pixel" in name]
    assert names[:4] == ["first", "first, 2 steps", "run", "run, 2 steps"]
    assert "JPEG at 0.50 bit/pixel" in codecs
    assert {f"WebP at {rate} bit/pixel" for rate in ("1.00", "2.00")} <= set(codecs)
    assert sum("bicubic" in name for name in names) == 1
    first = results["systems"][0]
    assert first["bits_per_pixel"] == 1  # 4 values of 16 bit for 8 × 8 pixels
    assert (first["differences"], first["steps"]) == ({}, 1)


def test_figures_are_those_of_the_model(done, prepared):
    _, results = done
    values = []
    for path in sorted((prepared / "photos").iterdir()):
        original = center_crop(open_image(path), size=64)
        tokenizer, index = tiny_tokenizer(), len(values)
        z = tokenizer.encode(original).mode()
        output = tokenizer.decode(z, size=(64, 64), seed=[index], output="uint8")[0]
        values.append(10 * math.log10(255**2 / (original.double() - output.double()).square().mean().item()))
    assert results["systems"][0]["pictures"]["psnr"] == pytest.approx(values, abs=1e-3)
    assert results["systems"][0]["figures"]["psnr"]["value"] == pytest.approx(np.mean(values), abs=1e-3)


def test_every_system_is_timed(done):
    _, results = done
    for system in results["systems"]:
        assert [s["part"] for s in system["speed"]] == ["encode", "decode"], system["name"]
        assert all(s["ms"] > 0 for s in system["speed"])


def test_table_and_notes_are_printed(prepared, tmp_path, capsys):
    more = ["--no_baselines", "--peer", "bicubic=8", "--limit", "2"]
    words = command(prepared, tmp_path / "out", *more)
    words[words.index("--repeats") + 1] = "0"
    assert main(words) == 0
    text = capsys.readouterr().out
    for said in ("PSNR (dB)", "SSIM", "bicubic", "differences to first", "2 pictures", "data range 255", "report.html"):
        assert said in text, said
    assert "JPEG" not in text
    assert "Speed was not measured." in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_several_sizes_in_one_run(prepared, tmp_path, capsys):
    words = command(prepared, tmp_path / "out", "--no_baselines", "--peer", "bicubic=8")
    place = words.index("--size")
    words[place : place + 2] = ["--sizes", "64", "32"]
    words[words.index("ssim")] = "mean_error"
    assert main(words) == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in ("first at 32²", "first at 64²", "paired, at 32²", "At 64²: Of 2 systems on 3 pictures", "mean error"):
        assert said in text, said
    sizes = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["sizes"]
    assert list(sizes) == ["32", "64"]
    assert [(found["size"], found["short_side"]) for found in sizes.values()] == [(32, 64), (64, 64)]
    assert [s["size"] for found in sizes.values() for s in found["systems"][0]["speed"]] == [[32, 32]] * 2 + [
        [64, 64]
    ] * 2
    assert set(sizes["32"]["systems"][0]["channels"]["mean_error"]) == {"red", "green", "blue"}
    assert main(command(prepared, tmp_path / "alone", "--no_baselines", "--peer", "bicubic=8")) == 0
    alone = json.loads((tmp_path / "alone/results.json").read_text(encoding="utf-8"))
    for one, several in zip(alone["systems"], sizes["64"]["systems"], strict=True):
        assert one["pictures"]["psnr"] == several["pictures"]["psnr"]


def test_speed_is_measured_at_every_batch_asked_for(prepared, tmp_path):
    more = ["--no_baselines", "--limit", "2", "--speed_batches", "2", "1", "2"]
    assert main(command(prepared, tmp_path / "out", *more)) == 0
    (system,) = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["systems"]
    measured = [(speed["batch"], speed["part"]) for speed in system["speed"]]
    assert measured == [(1, "encode"), (1, "decode"), (2, "encode"), (2, "decode")]
    gflop = {speed["batch"]: speed["gflop"] for speed in system["speed"] if speed["part"] == "decode"}
    assert gflop[2] == pytest.approx(2 * gflop[1], rel=0.01)


def test_only_the_first_of_two_processes_writes(prepared, tmp_path):
    words = command(prepared, tmp_path / "out", "--no_baselines", "--batch", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "monobath"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*launch, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report.html") == 1
    two = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert main(command(prepared, tmp_path / "one", "--no_baselines", "--batch", "1")) == 0
    one = json.loads((tmp_path / "one/results.json").read_text(encoding="utf-8"))
    assert two["systems"][0]["pictures"] == one["systems"][0]["pictures"]
    assert two["systems"][0]["figures"] == one["systems"][0]["figures"]


def test_bench(prepared, tmp_path, capsys):
    pytest.importorskip("diffusers")
    out = tmp_path / "bench"
    words = ["bench", "--cpu", "--sizes", "64", "--decoders", "XS/4", "--model", str(prepared / "first")]
    assert main([*words, "--repeats", "1", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["bench.md", "report.html", "results.json"]
    text, results = capsys.readouterr().out, json.loads((out / "results.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in results["results"]]
    assert {"AutoencoderKL", "AutoencoderTiny", "XS/4"} <= set(names)
    assert len(names) == 4
    assert results["command"].startswith("monobath bench --cpu --sizes 64")
    for said in ("XS/4", "AutoencoderTiny"):
        assert said in text
        assert said in (out / "bench.md").read_text(encoding="utf-8")
        assert said in (out / "report.html").read_text(encoding="utf-8")


def test_the_decoders_named_in_the_help_are_the_benchmarks_own(capsys):
    assert main(["bench", "--help"]) == 0
    named = "XS, S, B and M, each with patch 1, 2 and 4, and CS/4, CM/4, CL/4"
    assert named in " ".join(capsys.readouterr().out.split())
    assert [f"{size}/{patch}" for size in ("XS", "S", "B", "M") for patch in (1, 2, 4)] == DECODERS[:12]
    assert DECODERS[12:] == ["CS/4", "CM/4", "CL/4"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--size", "4"], "--size is 4: it must be at least 8"),
        (["--sizes", "32", "64"], "--size 64 and --sizes 32 64 contradict one another"),
        (["--batch", "0"], "--batch is 0"),
        (["--repeats", "-1"], "--repeats is -1"),
        (["--speed_batches", "0"], "--speed_batches is 0"),
        (["--limit", "0"], "limit"),
        (["--steps", "0"], "at least one step"),
        (["--metrics", "pnsr"], "did you mean psnr?"),
        (["--peer", "jpg=1"], "did you mean jpeg?"),
        (["--peer", "jpeg"], "lacks what follows jpeg="),
        (["--peer", "taef2=nowhere"], "does not exist"),
        (["--rates", "-1"], "above 0"),
        (["--model", "no-such-model"], "no tokenizer 'no-such-model'"),
        (["--peer", "jpeg=1", "jpeg=1"], "each with a name of its own"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(prepared, tmp_path, capsys, more, said):
    assert main(command(prepared, tmp_path / "out", *more)) == 2
    written = capsys.readouterr()
    assert said in written.err
    assert written.err.count("\n") == 1, written.err
    assert written.err.startswith("monobath eval: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "100"], "multiples of 8"),
        (["--decoders", "XXL/1"], "XXL"),
        (["--repeats", "0"], "repeats is 0"),
        (["--cpu", "--device", "cuda"], "contradict one another"),
    ],
)
def test_mistakes_of_bench(tmp_path, capsys, words, said):
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    written = capsys.readouterr()
    assert said in written.err
    assert written.err.count("\n") == 1, written.err
    assert not (tmp_path / "out").exists()
