"""Laws of what the published training asks for and ours does not: where it starts, what decays, what is averaged."""

from __future__ import annotations

import pytest
import torch
from conftest import of_kind
from test_training import photos as photos  # the fixture
from test_training import tiny_recipe, weights

from monobath import UserError
from monobath.training import load_recipe, train
from monobath.training.config import DistillConfig
from monobath.training.recipe import DistillationRecipe


@pytest.fixture(scope="module")
def first(tmp_path_factory, photos):
    """A finished training of the tiny model."""
    return train(tiny_recipe(tmp_path_factory.mktemp("first"), photos, steps=3))


def unmoved(recipe) -> dict[str, torch.Tensor]:
    """The weights that a recipe starts from."""
    recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.training.ema = 0.0, 0.0, 0.0
    return weights(train(recipe))


def test_init_encoder_takes_the_encoder_and_starts_the_decoder_anew(tmp_path, photos, first):
    recipe = tiny_recipe(tmp_path / "second", photos, steps=1, train_encoder=False)
    recipe.init_encoder = str(first)
    old, new, fresh = (
        weights(first),
        unmoved(recipe),
        unmoved(tiny_recipe(tmp_path / "fresh", photos, steps=1, train_encoder=False)),
    )
    for name, value in new.items():
        source = old if name.startswith("encoder.") else fresh
        assert torch.equal(value, source[name]), name
    assert not torch.equal(new["decoder.conv_in.weight"], old["decoder.conv_in.weight"])


def test_a_students_decoder_can_start_anew(tmp_path, photos, first):
    recipe = tiny_recipe(tmp_path / "student", photos, steps=1, train_encoder=False)
    recipe.init_encoder = str(first)
    recipe = of_kind(DistillationRecipe, recipe, distill=DistillConfig(teacher=str(first), steps=2))
    assert not torch.equal(unmoved(recipe)["decoder.conv_in.weight"], weights(first)["decoder.conv_in.weight"])


def test_a_recipe_starts_from_one_model(first):
    with pytest.raises(UserError, match="give init to start from all of a model"):
        load_recipe("cpu-default", [f"init={first}", f"init_encoder={first}"])
    recipe = load_recipe("cpu-teacher", [f"init_encoder={first}", "init=", "model.decoder.latent_channels=4"])
    assert recipe.model.encoder.base == 16  # the encoder's shape is that model's, the decoder's the recipe's own
    assert recipe.model.decoder.size == "CM/4"


def test_the_published_stages():
    """SSDD, section 4.1: which stage starts from what, on which pictures."""
    stages = [load_recipe(name) for name in ("ssdd-stage0-encoder", "ssdd-stage1-pretrain", "ssdd-stage2-finetune")]
    assert [(recipe.init, recipe.init_encoder) for recipe in stages] == [
        ("", ""), ("", "runs/ssdd-stage0-encoder/model"), ("runs/ssdd-stage1-pretrain/model", ""),
    ]  # fmt: skip
    assert [recipe.data.scale for recipe in stages] == [[128, 256], [128, 256], [256, 256]]
    assert load_recipe("ssdd-stage2-finetune", ["data.size=512", "data.scale=[512, 512]"]).data.scale == [512, 512]
    last = load_recipe("ssdd-stage3-distill")
    assert last.data.scale == [256, 256]
