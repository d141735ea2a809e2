"""Laws of the tokenizer: what goes in, what comes out, and what a file gives back."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import rand_images, randn, tiny_tokenizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import monobath
from monobath import Tokenizer, UserError, resources, store
from monobath.decoders import decoder_config
from monobath.flow import euler_step
from monobath.images import to_float
from monobath.models.encoder import EncoderConfig
from monobath.sampling import draw_noise
from monobath.tiles import pad_to_multiple
from monobath.tokenizer import SamplerConfig, TokenizerConfig


@pytest.fixture(scope="module")
def tok():
    return tiny_tokenizer()


def pixels(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- encode -----------------------------------------------------------------------------------------


def test_every_form_of_a_picture_gives_the_same_latents(tok):
    array = pixels()
    as_tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [
        Image.fromarray(array),
        array,
        array[None],
        as_tensor,
        as_tensor[None],
        to_float(as_tensor),
        to_float(as_tensor)[None].double(),
        [Image.fromarray(array)],
        [array],
        (to_float(as_tensor),),
    ]
    expected = tok.encode(forms[0])
    assert expected.mode().shape == (1, 4, 2, 3)
    assert expected.size == (16, 24)
    for form in forms[1:]:
        assert torch.equal(tok.encode(form).mode(), expected.mode())


def test_a_list_is_a_batch(tok):
    a, b = pixels(seed=1), pixels(seed=2)
    both = tok.encode([a, Image.fromarray(b)]).mode()
    assert torch.allclose(both, torch.cat([tok.encode(a).mode(), tok.encode(b).mode()]), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (33, 20), (8, 8), (1, 40)])
def test_any_size_comes_back(tok, size):
    posterior = tok.encode(rand_images(2, 3, *size))
    assert posterior.mode().shape == (2, 4, -(-size[0] // 8), -(-size[1] // 8))
    assert tok.decode(posterior.mode(), size=posterior.size).shape == (2, 3, *size)
    assert tok(rand_images(1, 3, *size)).shape == (1, 3, *size)


def test_padding_reflects_then_replicates():
    x = torch.arange(3.0).reshape(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert pad_to_multiple(x, 5)[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert pad_to_multiple(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert pad_to_multiple(x, 5, "replicate")[0, 0, 0].tolist() == [0, 1, 2, 2, 2]
    assert pad_to_multiple(x, 3) is x


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 4, 8, 8), ["(1, 4, 8, 8)", "(B, 3, H, W)"]),
        (torch.zeros(8, 8), ["(8, 8)"]),
        (torch.zeros(0, 3, 8, 8), ["(0, 3, 8, 8)"]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), ["int64", "uint8"]),
        (torch.full((1, 3, 8, 8), 255.0), ["255", "[-1, 1]", "uint8"]),
        (torch.full((1, 3, 8, 8), torch.nan), ["nan"]),
        (np.zeros((8, 8, 3)), ["float64", "uint8"]),
        (np.zeros((3, 8, 8), dtype=np.uint8), ["(3, 8, 8)", "(H, W, 3)"]),
        ([], ["empty"]),
        ("photo.png", ["str"]),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)], ["(8, 8)", "(8, 16)"]),
    ],
)
def test_what_is_no_picture_is_refused(tok, images, words):
    with pytest.raises(UserError) as error:
        tok.encode(images)
    assert all(word in str(error.value) for word in words)


def test_too_many_pixels_are_refused(tok):
    for image in (Image.new("RGB", (30, 10)), np.zeros((10, 30, 3), np.uint8), torch.zeros(1, 3, 10, 30)):
        with pytest.raises(UserError, match="max_pixels=299"):
            tok.encode(image, max_pixels=299)
        tok.encode(image, max_pixels=300)


# ---- decode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"patch": 1, "channels": [16, 16, 16, 24]}])
def test_decode_is_one_step_from_noise(form):
    tok = tiny_tokenizer(decoder=form)
    z = randn(2, 4, 2, 3)
    noise, t = draw_noise((3, 16, 24), [5, 6]), torch.ones(2)
    kind = tok.config.decoder.prediction
    assert kind == ("v" if form else "x")
    by_hand = euler_step(tok.decoder(noise, t, z), noise, t, torch.zeros(2), kind).clamp(-1, 1)
    assert torch.allclose(tok.decode(z, seed=5), by_hand, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(tok):
    z = randn(3, 4, 2, 3)
    together = tok.decode(z, seed=7)
    assert torch.allclose(tok.decode(z, seed=[7, 8, 9]), together, atol=1e-6)
    for i in range(3):
        assert torch.allclose(tok.decode(z[i : i + 1], seed=7 + i), together[i : i + 1], atol=1e-5)
    assert (tok.decode(z[:1], seed=8) - together[:1]).abs().max() > 1e-3


def test_steps_and_noise():
    tok = tiny_tokenizer(steps=3, noise="zero")
    z = randn(1, 4, 2, 3)
    default = tok.decode(z)
    assert torch.equal(default, tok.decode(z, steps=3, noise="zero", seed=5))  # zero noise: seeds do not matter
    assert not torch.equal(default, tok.decode(z, steps=1))
    assert not torch.equal(default, tok.decode(z, noise="gaussian"))
    assert not torch.equal(tok.decode(z, noise="gaussian", seed=1), tok.decode(z, noise="gaussian", seed=2))


def test_output_kinds(tok):
    z = 3 * randn(2, 4, 2, 3)
    as_tensor, as_uint8, as_pil = (tok.decode(z, size=(15, 21), output=kind) for kind in ("tensor", "uint8", "pil"))
    assert as_tensor.shape == as_uint8.shape == (2, 3, 15, 21)
    assert as_tensor.dtype == torch.float32
    assert as_tensor.abs().max() <= 1
    assert as_uint8.dtype == torch.uint8
    assert torch.equal(as_uint8, ((as_tensor + 1) * 127.5).round().to(torch.uint8))
    assert [p.size for p in as_pil] == [(21, 15)] * 2
    assert np.array_equal(np.asarray(as_pil[1]), as_uint8[1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("z", "options", "words"),
    [
        (torch.zeros(1, 5, 2, 2), {}, ["(1, 5, 2, 2)", "f8c4", "(B, 4, h, w)"]),
        (torch.zeros(4, 2, 2), {}, ["(4, 2, 2)"]),
        (torch.zeros(1, 4, 0, 2), {}, ["(1, 4, 0, 2)"]),
        ("latents", {}, ["str"]),
        (torch.full((1, 4, 2, 2), torch.nan), {}, ["NaN"]),
        (torch.zeros(1, 4, 2, 2), {"size": (17, 16)}, ["(17, 16)", "(16, 16)"]),
        (torch.zeros(1, 4, 2, 2), {"size": (0, 16)}, ["(0, 16)"]),
        (torch.zeros(1, 4, 2, 2), {"output": "numpy"}, ["numpy", "pil"]),
        (torch.zeros(1, 4, 2, 2), {"steps": 0}, ["steps=0"]),
        (torch.zeros(1, 4, 2, 2), {"noise": "pink"}, ["pink", "zero"]),
        (torch.zeros(2, 4, 2, 2), {"seed": [1]}, ["1 entries", "batch of 2"]),
    ],
)
def test_decode_says_no(tok, z, options, words):
    with pytest.raises(UserError) as error:
        tok.decode(z, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "channels", "words"),
    [
        ("default", 4, "(1, 4, 2, 3): this tokenizer (f8c16) needs (B, 16, h, w); f8c4 is packaged for 4 channels"),
        ("f8c4", 16, "(1, 16, 2, 3): this tokenizer (f8c4) needs (B, 4, h, w); default is packaged for 16 channels"),
        ("default", 5, "(1, 5, 2, 3): this tokenizer (f8c16) needs (B, 16, h, w)"),
    ],
)
def test_latents_of_another_model_name_a_packaged_one(packaged, name, channels, words):
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(name).decode(torch.zeros(1, channels, 2, 3))
    assert str(error.value) == f"latents are {words}"


def test_published_factors_change_nothing(tok):
    other = Tokenizer(dataclasses.replace(tok.config, scaling_factor=0.18, shift_factor=0.3)).eval()
    other.load_state_dict(tok.state_dict())
    x = rand_images(1, 3, 16, 24)
    assert torch.equal(other.encode(x).mode(), tok.encode(x).mode())
    assert torch.equal(other(x), tok(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(tok, dtype):
    half = tiny_tokenizer().to(dtype)
    assert half.dtype == dtype
    x = rand_images(1, 3, 16, 24)
    posterior = half.encode(x)
    assert posterior.mode().dtype == torch.float32
    out = half.decode(posterior.mode())
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    full = tok.encode(x).mode()
    assert (posterior.mode() - full).norm() / full.norm() < 0.1


SPACES = {
    "f16c4": ({"factor": 16, "patch": 4}, {"factor": 16}),
    "f16c16": (
        {"factor": 16, "patch": 4, "latent_channels": 16},
        {"factor": 16, "latent_channels": 16, "patch": 2, "channels": [16, 16, 24]},
    ),
    "f32c32": ({"factor": 32, "patch": 8, "latent_channels": 32}, {"factor": 32, "latent_channels": 32}),
    # A token of 8 pixels over latents of 4: odd latent sides are padded to whole tokens and cropped.
    "f4c4": ({"factor": 4, "patch": 1}, {"factor": 4}),
    "f4c3": (
        {"factor": 4, "latent_channels": 3, "patch": 1, "linear_skip": True},
        {"factor": 4, "latent_channels": 3, "patch": 2, "channels": [16, 16, 24], "linear_skip": True},
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_every_latent_space(name, tmp_path):
    encoder, decoder = SPACES[name]
    tok = tiny_tokenizer(encoder=encoder, decoder=decoder)
    assert tok.config.encoder.name == name
    x = rand_images(2, 3, 20, 45)
    posterior = tok.encode(x)
    f = tok.factor
    assert posterior.mode().shape[2:] == (-(-20 // f), -(-45 // f))
    out = tok.decode(posterior.mode(), size=posterior.size)
    assert out.shape == x.shape
    assert tok.decode(posterior.mode()).shape[2:] == tuple(f * n for n in posterior.mode().shape[2:])
    tok.save_pretrained(tmp_path / name)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / name)(x), out)


# ---- configuration ----------------------------------------------------------------------------------


def test_configuration_cross_checks():
    with pytest.raises(UserError, match=r"encoder\.factor=16 and decoder\.factor=8"):
        TokenizerConfig(encoder=EncoderConfig(factor=16), decoder=decoder_config({"size": "S/2"}))
    with pytest.raises(UserError, match=r"latent_channels=4 and decoder\.latent_channels=16"):
        TokenizerConfig(decoder=decoder_config({"size": "S/2", "latent_channels": 16}))
    for wrong, named in (({"steps": 0}, "steps=0"), ({"power": 0}, "power=0"), ({"noise": "pink"}, "pink")):
        with pytest.raises(UserError, match=named):
            SamplerConfig(**wrong)


def test_configuration_round_trip(tok):
    values = json.loads(json.dumps(dataclasses.asdict(tok.config)))
    assert TokenizerConfig.from_dict(values) == tok.config
    with pytest.raises(UserError, match="colour"):
        TokenizerConfig.from_dict(values | {"colour": 1})
    with pytest.raises(UserError, match="colour"):
        TokenizerConfig.from_dict(values | {"decoder": values["decoder"] | {"colour": 1}})


# ---- files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tok.save_pretrained(folder, extra={"recipe": "tiny"})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_what_is_saved_is_what_is_loaded(tok, saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["training"] == {"recipe": "tiny"}
    loaded = Tokenizer.from_pretrained(saved)
    assert loaded.config == tok.config
    assert not loaded.training
    x = rand_images(1, 3, 20, 33)
    assert torch.equal(loaded.encode(x).mode(), tok.encode(x).mode())
    assert torch.equal(loaded(x), tok(x))


def test_the_weights_file_alone_is_enough(tok, saved, tmp_path):
    x = rand_images(1, 3, 16, 24)
    file = shutil.copy(saved / "model.safetensors", tmp_path / "renamed.safetensors")
    assert torch.equal(Tokenizer.from_pretrained(file)(x), tok(x))
    (tmp_path / "folder").mkdir()
    shutil.copy(file, tmp_path / "folder" / "model.safetensors")
    assert torch.equal(Tokenizer.from_pretrained(str(tmp_path / "folder"))(x), tok(x))


def test_half_precision_files(tok, saved, tmp_path):
    tok.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        metadata = len(file.metadata()["config"])
    sizes = [(p / "model.safetensors").stat().st_size - metadata for p in (tmp_path / "half", saved)]
    tensors = sum(t.numel() for t in tok.state_dict().values())
    assert sizes[1] - sizes[0] == pytest.approx(2 * tensors, rel=0.01)
    loaded = Tokenizer.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.decoder.conv_in.weight, tok.decoder.conv_in.weight.bfloat16().float())
    assert Tokenizer.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert tok.dtype == torch.float32


def test_a_folder_in_the_hubs_cache_loads_by_its_repository(tok, saved, tmp_path):
    repo = tmp_path / "models--somebody--photos"
    snapshot = repo / "snapshots" / ("a" * 40)
    shutil.copytree(saved, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    loaded = Tokenizer.from_pretrained("somebody/photos", cache_dir=tmp_path, local_files_only=True)
    x = rand_images(1, 3, 16, 24)
    assert torch.equal(loaded(x), tok(x))


def test_an_unknown_name_is_explained():
    for name in ("no-such-model", "nobody/no-such-model", "a/b/c"):
        with pytest.raises(UserError) as error:
            Tokenizer.from_pretrained(name)
        message = str(error.value)
        assert repr(name) in message
        assert "not packaged" in message
        assert "\n" not in message


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(path)
    return str(error.value)


def test_missing_files_are_named(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in refused(copy)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(tmp_path / "empty")


def test_corrupt_files_are_refused(copy):
    weights, config = copy / "model.safetensors", copy / "config.json"
    whole = weights.read_bytes()
    for damaged in (b"", b"not safetensors at all", whole[:1000], whole[:-100]):
        weights.write_bytes(damaged)
        assert "corrupt" in refused(copy)
    weights.write_bytes(whole)
    for damaged in ("{", "[1, 2]", "\x00"):
        config.write_text(damaged, encoding="utf-8")
        assert "monobath" in refused(copy)
    config.write_bytes(b"\xff\xfe\x00")
    assert "corrupt" in refused(copy)


def test_other_checkpoints_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "not a monobath tokenizer" in refused(tmp_path / "other.safetensors")
    save_file(
        {"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"config": json.dumps({"format": "x"})}
    )
    assert "'x'" in refused(tmp_path / "other.safetensors")


def test_another_architecture_is_listed(copy):
    file = copy / "model.safetensors"
    state = load_file(file)
    state["decoder.extra"] = torch.zeros(1)
    state["decoder.conv_in.bias"] = torch.zeros(7)
    del state["encoder.conv_in.weight"]
    save_file(state, file)
    config = json.loads((copy / "config.json").read_text())
    del config["model_sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    message = refused(copy)
    assert "missing: encoder.conv_in.weight" in message
    assert "unexpected: decoder.extra" in message
    assert "misshapen: decoder.conv_in.bias (7,) instead of (16,)" in message


def test_configurations_of_another_version_are_refused(copy):
    config = copy / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    for change, named in [
        ({"colour": 1}, "colour"),
        ({"encoder": 3}, "configuration"),
        ({"encoder": values["encoder"] | {"factor": "8"}}, "configuration"),
        ({"encoder": values["encoder"] | {"factor": 6}}, "factor"),
    ]:
        config.write_text(json.dumps(values | change), encoding="utf-8")
        assert named in refused(copy)


def test_a_failing_save_keeps_the_old_model(tok, copy, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def half_written(state, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", half_written)
    with pytest.raises(UserError, match="No space left"):
        tok.save_pretrained(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


def test_lazy_top_level():
    assert monobath.Tokenizer is Tokenizer
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = monobath.Tokeniser


def test_a_saved_model_has_the_same_bytes_each_time(tmp_path):
    """safetensors orders metadata by lot."""
    found = set()
    for number in range(8):
        tiny_tokenizer().save_pretrained(tmp_path / str(number))
        found.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "0/model.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
        inside, beside = json.loads(opened.metadata()["config"]), json.loads((tmp_path / "0/config.json").read_text())
    assert beside == inside | {"model_sha256": hashlib.sha256(found.pop()).hexdigest()}


def test_weights_that_were_exchanged_are_refused(tmp_path):
    for seed in (0, 1):
        tiny_tokenizer(seed).save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "1/model.safetensors", tmp_path / "0/model.safetensors")
    with pytest.raises(UserError, match="is not the file that"):
        Tokenizer.from_pretrained(tmp_path / "0")
    config = json.loads((tmp_path / "0/config.json").read_text())
    del config["model_sha256"]  # as folders from before there were hashes
    (tmp_path / "0/config.json").write_text(json.dumps(config))
    Tokenizer.from_pretrained(tmp_path / "0")


def test_packaged_weights_have_hashes():
    for name in resources.weights_names():
        assert "model_sha256" in json.loads((resources.weights_path(name) / "config.json").read_text())


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("encoder", "base", 2**40), ("encoder", "factor", 2**30), ("encoder", "multipliers", [10**9, 1, 1]),
     ("decoder", "channels", [2**31, 8]), ("decoder", "middle_blocks", 10**12), ("decoder", "latent_channels", "four"),
     ("sampler", "steps", 10**15), ("sampler", "noise", ["zero"])],
)  # fmt: skip
def test_a_configuration_cannot_claim_more_than_its_weights_hold(tmp_path, part, name, value):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[part][name] = value
    if name in ("factor", "latent_channels"):
        config["decoder" if part == "encoder" else "encoder"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        Tokenizer.from_pretrained(tmp_path).decode(torch.zeros(1, 4, 2, 3))
    assert "\n" not in str(error.value)
    assert "alloc" not in str(error.value)
