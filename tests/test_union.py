"""Laws of one checkpoint that decodes at once and coarse to fine: `scales.union`, and a sampler of one stage."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import losses_of, previews, rand_images, randn, tiny_tokenizer
from PIL import Image
from test_scales import KINDS, QUIET, drawn
from test_training import photos as photos  # the fixture
from test_training import rows, same, tiny_recipe, weights

from monobath import Tokenizer, UserError, resources
from monobath.cli import main
from monobath.data.latent_file import LatentFile
from monobath.sampling import draw_noise
from monobath.scales import image_pyramid
from monobath.tokenizer import SamplerConfig
from monobath.training import Interrupted, Run, load_recipe, train
from monobath.training.config import LossConfig, ScalesConfig
from monobath.training.objectives.base import AutoencoderObjective
from monobath.training.objectives.staged import UnionObjective


def union(seed: int = 0, *, decoder: dict | None = None, **sampler) -> Tokenizer:
    """A tiny tokenizer of three stages that decodes at full resolution."""
    return tiny_tokenizer(seed, decoder={"stages": 3} | (decoder or {}), **({"noise": "zero"} | sampler))


def as_progressive(tok: Tokenizer) -> Tokenizer:
    """The same weights, decoded through all stages."""
    other = Tokenizer(dataclasses.replace(tok.config, sampler=dataclasses.replace(tok.config.sampler, stages=3)))
    other.load_state_dict(tok.state_dict())
    return other.eval()


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
def test_one_step_at_full_resolution_is_the_last_stages_from_the_start(noise):
    tok, z = union(noise=noise), randn(2, 4, 3, 5)
    start = draw_noise((3, 24, 40), [5, 6], noise)
    with torch.no_grad():
        expected = tok.decoder(start, torch.ones(2), z, 2).clamp(-1, 1)
    assert torch.allclose(tok.decode(z, seed=5), expected, atol=1e-6)
    assert not torch.allclose(expected, tok.decoder(start, torch.ones(2), z, 1).clamp(-1, 1), atol=1e-4)


def test_previews_are_those_of_the_progressive_form():
    tok, z = union(), randn(1, 4, 5, 6)
    at_once, progressive = tok.decode(z, size=(37, 48)), as_progressive(tok)
    pictures = list(tok.decode_progressive(z, size=(37, 48)))
    assert [tuple(p.shape[2:]) for p in pictures] == [(10, 12), (19, 24), (37, 48)]
    assert torch.equal(pictures[-1], progressive.decode(z, size=(37, 48)))
    assert (pictures[-1] - at_once).abs().max() > 1e-3


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
def test_folded_it_gives_the_same_pictures(noise):
    tok, z = union(noise=noise, decoder={"patch": 4, "prediction": "x"}), randn(2, 4, 5, 3)
    folded = tok.optimize()
    assert (folded.decode(z, seed=3) - tok.decode(z, seed=3)).abs().max() < 1e-4
    assert len(list(folded.decode_progressive(z))) == 1


def test_it_decodes_in_tiles():
    tok, z = union(decoder={"norm": "local", "middle_blocks": 0}).double(), randn(1, 4, 48, 32).double()
    overlap = 2 * tok.decoder.reach()
    assert overlap < 256
    assert torch.allclose(tok.decode(z, tile=256, overlap=overlap), tok.decode(z), atol=1e-6)


def test_it_becomes_a_diffusers_model():
    pytest.importorskip("diffusers")
    from monobath.integrations.diffusers import AutoencoderMonobath

    tok, z = union(), randn(1, 4, 4, 6)
    decoded = AutoencoderMonobath.from_tokenizer(tok).decode(z).sample
    assert torch.allclose(decoded.clamp(-1, 1), tok.decode(z), atol=1e-5)


def test_guidance_is_for_the_stages():
    tok, z = union(decoder={"null_latent": True}), randn(1, 4, 4, 4)
    torch.nn.init.ones_(tok.decoder.null_latent)
    with pytest.raises(UserError, match="at full resolution at once, without guidance"):
        tok.decode(z, guidance=2.0)
    guided, plain = (next(tok.decode_progressive(z, guidance=g)) for g in (2.0, 1.0))
    assert (guided - plain).abs().max() > 1e-4


def test_a_packaged_name_can_be_another_way_to_decode(tmp_path, monkeypatch):
    tok = union()
    tok.save_pretrained(tmp_path / "weights/ours")
    (tmp_path / "weights/aliases.json").write_text(
        '{"default": {"weights": "ours"}, "progressive": {"weights": "ours", "stages": 3}}'
    )
    monkeypatch.setattr(resources, "_ROOT", tmp_path)
    z = randn(1, 4, 4, 4)
    assert resources.weights_names() == ["default", "progressive", "ours"]
    assert torch.equal(Tokenizer.from_pretrained("default").decode(z), tok.decode(z))
    *_, expected = tok.decode_progressive(z)
    assert torch.equal(Tokenizer.from_pretrained("progressive").decode(z), expected)


@pytest.mark.parametrize("model", ["default", "progressive", "f8c4-progressive"])
def test_latents_remember_how_they_are_decoded(model, tmp_path):
    """`monobath decode` makes the picture that the model they were encoded with makes, stages and all."""
    photo = tmp_path / "photo.png"
    Image.open(resources.sample_paths()[0]).crop((0, 0, 72, 48)).save(photo)
    assert main(["encode", str(photo), "--out", str(tmp_path), "--model", model]) == 0
    assert main(["decode", str(tmp_path / "photo.safetensors"), "--out", str(tmp_path / "out")]) == 0
    tok = Tokenizer.from_pretrained(model)
    expected = tok.decode(tok.encode(Image.open(photo)).mode(), output="pil")[0]
    assert Image.open(tmp_path / "out/photo.png").tobytes() == expected.tobytes()
    assert "preview-" in LatentFile.read(tmp_path / "photo.safetensors").model  # whatever the alias means tomorrow


# ---- the objective --------------------------------------------------------------------------------------------------


def moments_of(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z, torch.full_like(z, -30.0)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_at_what_decoding_does(kind):
    """Half of the batch through the stages, half at once: the losses are the decoded pictures' squared errors."""
    tok = union(noise="gaussian", decoder={"patch": 1, "prediction": kind})
    made = UnionObjective(tok, QUIET, ScalesConfig(union=0.5), train_encoder=False).eval()
    x, z, noise = rand_images(4, 3, 32, 64), randn(4, 4, 4, 8), draw_noise((3, 32, 64), [7, 8, 9, 10])
    losses = losses_of(made, x, torch.ones(4), noise, torch.zeros_like(z), moments_of(z)).named
    images = image_pyramid(x[:2], 3)
    for stage, preview in enumerate(previews(tok.decoder, z[:2], [7, 8])):
        error = (preview - images[stage]).square().mean()
        assert losses[f"flow_stage{stage}"].item() == pytest.approx(error.item(), rel=1e-3)
    whole = tok.decoder(noise[2:], torch.ones(2), z[2:])
    clean = noise[2:] + whole if kind == "v" else whole
    assert losses["flow_at_once"].item() == pytest.approx((clean - x[2:]).square().mean().item(), rel=1e-4)
    stages = sum(losses[f"flow_stage{s}"] for s in range(3))
    assert torch.allclose(losses["loss"], 0.5 * stages + 0.5 * losses["flow_at_once"])


@pytest.mark.parametrize("kind", KINDS)
def test_at_once_it_learns_what_a_single_scale_learns(kind):
    shape = {"patch": 1, "prediction": kind}
    tok, single = union(decoder=shape), tiny_tokenizer(decoder=shape)
    single.load_state_dict({n: v for n, v in tok.state_dict().items() if n != "decoder.stage_embedding"})
    torch.nn.init.zeros_(tok.decoder.stage_embedding)
    x, z, noise = rand_images(4, 3, 32, 32), randn(4, 4, 4, 4), randn(4, 3, 32, 32)
    ours = UnionObjective(tok, QUIET, ScalesConfig(union=0.25), train_encoder=False)
    losses = losses_of(ours, x, torch.ones(4), noise, torch.zeros_like(z), moments_of(z)).parts
    alone = AutoencoderObjective(single, QUIET, train_encoder=False)
    expected = losses_of(alone, x[1:], torch.ones(3), noise[1:], torch.zeros_like(z[1:]), moments_of(z[1:])).parts
    assert torch.allclose(losses["flow_at_once"], expected["flow"], rtol=1e-5)


@pytest.mark.parametrize(("fraction", "batch", "through"), [(0.5, 6, 3), (0.01, 4, 1), (0.99, 4, 3), (0.25, 8, 2)])
def test_both_always_have_samples(fraction, batch, through):
    made = UnionObjective(union(), QUIET, ScalesConfig(union=fraction), train_encoder=False)
    learned = drawn(made, rand_images(batch, 3, 32, 32), ones=1.0)
    losses = learned.parts
    stages = sum(losses[f"flow_stage{s}"] for s in range(3))
    share = through / batch
    assert torch.allclose(losses["flow"], share * stages + (1 - share) * losses["flow_at_once"])
    assert learned.clean.shape == learned.real.shape == (batch, 3, 32, 32)


def test_everything_learns_the_encoder_too():
    made = UnionObjective(
        union(decoder={"dropout": 0.0}), LossConfig(perceptual=0.1), ScalesConfig(union=0.5), train_encoder=True
    )
    drawn(made, rand_images(4, 3, 32, 32), ones=1.0).total.backward()
    still = [name for name, p in made.tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert made.tokenizer.decoder.stage_embedding.grad.abs().amax(1).min() > 0


def test_both_get_better():
    made = UnionObjective(union(), QUIET, ScalesConfig(union=0.5), train_encoder=False)
    x, found = rand_images(4, 3, 32, 32), []
    optimizer = torch.optim.Adam(made.tokenizer.decoder.parameters(), lr=1e-2)
    for _ in range(12):
        losses = drawn(made, x, ones=1.0).named
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append(torch.stack([v.detach() for k, v in losses.items() if k.startswith("flow_")]))
    assert (found[-1] < 0.7 * found[0]).all()


# ---- runs -----------------------------------------------------------------------------------------------------------


def union_recipe(folder, photos, **options):
    recipe = tiny_recipe(folder, photos, **options)
    decoder = dataclasses.replace(recipe.model.decoder, stages=3)
    recipe.model = dataclasses.replace(recipe.model, decoder=decoder, sampler=SamplerConfig(noise="zero"))
    recipe.scales = ScalesConfig(union=0.5)
    recipe.times.ones, recipe.times.zero_noise = 1.0, 1.0
    return dataclasses.replace(recipe)  # the recipe checks itself again


def test_a_run_trains_logs_and_decodes_both_ways(tmp_path, photos):
    model = train(union_recipe(tmp_path / "run", photos, loss={"perceptual": 0.1, "repa": 0.2}, batch_size=6, steps=3))
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert {"flow", "flow_at_once", "flow_stage0", "flow_stage1", "flow_stage2", "repa"} <= logged[-1].keys()
    assert all(math.isfinite(value) for value in logged[-1].values())
    tok = Tokenizer.from_pretrained(model)
    assert (tok.config.sampler.stages, tok.config.decoder.stages) == (1, 3)
    assert len(list(tok.decode_progressive(randn(1, 4, 8, 8)))) == 3


def test_resumed_equals_uninterrupted(tmp_path, photos, monkeypatch):
    whole = train(union_recipe(tmp_path / "whole", photos, steps=4))
    recipe = union_recipe(tmp_path / "parts", photos, steps=4)
    stop = Run.told_to_stop
    monkeypatch.setattr(Run, "told_to_stop", lambda run: run.done == 2 or stop(run))
    with pytest.raises(Interrupted):
        train(recipe)
    monkeypatch.undo()
    assert same(weights(train(recipe)), weights(whole))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scales.union=1"], "scales.union is 1"),
        (["scales.union=0.5", "scales.drop=0.1"], "drops no latents"),
        (["scales.union=0.5", "model.decoder.stages=3", "times.ones=0.5"], "set them to 1 and 0"),
        (["scales.union=0.5"], "scales.* is for multi-scale decoders"),
    ],
)
def test_mistakes_in_recipes(overrides, words):
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        load_recipe("cpu-default", overrides)


def test_a_batch_of_one_is_refused(tmp_path, photos):
    with pytest.raises(UserError, match=r"gives 1 images a pass: scales.union needs at least 2"):
        train(union_recipe(tmp_path / "run", photos, batch_size=1))


def test_the_command_line_gives_previews_on_demand(tmp_path, capsys):
    union().save_pretrained(tmp_path / "model")
    Image.new("RGB", (32, 32), (200, 90, 30)).save(tmp_path / "a.png")
    command = ["reconstruct", str(tmp_path / "a.png"), "--model", str(tmp_path / "model"), "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["a.png"]
    assert main([*command, str(tmp_path / "out"), "--progressive"]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.8.png", "a.16.png", "a.png"}
    assert main([*command, str(tmp_path / "no"), "--progressive", "--engine", "torch"]) == 2
    assert "--engine with --progressive" in capsys.readouterr().err


def test_a_single_scale_starts_as_its_last_stage(tmp_path, photos):
    first = train(union_recipe(tmp_path / "first", photos, steps=2))
    recipe = tiny_recipe(tmp_path / "second", photos, steps=1, ema=0.0)
    recipe.model = dataclasses.replace(recipe.model, sampler=SamplerConfig(noise="zero"))
    recipe.init, recipe.optimizer.lr, recipe.optimizer.weight_decay = str(first), 0.0, 0.0
    before, after = Tokenizer.from_pretrained(first), Tokenizer.from_pretrained(train(recipe))
    assert (before.decoder.stage_embedding[-1] != 0).any()
    z = randn(2, 4, 4, 6)
    assert torch.allclose(after.decode(z), before.decode(z), atol=1e-5)
