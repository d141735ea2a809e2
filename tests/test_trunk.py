"""Laws of trunks: the first layers of TAEF2's decoder before ours, frozen, with the whole picture's statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import rand_images, randn, randomise
from safetensors.torch import load_file, save_file
from test_training import photos as photos  # the fixture

from monobath import Tokenizer, UserError
from monobath.autoencoders import read_taesd
from monobath.cli import main
from monobath.data import LatentDataset
from monobath.decoders import Taef2Config, decoder_config, make_decoder
from monobath.decoders.taef2 import Taef2Decoder
from monobath.decoders.unet import UNet
from monobath.integrations.diffusers import AutoencoderMonobath
from monobath.models import taesd
from monobath.sampling import draw_noise
from monobath.tokenizer import TokenizerConfig
from monobath.training import initialise, load_recipe

CHANNELS = 6
SHAPES = [(6, {"size": "custom", "patch": 4, "channels": [8, 8], "down": [0, 1], "up": [1, 1]}), (11, {}), (16, {})]
BARE = {"size": "custom", "patch": 2, "channels": [8], "down": [0], "up": [1], "linear_skip": True, "norm": "local",
        "modulation": False, "middle_blocks": 0, "upsampling": "shuffle", "prediction": "x"}  # fmt: skip


def tokenizer_with(layers: int, **decoder: object) -> Tokenizer:
    """Random weights everywhere; the trunk's are larger, so that its norms and its clamp matter."""
    values = {
        "encoder": {"family": "taef2", "factor": 8, "latent_channels": CHANNELS},
        "decoder": BARE | {"trunk": layers, "latent_channels": CHANNELS, "standardise": True} | decoder,
        "sampler": {"noise": "zero"},
    }
    made = randomise(Tokenizer(TokenizerConfig.from_dict(values)), scale=0.5).eval()
    assert isinstance(made.decoder, UNet)
    with torch.no_grad():
        for name, parameter in made.decoder.named_parameters():
            parameter.mul_(1 if name.startswith("trunk") else 0.5)  # without norms activations would grow
        features = made.decoder.read(3 * randn(2, CHANNELS, 4, 5, seed=2))  # their scale, as training finds it
        made.decoder.latent_shift.copy_(features.mean((0, 2, 3))[:, None, None])
        made.decoder.latent_scale.copy_(0.5 / features.std((0, 2, 3)).clamp_min(0.1)[:, None, None])
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """TAEF2's two files, with random weights."""
    root = tmp_path_factory.mktemp("taef2")
    for part, module in (
        ("encoder", taesd.taesd_encoder(CHANNELS, channels=8)),
        ("decoder", taesd.taesd_decoder(CHANNELS)),
    ):
        state = {name: 0.7 * value.contiguous() for name, value in randomise(module, scale=0.5).state_dict().items()}
        save_file(state, root / f"taef2_{part}.safetensors")
    return root


# ---- decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "shape"), SHAPES)
def test_it_is_the_decoder_without_on_the_features(layers, shape):
    decoder = tokenizer_with(layers, **shape).decoder
    assert isinstance(decoder, UNet)
    factor = decoder.config.read_factor
    assert factor == {6: 8, 11: 4, 16: 2}[layers]
    plain = make_decoder(
        decoder_config(BARE | shape | {"factor": factor, "latent_channels": 64, "standardise": True})
    ).eval()
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if not k.startswith("trunk")})
    x, t, z = randn(2, 3, 32, 48), torch.tensor([0.4, 1.0]), 3 * randn(2, CHANNELS, 4, 6)
    features = decoder.read(z)
    assert features.shape == (2, 64, 32 // factor, 48 // factor)
    with torch.no_grad():
        expected = plain(x, t, features)
        assert decoder(x, t, z).equal(expected)
        assert decoder(x, t, features).equal(expected)


def test_the_features_are_those_of_the_family_s_decoder(folder):
    own = read_taesd("taef2", str(folder), "decoder")
    for layers in taesd.TRUNKS:
        trunk = taesd.Trunk(CHANNELS, layers)
        trunk.layers.load_state_dict(own[:layers].state_dict())
        z = 3 * randn(1, CHANNELS, 3, 5)
        with torch.no_grad():
            features = trunk(z)
            torch.testing.assert_close(own[layers:](features), own(z))
        assert features.shape == (1, 64, 3 * taesd.TRUNKS[layers], 5 * taesd.TRUNKS[layers])


@pytest.mark.parametrize(("layers", "shape"), SHAPES)
def test_folded_exported_and_in_diffusers_it_is_the_same(layers, shape, tmp_path):
    from monobath.export.engines import with_engine

    tokenizer = tokenizer_with(layers, **shape)
    z = 3 * randn(2, CHANNELS, 4, 5)
    expected = tokenizer.decode(z)
    assert expected.std() > 0.1
    torch.testing.assert_close(tokenizer.optimize().decode(z), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(with_engine(tokenizer, "torch-export").decode(z), expected, atol=1e-4, rtol=0)
    AutoencoderMonobath.from_tokenizer(tokenizer).save_pretrained(tmp_path / "vae")
    again = AutoencoderMonobath.from_pretrained(tmp_path / "vae")
    torch.testing.assert_close(again.decode(z).sample.clamp(-1, 1), expected, atol=1e-5, rtol=0)
    tokenizer.save_pretrained(tmp_path / "model")
    assert Tokenizer.from_pretrained(tmp_path / "model").decode(z).equal(expected)


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("form", ["decoder", "folded"])
def test_tiles_have_the_statistics_of_the_whole(noise, form):
    """Away from their reach tiles are the whole picture, though every pixel depends on every latent."""
    tokenizer = tokenizer_with(11)
    tokenizer = tokenizer.optimize(noise=noise) if form == "folded" else tokenizer
    z = 3 * randn(1, CHANNELS, 12, 9)
    whole = tokenizer.decode(z, noise=noise)
    assert (tokenizer.decode(z, noise=noise, tile=48) - whole).abs().max() < 1e-4
    with torch.no_grad():
        far = z.clone()
        far[:, :, -1, -1] += 3
    assert (tokenizer.decode(far, noise=noise)[:, :, :8, :8] - whole[:, :, :8, :8]).abs().max() > 1e-4


@pytest.mark.parametrize("slim", [False, True])
def test_the_reach_is_that_behind_the_features(slim):
    config = Taef2Config(slim=8, latent_channels=CHANNELS) if slim else tokenizer_with(11).decoder.config
    decoder = make_decoder(config).eval()
    assert decoder.reach() is not None
    pixels, latents = decoder.receptive_field((40, 47))
    randomise(decoder, scale=0.5)
    cell = config.read_factor
    features = randn(1, 64, 96 // cell, 96 // cell).requires_grad_()
    x = draw_noise((3, 96, 96), [0], "gaussian").requires_grad_()
    decoder(x, torch.ones(1), features)[:, :, 40:48, 48].abs().sum().backward()
    for given, (first, last), side in ((x, pixels, 1), (features, latents, cell)):
        if slim and given is x:
            assert given.grad is None
            continue
        assert given.grad is not None
        rows = given.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        assert (rows.min() * side, (rows.max() + 1) * side - 1) == (first, last)


# ---- slim -------------------------------------------------------------------------------------------------------


def slim_tokenizer(folder: Path, channels: int) -> Tokenizer:
    """With weights of the family's decoder, chosen over some features."""
    values = {
        "encoder": {"family": "taef2", "factor": 8, "latent_channels": CHANNELS},
        "decoder": {"slim": channels, "latent_channels": CHANNELS},
        "sampler": {"noise": "zero"},
    }
    made = Tokenizer(TokenizerConfig.from_dict(values)).eval()
    own, decoder = read_taesd("taef2", str(folder), "decoder"), made.decoder
    assert isinstance(decoder, Taef2Decoder)
    assert decoder.trunk is not None
    decoder.trunk.layers.load_state_dict(own[:16].state_dict())
    decoder.tail.take(own, decoder.read(3 * randn(2, CHANNELS, 4, 5, seed=2)).detach())
    decoder.conv_out.load_state_dict(own[-1].state_dict())
    return made


def test_with_all_channels_it_is_the_family_s_decoder(folder):
    own, z = read_taesd("taef2", str(folder), "decoder"), 3 * randn(2, CHANNELS, 3, 5)
    with torch.no_grad():
        expected = (2 * own(z) - 1).clamp(-1, 1)
        assert expected.std() > 0.1
        torch.testing.assert_close(slim_tokenizer(folder, 64).decode(z), expected, atol=1e-4, rtol=0)
        errors = [(slim_tokenizer(folder, n).decode(z) - expected).square().mean() for n in (8, 32, 56)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_channels_that_say_nothing_are_left_out_without_loss(folder):
    """Constant ones go into the biases; of the others none is lost."""
    own = read_taesd("taef2", str(folder), "decoder")
    block = own[18].conv
    with torch.no_grad():
        for i in (0, 2):
            block[i].weight[::2] = 0
            block[i].bias[::2] = 0.7
    features = own[:16](3 * randn(2, CHANNELS, 4, 5, seed=2))
    tail = taesd.SlimTail(32)
    tail.take(own, features)
    inside = (..., slice(4, -4), slice(4, -4))  # away from the border, where a constant is padded with zeros
    with torch.no_grad():
        torch.testing.assert_close(tail(features)[inside], own[16:19](features)[inside], atol=1e-3, rtol=1e-4)


def test_slim_folded_exported_in_tiles_and_in_diffusers(folder, tmp_path):
    from monobath.export.engines import with_engine

    tokenizer = slim_tokenizer(folder, 8)
    z = 3 * randn(1, CHANNELS, 9, 7)
    expected = tokenizer.decode(z)
    for made in (tokenizer.optimize(), with_engine(tokenizer, "torch-export")):
        torch.testing.assert_close(made.decode(z), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.decode(z, tile=32), expected, atol=1e-4, rtol=0)
    AutoencoderMonobath.from_tokenizer(tokenizer).save_pretrained(tmp_path / "vae")
    again = AutoencoderMonobath.from_pretrained(tmp_path / "vae").decode(z).sample
    torch.testing.assert_close(again.clamp(-1, 1), expected, atol=1e-5, rtol=0)
    tokenizer.save_pretrained(tmp_path / "model")
    assert Tokenizer.from_pretrained(tmp_path / "model").decode(z).equal(expected)


# ---- training ---------------------------------------------------------------------------------------------------


def command(folder: Path, data: Path, run: Path, *more: str) -> list[str]:
    return [
        "train", "retrofit", "--encoder", f"taef2={folder}", "--data", str(data), "--run", str(run),
        "--model.decoder.size", "CM/4", "--model.decoder.trunk", "16", "--data.size", "32", "--data.scale", "[48, 56]",
        "--loss.perceptual", "0", "--training.batch_size", "2", "--training.precision", "fp32",
        "--training.sample_every", "0", "--training.log_every", "1", "--training.steps", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cache(folder, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "latents"
    line = ["cache-latents", "--encoder", f"taef2={folder}", "--data", str(photos), "--size", "48"]
    assert main([*line, "--scale", "48", "56", "--out", str(out)]) == 0
    return out


def test_windows_are_cut_from_the_features_of_the_whole(cache):
    decoder = tokenizer_with(11).decoder
    assert isinstance(decoder, UNet)
    whole, parts = LatentDataset(cache), LatentDataset(cache, window=16)
    assert parts[0, 1]["moments"].shape == (2 * CHANNELS, 2, 2)
    parts.through = decoder.trunk
    parts.cache = True
    z = whole[0, 1]["moments"][None, :CHANNELS].float()
    features = decoder.read(z)[0].half()
    places = set()
    for epoch in range(4):
        part, crop = parts[epoch, 1], whole[epoch, 1]["image"]
        assert "moments" not in part
        assert part["features"].shape == (64, 4, 4)
        found = [
            (top, left)
            for top in range(0, 9, 2)
            for left in range(0, 9, 2)
            if part["features"].equal(features[:, top : top + 4, left : left + 4])
        ]
        assert len(found) == 1
        top, left = (4 * place for place in found[0])
        assert part["image"].equal(crop[:, top : top + 16, left : left + 16])
        places.add(found[0])
    assert len(places) > 1


def test_training_leaves_the_trunk_as_it_came_and_fits_the_rest(folder, cache, photos, tmp_path, monkeypatch):
    """From windows of cached latents and from photos; what is trained on whole crops sees the same either way."""
    monkeypatch.setattr(initialise, "CROPS", 4)
    monkeypatch.setattr(initialise, "POSITIONS", 16)
    cached = ["--data.latents", "true"]
    assert main(command(folder, cache, tmp_path / "windows", *cached)) == 0
    whole = ["--data.size", "48"]
    assert main(command(folder, cache, tmp_path / "cached", *cached, *whole)) == 0
    assert main(command(folder, photos, tmp_path / "photos", *whole)) == 0
    layers = read_taesd("taef2", str(folder), "decoder")[:16].state_dict()
    first = None
    for name in ("windows", "cached", "photos"):
        state = load_file(tmp_path / name / "model/model.safetensors")
        inside = {k.removeprefix("decoder.trunk.layers."): v for k, v in state.items() if ".trunk." in k}
        assert inside.keys() == layers.keys()
        assert all(inside[key].equal(layers[key]) for key in layers)
        assert not state["decoder.latent_scale"].equal(torch.ones(64, 1, 1))
        if name != "windows":
            first = state if first is None else first
            torch.testing.assert_close(
                state["decoder.conv_in.weight"], first["decoder.conv_in.weight"], atol=2e-3, rtol=0
            )
    # A run that starts from another's needs the family's files no more.
    again = command(folder, cache, tmp_path / "again", *cached, "--init", str(tmp_path / "windows/model"))
    assert main([*again[:2], *again[4:]]) == 0
    state = load_file(tmp_path / "again/model/model.safetensors")
    assert all(state[f"decoder.trunk.layers.{key}"].equal(layers[key]) for key in layers)
    x = rand_images(1, 3, 33, 40)
    assert Tokenizer.from_pretrained(tmp_path / "windows/model", encoder=f"taef2={folder}")(x).shape == x.shape


def test_decoding_starts_from_the_best_linear_map_of_the_features(folder, cache, monkeypatch):
    from monobath.training.initialise import make_tokenizer

    found = {}
    for layers in (0, 16):
        overrides = [f"model.encoder.source={folder}", "model.encoder.family=taef2", "training.sample_every=0"]
        overrides += [f"model.decoder.trunk={layers}", "data.latents=true", f"data.source={cache}", "run="]
        overrides += ["model.decoder.size=CM/4", "data.size=48", "data.scale=[48, 56]"]
        dataset = LatentDataset(cache)
        tokenizer = make_tokenizer(load_recipe("retrofit", overrides), dataset, quiet=True).eval()
        decoder = tokenizer.decoder
        assert isinstance(decoder, UNet)
        x = torch.stack([LatentDataset(cache)[0, i]["image"] for i in range(4)]) / 127.5 - 1
        z = torch.stack([LatentDataset(cache)[0, i]["moments"][:CHANNELS] for i in range(4)]).float()
        features = decoder.standardised(decoder.read(z))
        linear = F.pixel_shuffle(decoder.linear_skip(features), decoder.config.read_factor)
        with torch.no_grad():
            found[layers] = (linear - x).square().mean()
            # Its last convolution starts at zero: the linear map is all there is.
            assert tokenizer.decode(z).sub(linear.clamp(-1, 1)).abs().max() < 1e-5
            perturbed = linear + 0.02 * F.pixel_shuffle(F.conv2d(features, randn(*decoder.linear_skip.weight.shape),
                                                                 padding=1), decoder.config.read_factor)  # fmt: skip
            assert (perturbed - x).square().mean() > found[layers]
    assert found[16] < x.var()


# ---- bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_explained(folder, photos, tmp_path, capsys):
    for changes, words in (
        ({"trunk": 7}, "decoder.trunk is 7 at factor 8: choose of 6, 11, 16"),
        ({"trunk": 6, "factor": 16}, "decoder.trunk is 6 at factor 16"),
        ({"slim": 65}, "decoder.slim is 65: give 1 to 64"),
        ({"slim": 8, "stages": 3}, "decoder.stages is 3: taef2 decoders have no such field"),
        ({"trunk": 6, "latent_channels": 64}, "needs latents of other than 64 channels"),
    ):
        with pytest.raises(UserError, match=words):
            decoder_config({"size": "CM/4", "latent_channels": CHANNELS} | changes)
    with pytest.raises(UserError, match=r"decoder\.trunk is 6: kl decoders have no such field"):
        decoder_config({"kind": "kl", "channels": [8, 8, 8, 8], "trunk": 6})
    with pytest.raises(UserError, match=r'decoder\.kind taef2 needs sampler\.steps 1 and sampler\.noise "zero"'):
        TokenizerConfig(decoder=decoder_config({"slim": 8}))
    given = command(folder, photos, tmp_path / "run")
    (tmp_path / "half").mkdir()
    half = tmp_path / "half/taef2_encoder.safetensors"
    half.write_bytes((folder / half.name).read_bytes())
    given[3] = f"taef2={half.parent}"
    assert main(given) == 2
    assert "taef2_decoder.safetensors does not exist" in capsys.readouterr().err
    assert main(["train", "cpu-default", "--data", str(photos), "--run", str(tmp_path / "own"),
                 "--model.decoder.trunk", "6"]) == 2  # fmt: skip
    assert "trunk is 6 with the encoder ours: its layers are read from TAEF2's files" in capsys.readouterr().err
