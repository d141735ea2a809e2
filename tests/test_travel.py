"""Checkpoints in parts: what fits travels, and training goes on from it."""

from __future__ import annotations

import pytest
import torch
import travel
from safetensors.torch import load_file
from test_training import photos as photos  # the fixture
from test_training import rows, same, tiny_recipe, weights

from monobath.errors import UserError
from monobath.training import Interrupted, checkpoints, train
from monobath.training.config import LossConfig, OptimizerConfig


@pytest.fixture
def begun(tmp_path, photos):
    """A run of 6 steps, stopped after the third."""

    def recipe(name, minutes=0.0, **training):
        return tiny_recipe(tmp_path / name, photos, steps=6, checkpoint_every=1, minutes=minutes, **training)

    for _ in range(3):
        with pytest.raises(Interrupted):
            train(recipe("run", minutes=1e-6))
    return recipe


def parts_of(state):
    return {file.name: file.stat().st_size for file in sorted(state.glob("state.*"))}


def test_what_travelled_whole_trains_on_to_the_same_bytes_but_for_the_average(begun, tmp_path):
    size = sum(f.stat().st_size for f in checkpoints.latest(tmp_path / "run").iterdir())
    found, level = travel.pack(tmp_path / "run", tmp_path / "state", part=size // 3)
    assert level == "everything"
    assert [file.name for file in found] == list(parts_of(tmp_path / "state")) == ["state.00", "state.01", "state.02"]
    assert max(parts_of(tmp_path / "state").values()) <= size // 3
    assert travel.unpack(tmp_path / "state", tmp_path / "there") == 3
    here, there = (load_file(checkpoints.latest(tmp_path / n) / "model.safetensors") for n in ("run", "there"))
    assert same(here, there)
    train(begun("run"))
    train(begun("there"))
    here, there = (load_file(checkpoints.latest(tmp_path / n) / "model.safetensors") for n in ("run", "there"))
    assert same(here, there)
    here, there = weights(tmp_path / "run/model"), weights(tmp_path / "there/model")
    assert not same(here, there)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=2**-7, atol=1e-3)


def test_what_does_not_fit_is_left_out_from_the_end(begun, tmp_path):
    _, level = travel.pack(tmp_path / "run", tmp_path / "state")
    sizes = [sum(parts_of(tmp_path / "state").values())]
    for expected in travel.LEVELS[1:]:
        _, level = travel.pack(tmp_path / "run", tmp_path / "state", total=sizes[-1] - 1)
        assert level == expected
        sizes.append(sum(parts_of(tmp_path / "state").values()))
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(UserError, match=r"averaged weights of .* take"):
        travel.pack(tmp_path / "run", tmp_path / "state", total=sizes[-1] - 1)
    with pytest.raises(UserError, match=r"averaged weights of .* take"):
        travel.pack(tmp_path / "run", tmp_path / "state", part=1000, parts=2)
    assert travel.unpack(tmp_path / "state", tmp_path / "there") == 3
    there = checkpoints.latest(tmp_path / "there")
    assert same(load_file(there / "model.safetensors"), load_file(there / "ema.safetensors"))


@pytest.mark.parametrize(
    ("kind", "expected"), [("adamw", [5e-4, 1e-3, 1e-3, 1e-3, 1e-3]), ("radam_schedulefree", [1e-3] * 5)]
)
def test_without_moments_the_rate_warms_up_again(tmp_path, photos, kind, expected):
    def recipe(name, minutes=0.0):
        made = tiny_recipe(tmp_path / name, photos, steps=6, checkpoint_every=1, log_every=1, minutes=minutes)
        made.optimizer = OptimizerConfig(kind=kind, lr=1e-3, warmup=2, schedule="constant")
        return made

    with pytest.raises(Interrupted):
        train(recipe("run", minutes=1e-6))
    size = sum(f.stat().st_size for f in travel.pack(tmp_path / "run", tmp_path / "state")[0])
    level = ""
    while level != "weights alone":
        found, level = travel.pack(tmp_path / "run", tmp_path / "state", total=size - 1)
        size = sum(f.stat().st_size for f in found)
    travel.unpack(tmp_path / "state", tmp_path / "there")
    with pytest.raises(Interrupted):
        train(recipe("there", minutes=1e-6))  # stopped within the warm-up: the next sitting goes on with it
    train(recipe("there"))
    rates = [row["lr"] for row in rows(tmp_path / "there") if "lr" in row]
    assert rates == pytest.approx(expected)


def test_of_the_optimizer_only_moments_are_rounded(tmp_path, photos):
    """A schedule-free run keeps the weights that it trains at, and its iterates, to the bit."""

    def recipe(name, minutes=0.0):
        made = tiny_recipe(tmp_path / name, photos, steps=6, checkpoint_every=1, minutes=minutes, loss={"repa": 0.25})
        made.optimizer = OptimizerConfig(kind="radam_schedulefree", lr=1e-3)
        return made

    with pytest.raises(Interrupted):
        train(recipe("run", minutes=1e-6))
    whole = sum(f.stat().st_size for f in travel.pack(tmp_path / "run", tmp_path / "state")[0])
    _, level = travel.pack(tmp_path / "run", tmp_path / "state", total=whole - 1)
    assert level == "moments in bfloat16"
    travel.unpack(tmp_path / "state", tmp_path / "there")
    here, there = (
        torch.load(checkpoints.latest(tmp_path / name) / "trainer.pt", weights_only=True) for name in ("run", "there")
    )
    assert all(torch.equal(a, b) for a, b in zip(here["training_weights"], there["training_weights"], strict=True))
    assert same(here["losses"], there["losses"])
    for number, state in here["optimizer"]["state"].items():
        kept = there["optimizer"]["state"][number]
        assert torch.equal(state["z"], kept["z"])
        assert kept["exp_avg_sq"].dtype == torch.bfloat16
    train(recipe("there"))


def test_a_newer_checkpoint_stays(begun, tmp_path):
    travel.pack(tmp_path / "run", tmp_path / "state")
    train(begun("run"))
    assert travel.unpack(tmp_path / "state", tmp_path / "run") == 6
    assert checkpoints.latest(tmp_path / "run").name == "step-00000006"


def test_mistakes(begun, tmp_path, photos):
    with pytest.raises(UserError, match="no checkpoint to pack"):
        travel.pack(tmp_path / "nothing", tmp_path / "state")
    with pytest.raises(UserError, match=r"no state\.00"):
        travel.unpack(tmp_path, tmp_path / "there")
    found, _ = travel.pack(tmp_path / "run", tmp_path / "state", part=20_000, parts=1000)
    found[1].unlink()
    with pytest.raises(UserError, match="damaged, or parts of it are missing"):
        travel.unpack(tmp_path / "state", tmp_path / "there")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/state.00").write_bytes(b"not a state")
    with pytest.raises(UserError, match="damaged"):
        travel.unpack(tmp_path / "damaged", tmp_path / "there")
    judged = tiny_recipe(tmp_path / "judged", photos, steps=2)
    judged.loss = LossConfig(perceptual=0, adversarial=0.5)
    train(judged)
    with pytest.raises(UserError, match="discriminator"):
        travel.pack(tmp_path / "judged", tmp_path / "state")
