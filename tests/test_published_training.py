"""Laws of what the published training asks for and ours does not: where it starts, what decays, what is averaged."""

from __future__ import annotations

import pytest
import torch
from conftest import of_kind, tiny_decoder, tiny_decoder_config, tiny_encoder_config
from test_training import photos as photos  # the fixture
from test_training import same, tiny_recipe, weights

from monobath import Tokenizer, UserError
from monobath.decoders import decoder_config, make_decoder
from monobath.evaluation.facts import describe
from monobath.tokenizer import TokenizerConfig
from monobath.training import Run, load_recipe, train
from monobath.training.config import DistillConfig, OptimizerConfig
from monobath.training.initialise import make_tokenizer
from monobath.training.optimizers import make_optimizer
from monobath.training.recipe import DistillationRecipe, TokenizerRecipe


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
        patch.setattr("monobath.training.optimizers.make_optimizer", old)
        train(recipe("run", 6))
        whole = train(recipe("whole", 8))
    gone_on = weights(train(recipe("run", 8)))
    assert same(gone_on, weights(whole))
    assert not same(gone_on, weights(train(recipe("new", 8))))


@pytest.mark.parametrize("size", ["XS/1", "custom"])
def test_published_first_weights(size):
    """Xavier's for linear maps, N(0, 0.02²) for convolutions, zero biases; what starts at zero stays there."""
    decoder = tiny_decoder_config() if size == "custom" else decoder_config({"size": size})
    torch.manual_seed(0)
    usual = make_decoder(decoder)
    recipe = TokenizerRecipe(model=TokenizerConfig(encoder=tiny_encoder_config(), decoder=decoder))
    recipe.first_weights = "published"
    torch.manual_seed(0)
    published = make_tokenizer(recipe).decoder
    convolutions = []
    for (name, before), after in zip(usual.named_modules(), published.modules(), strict=True):
        if not isinstance(after, torch.nn.Linear | torch.nn.Conv2d):
            continue
        assert after.bias is None or not after.bias.any(), name
        if not before.weight.any():
            assert not after.weight.any(), name
        elif isinstance(after, torch.nn.Linear):
            bound = (6 / (after.in_features + after.out_features)) ** 0.5
            assert 0.8 * bound < after.weight.abs().max() <= bound, name
        else:
            convolutions.append(after.weight.detach().flatten())
    assert torch.cat(convolutions).std() == pytest.approx(0.02, rel=0.02)
    assert any(name.endswith("conv2") for name, _ in published.named_modules())


def test_first_weights_are_for_the_published_networks():
    with pytest.raises(UserError, match=r"first_weights is published, .* decoders with group norms, such as S/1; CM/4"):
        load_recipe("cpu-default", ["first_weights=published"])
    assert load_recipe("ssdd-stage1-pretrain").first_weights == "published"
    assert load_recipe("cpu-default").first_weights == "pytorch"


def test_a_model_knows_the_times_it_was_trained_at(tmp_path, photos, first):
    """A teacher that has seen t = 1 alone cannot be sampled in several steps, nor can a student."""

    def distilled(name: str, teacher, steps: int, student_steps: int = 1):
        recipe = tiny_recipe(tmp_path / name, photos, steps=1, sample_every=0, train_encoder=False)
        config = DistillConfig(teacher=str(teacher), steps=steps, student_steps=student_steps)
        return of_kind(DistillationRecipe, recipe, distill=config)

    recipe = tiny_recipe(tmp_path / "ones", photos, steps=1, sample_every=0)
    recipe.times.ones = 1.0
    only_ones = train(recipe)
    with pytest.raises(UserError, match=r"was trained at t = 1 alone, and cannot be sampled in 3 steps: name one"):
        train(distilled("a", only_ones, 3))
    assert not (tmp_path / "a" / "checkpoints").exists()
    train(distilled("b", only_ones, 1))
    student = train(distilled("c", first, 3, student_steps=2))
    with pytest.raises(UserError, match=r"was trained at t = 1 and 0\.25 alone, and cannot be sampled in 3 steps"):
        train(distilled("d", student, 3))
    train(distilled("e", student, 2))  # what it is made for
    known = [
        describe(Tokenizer.from_pretrained(model), str(model))["training"] for model in (first, only_ones, student)
    ]
    assert [facts.get("only_times") for facts in known] == [None, [1.0], [1.0, 0.25]]
