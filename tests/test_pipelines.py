"""FLUX.2's pipelines with an `AutoencoderMonobath`, and previews of pipelines at work; all parts tiny and random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randn, randomise, tiny_tokenizer
from PIL import Image
from test_autoencoder import generator, pipe_of

from monobath import Tokenizer, UserError
from monobath.autoencoders import as_encoder
from monobath.config import TokenizerConfig

diffusers = pytest.importorskip("diffusers")

from monobath.integrations.diffusers import AutoencoderMonobath, LatentPreviews  # noqa: E402

CHANNELS = 4
FAMILY = {
    "block_out_channels": [8, 8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 4, "latent_channels": CHANNELS,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 2, "layers_per_block": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def family():
    """FLUX.2's autoencoder, with statistics as a trained one has."""
    vae = randomise(diffusers.AutoencoderKLFlux2(**FAMILY)).eval()
    vae.bn.running_mean.copy_(randn(4 * CHANNELS))
    vae.bn.running_var.copy_(randn(4 * CHANNELS, seed=1).square() + 0.1)
    return vae


def retrofit(family_name: str, **published) -> Tokenizer:
    shape = {"factor": 8, "latent_channels": CHANNELS}
    own = {"size": "custom", "patch": 4, "channels": [8, 8], "middle_blocks": 0, "norm": "local", **shape}
    values = {"encoder": {"family": family_name, **shape}, "decoder": own, "sampler": {"noise": "zero"}, **published}
    return randomise(Tokenizer(TokenizerConfig.from_dict(values))).eval()


def flux2(vae):
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    ).eval()  # fmt: skip
    pipe = diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_flux2(pipe, **options):
    options = {"prompt_embeds": randn(1, 5, 16), "height": 48, "width": 64, "num_inference_steps": 2} | options
    return pipe(**options, generator=generator()).images


def test_flux2_s_pipeline_decodes_raw_latents_as_with_its_own_autoencoder(family):
    """The same latents reach `decode`: what the pipeline holds, by the statistics of the family's batch norm."""
    model = retrofit("flux2", **as_encoder(family).published)
    vae = AutoencoderMonobath.from_tokenizer(model)
    (picture,) = run_flux2(flux2(vae))
    assert picture.size == (64, 48)
    torch.manual_seed(0)
    pipe = flux2(vae)
    held = run_flux2(pipe, output_type="latent")
    torch.manual_seed(0)
    seen = []
    pipe.vae.decode = lambda z, return_dict=True: seen.append(z) or (torch.zeros(1, 3, 48, 64),)
    run_flux2(pipe)
    rows = held.transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(model.config.packing.unpack(rows), seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.config.packing.pack(seen[0]), rows, atol=1e-5, rtol=1e-5)
    std = (family.bn.running_var + family.config.batch_norm_eps).sqrt()[None, :, None, None]
    unpacked = diffusers.Flux2Pipeline._unpatchify_latents(rows * std + family.bn.running_mean[None, :, None, None])
    torch.testing.assert_close(seen[0], unpacked, atol=1e-4, rtol=1e-4)


def test_normalised_latents_reach_the_decoder_as_the_pipeline_holds_them(tmp_path):
    vae = AutoencoderMonobath.from_tokenizer(retrofit("taef2"))
    assert vae.config.batch_norm_eps == 0
    assert torch.equal(vae.bn.running_mean, torch.zeros(16))
    assert torch.equal(vae.bn.running_var, torch.ones(16))
    vae.save_pretrained(tmp_path)
    again = AutoencoderMonobath.from_pretrained(tmp_path)
    assert again.whole.takes_normalised
    assert run_flux2(flux2(again))[0].size == (64, 48)


def test_statistics_survive_files_and_come_from_an_encoder_for_older_models(family, tmp_path):
    published = as_encoder(family).published
    model = AutoencoderMonobath.from_tokenizer(retrofit("flux2", **published))
    model.save_pretrained(tmp_path)
    kept = AutoencoderMonobath.from_pretrained(tmp_path)
    assert torch.equal(kept.bn.running_mean, family.bn.running_mean)
    assert kept.config.batch_norm_eps == family.config.batch_norm_eps
    older = retrofit("flux2")
    with pytest.raises(UserError, match="flux2=WHERE"):
        AutoencoderMonobath.from_tokenizer(older).bn  # noqa: B018
    older.attach_encoder(as_encoder(family))
    assert torch.equal(AutoencoderMonobath.from_tokenizer(older).bn.running_var, family.bn.running_var)
    assert not hasattr(AutoencoderMonobath.from_tokenizer(tiny_tokenizer()), "bn")


def test_raw_and_normalised_latents_are_not_taken_for_one_another(family):
    with pytest.raises(UserError, match=r"makes raw latents .* normalised ones: give taef2=WHERE"):
        retrofit("taef2").attach_encoder(as_encoder(family))
    with pytest.raises(UserError, match="for raw latents"):
        retrofit("taef2", normalised=True, packed_mean=[0.0] * 16, packed_variance=[1.0] * 16)
    with pytest.raises(UserError, match="4 each for every one of the 4"):
        retrofit("flux2", packed_mean=[0.0] * 4, packed_variance=[1.0] * 4)


# ---- previews ---------------------------------------------------------------------------------------------------


def test_previews_change_nothing_and_are_the_decoder_s_pictures(tmp_path):
    model = tiny_tokenizer(noise="zero")
    model.config.scaling_factor, model.config.shift_factor = 0.5, 0.2
    torch.manual_seed(0)
    pipe = pipe_of(diffusers.StableDiffusionPipeline, AutoencoderMonobath.from_tokenizer(model))
    options = {"height": 48, "width": 64, "num_inference_steps": 3, "num_images_per_prompt": 2}
    plain = pipe("a", **options, generator=generator()).images
    held = []

    def keeping(previews):
        def call(*given):
            held.append(given[3]["latents"].clone())
            return previews(*given)

        return call

    previews = LatentPreviews(model, out=tmp_path, every=2, notebook=False)
    watched = pipe("a", **options, generator=generator(), callback_on_step_end=keeping(previews)).images
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(plain, watched, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000.png", "step-002.png"]
    expected = model.decode(held[2] / 0.5 + 0.2, output="pil")
    with Image.open(tmp_path / "step-002.png") as picture:
        assert picture.size == (128, 48)
        halves = [picture.crop((64 * i, 0, 64 * i + 64, 48)) for i in range(2)]
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(halves, expected, strict=True))


def test_previews_of_packed_latents(family, tmp_path):
    model = retrofit("flux2", **as_encoder(family).published)
    pipe = flux2(AutoencoderMonobath.from_tokenizer(model))
    previews = LatentPreviews(model, out=tmp_path, size=(48, 64))
    final = run_flux2(pipe, callback_on_step_end=previews)[0]
    assert np.abs(np.asarray(previews.latest).astype(int) - np.asarray(final)).max() <= 1  # the last step's latents
    with pytest.raises(UserError, match=r"not square: give size"):
        LatentPreviews(model, out=tmp_path).raw(randn(1, 12, 16))
    flux = LatentPreviews(tiny_tokenizer(), size=(48, 64))  # FLUX packs, and does not normalise
    z = randn(1, 4, 6, 8)
    rows = diffusers.FluxPipeline._pack_latents(z, 1, 4, 6, 8)
    torch.testing.assert_close(flux.raw(rows), z)


def test_previews_in_a_notebook_take_one_another_s_place(monkeypatch, tmp_path):
    ipython = pytest.importorskip("IPython")
    shown = []

    class Handle:
        def update(self, picture):
            shown.append(("update", picture))

    def display(picture, display_id):
        shown.append(("display", picture))
        return Handle()

    monkeypatch.setattr(ipython.display, "display", display)
    previews = LatentPreviews(tiny_tokenizer(), out=tmp_path / "none", notebook=True)
    for step in range(3):
        assert previews(None, step, 0, {"latents": randn(1, 4, 2, 3, seed=step)}) == {}
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert not (tmp_path / "none").exists()


def test_other_latents_are_refused_in_words():
    previews = LatentPreviews(tiny_tokenizer())
    for latents in (randn(1, 16, 4, 4), randn(1, 4, 4), randn(4, 4)):
        with pytest.raises(UserError, match="previews' decoder takes 4 channels"):
            previews.raw(latents)
    with pytest.raises(UserError, match="every is 0"):
        LatentPreviews(tiny_tokenizer(), every=0)
