"""What `monobath export --for PROGRAM` writes: names, shapes and pictures are those that the program loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import rand_images, randn, randomise, tiny_tokenizer
from safetensors.torch import load_file, save_file

from monobath import Tokenizer, UserError
from monobath.autoencoders import read_taesd
from monobath.cli import main
from monobath.config import TokenizerConfig
from monobath.decoders.taef2 import Taef2Decoder
from monobath.export.formats import convolution_of, taef2_state
from monobath.models import taesd

CHANNELS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published-style decoder with random weights."""
    folder = tmp_path_factory.mktemp("taef2")
    decoder = randomise(taesd.taesd_decoder(CHANNELS), scale=0.3)
    save_file(decoder.state_dict(), folder / "taef2_decoder.safetensors")
    return folder


def slim(folder, *, channels: int = 64, unfolded: bool = False, **config) -> Tokenizer:
    """A model of the recipe's shape with the family's own weights."""
    values = {
        "encoder": {"family": "taef2", "latent_channels": CHANNELS},
        "decoder": {"kind": "taef2", "slim": channels, "unfolded": unfolded, "latent_channels": CHANNELS},
        "sampler": {"noise": "zero"},
    }
    made = Tokenizer(TokenizerConfig.from_dict(values | config)).eval()
    own, decoder = read_taesd("taef2", str(folder), "decoder"), made.decoder
    assert isinstance(decoder, Taef2Decoder)
    assert decoder.trunk is not None
    decoder.trunk.layers.load_state_dict(own[:16].state_dict())
    with torch.no_grad():
        decoder.tail.take(own, decoder.read(randn(1, CHANNELS, 4, 5)))
    decoder.conv_out.load_state_dict(own[-1].state_dict())
    return made


@pytest.mark.parametrize("unfolded", [False, True])
def test_before_the_first_step_it_is_the_file_that_it_came_from(folder, tmp_path, capsys, unfolded):
    slim(folder, unfolded=unfolded).save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--for", "comfyui", "--out", str(tmp_path)]) == 0
    assert "the same pictures" in capsys.readouterr().out
    written, given = (load_file(where / "taef2_decoder.safetensors") for where in (tmp_path, folder))
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(written[name], tensor, atol=1e-6, rtol=0)


@torch.no_grad()
def test_trained_unfolded_its_pictures_are_the_model_s(folder, tmp_path):
    model = slim(folder, unfolded=True)
    for name, parameter in model.decoder.named_parameters():
        if not name.startswith("trunk"):
            parameter.add_(randn(*parameter.shape, seed=3), alpha=0.05 * float(parameter.std()))
    state, psnr = taef2_state(model)
    assert psnr > 90
    own, z = taesd.from_state("decoder", state, "it"), randn(2, CHANNELS, 5, 7)
    torch.testing.assert_close((2 * own(z) - 1).clamp(-1, 1), model.decode(z), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_trained_enlargement_is_written_as_near_as_the_form_allows_or_not_at_all(folder):
    model = slim(folder)
    up, c = model.decoder.tail.up, taesd.CHANNELS
    assert taef2_state(model)[1] > 90
    wanted = 0.02 * randn(c, c, 3, 3)
    exact = taesd.SlimTail(c)  # what an enlargement and that convolution are as one
    own = taesd.taesd_decoder(CHANNELS)
    own[17].weight.copy_(wanted)
    exact.take(own, randn(1, c, 3, 4))
    torch.testing.assert_close(convolution_of(exact.up.weight), wanted, atol=1e-6, rtol=0)
    up.weight.add_(randn(*up.weight.shape, seed=1), alpha=float(up.weight.std()))
    with pytest.raises(UserError, match=r"dB between the two.*decoder\.unfolded true"):
        taef2_state(model)


def test_stable_diffusion_cpp_counts_layers_from_the_first_convolution(folder, tmp_path):
    slim(folder).save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--for", "sdcpp", "--out", str(tmp_path)]) == 0
    written, given = load_file(tmp_path / "taef2-sdcpp.safetensors"), load_file(folder / "taef2_decoder.safetensors")
    assert written["decoder.layers.0.weight"].shape == (64, CHANNELS, 3, 3)
    assert written["decoder.layers.18.weight"].shape == (3, 64, 3, 3)
    assert {name for name in written if ".pool." in name and name.endswith("0.weight")} == {
        f"decoder.layers.{n}.pool.0.weight" for n in (2, 3, 4)
    }
    assert len(written) == len(given)


def test_other_models_are_refused_with_the_reason(folder, tmp_path, capsys):
    tiny_tokenizer(noise="zero").save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), "--for", "comfyui", "--out", str(tmp_path / "o")]) == 2
    assert "this decoder is custom" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    for model, why in (
        (slim(folder, channels=8), "8 channels, not 64"),
        (slim(folder, latents="raw"), "takes raw latents"),
    ):
        with pytest.raises(UserError, match=why):
            taef2_state(model)
    command = ["export", str(tmp_path / "ours"), "--for", "sdcpp", "--engine", "openvino", "--out", str(tmp_path / "o")]
    assert main(command) == 2
    assert "leave out --engine" in capsys.readouterr().err


LOADED = """
import json, sys
sys.modules["monobath"] = None
import diffusers, torch
from safetensors.torch import load_file, save_file
folder, given, out = sys.argv[1:]
vae = diffusers.AutoModel.from_pretrained(folder, trust_remote_code=True)
known = load_file(given)
with torch.no_grad():
    z = vae.encode(known["x"]).latent_dist.mode()
    vae.enable_tiling(tile=32, overlap=16)
    save_file({"z": z, "picture": vae.decode(z).sample.contiguous()}, out)
assert not [name for name in sys.modules if name.startswith("monobath.")]
"""


def test_diffusers_loads_a_folder_without_monobath(tmp_path, monkeypatch):
    """In a process that cannot import monobath; .ci/run does it where it is not installed."""
    pytest.importorskip("diffusers")
    model, x = tiny_tokenizer(), rand_images(1, 3, 48, 72)
    model.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--for", "diffusers", "--out", str(tmp_path / "folder")]) == 0
    config = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    module, _, name = config["auto_map"]["AutoModel"].partition(".")
    assert name == "AutoencoderMonobath"
    text = (tmp_path / "folder" / f"{module}.py").read_text(encoding="utf-8")
    assert "import monobath" not in text
    assert "from monobath" not in text
    save_file({"x": x}, tmp_path / "x.safetensors")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # where diffusers keeps copies of such modules
    arguments = [str(tmp_path / name) for name in ("folder", "x.safetensors", "out.safetensors")]
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, z = load_file(tmp_path / "out.safetensors"), model.encode(x).mode()
    torch.testing.assert_close(found["z"], z, atol=1e-5, rtol=0)
    expected = model.decode(z, tile=32, overlap=16)
    torch.testing.assert_close(found["picture"].clamp(-1, 1), expected, atol=1e-5, rtol=0)
