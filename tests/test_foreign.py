"""Laws of foreign encoders: frozen, exact, never stored; decoders of their latents train, save, load and decode."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import rand_images, randn, randomise
from safetensors.torch import load_file, save_file
from test_docs import blocks
from test_training import photos as photos  # the fixture
from torch import nn

from monobath import Tokenizer, UserError
from monobath.autoencoders import as_encoder
from monobath.cli import main
from monobath.data import Crops, encoding
from monobath.models import taesd
from monobath.models.encoder import FAMILIES, EncoderConfig, Posterior
from monobath.models.frozen import NO_SPREAD, ForeignEncoder
from monobath.tokenizer import TokenizerConfig
from monobath.training import initialise, load_recipe, train

diffusers = pytest.importorskip("diffusers")

KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
}  # fmt: skip
TINY = {
    "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4, "latent_channels": 4,
    "num_encoder_blocks": [1] * 4, "num_decoder_blocks": [1] * 4, "scaling_factor": 0.5,
}  # fmt: skip
DC = {
    "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "latent_channels": 8,
    "encoder_block_out_channels": [8] * 6, "decoder_block_out_channels": [8] * 6, "attention_head_dim": 4,
    "encoder_layers_per_block": [1] * 6, "decoder_layers_per_block": [1] * 6, "scaling_factor": 0.41407,
    "encoder_qkv_multiscales": [[]] * 6, "decoder_qkv_multiscales": [[]] * 6,
}  # fmt: skip
FACTORS = {"kl": 8, "flux2": 8, "tiny": 8, "dc": 32, "taef2": 8}
PUBLISHED = {"kl": (0.3611, 0.1159), "flux2": (1.0, 0.0), "tiny": (0.5, 0.0), "dc": (0.41407, 0.0), "taef2": (1.0, 0.0)}
SMALL = [
    "--model.decoder.size", "custom", "--model.decoder.patch", "4", "--model.decoder.channels", "[8, 8]",
    "--model.decoder.middle_blocks", "0", "--model.decoder.linear_skip", "true", "--model.decoder.norm", "local",
    "--data.size", "32", "--data.scale", "[32, 40]", "--loss.perceptual", "0", "--training.batch_size", "4",
    "--training.precision", "fp32", "--training.sample_every", "0", "--training.log_every", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _few_crops(monkeypatch):
    """Enough to be told of the latents, for tests."""
    monkeypatch.setattr(initialise, "CROPS", 4)
    monkeypatch.setattr(initialise, "POSITIONS", 16)
    monkeypatch.setattr(initialise, "BATCH", 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny random autoencoder of each family, on disk."""
    root = tmp_path_factory.mktemp("foreign")
    made = {
        "kl": diffusers.AutoencoderKL(**KL, scaling_factor=0.3611, shift_factor=0.1159),
        "flux2": diffusers.AutoencoderKLFlux2(**KL),
        "tiny": diffusers.AutoencoderTiny(**TINY),
        "dc": diffusers.AutoencoderDC(**DC),
    }
    for kind, vae in made.items():
        randomise(vae)
        if kind == "flux2":
            vae.bn.running_mean.copy_(randn(16))
            vae.bn.running_var.copy_(randn(16, seed=1).square() + 0.1)
        vae.save_pretrained(root / kind)
    (root / "taef2").mkdir()
    encoder = randomise(taesd.taesd_encoder(6, channels=8))
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, root / "taef2/taef2_encoder.safetensors")
    return {kind: root / kind for kind in (*made, "taef2")}


def spec(folders: dict[str, Path], kind: str) -> str:
    return f"{kind}={folders[kind]}"


def reference(folders: dict[str, Path], kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean and log-variance, by the source's own code."""
    if kind == "taef2":
        file = folders[kind] / "taef2_encoder.safetensors"
        return taesd.from_state("encoder", load_file(file), "")((x + 1) / 2), None
    classes = {"kl": "AutoencoderKL", "flux2": "AutoencoderKLFlux2", "tiny": "AutoencoderTiny", "dc": "AutoencoderDC"}
    coded = getattr(diffusers, classes[kind]).from_pretrained(folders[kind]).eval().encode(x, return_dict=False)[0]
    return (coded, None) if isinstance(coded, torch.Tensor) else (coded.mean, coded.logvar)


def pooled(x: torch.Tensor) -> torch.Tensor:
    """A callable of the user's: three channels, factor 16."""
    return 5 * F.avg_pool2d(x, 16) + 2


def gaussian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One with a spread."""
    return pooled(x), pooled(x) - 4


pooled.scaling_factor = 0.25  # type: ignore[attr-defined]


@torch.no_grad()
def tiny_retrofit(encoder: ForeignEncoder, **decoder: object) -> Tokenizer:
    """A decoder with random weights for an encoder's latents; no encoder is attached."""
    shape = {"factor": encoder.config.factor, "latent_channels": encoder.config.latent_channels}
    own = {"size": "custom", "patch": 4, "channels": [8, 8], "middle_blocks": 0, "norm": "local", "linear_skip": True}
    values = {
        "encoder": {"family": encoder.config.family, "source": encoder.config.source, **shape},
        "decoder": own | {"standardise": True} | decoder | shape,
        "sampler": {"noise": "zero"},
        **encoder.published,
    }
    tokenizer = randomise(Tokenizer(TokenizerConfig.from_dict(values))).eval()
    for parameter in tokenizer.decoder.parameters():
        parameter.mul_(0.5)  # without norms activations would grow from layer to layer
    tokenizer.decoder.latent_shift.copy_(randn(*tokenizer.decoder.latent_shift.shape))
    tokenizer.decoder.latent_scale.copy_(randn(*tokenizer.decoder.latent_scale.shape, seed=1).abs() + 0.2)
    return tokenizer


def fails(capsys, command: list[str]) -> str:
    assert main(command) == 2
    return capsys.readouterr().err


# ---- encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACTORS)
def test_moments_are_the_source_s(folders, kind):
    encoder, f = as_encoder(spec(folders, kind)), FACTORS[kind]
    x = rand_images(2, 3, 2 * f, 3 * f)
    with torch.no_grad():
        mean, logvar = reference(folders, kind, x)
    moments = encoder(x)
    torch.testing.assert_close(moments[:, : mean.shape[1]], mean)
    expected = torch.full_like(mean, NO_SPREAD) if logvar is None else logvar
    torch.testing.assert_close(Posterior(moments, (1, 1)).logvar, expected)
    assert (encoder.config.factor, encoder.config.latent_channels) == (f, mean.shape[1])
    assert (encoder.config.family, encoder.config.source) == (kind, str(folders[kind]))
    published = tuple(encoder.published.get(n, d) for n, d in (("scaling_factor", 1.0), ("shift_factor", 0.0)))
    assert published == PUBLISHED[kind]


def test_flux2_publishes_the_statistics_of_its_patches(folders):
    """Those of latents with the mean and variance that the batch norm says for each place of a patch."""
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folders["flux2"])
    mean, var = vae.bn.running_mean, vae.bn.running_var
    patches = mean[None, :, None, None] + var.sqrt()[None, :, None, None] * randn(400, 16, 8, 8)
    z = diffusers.Flux2Pipeline._unpatchify_latents(patches)
    published = as_encoder(vae).published
    assert torch.allclose(torch.tensor(published["latent_mean"]), z.mean((0, 2, 3)), atol=0.02)
    assert torch.allclose(torch.tensor(published["latent_std"]), z.std((0, 2, 3)), atol=0.02)


def test_it_is_no_part_of_the_model_and_stays_as_it_is(folders):
    encoder = as_encoder(spec(folders, "kl"))
    tokenizer = tiny_retrofit(encoder)
    tokenizer.attach_encoder(encoder)
    before = {k: v.clone() for k, v in encoder.network.state_dict().items()}
    tokenizer.train().requires_grad_(True)
    assert not any(name.startswith("encoder") for name in tokenizer.state_dict())
    assert not list(tokenizer.encoder.parameters())
    moments = tokenizer.encoder(rand_images(1, 3, 16, 16))
    assert not moments.requires_grad
    assert not encoder.network.training
    assert not any(p.requires_grad for p in encoder.network.parameters())
    assert all(v.equal(before[k]) for k, v in encoder.network.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.encoder(rand_images(1, 3, 16, 16)).equal(moments)
    assert tokenizer.to(torch.float64).encoder(rand_images(1, 3, 16, 16).double()).dtype == torch.float64
    assert (tokenizer.device.type, tokenizer.dtype) == ("cpu", torch.float64)


def test_callables():
    encoder = as_encoder(pooled)
    x = rand_images(1, 3, 32, 48)
    assert (encoder.config.name, encoder.config.family) == ("f16c3", "custom")
    assert encoder.published == {"scaling_factor": 0.25}
    assert encoder(x)[:, :3].equal(pooled(x))
    assert as_encoder(gaussian)(x).equal(torch.cat(gaussian(x), dim=1))
    assert as_encoder(encoder) is encoder
    assert as_encoder(f"custom={__name__}:pooled")(x).equal(encoder(x))
    network = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.Dropout())
    module = as_encoder(network)
    assert module(x)[:, :2].equal(network[0](x))
    tokenizer = tiny_retrofit(encoder).attach_encoder(gaussian)
    odd = rand_images(1, 3, 37, 21)
    posterior = tokenizer.encode(odd)
    assert posterior.mode().shape == (1, 3, 3, 2)
    assert tokenizer.decode(posterior.mode(), size=posterior.size).shape == odd.shape
    assert tokenizer(odd).equal(tokenizer.decode(posterior.mode(), size=posterior.size))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("kl", "not KIND=WHERE of a known kind|lacks what follows kl=: a folder or a Hub id"),
        ("kl:somewhere", "write kl=somewhere"),
        ("tny=somewhere", "did you mean tiny=somewhere"),
        ("vae=somewhere", "choose a KIND of kl, flux2"),
        ("kl=random", "random weights have no latents"),
        ("kl=no-such-folder", "does not exist"),
        ("kl=nobody/nothing", "could not be loaded.*Hub id"),
        ("taef2=no-such-folder", "taef2_encoder.safetensors does not exist"),
        ("custom=no_such_module:f", "could not be imported.*PYTHONPATH"),
        ("custom=json:JSONDecoder", "name a callable"),
        (3, "encoder is int: give KIND=WHERE"),
        (lambda x: x[:, :, 0], "expected latents"),
        (lambda x: x.mean(), "expected latents"),
        (lambda x: "no", "gave str"),
    ],
)
def test_what_is_no_encoder_is_explained(given, words):
    with pytest.raises(UserError, match=words):
        as_encoder(given)


def test_configurations_are_checked(folders):
    with pytest.raises(UserError, match="did you mean taef2"):
        EncoderConfig(family="taef")
    with pytest.raises(UserError, match="holds an AutoencoderTiny"):
        as_encoder(f"kl={folders['tiny']}")
    encoder = ForeignEncoder(EncoderConfig(family="custom", factor=8, latent_channels=3), pooled)
    with pytest.raises(UserError, match=r"gave latents \(1, 3, 2, 2\).*expected \(1, 3, 4, 4\)"):
        encoder(rand_images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="divisible by 8"):
        encoder(rand_images(1, 3, 32, 20))
    assert EncoderConfig(family="kl", source="here") == EncoderConfig(family="kl", source="there")


# ---- tokenizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_a_saved_model_decodes_at_once_and_encodes_when_told_how(folders, tmp_path, kind):
    encoder = as_encoder(spec(folders, kind))
    tokenizer = tiny_retrofit(encoder).attach_encoder(encoder)
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["encoder"]["family"], config["encoder"]["source"]) == (kind, str(folders[kind]))
    assert (config["scaling_factor"], config["shift_factor"]) == PUBLISHED[kind]
    assert all(name.startswith("decoder.") for name in load_file(tmp_path / "model/model.safetensors"))
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    z = randn(2, encoder.config.latent_channels, 2, 3)
    expected = tokenizer.decode(z)
    assert loaded.decode(z).equal(expected)
    with pytest.raises(UserError, match=f'attach it with Tokenizer.from_pretrained.*encoder="{kind}='):
        loaded.encode(rand_images(1, 3, 32, 32))
    x = rand_images(1, 3, 45, 70)
    whole = Tokenizer.from_pretrained(tmp_path / "model", encoder=spec(folders, kind))
    assert whole.encode(x).mode().equal(tokenizer.encode(x).mode())
    assert whole(x).shape == x.shape
    loaded.config.scaling_factor, loaded.config.shift_factor = 9.0, -3.0
    assert loaded.decode(z).equal(expected)


def test_attaching_what_does_not_fit(folders):
    tokenizer = tiny_retrofit(as_encoder(spec(folders, "kl")))
    with pytest.raises(UserError, match=r"dc=.* makes f32c8 latents, and this model decodes f8c4"):
        tokenizer.attach_encoder(spec(folders, "dc"))
    own = Tokenizer(TokenizerConfig())
    with pytest.raises(UserError, match=r"has an encoder of its own \(f8c4\)"):
        own.attach_encoder(spec(folders, "kl"))


@pytest.mark.parametrize("modulation", [False, True])
def test_constants_of_the_latents_are_everywhere(folders, tmp_path, modulation):
    """In the folded decoder, in tiles, in half of the type's precision, and in the diffusers model."""
    from monobath.integrations.diffusers import AutoencoderMonobath

    encoder = as_encoder(spec(folders, "kl"))
    tokenizer = tiny_retrofit(encoder, modulation=modulation)
    z = 5 * randn(1, 4, 6, 9) + 3
    expected = tokenizer.decode(z)
    assert (tokenizer.optimize().decode(z) - expected).abs().max() < 1e-4
    tiled = tokenizer.decode(z, tile=40, overlap=16)
    assert tiled.shape == expected.shape
    assert not torch.allclose(tokenizer.decode(z + 1), expected, atol=1e-3)
    vae = AutoencoderMonobath.from_tokenizer(tokenizer)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == PUBLISHED["kl"]
    assert len(vae.config.block_out_channels) == 4
    assert torch.allclose(vae.decode(z).sample.clamp(-1, 1), expected, atol=1e-6)
    with pytest.raises(UserError, match="holds no encoder"):
        vae.encode(rand_images(1, 3, 16, 16))
    vae.save_pretrained(tmp_path / "vae")
    again = AutoencoderMonobath.from_pretrained(tmp_path / "vae")
    torch.testing.assert_close(again.decode(z).sample, vae.decode(z).sample)
    x = rand_images(1, 3, 16, 24)
    again.attach_encoder(encoder)
    tokenizer.attach_encoder(encoder)
    both = AutoencoderMonobath.from_tokenizer(tokenizer)
    for each in (again, both):
        assert each.encode(x).latent_dist.mode().equal(tokenizer.encode(x).mode())


def test_the_folded_decoder_is_exported_with_them():
    from monobath.export.engines import with_engine

    tokenizer = tiny_retrofit(as_encoder(pooled))
    z = 5 * randn(1, 3, 2, 3) + 3
    assert (with_engine(tokenizer, "torch-export").decode(z) - tokenizer.decode(z)).abs().max() < 1e-4


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_the_linear_decoding_is_the_best_one(padding):
    z = randn(3, 4, 6, 5)
    true = nn.Conv2d(4, 3 * 16, 3, padding=1, padding_mode=padding)
    x = F.pixel_shuffle(true(z), 4).detach()
    weight, bias = initialise.least_squares([(x[:2], z[:2]), (x[2:], z[2:])], 4, padding)
    assert torch.allclose(weight, true.weight, atol=5e-3)
    assert torch.allclose(bias, true.bias, atol=5e-3)


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_retrofit_trains_the_decoder_alone(folders, photos, tmp_path, kind):
    """Channels, factor and factors of scale come from the encoder."""
    given = spec(folders, kind)
    command = ["train", "retrofit", "--encoder", given, "--data", str(photos), *SMALL]
    before = {path.name: path.read_bytes() for path in folders[kind].iterdir()}
    assert main([*command, "--run", str(tmp_path / "whole"), "--training.steps", "2"]) == 0
    assert {path.name: path.read_bytes() for path in folders[kind].iterdir()} == before
    model = Tokenizer.from_pretrained(tmp_path / "whole/model", encoder=given)
    config = model.config
    assert (config.encoder.family, model.factor, config.decoder.size) == (kind, FACTORS[kind], "custom")
    assert (config.scaling_factor, config.shift_factor) == PUBLISHED[kind]
    assert config.decoder.latent_channels == config.encoder.latent_channels
    assert not model.decoder.latent_scale.equal(torch.ones_like(model.decoder.latent_scale))
    assert load_recipe(str(tmp_path / "whole/config.yaml")).model == config
    x = rand_images(1, 3, 33, 40)
    assert model(x).shape == x.shape


def test_a_resumed_run_ends_in_the_same_bytes(folders, photos, tmp_path):
    command = ["train", "retrofit", "--encoder", spec(folders, "tiny"), "--data", str(photos), *SMALL]
    command += ["--training.checkpoint_every", "2", "--training.steps", "4"]
    assert main([*command, "--run", str(tmp_path / "a")]) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "b/model")
    assert main([*command, "--run", str(tmp_path / "b")]) == 0
    a, b = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


def test_cached_latents_are_those_on_the_fly(folders, photos, tmp_path, capsys):
    given = spec(folders, "kl")
    cache = ["cache-latents", "--encoder", given, "--data", str(photos), "--size", "32", "--scale", "32", "40"]
    assert main([*cache, "--out", str(tmp_path / "cache")]) == 0
    facts = json.loads((tmp_path / "cache/latents.json").read_text())
    assert facts["encoder"]["family"] == "kl"
    assert "source" not in facts["encoder"]
    command = ["train", "retrofit", *SMALL, "--data.cache", "false", "--training.steps", "2", "--encoder", given]
    live = [*command, "--data", str(photos), "--run", str(tmp_path / "live")]
    stored = [*command, "--data", str(tmp_path / "cache"), "--data.latents", "true", "--run", str(tmp_path / "stored")]
    assert main(live) == 0
    assert main(stored) == 0
    losses = [
        [json.loads(line)["flow"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("live", "stored")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    # The same encoder from elsewhere is the same; another one is refused.
    shutil.copytree(folders["kl"], tmp_path / "moved")
    moved = [*cache, "--out", str(tmp_path / "cache")]
    moved[2] = f"kl={tmp_path / 'moved'}"
    assert main(moved) == 0
    other = randomise(diffusers.AutoencoderKL(**KL), seed=7)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    refused = [*stored, "--run", str(tmp_path / "refused"), "--model.encoder.source", str(tmp_path / "other")]
    assert "holds latents of the encoder" in fails(capsys, refused)


def test_a_callable_from_python(photos, tmp_path):
    """Its latents are cached, and a decoder learns from the cache without it."""
    facts = encoding.cache_latents(as_encoder(pooled), str(photos), tmp_path / "cache", Crops(size=32, scale=(32, 40)))
    assert facts.encoder["factor"] == 16
    words = [word.removeprefix("--") for word in SMALL]
    overrides = [f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]
    overrides += [f"data.source={tmp_path / 'cache'}", "data.latents=true", f"run={tmp_path / 'run'}"]
    overrides += ["model.encoder.family=custom", "training.steps=2"]
    for part in ("encoder", "decoder"):
        overrides += [f"model.{part}.factor=16", f"model.{part}.latent_channels=3"]

    model = train(load_recipe("retrofit", overrides))
    tokenizer = Tokenizer.from_pretrained(model, encoder=pooled)
    assert tokenizer(rand_images(1, 3, 20, 40)).shape == (1, 3, 20, 40)
    # Latents of mean 2 and several times the scale of ours are brought to the scale that first weights expect.
    z = tokenizer.decoder.standardised(pooled(rand_images(64, 3, 16, 16)))
    assert z.shape == (64, 3, 1, 1)
    with pytest.raises(UserError, match=r"is not named: add --encoder custom=WHERE"):
        train(load_recipe("retrofit", [*overrides, "training.sample_every=1", f"run={tmp_path / 'other'}"]))


def test_what_cannot_be_trained_is_explained(folders, photos, tmp_path, capsys):
    command = ["train", "retrofit", "--data", str(photos), "--run", str(tmp_path / "run"), *SMALL]
    assert "names no encoder to fit a decoder to: add --encoder KIND=WHERE" in fails(capsys, command)
    assert "did you mean tiny=x" in fails(capsys, [*command, "--encoder", "tny=x"])
    command += ["--encoder", spec(folders, "kl")]
    assert "a foreign encoder stays as it is" in fails(capsys, [*command, "--training.train_encoder", "true"])
    dc = [*command[:-1], spec(folders, "dc"), "--data.size", "48", "--data.scale", "[48, 48]"]
    assert "data.size=48 must be divisible by 32" in fails(capsys, dc)


def test_the_command_line_encodes_with_it(folders, photos, tmp_path, capsys):
    encoder = as_encoder(spec(folders, "kl"))
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    tiny_retrofit(encoder).save_pretrained(model)
    photo = str(photos / "00.png")
    given = ["--model", model, "--encoder", spec(folders, "kl")]
    assert "holds no encoder" in fails(capsys, ["reconstruct", photo, "--out", out, "--model", model])
    assert main(["reconstruct", photo, "--out", out, *given]) == 0
    assert main(["encode", photo, "--out", out, *given]) == 0
    assert main(["decode", f"{out}/00.safetensors", "--out", str(tmp_path / "again"), "--model", model]) == 0
    assert (tmp_path / "again/00.png").read_bytes() == (tmp_path / "out/00.png").read_bytes()
    quick = ["--size", "32", "--limit", "4", "--metrics", "psnr", "--repeats", "0", "--no_baselines"]
    measure = ["eval", "--data", str(photos), "--out", str(tmp_path / "eval"), *quick]
    assert main([*measure, *given]) == 0
    assert "has an encoder of its own" in fails(capsys, [*measure, *given[2:]])
    stats = ["stats", "--data", str(photos), "--size", "32", "--limit", "4", "--in_place", *given]
    assert main(stats) == 0
    stored = json.loads((tmp_path / "model/config.json").read_text())
    assert (stored["scaling_factor"], stored["shift_factor"]) == PUBLISHED["kl"]
    assert len(stored["latent_std"]) == 4
    capsys.readouterr()
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["encoder"], facts["encoder_of"]) == ("f8c4", "diffusers' AutoencoderKL")


# ---- the page and the benchmark -----------------------------------------------------------------------------------


def test_the_page_is_true(folders, photos, tmp_path, monkeypatch):
    """Its blocks run in order, at tiny size."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["kl"], "stable-diffusion")
    shutil.copytree(folders["taef2"], "FOLDER")
    decoder = randomise(taesd.taesd_decoder(6)).state_dict()
    save_file({k: v.contiguous() for k, v in decoder.items()}, "FOLDER/taef2_decoder.safetensors")
    for name in ("my-photos", "held-out"):
        shutil.copytree(photos, name)
    shutil.copy(photos / "00.png", "photo.png")
    smaller = {
        "train": [
            *SMALL,
            "--training.steps",
            "2",
            "--data.workers",
            "0",
            "--data.scale",
            "[64, 192]",
            "--data.size",
            "64",
        ],
        "cache-latents": ["--copies", "1"],
        "eval": ["--limit", "4", "--size", "32", "--repeats", "0", "--metrics", "psnr", "--no_baselines"],
    }
    names = {"photo": rand_images(1, 3, 24, 40)}
    verbs = []
    for language, block in blocks(Path(__file__).parent.parent / "docs" / "retrofit.md"):
        if language == "py":
            exec(compile(block, "docs/retrofit.md", "exec"), names)
            continue
        for line in block.splitlines():
            program, verb, *rest = shlex.split(line)
            assert program == "monobath"
            options = smaller.get(verb, [])
            if {"runs/from-windows", "runs/flux2-slim"} & set(rest):  # their size and scale are the point
                pairs = zip(options[::2], options[1::2], strict=True)
                options = [word for pair in pairs for word in pair if not pair[0].startswith("--data.")]
            assert main([verb, *rest, *options]) == 0, line
            verbs.append(verb)
    learned = ["cache-latents", "train"]
    assert verbs == ["train", *learned, *learned, "train", "reconstruct", "eval", *learned]
    assert names["pictures"][0].size == (64, 64)
    assert names["factors"] == PUBLISHED["kl"]
    assert Path("runs/pooled/latents.json").is_file()
    facts = json.loads(Path("runs/eval-retrofit/results.json").read_text())
    assert len(facts["systems"]) == 2
    page = Path(__file__).parent.parent / "docs" / "retrofit.md"
    assert all(f"`{kind}=" in page.read_text(encoding="utf-8") for kind in FAMILIES)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_the_benchmark_of_windows(folders, photos, monkeypatch, capsys, kind):
    """Without norms, the middle of a crop's latents is that of the picture's; with GroupNorm it is not."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    run = importlib.import_module("latent_windows").main
    assert run(["--encoder", spec(folders, kind), "--data", str(photos), "--limit", "2"]) == 0
    first, *gaps, head, _, own, windows = capsys.readouterr().out.splitlines()
    assert float(first.rpartition(" ")[2]) > 0.1
    found = [float(line.rpartition(" ")[2]) for line in gaps]
    assert len(found) == 2
    # Of what only convolutions made, a crop's border is felt less the farther away it is.
    assert (found[1] < 0.3 * found[0]) == (kind == "tiny")
    assert head.count("|") == own.count("|") == windows.count("|") == 6
    cells = [float(cell) for cell in own.split("|")[2:-1]]
    # Squared errors of the parts are those of the whole.
    assert sum(10 ** (-cell / 10) for cell in cells[1:]) == pytest.approx(10 ** (-cells[0] / 10), rel=0.03)


def test_the_benchmark(folders, photos, tmp_path, monkeypatch, capsys):
    """At tiny size: its rows, and that what is done is not done again."""
    from monobath.evaluation import frechet

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    monkeypatch.setattr(frechet, "CROPS", 1)
    monkeypatch.setattr(frechet, "HALVES", 3)
    run = importlib.import_module("retrofit").main
    out, given = ["--out", str(tmp_path / "out")], ["--encoder", spec(folders, "tiny"), "--data", str(photos)]
    words = [word.removeprefix("--") for word in SMALL]
    kept = [f"{k}={v}" for k, v in zip(words[::2], words[1::2], strict=True) if "data." not in k]
    train = ["train", *out, *given, "--set", *kept, "--size", "32", "--batch", "4", "--crops", "8", "--copies", "1"]
    score = ["score", *out, *given, "--score-size", "32", "--limit", "4", "--repeats", "1"]
    assert run(train) == 0
    assert run([*train, "--name", "windows", "--encode-size", "40", "--scale", "40", "48"]) == 0
    assert (tmp_path / "out/latents-40x1/latents.json").is_file()
    assert run(score) == 0
    capsys.readouterr()
    assert run(["show", *out]) == 0
    rows, differences = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows.splitlines()[2:]]
    names = [["AutoencoderTiny (tiny)", "", ""], ["CM-4-8", "8", "0"], ["CM-4-windows-8", "8", "0"]]
    assert [row[:3] for row in rows] == names
    assert all("±" in cell for row in rows for cell in row[3:7])
    assert "cached" in rows[1][-1]
    assert "CM-4-8-seed0 − AutoencoderTiny (tiny)" in differences
    monkeypatch.setattr(Tokenizer, "decode", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert run(train) == 0
    assert run(score) == 0
