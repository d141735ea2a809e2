"""Laws of multi-scale decoding: its paths, hand-overs and previews, its training, and its distillation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import (
    dead_parameters,
    losses_of,
    of_kind,
    previews,
    rand_images,
    randn,
    record_calls,
    tiny_decoder,
    tiny_tokenizer,
)
from conftest import sample as decoded
from PIL import Image
from scipy.optimize import fsolve
from test_training import photos as photos  # the fixture
from test_training import rows, same, tiny_recipe, weights

from monobath import Tokenizer, UserError
from monobath.cli import main
from monobath.decoding import predictor
from monobath.flow import velocity
from monobath.sampling import draw_noise, euler, time_grid
from monobath.scales import (
    ScaleSchedule,
    block_noise,
    down,
    image_pyramid,
    noise_pyramid,
    up,
)
from monobath.tokenizer import SamplerConfig
from monobath.training import Interrupted, Run, load_recipe, train
from monobath.training.config import DistillConfig, LossConfig, ScalesConfig, TimesConfig
from monobath.training.objectives.adversarial import Adversary
from monobath.training.objectives.base import AutoencoderObjective, Batch, Draws
from monobath.training.objectives.distilled import StagedDistillation
from monobath.training.objectives.staged import (
    StagedObjective,
    assign_stages,
    sigmoid_weight,
    uniform_times,
)
from monobath.training.recipe import DistillationRecipe

KINDS = ["v", "x"]
QUIET = LossConfig(perceptual=0.0)


def multi(seed: int = 0, *, decoder: dict | None = None, **sampler) -> Tokenizer:
    """A tiny tokenizer of three stages; a picture's sides are padded to multiples of 32."""
    return tiny_tokenizer(seed, decoder={"stages": 3} | (decoder or {}), **({"stages": 3} | sampler))


def ones(x: torch.Tensor, value: float = 1.0) -> torch.Tensor:
    return torch.full((len(x),), value, dtype=x.dtype)


# ---- the schedule and the hand-over ---------------------------------------------------------------------------------


def test_levels_of_three_stages():
    schedule = ScaleSchedule(3)
    assert [s.end for s in schedule] == pytest.approx([2 / 3, 1 / 3, 0])
    assert [s.start for s in schedule] == pytest.approx([1, 0.8, 0.5])
    assert ScaleSchedule(1)[0] == dataclasses.replace(schedule[0], end=0.0)
    assert [schedule.size(s, (37, 50)) for s in range(3)] == [(10, 13), (19, 25), (37, 50)]
    assert (schedule.unit(8, 8), schedule.unit(8, 4), schedule.unit(4, 8), ScaleSchedule(1).unit(8, 8)) == (4, 4, 8, 1)
    with pytest.raises(ValueError, match="stages=0"):
        ScaleSchedule(0)
    with pytest.raises(IndexError):
        schedule[3]


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_closed_forms_solve_the_derivation(stages):
    """α, β, σ from what is asked: no covariance in a block, variance σ², and the picture's share 1 − σ."""
    schedule = ScaleSchedule(stages)
    for s in range(stages - 1):
        e = schedule[s].end

        def asked(unknown, e=e):
            alpha, beta, sigma = unknown
            return alpha**2 * e**2 - beta**2 / 3, alpha**2 * e**2 + beta**2 - sigma**2, alpha * (1 - e) - (1 - sigma)

        alpha, beta, sigma = fsolve(asked, (0.6, 0.6, 0.6), xtol=1e-12)
        assert schedule[s + 1].start == pytest.approx(sigma, abs=1e-9)
        state, white = randn(1, 3, 4, 6).double(), randn(1, 3, 8, 12, seed=1).double()
        expected = alpha * up(state) + beta * block_noise(white)
        assert torch.allclose(schedule.hand_over(state, s, white), expected, atol=1e-9)


def test_block_noise():
    noise = block_noise(randn(1, 1, 2000, 2000))
    assert down(noise).abs().max() < 1e-6
    blocks = torch.nn.functional.pixel_unshuffle(noise, 2).flatten(2)[0]
    expected = torch.full((4, 4), -1 / 3) + torch.eye(4) * 4 / 3
    assert torch.allclose(torch.cov(blocks), expected, atol=0.01)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_noise_is_white_after_every_hand_over(stages):
    """σ²·I within 1 %, inside a block and across blocks, on a million blocks of a grey picture."""
    schedule = ScaleSchedule(stages)
    for s in range(stages - 1):
        sigma = schedule[s + 1].start
        state = schedule[s].state(torch.full((1, 1, 1000, 1000), 0.5), randn(1, 1, 1000, 1000, seed=s), torch.zeros(1))
        after = schedule.hand_over(state, s, randn(1, 1, 2000, 2000, seed=9))
        assert after.mean() == pytest.approx(0.5 * (1 - sigma), abs=0.005)
        inside = torch.nn.functional.pixel_unshuffle(after, 2)[0]  # (4, 1000, 1000)
        beside = torch.cat([inside[:, :, :-1], inside[:, :, 1:]]).flatten(1)
        below = torch.cat([inside[:, :-1], inside[:, 1:]]).flatten(1)
        for pairs in (beside, below):
            assert torch.allclose(torch.cov(pairs) / sigma**2, torch.eye(8), atol=0.01)


def test_a_pyramid_is_white_and_continues_itself():
    """With the true image, a hand-over gives the next stage's start with the next field of the same noise."""
    white, x = randn(2, 3, 16, 24), rand_images(2, 3, 16, 24)
    for stages in (2, 3, 4):
        schedule, fields, images = (
            ScaleSchedule(stages), noise_pyramid(white, stages), image_pyramid(x, stages),
        )  # fmt: skip
        assert fields[-1] is white
        assert images[-1] is x
        for s in range(stages - 1):
            end = schedule[s].state(images[s], fields[s], torch.zeros(2))
            start = schedule[s + 1].state(images[s + 1], fields[s + 1], torch.ones(2))
            assert torch.allclose(schedule.hand_over(end, s, fields[s + 1]), start, atol=1e-5)
    coarse = noise_pyramid(randn(1, 1, 2000, 2000), 3)[0]
    assert abs(coarse.std() - 1) < 0.01
    assert not any(field.any() for field in noise_pyramid(torch.zeros(1, 3, 8, 8), 3))


# ---- a stage's path -------------------------------------------------------------------------------------------------


CASES = [
    pytest.param(stage, id=f"{stages}-{stage.index}") for stages in (1, 2, 3, 4) for stage in ScaleSchedule(stages)
]


@pytest.mark.parametrize("stage", CASES)
def test_ends_of_a_stage(stage):
    x, noise = rand_images(2, 3, 4, 6), randn(2, 3, 4, 6)
    start = (1 - stage.start) * up(down(x)) + stage.start * noise
    end = (1 - stage.end) * x + stage.end * noise
    assert torch.allclose(stage.state(x, noise, torch.ones(2)), start, atol=1e-6)
    assert torch.allclose(stage.state(x, noise, torch.zeros(2)), end, atol=1e-6)
    assert torch.allclose(stage.velocity(x, noise), end - start, atol=1e-6)
    assert torch.allclose(stage.level(torch.tensor([0.0, 1.0])), torch.tensor([stage.end, stage.start]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("stage", CASES)
def test_the_truth_leads_to_a_stages_end(stage, steps, kind):
    x, noise = rand_images(2, 3, 4, 6), randn(2, 3, 4, 6)
    truth = x if kind == "x" else stage.velocity(x, noise)
    grid = [t.float().expand(2) for t in time_grid(steps)]
    seen = []

    def predict(state, level):
        tau = grid[len(seen)]
        assert torch.allclose(level, stage.level(tau))
        assert torch.allclose(state, stage.state(x, noise, tau), atol=1e-5)
        seen.append(level)
        return truth

    state = stage.state(x, noise, torch.ones(2))
    for tau, after in itertools.pairwise(grid):
        state = stage.step(predict(state, stage.level(tau)), state, tau, after, kind)
    assert torch.allclose(state, stage.state(x, noise, torch.zeros(2)), atol=1e-5)
    assert len(seen) == steps


@pytest.mark.parametrize("stage", CASES)
def test_previews_recover_the_image_at_any_time(stage):
    x, noise = rand_images(3, 3, 4, 6).double(), randn(3, 3, 4, 6).double()
    tau = torch.tensor([0.1, 0.6, 1.0]).double()
    state = stage.state(x, noise, tau)
    assert stage.clean(x, state, tau, "x") is x
    assert torch.allclose(stage.clean(stage.velocity(x, noise), state, tau, "v"), x, atol=1e-9)


@pytest.mark.parametrize("stage", CASES)
def test_both_kinds_take_the_same_step(stage):
    """A guess of the clean image, written as the velocity that it means."""
    guess, noise = rand_images(2, 3, 4, 6).double(), randn(2, 3, 4, 6).double()
    tau = torch.tensor([0.4, 1.0]).double()
    state = stage.state(guess, noise, tau)
    for fraction in (0.0, 0.3, 0.9):
        a = stage.step(guess, state, tau, fraction * tau, "x")
        b = stage.step(stage.velocity(guess, noise), state, tau, fraction * tau, "v")
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stages", "steps"), [(1, 1), (2, 1), (3, 1), (3, 4), (4, 2)])
def test_the_truth_leads_through_all_stages(stages, steps, kind):
    """Every preview is the image at its size, rectangular too, and every stage sees the noise of the one field."""
    x, white = rand_images(2, 3, 16, 32), draw_noise((3, 16, 32), [4, 5])
    images, fields, schedule = image_pyramid(x, stages), noise_pyramid(white, stages), ScaleSchedule(stages)
    decoder = tiny_decoder(factor=2, patch=1, prediction=kind, stages=stages)

    def predict(state, level, features, stage=None):
        s = stage or 0  # a single scale has none
        return images[s] if kind == "x" else schedule[s].velocity(images[s], fields[s])

    decoder.predict = predict
    found = previews(decoder, randn(2, 4, 8, 16), [4, 5], steps=steps)
    assert len(found) == stages
    for preview, image in zip(found, images, strict=True):
        assert torch.allclose(preview, image, atol=1e-5)


# ---- one stage is the single scale, to the last bit ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_stage_is_the_single_scale_path(kind):
    (stage,) = ScaleSchedule(1)
    x, noise, t = rand_images(3, 3, 4, 6), randn(3, 3, 4, 6), torch.tensor([0.1, 0.5, 1.0])
    from monobath import flow

    x_t = flow.interpolate(x, noise, t)
    guess = randn(3, 3, 4, 6, seed=2)
    assert torch.equal(stage.level(t), t)
    assert torch.equal(stage.state(x, noise, t), x_t)
    assert torch.equal(stage.velocity(x, noise), velocity(x, noise))
    assert torch.equal(stage.clean(guess, x_t, t, kind), flow.to_clean(guess, x_t, t, kind))
    assert torch.equal(stage.step(guess, x_t, t, 0.3 * t, kind), flow.euler_step(guess, x_t, t, 0.3 * t, kind))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_stage_samples_as_the_single_scale_does(kind, steps):
    decoder, z, noise = tiny_decoder(patch=1, prediction=kind), randn(2, 4, 2, 3), draw_noise((3, 16, 24), [4, 5])
    expected = euler(lambda x_t, t: decoder(x_t, t, z), noise, kind=kind, steps=steps)
    assert torch.equal(decoded(decoder, z, [4, 5], steps=steps), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", ["gaussian", "zero"])
def test_one_stage_decodes_as_the_single_scale_does(kind, noise):
    tok = tiny_tokenizer(decoder={"patch": 1, "prediction": kind})
    z, options = randn(2, 4, 3, 5), {"steps": 3, "noise": noise}
    with torch.no_grad():
        found = decoded(tok.decoder, z, [4, 5], **options, size=(21, 40))
    assert torch.equal(found.clamp(-1, 1), tok.decode(z, seed=4, size=(21, 40), **options))
    (alone,) = tok.decode_progressive(z, seed=4, size=(21, 40), **options)
    assert torch.equal(alone, tok.decode(z, seed=4, size=(21, 40), **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_encoder", [False, True])
def test_one_stage_has_the_single_scale_losses(kind, train_encoder):
    x = rand_images(4, 3, 16, 24)
    draws = Draws.make(3, tuple(x.shape), (4, 4, 2, 3), TimesConfig(ones=0.5, zero_noise=0.5))
    loss, found = LossConfig(perceptual=0.3, kl=1e-3, repa=0.2), []
    for make in (AutoencoderObjective, lambda *a, **k: StagedObjective(a[0], a[1], ScalesConfig(), **k)):
        torch.manual_seed(0)  # of REPA's projector
        tok = tiny_tokenizer(decoder={"patch": 1, "prediction": kind})
        objective = make(tok, loss, train_encoder=train_encoder)
        objective.draw(draws, 1, 0, 1)
        learned = objective(Batch(images=x, draws=draws))
        losses = learned.named
        losses["loss"].backward()
        found.append((losses, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}))
        assert torch.equal(learned.real, x)
    (one, first), (other, second) = found
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert same(first, second)


# ---- the decoder ----------------------------------------------------------------------------------------------------


def test_an_embedding_only_where_there_are_stages():
    single, stages = tiny_decoder(), tiny_decoder(stages=3, null_latent=True)
    new = stages.state_dict().keys() - single.state_dict().keys()
    assert new == {"stage_embedding", "null_latent"}
    assert not any(p.any() for n, p in Tokenizer(multi(decoder={"null_latent": True}).config).named_parameters()
                   if n.rpartition(".")[2] in new)  # fmt: skip
    x, t, z = randn(2, 3, 16, 24), torch.tensor([0.3, 1.0]), randn(2, 4, 8, 12)
    outputs = [stages(x, t, z, s) for s in range(3)]
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(outputs, 2))
    assert torch.equal(single(x, t, z), single(x, t, z, 0))


@pytest.mark.parametrize(("stages", "given"), [(3, 3), (3, -1), (1, 1)])
def test_a_stage_that_is_not_there_is_refused(stages, given):
    with pytest.raises(ValueError, match=f"stage is {given}: this decoder has {stages}"):
        tiny_decoder(stages=stages)(randn(1, 3, 16, 16), torch.ones(1), randn(1, 4, 2, 2), given)


def test_zero_embeddings_leave_a_single_scale_decoder_what_it_is():
    """The union: from the same state and time, one step at the last stage is the single-scale prediction."""
    single, stages = tiny_decoder(), tiny_decoder(stages=3)
    stages.load_state_dict(single.state_dict() | {"stage_embedding": torch.zeros_like(stages.stage_embedding)})
    x, t, z = randn(2, 3, 16, 24), torch.tensor([0.5, 0.2]), randn(2, 4, 2, 3)
    for s in range(3):
        assert torch.equal(stages(x, t, z, s), single(x, t, z))
    last, tau = ScaleSchedule(3)[2], torch.tensor([1.0, 0.4])  # levels 0.5 and 0.2
    got = last.clean(predictor(stages, z)(x, last.level(tau), 2), x, tau, "x")
    assert torch.allclose(got, single(x, t, z), atol=1e-6)


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(37, 50), (64, 96), (8, 5), (1, 1)])
def test_previews_have_the_right_sizes_and_the_last_is_the_picture(kind, size):
    tok = multi(decoder={"patch": 1, "prediction": kind}, steps=2)
    z = randn(2, 4, -(-size[0] // 8), -(-size[1] // 8))
    found = list(tok.decode_progressive(z, size=size, seed=3))
    h, w = size
    assert [tuple(p.shape) for p in found] == [
        (2, 3, -(-h // 4), -(-w // 4)), (2, 3, -(-h // 2), -(-w // 2)), (2, 3, h, w),
    ]  # fmt: skip
    assert all(p.dtype == torch.float32 and p.abs().max() <= 1 for p in found)
    assert torch.equal(found[-1], tok.decode(z, size=size, seed=3))
    assert not torch.equal(found[-1], tok.decode(z, size=size, seed=3, steps=1))
    assert not torch.equal(found[-1], tok.decode(z, size=size, seed=5))


def test_every_output_form():
    tok, z = multi(), randn(2, 4, 3, 5)
    floats = list(tok.decode_progressive(z))
    for preview, pixels, pictures in zip(
        floats, tok.decode_progressive(z, output="uint8"), tok.decode_progressive(z, output="pil"), strict=True
    ):
        assert pixels.dtype == torch.uint8
        assert pixels.shape == preview.shape
        assert [picture.size for picture in pictures] == [(preview.shape[3], preview.shape[2])] * 2
        assert np.array_equal(np.asarray(pictures[1]), pixels[1].permute(1, 2, 0).numpy())
    assert torch.equal(tok.decode(z, output="uint8"), pixels)


def test_a_preview_comes_before_the_next_stage_begins():
    tok = multi(steps=2)
    calls = record_calls(tok.decoder)
    stream = tok.decode_progressive(randn(1, 4, 4, 8))
    assert calls == []
    first = next(stream)
    assert [x_t.shape[2:] for x_t, _, _ in calls] == [(8, 16)] * 2
    assert not first.requires_grad
    assert len(list(stream)) == 2
    assert [x_t.shape[2:] for x_t, _, _ in calls] == [(8, 16)] * 2 + [(16, 32)] * 2 + [(32, 64)] * 2


@pytest.mark.parametrize("noise", ["gaussian", "zero"])
def test_a_picture_does_not_depend_on_its_batch(noise):
    tok, z = multi(noise=noise), randn(3, 4, 3, 5)
    together = list(tok.decode_progressive(z, seed=[7, 1, 4]))
    for i, seed in enumerate([7, 1, 4]):
        for preview, alone in zip(together, tok.decode_progressive(z[i : i + 1], seed=[seed]), strict=True):
            assert torch.allclose(preview[i : i + 1], alone, atol=1e-4)  # kernels round by batch
    if noise == "zero":
        assert torch.equal(tok.decode(z, seed=0), tok.decode(z, seed=9))


def test_noise_is_that_of_a_single_scale():
    """The coarsest field is made of the noise that a seed means everywhere."""
    tok = multi()
    seen = record_calls(tok.decoder)
    next(tok.decode_progressive(randn(2, 4, 4, 4), seed=5))
    white = draw_noise((3, 32, 32), [5, 6])
    assert torch.allclose(seen[0][0], 4 * torch.nn.functional.avg_pool2d(white, 4), atol=1e-6)


def test_guidance():
    tok, z = multi(decoder={"null_latent": True}), randn(2, 4, 4, 4)
    decoder = tok.decoder
    state, level = randn(2, 3, 16, 16), torch.tensor([0.5, 0.7])
    with torch.no_grad():
        given, absent = (decoder(state, level, latent, 1) for latent in (z, decoder.without(z)))
        for scale in (0.0, 1.0, 2.5):
            expected = absent + scale * (given - absent)
            assert torch.allclose(predictor(decoder, z, scale)(state, level, 1), expected, atol=1e-5)
    assert torch.equal(tok.decode(z, guidance=1.0), tok.decode(z))
    guided = tok.decode(z, guidance=2.0)
    assert not torch.allclose(guided, tok.decode(z))
    tok.config.sampler.guidance = 2.0
    assert torch.equal(tok.decode(z), guided)


def test_save_and_load(tmp_path):
    tok, z = multi(decoder={"null_latent": True}, guidance=1.5), randn(1, 4, 4, 4)
    tok.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config == tok.config
    assert torch.equal(loaded.decode(z), tok.decode(z))
    config = json.loads((tmp_path / "model/config.json").read_text())
    for part, names in {"decoder": ("stages", "null_latent"), "sampler": ("stages", "guidance")}.items():
        for name in names:
            del config[part][name]  # as written before there were stages
    assert type(tok.config).from_dict({k: v for k, v in config.items() if k in ("encoder", "decoder", "sampler")})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 8}, "tile=8"),
        ({"tile": 16, "overlap": 16}, "overlap=16 with tile=16"),
        ({"overlap": 16}, "overlap=16 without tile"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2**15}, "at most 10,000"),
        ({"seed": [1, 2]}, "2 entries for a batch of 1"),
        ({"noise": "pink"}, "pink"),
        ({"output": "jpeg"}, "jpeg"),
        ({"size": (40, 8)}, "does not fit"),
        ({"guidance": 2.0}, "without a null latent"),
    ],
)
def test_mistakes_in_decoding(options, words):
    tok, z = multi(), randn(1, 4, 4, 4)
    with pytest.raises(UserError, match=words):
        tok.decode(z, **options)
    if "overlap" not in options:
        with pytest.raises(UserError, match=words):  # at once, not at the first picture
            tok.decode_progressive(z, **options)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2])
def test_stages_go_in_tiles_too(steps):
    """Every step of every stage; tiles are the whole where a pixel sees no further than half of what they share."""
    shape = {"norm": "local", "middle_blocks": 0, "modulation": False, "down": [0, 1], "up": [1, 1]}
    tok = multi(steps=steps, decoder=shape).double()
    overlap, z = 2 * tok.decoder.reach(), randn(2, 4, 40, 30).double()
    options = {"steps": steps, "size": (315, 236)}
    whole = previews(tok.decoder, z, [3, 4], **options)
    tiled = previews(tok.decoder, z, [3, 4], **options, tile=overlap + 48, overlap=overlap)
    assert [p.shape for p in tiled] == [p.shape for p in whole]
    for ours, expected in zip(tiled, whole, strict=True):
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    blended = previews(tok.decoder, z, [3, 4], **options, tile=96)
    assert (blended[-1] - whole[-1]).abs().max() > 1e-3 * whole[-1].abs().max()
    one = previews(tok.decoder, z[1:], [4], **options, tile=96)  # a sample does not depend on its batch
    assert torch.equal(one[-1], blended[-1][1:])
    assert torch.equal(tok.decode(z, seed=3, tile=4096), tok.decode(z, seed=3))


def test_guidance_of_a_single_scale_is_refused():
    with pytest.raises(UserError, match="null latent"):
        tiny_tokenizer().decode(randn(1, 4, 2, 2), guidance=3.0)


@pytest.mark.parametrize(
    ("decoder", "sampler", "words"),
    [
        ({"stages": 3}, {"stages": 2}, "sampler.stages=2 with decoder.stages=3"),
        ({}, {"stages": 2}, "sampler.stages=2 with decoder.stages=1"),
        (
            {"stages": 3, "null_latent": True},
            {"stages": 1, "guidance": 2.0},
            "guidance=2.0 needs sampler.stages above 1",
        ),
        ({"stages": 0}, {}, "decoder.stages is 0"),
        ({"null_latent": True}, {}, "null_latent needs decoder.stages"),
        ({"stages": 2}, {"stages": 2, "guidance": 2.0}, "guidance=2.0 needs decoder.null_latent"),
    ],
)
def test_mistakes_in_a_model(decoder, sampler, words):
    with pytest.raises(UserError, match=words):
        tiny_tokenizer(decoder=decoder, **sampler)


def test_what_needs_one_scale_says_so():
    tok = multi()
    with pytest.raises(UserError, match=r"3 stages.*cannot be folded"):
        tok.optimize()
    diffusers = pytest.importorskip("diffusers")
    assert diffusers
    from monobath.integrations.diffusers import AutoencoderMonobath

    with pytest.raises(UserError, match="3 stages cannot become a diffusers model"):
        AutoencoderMonobath.from_tokenizer(tok)


# ---- the objective --------------------------------------------------------------------------------------------------


def drawn(objective, x, seed: int = 0, ones: float = 0.5, judge=None):
    f = objective.tokenizer.factor
    grid = getattr(objective, "grid", ())
    latents = (len(x), 4, x.shape[2] // f, x.shape[3] // f)
    draws = Draws.make(seed, tuple(x.shape), latents, TimesConfig(ones=ones), grid=grid)
    objective.draw(draws, seed, 0, 1)
    return objective(Batch(images=x, draws=draws, judge=judge))


def test_small_noise_levels_can_count_more():
    """Each stage's loss by its own noise level, which a stage's local time is not."""
    x, tokenizer = rand_images(3, 3, 32, 64), multi()
    noise, latent_noise, t = randn(3, 3, 32, 64), torch.zeros(3, 4, 4, 8), torch.full((3,), 0.5)
    plain, weighted = (
        losses_of(
            StagedObjective(tokenizer, LossConfig(perceptual=0, time_power=power), ScalesConfig(), train_encoder=False),
            x,
            t,
            noise,
            latent_noise,
            stages=(0, 1, 2),
        ).parts
        for power in (0.0, 2.0)
    )
    for stage in ScaleSchedule(3):
        name = f"flow_stage{stage.index}"
        expected = plain[name] * stage.level(torch.tensor(0.5)) ** -2
        torch.testing.assert_close(weighted[name], expected)


def test_stages_are_balanced():
    generator = torch.Generator().manual_seed(0)
    for stages in (1, 2, 3, 4):
        found = assign_stages(12, stages, generator)
        assert all(sorted(found[i : i + stages]) == list(range(stages)) for i in range(0, 12, stages))
    counts = np.bincount([assign_stages(4, 3, generator)[3] for _ in range(300)], minlength=3)
    assert counts.min() > 60  # what is left over goes to any stage
    objective = StagedObjective(multi(), QUIET, ScalesConfig(), train_encoder=False)

    def own(seed, batch, rank, world):
        draws = Draws(torch.ones(batch), torch.empty(0), torch.empty(0))
        objective.draw(draws, seed, rank, world)
        return draws.stages, draws.dropped

    whole = own(5, 12, 0, 1)
    parts = [own(5, 6, rank, 2) for rank in (0, 1)]
    assert whole == tuple(a + b for a, b in zip(*parts, strict=True))
    assert own(6, 12, 0, 1) != whole


@pytest.mark.parametrize("kind", KINDS)
def test_losses_vanish_at_the_truth_only(kind, monkeypatch):
    tok = multi(decoder={"patch": 1, "prediction": kind})
    objective = StagedObjective(tok, LossConfig(perceptual=0.1), ScalesConfig(), train_encoder=False)
    x, stages = rand_images(6, 3, 32, 64), (0, 1, 2, 2, 1, 0)
    draws = Draws.make(0, tuple(x.shape), (6, 4, 4, 8), TimesConfig(ones=0.5))
    images, fields, schedule = image_pyramid(x, 3), noise_pyramid(draws.noise, 3), ScaleSchedule(3)
    seen = []

    def truth(state, level, z, stage):
        rows = [i for i, s in enumerate(stages) if s == stage]
        image, white = images[stage][rows], fields[stage][rows]
        assert torch.allclose(level, schedule[stage].level(draws.t[rows]))
        assert torch.allclose(state, schedule[stage].state(image, white, draws.t[rows]), atol=1e-6)
        seen.append(state.shape)
        return (image if kind == "x" else schedule[stage].velocity(image, white)) + off

    monkeypatch.setattr(tok.decoder, "forward", truth)
    given = (objective, x, draws.t, draws.noise, draws.latent_noise)
    off = 0.0
    losses = losses_of(*given, stages=stages).named
    assert seen == [(2, 3, 8, 16), (2, 3, 16, 32), (2, 3, 32, 64)]  # a pass a stage
    assert all(value < 1e-8 for value in losses.values())
    off = 0.5
    learned = losses_of(*given, stages=stages)
    losses = learned.named
    assert [losses[f"flow_stage{s}"].item() for s in range(3)] == pytest.approx([0.25] * 3, rel=1e-3)
    assert losses["flow"].item() == pytest.approx(0.25, rel=1e-3)
    assert losses["perceptual"] > 1e-4
    assert losses["loss"].item() == pytest.approx((losses["flow"] + 0.1 * losses["perceptual"] / 3).item())
    assert torch.equal(learned.real, x[2:4])
    assert learned.clean.shape == (2, 3, 32, 64)


def test_everything_of_the_decoder_learns():
    tok = multi(decoder={"null_latent": True})
    objective = StagedObjective(tok, QUIET, ScalesConfig(drop=0.4), train_encoder=False)
    x = rand_images(6, 3, 32, 64)
    draws = Draws.make(0, (6, 3, 32, 64), (6, 4, 4, 8), TimesConfig())
    objective.draw(draws, 0, 0, 1)
    assert any(draws.dropped)
    assert dead_parameters(tok.decoder, lambda: drawn(objective, x).total[None] * 1e4) == []
    assert tok.decoder.stage_embedding.grad.abs().amax(1).min() > 0  # each stage's own


def test_the_encoder_learns_too():
    tok = multi()
    objective = StagedObjective(tok, LossConfig(kl=1e-3, perceptual=0.0), ScalesConfig(), train_encoder=True)
    losses = drawn(objective, rand_images(3, 3, 32, 32)).named
    losses["loss"].backward()
    assert "kl" in losses
    assert all(p.grad is not None and p.grad.any() for p in tok.encoder.parameters())


def test_a_batch_without_the_last_stage_is_refused():
    objective = StagedObjective(multi(), QUIET, ScalesConfig(), train_encoder=False)
    x = rand_images(2, 3, 32, 32)
    draws = Draws.make(0, tuple(x.shape), (2, 4, 4, 4), TimesConfig())
    with pytest.raises(ValueError, match="last of 3 stages"):
        losses_of(objective, x, draws.t, draws.noise, draws.latent_noise, stages=(0, 1))


def test_sigmoid_weight_is_the_formula_and_finite_everywhere():
    t = torch.linspace(0.01, 0.99, 50).double()
    level = 2 * torch.log((1 - t) / t)
    naive = math.exp(-3) * torch.sigmoid(level + 3) / (t * (1 - t))
    assert torch.allclose(sigmoid_weight(t.float()).double(), naive, rtol=1e-4)
    ends = sigmoid_weight(torch.tensor([0.0, 1e-30, 1.0]))
    assert torch.isfinite(ends).all()
    assert ends[2] < 2e-3
    x = rand_images(6, 3, 32, 32)
    plain, weighted = (
        drawn(StagedObjective(multi(), QUIET, ScalesConfig(weighting=w), train_encoder=False), x).named
        for w in ("none", "sigmoid")
    )
    assert torch.isfinite(weighted["loss"])
    assert not torch.equal(plain["loss"], weighted["loss"])


@pytest.mark.parametrize("weighting", ["sigmoid", "sigmoid-local"])
def test_the_sigmoid_weight_is_of_noise_levels_or_of_local_times(weighting):
    x, tokenizer = rand_images(3, 3, 32, 64), multi()
    noise, latent_noise, t = randn(3, 3, 32, 64), torch.zeros(3, 4, 4, 8), torch.full((3,), 0.4)

    def parts(scales: ScalesConfig):
        objective = StagedObjective(tokenizer, QUIET, scales, train_encoder=False)
        return losses_of(objective, x, t, noise, latent_noise, stages=(0, 1, 2)).parts

    plain, weighted = parts(ScalesConfig()), parts(ScalesConfig(weighting=weighting))
    for stage in ScaleSchedule(3):
        time = t[:1] if weighting == "sigmoid-local" else stage.level(t[:1])
        name = f"flow_stage{stage.index}"
        torch.testing.assert_close(weighted[name], plain[name] * sigmoid_weight(time)[0])


def test_uniform_times():
    t = torch.sigmoid(randn(20_000))
    u = uniform_times(torch.cat([t, torch.ones(5)]))
    assert u[-5:].tolist() == [1.0] * 5
    quantiles = torch.quantile(u[:-5], torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert torch.allclose(quantiles, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), atol=0.02)
    x = rand_images(6, 3, 32, 32)
    a, b = (
        drawn(StagedObjective(multi(), QUIET, ScalesConfig(times=times), train_encoder=False), x).named
        for times in ("logit-normal", "uniform")
    )
    assert not torch.equal(a["loss"], b["loss"])


# ---- distillation ---------------------------------------------------------------------------------------------------


def distillation(
    steps: int = 3, *, loss: LossConfig = QUIET, renoise: bool = False, same_weights: bool = True, kind: str = "x"
) -> StagedDistillation:
    shape = {"dropout": 0.5, "patch": 1, "prediction": kind}
    teacher = multi(decoder=shape, power=3.0)
    student = multi(0 if same_weights else 1, decoder=shape)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    config = DistillConfig(teacher="the teacher", steps=steps)
    return StagedDistillation(student, teacher, loss, config, ScalesConfig(renoise=renoise))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_a_one_step_teacher_has_no_flow_loss(kind):
    made = distillation(1, kind=kind).eval()
    losses = drawn(made, rand_images(2, 3, 32, 64), ones=1.0).named
    assert all(value < 1e-8 for name, value in losses.items() if name.startswith("flow"))
    other = drawn(distillation(4, kind=kind).eval(), rand_images(2, 3, 32, 64), ones=1.0).parts
    assert all(other[f"flow_stage{s}"] > 1e-6 for s in range(3))  # steps count


def test_the_student_is_trained_at_what_decoding_does():
    made = distillation(2).eval()
    x, z = rand_images(2, 3, 32, 64), randn(2, 4, 4, 8)
    noise = draw_noise((3, 32, 64), [7, 8])
    moments = torch.cat([z, torch.full_like(z, -30.0)], 1)
    losses = losses_of(made, x, torch.ones(2), noise, torch.zeros_like(z), moments)
    decoded = made.tokenizer.decode(z, seed=7)  # three calls of random weights: rounding is amplified
    assert torch.allclose(losses.clean.clamp(-1, 1), decoded, atol=1e-3)
    assert torch.equal(losses.real, x)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_ends_where_the_teacher_ends(kind):
    """A student that gave the target would hand over exactly what the teacher's many steps end in."""
    made = distillation(4, kind=kind).train()  # the teacher stays in evaluation mode
    schedule, z = ScaleSchedule(3), randn(2, 4, 4, 8)
    for s, size in enumerate([(8, 16), (16, 32), (32, 64)]):
        state = randn(2, 3, *size, seed=s)
        end = made.teachers(state, z, s, torch.ones(2))
        assert torch.equal(made.teachers(state, z, s, torch.ones(2)), end)
        assert not end.requires_grad
        image = schedule[s].clean(end - state, state, torch.ones(2), "v")
        assert torch.allclose(schedule[s].step(image, state, torch.ones(2), torch.zeros(2), "x"), end, atol=1e-4)
        if s == 2:
            assert torch.allclose(image, end, atol=1e-5)


def test_teachers_stages_are_those_of_its_decoding():
    made = distillation(3)
    z, white = randn(1, 4, 4, 4), draw_noise((3, 32, 32), [2])
    fields, schedule, state = noise_pyramid(white, 3), ScaleSchedule(3), None
    for s in range(3):
        start = fields[0] if state is None else schedule.hand_over(state, s - 1, fields[s])
        state = made.teachers(start, z, s, torch.ones(1))
    assert torch.allclose(state.clamp(-1, 1), made.teacher.decode(z, seed=2, steps=3), atol=1e-5)


def test_a_guided_teacher_guides():
    made = distillation(2)
    teacher = multi(decoder={"null_latent": True, "patch": 1}, guidance=3.0)
    student = multi(decoder={"null_latent": True, "patch": 1})
    config = DistillConfig(teacher="t", steps=2)
    made = StagedDistillation(student, teacher, QUIET, config, ScalesConfig()).eval()
    state, z = randn(1, 3, 8, 8), randn(1, 4, 4, 4)
    guided = made.teachers(state, z, 0, torch.ones(1))
    teacher.config.sampler.guidance = 1.0
    assert not torch.allclose(made.teachers(state, z, 0, torch.ones(1)), guided)
    assert not student.decoder.null_latent.requires_grad  # the student is not guided


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_of_the_student_learns_and_nothing_of_the_teacher(renoise, kind):
    made = distillation(2, renoise=renoise, same_weights=False, kind=kind)
    names = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert names == {f"tokenizer.decoder.{name}" for name, _ in made.tokenizer.decoder.named_parameters()}
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    made.train()
    assert not made.teacher.training
    drawn(made.eval(), rand_images(2, 3, 32, 32)).total.backward()
    for name, parameter in made.tokenizer.decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert made.tokenizer.decoder.stage_embedding.grad.abs().amax(1).min() > 0
    assert all(p.grad is None for p in made.teacher.parameters())
    assert same(before, made.teacher.state_dict())
    assert not any("teacher" in name for name in made.state_dict())


def test_gradients_go_back_through_the_hand_overs():
    made = distillation(2, same_weights=False).eval()
    drawn(made, rand_images(2, 3, 32, 32)).parts["flow_stage2"].backward()
    assert made.tokenizer.decoder.stage_embedding.grad.abs().amax(1).min() > 0


def test_steps_towards_the_target_bring_the_student_nearer():
    made = distillation(3, same_weights=False).eval()
    optimizer = torch.optim.Adam(made.tokenizer.decoder.parameters(), lr=1e-2)
    found = []
    for _ in range(10):
        loss = drawn(made, rand_images(2, 3, 32, 32)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.5 * found[0]


def renoised(made: StagedDistillation, x: torch.Tensor, level: float):
    """Losses of MSD's published form at that noise level."""
    draws = Draws.make(0, tuple(x.shape), (len(x), 4, x.shape[2] // 8, x.shape[3] // 8), TimesConfig(ones=1.0))
    draws.level = level
    return made(Batch(images=x, draws=draws)), draws


def test_the_published_level_is_one_per_batch():
    made, found = distillation(1, renoise=True), []
    for seed in range(300):
        levels = set()
        for rank in range(2):
            draws = Draws(torch.ones(3), torch.empty(0), torch.empty(0))
            made.draw(draws, seed, rank, 2)
            levels.add(draws.level)
        found += levels
    assert len(found) == 300  # both processes have the same one
    quantiles = torch.quantile(torch.tensor(found), torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.06)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("level", "first"), [(0.9, 0), (0.5, 1), (0.3, 2), (0.02, 2)])
def test_the_published_distillation(level, first, kind):
    """The student's picture, averaged down and noised, goes on through the stages that are left; end states count."""
    made, x = distillation(1, renoise=True, same_weights=False, kind=kind).eval(), rand_images(2, 3, 32, 64)
    schedule, calls, ends = ScaleSchedule(3), record_calls(made.teacher.decoder), []
    losses, draws = renoised(made, x, level)
    assert [stage for _, _, stage in calls] == list(range(first, 3))
    assert [t.unique().item() for _, t, _ in calls] == pytest.approx(
        [level, *(schedule[s].start for s in range(first + 1, 3))], abs=1e-6
    )
    fields, small = noise_pyramid(draws.noise, 3), image_pyramid(losses.clean, 3)[first]
    assert torch.allclose(calls[0][0], (1 - level) * small + level * fields[first], atol=1e-6)

    z = made._encoded(Batch(images=x, draws=draws))[1]
    with torch.no_grad():
        for model in (made.tokenizer, made.teacher):
            state, own = fields[0], []
            for stage in schedule:
                tau = 1.0
                if model is made.teacher:
                    if stage.index < first:
                        continue
                    if stage.index == first:
                        state = calls[0][0]
                        tau = (level - stage.end) / (stage.start - stage.end)
                tau = torch.full((2,), tau)
                prediction = predictor(model.decoder, z)(state, stage.level(tau), stage.index)
                own.append(stage.step(prediction, state, tau, torch.zeros(2), kind))
                if stage.index < 2:
                    state = schedule.hand_over(own[-1], stage.index, fields[stage.index + 1])
            ends.append(own[-3 + first :])
        expected = sum((a - b).square().mean() for a, b in zip(*ends, strict=True)) / (1 + level)
    torch.testing.assert_close(losses.parts["flow"].detach(), expected, rtol=1e-3, atol=1e-6)
    assert torch.allclose(losses.target, ends[1][-1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_its_teacher_has_no_published_loss_from_pure_noise(kind):
    made, x = distillation(1, renoise=True, kind=kind).eval(), rand_images(2, 3, 32, 64)
    assert renoised(made, x, 1.0)[0].parts["flow"] < 1e-8
    assert renoised(made, x, 0.6)[0].parts["flow"] > 1e-6


def test_a_guided_student_is_trained_at_what_decoding_does():
    shape = {"null_latent": True, "patch": 1}
    teacher, student = multi(decoder=shape), multi(1, decoder=shape, guidance=2.0)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    config = DistillConfig(teacher="t", steps=1, student_guidance=2.0)
    made = StagedDistillation(student, teacher, QUIET, config, ScalesConfig(renoise=True)).eval()
    x, z, noise = rand_images(1, 3, 32, 64), randn(1, 4, 4, 8), draw_noise((3, 32, 64), [7])
    moments = torch.cat([z, torch.full_like(z, -30.0)], 1)
    losses = losses_of(made, x, torch.ones(1), noise, torch.zeros_like(z), moments, level=0.5)
    assert torch.allclose(losses.clean.clamp(-1, 1), student.decode(z, seed=7), atol=1e-3)
    losses.total.backward()
    assert student.decoder.null_latent.grad.any()


def test_the_published_recipe(tmp_path):
    """One step a stage, 2.5·(1/(1+u)·errors + 0.1·LPIPS); it takes the shape of the teacher that is named."""
    multi(decoder={"null_latent": True}).save_pretrained(tmp_path / "teacher")
    recipe = load_recipe("msd-distill", [f"distill.teacher={tmp_path / 'teacher'}", "distill.student_guidance=1.5"])
    assert isinstance(recipe, DistillationRecipe)
    assert recipe.scales == ScalesConfig(renoise=True)
    assert (recipe.distill.steps, recipe.loss.flow, recipe.loss.perceptual) == (1, 2.5, 0.25)
    assert (recipe.model.sampler.steps, recipe.model.sampler.guidance) == (1, 1.5)
    assert load_recipe("msd-distill").scales == ScalesConfig(renoise=True)  # the teacher is named later
    multi().save_pretrained(tmp_path / "unguided")
    with pytest.raises(UserError, match=r"student_guidance is 1.5, but the student has no null latent"):
        load_recipe("msd-distill", [f"distill.teacher={tmp_path / 'unguided'}", "distill.student_guidance=1.5"])
    tiny_tokenizer().save_pretrained(tmp_path / "single")
    with pytest.raises(UserError, match=r"scales.\* is for multi-scale decoders"):
        load_recipe("msd-distill", [f"distill.teacher={tmp_path / 'single'}"])


def test_a_teacher_of_other_stages_is_refused():
    with pytest.raises(UserError, match="teacher has 1 stages, the student 3"):
        StagedDistillation(multi(), tiny_tokenizer(), QUIET, DistillConfig(teacher="t"), ScalesConfig())


def test_adversarial_losses_vanish_where_they_must():
    """Before its time the judge says 0, and the losses are those without one."""
    from accelerate import Accelerator

    loss = LossConfig(perceptual=0.0, adversarial=0.5, adversarial_start=0.5)
    x, judge = rand_images(3, 3, 32, 32), Adversary(loss, Accelerator(cpu=True), 1.0)
    for make in (
        lambda: distillation(2, same_weights=False),
        lambda: StagedObjective(multi(), QUIET, ScalesConfig(), train_encoder=False),
    ):
        objective = make().eval()
        without = drawn(objective, x).named
        early = drawn(objective, x, judge=judge.begin_step(0, 10)).named
        assert early.pop("adversarial") == 0
        assert all(torch.equal(without[name], value) for name, value in early.items())
        late = drawn(objective, x, judge=judge.begin_step(5, 10))
        assert late.parts["adversarial"] != 0
        late.total.backward()
        assert objective.tokenizer.decoder.stage_embedding.grad.any()
        assert judge.learn(late, 1) > 0


# ---- runs -----------------------------------------------------------------------------------------------------------


def scaled_recipe(folder, photos, *, loss: dict | None = None, scales: dict | None = None, **training):
    recipe = tiny_recipe(folder, photos, loss=loss, **training)
    decoder = dataclasses.replace(recipe.model.decoder, stages=3, null_latent=bool((scales or {}).get("drop")))
    recipe.model = dataclasses.replace(recipe.model, decoder=decoder, sampler=SamplerConfig(steps=2, stages=3))
    recipe.scales = ScalesConfig(**(scales or {}))
    recipe.training.batch_size = training.get("batch_size", 6)
    return dataclasses.replace(recipe)  # the recipe checks itself again


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos):
    """A multi-scale model after a few steps."""
    return train(scaled_recipe(tmp_path_factory.mktemp("scales") / "run", photos))


@pytest.mark.parametrize(
    "options",
    [
        {
            "scales": {"drop": 0.3, "times": "uniform", "weighting": "sigmoid"},
            "loss": {"perceptual": 0.1, "repa": 0.2},
            "steps": 3,
        },
        {"loss": {"adversarial": 0.5, "adversarial_start": 0.0}, "accumulation": 2, "batch_size": 12, "steps": 3},
    ],
)
def test_a_run_trains_logs_and_decodes(tmp_path, photos, options):
    model = train(scaled_recipe(tmp_path / "run", photos, **options))
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert {"flow", "flow_stage0", "flow_stage1", "flow_stage2"} <= logged[-1].keys()
    assert all(math.isfinite(value) for value in logged[-1].values())
    tok = Tokenizer.from_pretrained(model)
    assert tok.config.sampler.stages == tok.config.decoder.stages == 3
    assert tok.decoder.stage_embedding.abs().amax(1).min() > 0
    assert Image.open(tmp_path / "run/samples/step-00000003.png").size == (2 * 34 + 2, 2 * 34 + 2)


def test_training_learns_at_every_stage():
    objective = StagedObjective(multi(), QUIET, ScalesConfig(), train_encoder=False)
    x, found = rand_images(6, 3, 32, 32), []
    optimizer = torch.optim.Adam(objective.tokenizer.decoder.parameters(), lr=1e-2)
    for _ in range(12):
        losses = drawn(objective, x).named
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        found.append(torch.stack([losses[f"flow_stage{s}"].detach() for s in range(3)]))
    assert (found[-1] < 0.7 * found[0]).all()


def test_resumed_equals_uninterrupted(tmp_path, photos, monkeypatch):
    scales = {"drop": 0.3}
    whole = train(scaled_recipe(tmp_path / "whole", photos, scales=scales))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda run: run.done == 4)
        with pytest.raises(Interrupted):
            train(scaled_recipe(tmp_path / "part", photos, scales=scales))
    assert same(weights(train(scaled_recipe(tmp_path / "part", photos, scales=scales))), weights(whole))


def test_a_multi_scale_model_starts_from_a_single_scale_one(tmp_path, photos):
    first = train(tiny_recipe(tmp_path / "first", photos, steps=3))
    recipe = scaled_recipe(tmp_path / "second", photos, steps=1, ema=0.0, scales={"drop": 0.2}, train_encoder=False)
    recipe.init, recipe.optimizer.lr, recipe.optimizer.weight_decay = str(first), 0.0, 0.0
    old, new = weights(first), weights(train(recipe))
    assert all(torch.equal(new[name], value) for name, value in old.items())
    assert new.keys() - old.keys() == {"decoder.stage_embedding", "decoder.null_latent"}
    assert not any(new[name].any() for name in new.keys() - old.keys())


def test_a_distillation_runs_and_gives_one_step_a_stage(tmp_path, photos, trained):
    recipe = scaled_recipe(tmp_path / "run", photos, train_encoder=False, loss={"perceptual": 0.1})
    recipe = of_kind(DistillationRecipe, recipe, distill=DistillConfig(teacher=str(trained), steps=3))
    before = (trained / "model.safetensors").read_bytes()
    student = Tokenizer.from_pretrained(train(recipe))
    assert (trained / "model.safetensors").read_bytes() == before
    assert (student.config.sampler.steps, student.config.sampler.stages) == (1, 3)
    assert {"flow_stage0", "flow_stage2", "perceptual"} <= rows(tmp_path / "run")[-2].keys()
    old, new = weights(trained), student.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name.startswith("encoder."))


# ---- recipes and the command line -----------------------------------------------------------------------------------


def test_the_packaged_recipes():
    recipe = load_recipe("cpu-progressive")
    assert recipe.model.decoder.stages == recipe.model.sampler.stages == 3
    assert recipe.model.encoder == Tokenizer.from_pretrained("f8c4").config.encoder
    assert load_recipe("cpu-progressive-distill").distill.steps == recipe.model.sampler.steps


STAGES = ["model.decoder.stages=3", "model.sampler.stages=3"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.decoder.stages=3"], "model.decoder.stages is 3 and model.sampler.stages 1"),
        ([*STAGES, "data.size=48", "data.scale=[48,64]"], "data.size=48 must be divisible by 32.*each of 3 stages"),
        (["scales.weighting=sigmoid"], "scales.* is for multi-scale decoders"),
        ([*STAGES, "loss.space=v"], "learns in the space of what it predicts"),
        ([*STAGES, "scales.drop=0.1"], "give both or neither"),
        ([*STAGES, "scales.drop=1.5"], "scales.drop is 1.5"),
        ([*STAGES, "model.decoder.null_latent=true"], "give both or neither"),
        ([*STAGES, "scales.renoise=true"], "renoise is for distillation"),
        ([*STAGES, "distill.teacher=t", "init=f8c4", "training.train_encoder=false", "distill.student_steps=2"],
         "1 step a stage"),
        ([*STAGES, "distill.teacher=t", "init=f8c4", "training.train_encoder=false", "scales.times=uniform"],
         "only renoise counts"),
        ([*STAGES, "scales.times=uniform", "times.mean=-1"], "times.mean=-1, times.std=1 are for logit-normal times"),
        ([*STAGES, "distill.teacher=t", "init=f8c4", "training.train_encoder=false", "loss.time_power=1"],
         "would not act on a student of one step a stage"),
        ([*STAGES, "distill.teacher=t", "training.train_encoder=false", "distill.perceptual_to=teacher"],
         "several stages learn from the image"),
        (["scales.time=uniform"], "nearest valid one is scales.times"),
    ],
)  # fmt: skip
def test_mistakes_in_recipes(overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe("cpu-default", overrides)


def test_too_small_a_batch_is_refused(tmp_path, photos):
    with pytest.raises(UserError, match="gives 4 images a pass: 3 stages need a multiple of 3, or at least 5"):
        train(scaled_recipe(tmp_path / "run", photos, batch_size=4))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    multi().save_pretrained(folder / "multi")
    tiny_tokenizer().save_pretrained(folder / "single")
    return folder


def photo(path, width: int, height: int) -> str:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def test_reconstruct_writes_previews(models, tmp_path, capsys):
    pictures = [photo(tmp_path / name, *size) for name, size in
                {"a.png": (32, 32), "a.8.png": (50, 37), "dot.png": (1, 1)}.items()]  # fmt: skip
    out = tmp_path / "out"
    options = ["--out", str(out), "--model", str(models / "multi"), "--seed", "3"]
    assert main(["reconstruct", *pictures, "--progressive", *options]) == 0
    sizes = {path.name: Image.open(path).size for path in out.iterdir()}
    assert sizes == {
        "a.png": (32, 32), "a.8-2.png": (8, 8), "a.16.png": (16, 16),  # a.8.png is another picture's
        "a.8.png": (50, 37), "a.8.13x10.png": (13, 10), "a.8.25x19.png": (25, 19),
        "dot.png": (1, 1), "dot.1.png": (1, 1), "dot.1-2.png": (1, 1),
    }  # fmt: skip
    assert "3 pictures" in capsys.readouterr().out
    final = np.asarray(Image.open(out / "a.png"))
    assert main(["reconstruct", *pictures, "--out", str(tmp_path / "plain"), *options[2:]]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "plain/a.png")), final)
    tok = Tokenizer.from_pretrained(models / "multi")
    first, *_ = tok.decode_progressive(tok.encode(Image.open(pictures[0])).mode(), seed=3, output="uint8")
    assert np.array_equal(np.asarray(Image.open(out / "a.8-2.png")), first[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("single", ["--progressive"], ["--progressive", "has one stage"]),
        ("multi", ["--progressive", "--tile", "8"], ["tile=8", "at least"]),
        ("multi", ["--tile", "8"], ["tile=8"]),
        ("multi", ["--engine", "torch"], ["3 stages", "cannot be folded"]),
        ("multi", ["--steps", "0"], ["steps=0"]),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, model, options, words):
    source = photo(tmp_path / "a.png", 32, 32)
    command = ["reconstruct", source, "--out", str(tmp_path / "out"), "--model", str(models / model), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_export_of_several_stages_is_refused(models, tmp_path, capsys):
    pytest.importorskip("onnx")
    assert main(["export", str(models / "multi"), "--out", str(tmp_path / "out")]) == 2
    assert "3 stages: only one step can be exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_tells_the_stages(models, capsys):
    assert main(["info", str(models / "multi"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampler"]["stages"] == 3
    assert main(["info", str(models / "single"), "--json"]) == 0
    assert "stages" not in json.loads(capsys.readouterr().out)["sampler"]


def test_first_weights_do_not_depend_on_the_stages():
    found = []
    for stages in (1, 3):
        torch.manual_seed(0)
        config = multi(decoder={"stages": stages}, stages=stages).config
        torch.manual_seed(0)
        found.append(Tokenizer(config).state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
