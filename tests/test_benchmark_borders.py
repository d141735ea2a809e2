"""The benchmark of borders at tiny size: its tables, its plot, and that a border is a border."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_tokenizer
from PIL import Image
from test_benchmarks_training import benchmark as benchmark  # the fixture
from test_benchmarks_training import table
from test_training import photos as photos  # the fixture

from monobath import UserError
from monobath.evaluation.metrics import psnr


def test_bands_go_from_the_border_to_the_centre(benchmark):
    original = torch.full((2, 3, 12, 20), 100, dtype=torch.uint8)
    output = original.clone()
    output[:, 1] += 50
    output[:, 1, 1:-1, 1:-1] -= 50  # an error of the outermost places alone
    output[:, 2, 4:-4, 4:-4] -= 20  # and one of the centre
    outer, second, third, centre = benchmark("borders").bands(output, original)
    assert [band.name for band in (outer, second, third, centre)] == ["0", "1", "2–3", "4–7"]
    assert outer.mean_error == pytest.approx([0, 50 / 127.5, 0])
    assert second.mean_error == third.mean_error == [0, 0, 0]
    assert centre.mean_error == pytest.approx([0, 0, -20 / 127.5])
    whole = psnr(output[:, :, 4:-4, 4:-4], original[:, :, 4:-4, 4:-4]).mean().item()
    assert centre.psnr == pytest.approx(whole)


def test_all_of_it(benchmark, photos, tmp_path, capsys):
    models = [str(tmp_path / name) for name in ("one", "two")]
    for seed, name in enumerate(models):
        tiny_tokenizer(seed).save_pretrained(name)
    main = benchmark("borders").main
    command = [
        "--data",
        str(photos),
        "--model",
        *models,
        "--size",
        "32",
        "--limit",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--crop-sizes", "16", "32"]) == 0
    first, _, second, _ = capsys.readouterr().out.split("\n\n")
    names = [f"{name} at {size}²" for name in models for size in (16, 32)]
    assert [row[0] for row in table(first)] == names
    assert all(len(row) == 5 for row in table(first))
    distances = {"16": ["0", "1", "2–3", "4–7"], "32": ["0", "1", "2–3", "4–7", "8–15"]}
    assert [row[:2] for row in table(second)] == [[n, d] for n in names for d in distances[n[-3:-1]]]
    assert Image.open(tmp_path / "out/borders.png").width > 1000
    with pytest.raises(UserError, match="holds no square of size=64"):
        main([*command, "--crop-sizes", "64"])
