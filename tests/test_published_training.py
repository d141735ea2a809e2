"""Laws of what the published training asks for and ours does not: where it starts, what decays, what is averaged."""

from __future__ import annotations

import pytest
import torch
from conftest import of_kind, tiny_decoder
from test_training import photos as photos  # the fixture
from test_training import same, tiny_recipe, weights

from monobath import UserError
from monobath.training import Run, load_recipe, train
from monobath.training.config import DistillConfig, OptimizerConfig
from monobath.training.optimizers import make_optimizer
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
    assert {recipe.training.ema_start_steps for recipe in (*stages, last)} == {50_000}


def test_the_average_starts_after_so_many_steps(tmp_path, photos):
    """Until then it is the weights; the fraction of the run says nothing any more."""
    settings = {"ema": 0.9, "ema_warmup": False, "ema_start": 0.0, "sample_every": 0}
    for start, steps in ((2, 2), (2, 3), (0, 2)):
        recipe = tiny_recipe(tmp_path / f"{start}-{steps}", photos, steps=steps, ema_start_steps=start, **settings)
        run = Run(recipe)
        run.train()
        live, averaged = run.model.state_dict(), run.ema.model.state_dict()
        assert all(torch.equal(live[name], averaged[name]) for name in live) == ((start, steps) == (2, 2))
    with pytest.raises(UserError, match="ema_start_steps is -1"):
        tiny_recipe(tmp_path, photos, ema_start_steps=-1)


def test_relative_position_tables_do_not_decay():
    decoder = tiny_decoder()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    make_optimizer(decoder, OptimizerConfig(lr=1.0, weight_decay=0.1)).step()
    tables = 0
    for name, parameter in decoder.named_parameters():
        decays = parameter.ndim in (2, 4)
        assert torch.allclose(parameter, before[name] * (0.9 if decays else 1.0)), name
        tables += parameter.ndim == 3
    assert tables == 2


@pytest.mark.parametrize("kind", ["adamw", "radam_schedulefree"])
def test_a_run_begun_when_tables_decayed_goes_on_so(tmp_path, photos, monkeypatch, kind):
    def recipe(name: str, steps: int):
        found = tiny_recipe(tmp_path / name, photos, steps=steps, sample_every=0)
        found.optimizer = OptimizerConfig(kind=kind, lr=1e-2, weight_decay=0.5, schedule="constant")
        return found

    def old(module, config, like=None):
        groups = {"param_groups": [{"params": list(range(10**6))}]}
        return make_optimizer(module, config, groups)

    with monkeypatch.context() as patch:
        patch.setattr("monobath.training.run.make_optimizer", old)
        train(recipe("run", 6))
        whole = train(recipe("whole", 8))
    gone_on = weights(train(recipe("run", 8)))
    assert same(gone_on, weights(whole))
    assert not same(gone_on, weights(train(recipe("new", 8))))
