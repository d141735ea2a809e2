"""Every system behind the interface: real code paths, tiny weights, sides that no factor divides."""

from __future__ import annotations

import io
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import rand_images, randomise, tiny_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from monobath.errors import UserError
from monobath.evaluation.peers import (
    ARCHITECTURES,
    FORMATS,
    PEERS,
    Bicubic,
    FileCodec,
    TaesdSystem,
    make_peer,
    random_autoencoder,
)
from monobath.evaluation.speed import sample_images
from monobath.evaluation.system import TokenizerSystem
from monobath.images import to_float, to_uint8
from monobath.models import taesd
from monobath.tiles import pad_to_multiple

ODD = (19, 30)  # H, W: neither is a multiple of 8


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean() / 4)


def assert_lawful(system, bits):
    """Size kept, range kept, deterministic, real bits, and no picture depends on its neighbours."""
    x = rand_images(2, 3, *ODD)
    code = system.encode(x)
    assert code.size == ODD
    assert code.bits == [bits, bits]
    y = system.decode(code, [3, 4])
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert y.abs().max() <= 1
    assert y.std() > 0.01
    assert torch.equal(y, system.decode(system.encode(x), [3, 4]))
    alone = system.decode(system.encode(x[1:]), [4])
    assert (alone - y[1:]).abs().mean() < 1e-3  # random networks blow rounding up; a wrong sample is off by 0.1
    return x, y


# ---- monobath ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("systems") / "mine"
    tiny_tokenizer(noise="gaussian", steps=1).save_pretrained(path)
    return str(path)


def test_tokenizer_gives_what_the_tokenizer_gives(folder):
    system = TokenizerSystem(folder)
    x, y = assert_lawful(system, bits=16 * 4 * 3 * 4)
    posterior = system.tokenizer.encode(x)
    assert torch.equal(y, system.tokenizer.decode(posterior.mode(), size=ODD, seed=[3, 4]))
    assert (system.kind, system.weights, system.steps) == ("monobath", folder, 1)


def test_step_counts_and_noise_of_one_model(folder):
    one, four = TokenizerSystem(folder), TokenizerSystem(folder, steps=4)
    assert (one.name, four.name) == (folder, f"{folder}, 4 steps")
    assert one.family == four.family
    assert (one.steps, four.steps) == (1, 4)
    zero = TokenizerSystem(folder, noise="zero")
    assert zero.family != one.family
    x = rand_images(1, 3, *ODD)
    outputs = [s.decode(s.encode(x), [0]) for s in (one, four, zero)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[2], zero.decode(zero.encode(x), [1]))
    with pytest.raises(UserError, match="steps is 0"):
        TokenizerSystem(folder, steps=0)


def test_packaged_models_are_named_as_given_and_kept_under_their_versioned_name():
    system = TokenizerSystem("default")
    assert (system.name, system.family) == ("default", "default")
    assert system.weights != "default"
    assert system.decoder is not None


# ---- diffusers --------------------------------------------------------------------------------------------------

KL = {
    "block_out_channels": [16, 16, 16, 16], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
SHAPES = {
    "kl": KL,
    "tiny": {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
    "dc": {
        "latent_channels": 4, "attention_head_dim": 8,
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_block_out_channels": [8, 16],
        "encoder_layers_per_block": [1, 1], "encoder_qkv_multiscales": [[], [5]],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"], "decoder_block_out_channels": [8, 16],
        "decoder_layers_per_block": [1, 1], "decoder_qkv_multiscales": [[], [5]],
    },
    "consistency": {
        "encoder_block_out_channels": [8] * 4, "encoder_norm_num_groups": 4, "encoder_layers_per_block": 1,
        "decoder_block_out_channels": [16] * 4, "decoder_norm_num_groups": 4, "decoder_layers_per_block": 1,
    },
    "flux2": KL | {"latent_channels": 8},
}  # fmt: skip
CODES = {"kl": (8, 4), "tiny": (8, 4), "dc": (2, 4), "consistency": (8, 4), "flux2": (8, 8)}  # factor, channels


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory):
    """Folder of each kind, as `save_pretrained` writes it."""
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("peers")
    for kind, shape in SHAPES.items():
        vae = getattr(diffusers, ARCHITECTURES[kind].name)(**shape)
        randomise(vae, scale=0.1).save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("kind", SHAPES)
def test_diffusers_autoencoders_load_and_run(autoencoders, kind):
    factor, channels = CODES[kind]
    system = make_peer(f"{kind}={autoencoders / kind}")
    h, w = (-(-side // factor) for side in ODD)
    x, y = assert_lawful(system, bits=16 * channels * h * w)
    assert (system.kind, system.weights) == (ARCHITECTURES[kind].name, str(autoencoders / kind))
    vae = system.vae
    if kind == "consistency":
        assert not torch.equal(y, system.decode(system.encode(x), [5, 6]))
        return
    with torch.no_grad():
        coded = vae.encode(pad_to_multiple(x, factor))
        latent = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded[0]
        expected = vae.decode(latent).sample[:, :, : ODD[0], : ODD[1]].clamp(-1, 1)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", SHAPES)
def test_encoder_and_decoder_are_all_of_an_autoencoder(autoencoders, kind):
    system = make_peer(f"{kind}={autoencoders / kind}")
    counted = sum(p.numel() for part in (system.encoder, system.decoder) for p in part.parameters())
    assert counted == sum(p.numel() for p in system.vae.parameters())


def test_a_pipelines_folder_will_do(autoencoders, tmp_path):
    (tmp_path / "vae").symlink_to(autoencoders / "tiny")
    assert make_peer(f"tiny={tmp_path}").kind == "AutoencoderTiny"


def test_random_weights_are_the_published_shapes():
    with torch.device("meta"):  # parameters are counted, not made
        sizes = {kind: sum(p.numel() for p in random_autoencoder(kind).parameters()) for kind in ("kl", "tiny", "dc")}
    assert sizes == {"kl": 83_653_863, "tiny": 2_445_063, "dc": 312_250_275}


def test_random_weights_say_so():
    system = make_peer("tiny=random")
    assert system.weights == "random"
    assert "random" in system.name


def test_another_class_is_refused_with_the_right_kind(autoencoders):
    with pytest.raises(UserError, match=f"holds an AutoencoderTiny.*tiny={autoencoders}"):
        make_peer(f"kl={autoencoders / 'tiny'}")


@pytest.mark.parametrize("damage", ["lacks", "has too much", "is cut", "lost its weights"])
def test_damaged_autoencoders_are_refused(autoencoders, tmp_path, damage):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(autoencoders / "tiny" / file.name)
    (tmp_path / "config.json").write_text((autoencoders / "tiny" / "config.json").read_text())
    if damage == "lacks":
        state.pop("decoder.layers.0.weight")
    elif damage == "has too much":
        state["decoder.more"] = torch.zeros(1)
    if damage != "lost its weights":
        save_file(state, file, metadata={"format": "pt"})
    if damage == "is cut":
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"tiny={tmp_path}"):
        make_peer(f"tiny={tmp_path}")


def test_what_is_nowhere_is_explained(tmp_path):
    pytest.importorskip("diffusers")
    for where in ("nobody/nothing", "nobody/nothing/vae", str(tmp_path)):
        with pytest.raises(UserError, match=f"kl={where} could not be loaded.*kl=random"):
            make_peer(f"kl={where}")
    for where in (str(tmp_path / "none"), "./none", "none", "a/b/c/d"):
        with pytest.raises(UserError, match="does not exist"):
            make_peer(f"kl={where}")


def test_without_diffusers_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'monobath\[diffusers\]'"):
        make_peer("kl=random")


# ---- TAESD ------------------------------------------------------------------------------------------------------


@pytest.fixture
def taef2(tmp_path):
    """Half-precision files of the published structure, smaller: 6 latent channels, 8 channels."""
    for part, network in (("encoder", taesd.taesd_encoder(6, 8)), ("decoder", taesd.taesd_decoder(6, 8))):
        state = {name: tensor.half() for name, tensor in randomise(network).state_dict().items()}
        save_file(state, tmp_path / f"taef2_{part}.safetensors")
    return tmp_path


def test_taesd_networks_are_the_published_ones():
    encoder, decoder = taesd.taesd_encoder(32), taesd.taesd_decoder(32)
    assert sum(p.numel() for p in encoder.parameters()) == 1_338_528
    assert sum(p.numel() for p in decoder.parameters()) == 1_338_499
    names = set(encoder.state_dict())
    assert {"0.bias", "2.weight", "10.weight", "11.pool.0.weight", "13.conv.4.bias", "14.weight"} <= names
    assert not {"2.bias", "6.bias", "9.pool.0.weight", "11.pool.0.bias"} & names
    names = set(decoder.state_dict())
    assert {"1.bias", "3.pool.1.bias", "5.pool.3.weight", "7.weight", "12.weight", "18.conv.0.bias"} <= names
    assert not {"7.bias", "8.pool.0.weight", "17.bias"} & names


def test_taesd_loads_runs_and_sees_pixels_from_0_to_1(taef2):
    system = make_peer(f"taef2={taef2}")
    x, y = assert_lawful(system, bits=16 * 6 * 3 * 4)
    assert (system.name, system.kind, system.weights) == ("TAEF2", "TAEF2", str(taef2))
    assert {p.dtype for p in system.decoder.parameters()} == {torch.float32}
    code = system.encode(x)
    padded = pad_to_multiple(x, 8)
    torch.testing.assert_close(code.payload, system.encoder(padded / 2 + 0.5).detach())
    pixels = system.decoder(code.payload).detach()[:, :, : ODD[0], : ODD[1]]
    torch.testing.assert_close(y, (2 * pixels - 1).clamp(-1, 1))


def test_pooled_blocks_pool_before_the_skip():
    block = randomise(taesd.Block(4, pooled=True))
    x = rand_images(1, 4, 5, 7)
    pooled = x + block.pool(x)
    torch.testing.assert_close(block(x), F.relu(block.conv(pooled) + pooled))
    assert not torch.allclose(pooled, x)


def test_taesd_refuses_other_files(taef2, tmp_path):
    with pytest.raises(UserError, match=r"taef2_encoder\.safetensors does not exist"):
        make_peer(f"taef2={tmp_path / 'none'}")
    encoder, decoder = (taef2 / f"taef2_{part}.safetensors" for part in ("encoder", "decoder"))
    state = load_file(encoder)
    encoder.write_bytes(decoder.read_bytes())
    with pytest.raises(UserError, match=r"taef2_encoder\.safetensors does not fit the model: 0\.weight"):
        make_peer(f"taef2={taef2}")
    save_file({k: v for k, v in state.items() if k != "5.conv.0.bias"}, encoder)
    with pytest.raises(UserError, match=r"missing: 5\.conv\.0\.bias"):
        make_peer(f"taef2={taef2}")
    encoder.write_bytes(b"not tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        TaesdSystem("taef2", str(taef2))


# ---- codecs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_codecs_spend_the_budget_and_no_more(kind):
    x = sample_images((40, 56))[:2]
    quality = []
    for bpp in (1.5, 3.0, 6.0):
        system = make_peer(f"{kind}={bpp}")
        code = system.encode(x)
        assert code.bits == [8 * len(file) for file in code.payload]
        assert max(code.bits) <= bpp * 40 * 56
        y = system.decode(code, [0, 0])
        assert y.shape == x.shape
        assert torch.equal(to_float(to_uint8(y)), y)
        quality.append(psnr(x, y))
    assert quality[0] < quality[1] < quality[2]
    assert quality[2] > 28
    assert (system.name, system.family) == (f"{FORMATS[kind].name} at 6.00 bit/pixel", FORMATS[kind].name)


@pytest.mark.parametrize("kind", FORMATS)
def test_codecs_choose_the_highest_quality_that_fits(kind):
    system, image = FileCodec(kind, 2.0), Image.fromarray(to_uint8(sample_images((32, 24)))[0].permute(1, 2, 0).numpy())
    sizes = {q: len(system._file(image, q)) for q in range(system.format.lowest, system.format.highest + 1)}
    for quality in (system.format.lowest, 37, 80, system.format.highest):
        chosen = len(system._best(image, 8 * sizes[quality]))
        assert chosen <= sizes[quality]
        # AVIF's sizes fall by a byte or two here and there, which bisection may stumble over.
        assert chosen >= 0.98 * max(size for size in sizes.values() if size <= sizes[quality])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_budget_that_nothing_fits_gives_the_lowest_quality_and_its_real_bits(kind):
    code = FileCodec(kind, 1e-3).encode(rand_images(1, 3, 16, 24))
    assert code.bits[0] > 1e-3 * 16 * 24
    image = Image.open(io.BytesIO(code.payload[0]))
    assert image.format == FORMATS[kind].name.upper()
    assert not image.getexif()
    assert "icc_profile" not in image.info


def test_bicubic_keeps_a_pixel_of_each_square():
    x = sample_images((32, 48))[:2]
    system = make_peer("bicubic=8")
    code = system.encode(x)
    assert code.bits == [24 * 4 * 6] * 2
    small = F.interpolate(x, scale_factor=1 / 8, mode="bicubic", antialias=True)
    assert torch.equal(code.payload, to_uint8(small))
    expected = F.interpolate(to_float(to_uint8(small)), size=(32, 48), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.equal(system.decode(code, [0, 0]), expected)


def test_bicubic_of_odd_sides_and_flat_pictures():
    assert_lawful(Bicubic(4), bits=24 * 5 * 8)
    flat = to_float(torch.full((1, 3, *ODD), 200, dtype=torch.uint8))
    system = Bicubic(8)
    torch.testing.assert_close(system.decode(system.encode(flat), [0]), flat)


# ---- specifications ---------------------------------------------------------------------------------------------


def test_every_kind_has_a_help_and_is_made(autoencoders, taef2):
    wheres = {"taef2": taef2, "bicubic": 8} | dict.fromkeys(FORMATS, 1.0)
    wheres |= {kind: autoencoders / kind for kind in ARCHITECTURES}
    assert set(PEERS) == set(wheres)
    names = [make_peer(f"{kind}={where}").name for kind, where in wheres.items()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jpg=1.0", "did you mean jpeg"),
        ("taef1=x", "did you mean taef2"),
        ("zzzz=x", "choose kl, tiny"),
        ("kl", "lacks what follows kl="),
        ("jpeg=", "lacks what follows jpeg=: JPEG: bits a pixel"),
        ("jpeg=good", "'good' is not a number"),
        ("jpeg=0", "must be above 0"),
        ("webp=nan", "must be above 0"),
        ("avif=-1", "must be above 0"),
        ("bicubic=1", "at least 2"),
        ("bicubic=2.5", r"'2\.5' is not a number"),
    ],
)
def test_bad_specifications_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        make_peer(spec)


def test_sample_images_are_pictures_of_any_shape():
    x = sample_images((24, 40))
    assert x.shape[1:] == (3, 24, 40)
    assert x.std() > 0.2
    assert torch.equal(x, sample_images((24, 40)))
