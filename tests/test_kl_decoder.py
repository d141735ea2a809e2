"""The KL-VAE baseline in our own loop: the decoder, with and without its discriminator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import losses_of, rand_images, randn, tiny_tokenizer
from test_training import photos as photos  # the fixture
from test_training import rows, same, tiny_recipe, weights

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL

from monobath import Tokenizer, UserError
from monobath.decoders import UViTConfig
from monobath.decoders.kl import KLConfig, KLDecoder
from monobath.models.blocks import Conv2d
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training import Interrupted, Run, checkpoints, load_recipe, train
from monobath.training.config import LossConfig
from monobath.training.objectives.base import AutoencoderObjective

CHANNELS = [8, 8, 16, 16]


def kl_recipe(run, photos, adversarial: float = 0.0, **training):
    recipe = tiny_recipe(
        run, photos, **({"train_encoder": False} | training),
        loss={"perceptual": 0.0, "adversarial": adversarial, "adversarial_start": 0.5},
    )  # fmt: skip
    recipe.model.decoder = KLConfig(channels=CHANNELS)
    recipe.model.sampler = SamplerConfig(steps=1, noise="zero")
    return dataclasses.replace(recipe)


def picture(decoder, z):
    f = decoder.config.factor
    return decoder(z.new_zeros(len(z), 3, z.shape[2] * f, z.shape[3] * f), z.new_ones(len(z)), z)


def test_it_is_the_decoder_of_autoencoder_kl():
    ours = KLDecoder(KLConfig(channels=CHANNELS))
    theirs = AutoencoderKL(
        block_out_channels=CHANNELS, layers_per_block=2, latent_channels=4, norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    theirs.decoder.load_state_dict(ours.decoder.state_dict())
    theirs.post_quant_conv.load_state_dict(ours.post_quant_conv.state_dict())
    z = randn(2, 4, 3, 5)
    with torch.no_grad():
        assert torch.equal(picture(ours, z), theirs.decode(z).sample)


def test_replicate_padding_is_theirs_with_gradients_that_compile():
    """PyTorch's own gradient of it fails, compiled for a CPU: every 3×3 convolution must be ours."""
    ours = KLDecoder(KLConfig(channels=CHANNELS, padding="replicate"))
    theirs = KLDecoder(KLConfig(channels=CHANNELS))
    theirs.load_state_dict(ours.state_dict())
    for module in theirs.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "replicate"
    z = randn(2, 4, 3, 5)
    torch.testing.assert_close(picture(ours, z), picture(theirs, z))
    wide = [m for m in ours.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(wide) > 8
    assert all(isinstance(module, Conv2d) for module in wide)


def test_objective_is_l1_and_its_discriminator_counts_when_told():
    recipe_loss = LossConfig(flow=2.0, perceptual=0.0)
    tokenizer = tiny_tokenizer(noise="zero")
    config = dataclasses.replace(tokenizer.config, decoder=KLConfig(channels=CHANNELS))
    tokenizer = Tokenizer(config)
    objective = AutoencoderObjective(tokenizer, recipe_loss, train_encoder=False)
    x, latent_noise = rand_images(2, 3, 16, 24), randn(2, 4, 2, 3)
    given = (objective, x, torch.ones(2), torch.zeros_like(x), latent_noise)
    losses = losses_of(*given).named
    posterior = tokenizer.encode(x)
    expected = (picture(tokenizer.decoder, posterior.mean + posterior.std * latent_noise) - x).abs().mean()
    assert losses.keys() == {"loss", "l1"}
    torch.testing.assert_close(losses["l1"], expected)
    torch.testing.assert_close(losses["loss"], 2 * expected)
    told = losses_of(*given, judge=lambda generated, reconstruction, last: generated.new_tensor(3.0))
    torch.testing.assert_close(told.total, 2 * expected + 3)


def test_it_trains_saves_loads_and_decodes(tmp_path, photos):
    folder = train(kl_recipe(tmp_path / "run", photos, steps=4))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert isinstance(tokenizer.decoder, KLDecoder)
    assert tokenizer.decode(torch.zeros(1, 4, 2, 3), size=(15, 20)).shape == (1, 3, 15, 20)
    assert {"l1", "loss"} <= next(row for row in rows(tmp_path / "run") if "loss" in row).keys()
    with pytest.raises(UserError, match="has a KL-VAE decoder"):
        tokenizer.optimize()


def test_with_a_discriminator_it_resumes_bit_for_bit(tmp_path, photos, monkeypatch):
    whole = train(kl_recipe(tmp_path / "whole", photos, adversarial=0.5))
    logged = [row for row in rows(tmp_path / "whole") if "loss" in row]
    heard = [row["adversarial"] != 0 for row in logged]
    assert heard == [False] * 3 + [True] * 3  # from half of the run on
    assert all(row["discriminator"] > 0 for row in logged)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda run: run.done == 4)
        with pytest.raises(Interrupted):
            train(kl_recipe(tmp_path / "part", photos, adversarial=0.5))
    trainer = checkpoints.latest(tmp_path / "part") / "trainer.pt"
    kept = trainer.read_bytes()
    damaged = torch.load(trainer, weights_only=True)
    del damaged["adversary"]["optimizer"]["state"][0]["exp_avg"]
    torch.save(damaged, trainer)
    with pytest.raises(UserError, match=r"does not fit this recipe .*its exp_avg of a weight"):
        train(kl_recipe(tmp_path / "part", photos, adversarial=0.5))
    trainer.write_bytes(kept)
    part = train(kl_recipe(tmp_path / "part", photos, adversarial=0.5))
    assert same(weights(part), weights(whole))
    without = train(kl_recipe(tmp_path / "without", photos))
    assert not same(weights(without), weights(whole))


def test_the_discriminator_learns_and_the_decoder_alone_hears_it(tmp_path, photos):
    run = Run(kl_recipe(tmp_path / "run", photos, adversarial=0.5, steps=40, sample_every=0))
    network = run.adversary.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run.train()
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())
    losses = [row["discriminator"] for row in rows(tmp_path / "run") if "discriminator" in row]
    assert sum(losses[1:10]) / 9 < 0.5 * losses[0]  # the decoder, not yet told, gives it an easy task
    assert not any("adversary" in name or "judge" in name for name in run.model.state_dict())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_our_decoder_takes_a_discriminator_too(tmp_path, photos):
    recipe = tiny_recipe(tmp_path / "run", photos, loss={"adversarial": 0.5, "adversarial_start": 0.0}, steps=3)
    assert (train(recipe) / "model.safetensors").is_file()
    assert all(row["adversarial"] != 0 for row in rows(tmp_path / "run") if "loss" in row)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KLConfig(channels=[8, 8]), "factor 8 needs 4 levels"),
        (lambda: TokenizerConfig(decoder=KLConfig(), sampler=SamplerConfig(steps=2, noise="zero")), "takes no noise"),
    ],
)
def test_mistakes_are_explained(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_models_of_before_kinds_load():
    """Where `kl_decoder` stood beside the shape of a decoder that was not there."""
    before = {"decoder": {"size": "S/2", "padding": "replicate"}, "sampler": {"noise": "zero"}, "kl_decoder": CHANNELS}
    assert TokenizerConfig.from_dict(before).decoder == KLConfig(channels=CHANNELS, padding="replicate")
    assert isinstance(TokenizerConfig.from_dict(before | {"kl_decoder": []}).decoder, UViTConfig)
    recipe = load_recipe("cpu-default", ["model.kl_decoder=[8, 8, 16, 16]"])
    assert recipe.model.decoder == KLConfig(channels=CHANNELS, latent_channels=16, padding="replicate")
    with pytest.raises(UserError, match="kl_decoder is '\\[8': expected a list"):
        load_recipe("cpu-default", ["model.kl_decoder=[8"])


def test_repa_needs_one_of_our_decoders(tmp_path, photos):
    recipe = kl_recipe(tmp_path / "run", photos)
    recipe.loss.repa = 0.25
    with pytest.raises(UserError, match="no block to align"):
        train(recipe)
