"""Laws of distillation: the target is the teacher's sample, the student learns it, and nothing else moves."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import dead_parameters, losses_of, of_kind, rand_images, randn, tiny_tokenizer
from test_training import photos as photos  # the fixture
from test_training import rows, same, tiny_recipe, weights

from monobath import Tokenizer, UserError
from monobath.cli import main
from monobath.sampling import time_grid
from monobath.training import Interrupted, Run, load_recipe, train
from monobath.training.config import DistillConfig, LossConfig, TimesConfig
from monobath.training.objectives import distilled
from monobath.training.objectives.base import Draws
from monobath.training.objectives.distilled import DistillationObjective
from monobath.training.recipe import DistillationRecipe
from monobath.training.samples import SampleCache

NO_PERCEPTUAL = LossConfig(perceptual=0.0)


def objective(steps: int = 5, student_steps: int = 1, loss: LossConfig = NO_PERCEPTUAL, same_weights: bool = True):
    """A student beside its teacher; batch norms and dropout would show a teacher in training mode."""
    teacher = tiny_tokenizer(decoder={"dropout": 0.5}, power=3.0)
    student = tiny_tokenizer(0 if same_weights else 1, decoder={"dropout": 0.5}, steps=student_steps)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    config = DistillConfig(teacher="the teacher", steps=steps, student_steps=student_steps)
    return DistillationObjective(student, teacher, loss, config)


def batch(made: DistillationObjective, zero_noise: float = 0.0, seed: int = 0):
    x = rand_images(3, 3, 16, 24, seed=seed)
    draws = Draws.make(seed, tuple(x.shape), (3, 4, 2, 3), TimesConfig(ones=1.0, zero_noise=zero_noise), grid=made.grid)
    return x, draws.t, draws.noise, draws.latent_noise


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_target_is_the_teachers_sample(steps):
    """Exactly what decoding the same latent from the same noise gives, whatever mode the objective is in."""
    made = objective(steps).train()
    z, seeds = randn(2, 4, 3, 2), [7, 11]
    noise = torch.stack([torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    got = made.sample(noise, z)
    assert torch.equal(got.clamp(-1, 1), made.teacher.decode(z, seed=seeds, steps=steps))
    assert not got.requires_grad
    if steps > 1:
        assert not torch.allclose(got, objective(1).sample(noise, z), atol=1e-3)  # steps count


def test_zero_noise_reaches_the_teacher():
    made = objective(3)
    z = randn(1, 4, 2, 2)
    got = made.sample(torch.zeros(1, 3, 16, 16), z)
    assert torch.equal(got.clamp(-1, 1), made.teacher.decode(z, noise="zero", steps=3))


@pytest.mark.parametrize("kind", ["x", "v"])
def test_student_equal_to_a_one_step_teacher_has_zero_loss(kind):
    teacher, student = (tiny_tokenizer(decoder={"patch": 1, "prediction": kind}) for _ in range(2))
    made = DistillationObjective(student, teacher, LossConfig(perceptual=0.1), DistillConfig(teacher="t", steps=1))
    losses = losses_of(made, *batch(made)).named
    assert losses["flow"] < 1e-10
    assert losses["perceptual"] < 1e-8
    assert losses["loss"] < 1e-8


def test_the_perceptual_distance_is_to_the_teachers_sample_or_to_the_image():
    weights = LossConfig(perceptual=0.1)
    made = {
        to: DistillationObjective(
            tiny_tokenizer(), tiny_tokenizer(), weights, DistillConfig(teacher="t", steps=1, perceptual_to=to)
        )
        for to in ("", "teacher", "image")
    }
    x, t, noise, latent_noise = batch(made[""])
    losses = {to: losses_of(each, x, t, noise, latent_noise) for to, each in made.items()}
    found = {to: each.named for to, each in losses.items()}
    assert found[""]["perceptual"] == found["teacher"]["perceptual"] < 1e-8
    generated = losses["image"].clean
    assert torch.equal(found["image"]["perceptual"], made["image"].perceptual(generated, x).mean())
    assert found["image"]["perceptual"] > 0.01
    assert found["image"]["flow"] == found["teacher"]["flow"]


def test_a_step_towards_the_target_brings_the_student_nearer():
    made = objective(4, same_weights=False)
    optimizer = torch.optim.Adam(made.tokenizer.decoder.parameters(), lr=1e-2)
    found = []
    for _ in range(12):
        loss = losses_of(made.eval(), *batch(made)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.5 * found[0]


def test_everything_of_the_students_decoder_learns_and_nothing_of_the_teacher():
    made = objective(2, student_steps=2, same_weights=False)
    names = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert names == {f"tokenizer.decoder.{name}" for name, _ in made.tokenizer.decoder.named_parameters()}
    made.eval()
    assert dead_parameters(made.tokenizer.decoder, lambda: losses_of(made, *batch(made)).total[None] * 1e4) == []
    assert all(p.grad is None for p in made.teacher.parameters())
    assert not any("teacher" in name for name in made.state_dict())


def test_students_of_several_steps_learn_at_their_own_times():
    made = objective(4, student_steps=4)
    assert made.grid == time_grid(4, made.tokenizer.config.sampler.power)[:-1].tolist()
    assert set(torch.cat([batch(made, seed=s)[1] for s in range(20)]).tolist()) == {
        torch.tensor(t, dtype=torch.float32).item() for t in made.grid
    }


def test_draws_at_one_are_those_of_training_at_one():
    """A one-step student starts from the noise that a model trained at t = 1 starts from, zero noise included."""
    times = TimesConfig(ones=1.0, zero_noise=0.5)
    draws = Draws.make(3, (8, 3, 8, 8), (8, 4, 1, 1), times, grid=[1.0])
    assert torch.equal(draws.t, torch.ones(8))
    assert draws.noise.flatten(1).eq(0).all(1).sum() == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_channels": 3}, "must share their latents"),
        ({"base": 24}, "must share their latents"),
    ],
)
def test_other_latents_are_refused(change, words):
    channels = {"latent_channels": change["latent_channels"]} if "latent_channels" in change else {}
    teacher = tiny_tokenizer(encoder=change, decoder=channels)
    with pytest.raises(UserError, match=words):
        DistillationObjective(tiny_tokenizer(), teacher, NO_PERCEPTUAL, DistillConfig(teacher="t"))


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("teacher")
    return train(tiny_recipe(folder / "run", photos, steps=8))


def distill(folder, photos, teacher, *, cache: str = "", **training):
    recipe = tiny_recipe(folder, photos, **({"train_encoder": False} | training))
    return of_kind(DistillationRecipe, recipe, distill=DistillConfig(teacher=str(teacher), steps=3, cache=cache))


def test_a_distillation_starts_from_the_teacher_and_leaves_encoder_and_teacher_alone(tmp_path, photos, teacher):
    before = (teacher / "model.safetensors").read_bytes()
    student = train(distill(tmp_path / "run", photos, teacher))
    assert (teacher / "model.safetensors").read_bytes() == before
    old, new = weights(teacher), weights(student)
    assert all(torch.equal(old[name], new[name]) == name.startswith("encoder.") for name in old if "weight" in name)
    config = json.loads((student / "config.json").read_text())
    assert config["sampler"]["steps"] == 1
    assert config["training"]["recipe"]["distill"]["steps"] == 3
    first = next(row for row in rows(tmp_path / "run") if "flow" in row)
    assert first["flow"] < 0.1  # it starts from the teacher, or the first loss would be far


def test_resumed_distillation_equals_the_uninterrupted_one(tmp_path, photos, teacher, monkeypatch):
    whole = train(distill(tmp_path / "whole", photos, teacher))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda run: run.done == 4)
        with pytest.raises(Interrupted):
            train(distill(tmp_path / "part", photos, teacher))
    assert same(weights(train(distill(tmp_path / "part", photos, teacher))), weights(whole))


def test_cached_samples_give_the_same_student_without_the_teacher(tmp_path, photos, teacher, monkeypatch):
    cache = tmp_path / "cache"
    first = train(distill(tmp_path / "first", photos, teacher, cache=str(cache)))
    assert len(list(cache.rglob("*.safetensors"))) == 6
    calls = []
    monkeypatch.setattr(distilled, "euler", lambda *a, **k: calls.append(a))
    second = train(distill(tmp_path / "second", photos, teacher, cache=str(cache)))
    assert calls == []
    a, b = weights(first), weights(second)
    for name, value in a.items():  # float16 on disk
        torch.testing.assert_close(b[name], value, atol=5e-3, rtol=0)


def test_cache_of_another_teacher_is_refused(tmp_path, photos, teacher):
    cache = tmp_path / "cache"
    train(distill(tmp_path / "first", photos, teacher, cache=str(cache)))
    other = distill(tmp_path / "second", photos, teacher, cache=str(cache))
    other.distill.steps = 2
    with pytest.raises(UserError, match="made with another teacher_steps"):
        train(other)
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_a_damaged_sample_is_made_again(tmp_path):
    cache = SampleCache(tmp_path / "cache", {"a": 1})
    cache.write(5, 0, torch.ones(2, 3, 4, 4))
    assert torch.equal(cache.read(5, 0), torch.ones(2, 3, 4, 4))
    cache.path(5, 0).write_bytes(b"half")
    assert cache.read(5, 0) is None
    assert cache.read(6, 0) is None


def test_training_the_encoder_is_refused(tmp_path, photos, teacher):
    with pytest.raises(UserError, match=r"train_encoder.*set it to false"):
        distill(tmp_path, photos, teacher, train_encoder=True)


def test_student_of_a_student_decodes(tmp_path, photos, teacher):
    student = Tokenizer.from_pretrained(train(distill(tmp_path / "run", photos, teacher, steps=2)))
    assert student.decode(torch.zeros(1, 4, 2, 3)).shape == (1, 3, 16, 24)


# ---- the command line and recipes -----------------------------------------------------------------------------------


def test_the_verb_takes_the_shape_from_the_teacher(tmp_path, photos, teacher, capsys):
    arguments = [
        "distill",
        "cpu-distill",
        "--teacher",
        str(teacher),
        "--data",
        str(photos),
        "--run",
        str(tmp_path / "r"),
    ]
    small = ["--training.steps", "2", "--data.size", "32", "--data.scale", "[32, 40]", "--training.batch_size", "4"]
    assert main([*arguments, *small, "--distill.steps", "2", "--loss.perceptual", "0"]) == 0
    student = Tokenizer.from_pretrained(tmp_path / "r" / "model").config
    assert student.decoder == Tokenizer.from_pretrained(teacher).config.decoder
    assert str(tmp_path / "r" / "model") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "."], ["names no teacher", "--teacher"]),
        (["--teacher", "no/such/model", "--data", "."], ["no/such/model"]),
        (["--teacher", "default", "--data", ".", "--distill.steps", "0"], ["distill.steps is 0", "at least 1"]),
        (["--teacher", "default", "--data", ".", "--training.train_encoder", "true"], ["train_encoder", "false"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["distill", "cpu-distill", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_a_recipe_inherits_whole_parts_of_the_model_it_starts_from(tmp_path, teacher):
    file = tmp_path / "recipe.yaml"
    own = Tokenizer.from_pretrained(teacher).config
    file.write_text(f"init: {teacher}\ndata: {{size: 32, scale: [32, 40]}}\n")
    inherited = load_recipe(str(file)).model
    assert (inherited.encoder, inherited.decoder, inherited.sampler) == (own.encoder, own.decoder, own.sampler)
    other = load_recipe(str(file), ["model.decoder.size=XS/4"]).model
    assert other.encoder == own.encoder
    assert other.decoder.size == "XS/4"
    assert other.decoder.channels == [96, 96]
