"""Runs and recipes written before the redesign (commit 5086dde) still load, resume and end at the same weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from monobath.training import dump_recipe, load_recipe, train

FIXTURES = Path(__file__).parent / "fixtures"
NEW = {
    "training.ema_start_steps": 0, "init_encoder": "", "first_weights": "pytorch", "loss.repa_hidden": 2048,
    "distill.student_guidance": 1.0,
    "model.decoder.residual_shares": "flow", "model.decoder.context": 0,
}  # fmt: skip
"""Keys that came later, and what they say where a file does not: what was so before."""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A run of 8 steps that was stopped at step 4, what it ends at, and the pictures that it trains on."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(FIXTURES / "run-5086dde.zip") as archive:
        archive.extractall()
    rng = np.random.default_rng(7)
    Path("photos").mkdir()
    for i in range(6):
        picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8) // 4
        Image.fromarray(picture + np.linspace(0, 190, 48, dtype=np.uint8)[None, :, None]).save(f"photos/{i}.png")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are taken in another order by several
    yield
    torch.set_num_threads(threads)


def test_a_run_stopped_by_older_code_ends_at_the_same_weights(recorded, caplog):
    """The same bytes on a processor that repeats the recorded first steps to the byte; elsewhere close to them."""
    step = "checkpoints/step-00000004/model.safetensors"
    train(load_recipe("recipe.yaml", ["run=again"]))
    ours, theirs = load_file(f"again/{step}"), load_file(f"run/{step}")
    exact = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    train(load_recipe("run/config.yaml"))
    assert "recipe changed" not in caplog.text
    expected = load_file("final.safetensors")
    for run in ("run", "again"):
        found = load_file(f"{run}/checkpoints/step-00000008/model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if exact:
                assert torch.equal(found[name], value), (run, name)
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("kind", "trains"), [("multi-scale", "decoder"), ("distillation", "distillation"), ("generator", "generator")]
)
def test_an_older_config_loads_as_what_it_says(packaged, kind, trains):
    """Every key that the recipe still has says what the file says; those that it lost say nothing in the file,
    and new ones mean what was so before."""
    file = FIXTURES / f"config-{kind}-5086dde.yaml"
    recipe = load_recipe(str(file))
    before, after = yaml.safe_load(file.read_text()), yaml.safe_load(dump_recipe(recipe))
    assert after.pop("trains") == recipe.trains == trains
    assert after["model"]["decoder"].pop("kind") if "model" in after else True  # new: the rest of the shape tells it
    assert _differing(before, after) == []
    assert recipe.name == before["name"]


def _differing(before: dict, after: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in after.items():
        if isinstance(value, dict):
            found += _differing(before.get(key, {}), value, f"{prefix}{key}.")
        elif before.get(key, NEW.get(prefix + key)) != value:
            found.append(f"{prefix}{key}")
    return found
