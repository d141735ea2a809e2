"""ComfyUI's nodes against its recorded interface: tests/fixtures/comfyui.json says which names and signatures it has.

`scripts/comfyui_interface.py` compares the record with a checkout, and `scripts/try_comfyui.sh` runs the nodes in one.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from conftest import rand_images, randn, tiny_tokenizer

from monobath import Tokenizer, UserError, __version__

RECORD = json.loads((Path(__file__).parent / "fixtures" / "comfyui.json").read_text(encoding="utf-8"))["interface"]
CPU = torch.device("cpu")


class VAE:
    """Does what ComfyUI's does with a network: process_output works in place, and `decode` ignores what it returns."""

    def __init__(self, sd=None, device=None, config=None, dtype=None, metadata=None):
        assert sd == {}, "with weights, ComfyUI would look for a network"
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1
        self.latent_channels, self.downscale_ratio, self.upscale_ratio, self.crop_input = 4, 8, 8, True
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.working_dtypes, self.disable_offload, self.first_stage_model = [torch.float32], False, None
        self.device = self.output_device = self.vae_dtype = self.patcher = None

    def encode(self, pixel_samples):
        assert not self.crop_input
        assert self.memory_used_encode(pixel_samples.movedim(-1, 1).shape, self.vae_dtype) > 0
        return self.first_stage_model.encode(self.process_input(pixel_samples.movedim(-1, 1)).to(self.vae_dtype))

    def decode(self, samples_in, vae_options={}):  # noqa: B006
        assert self.memory_used_decode(samples_in.shape, self.vae_dtype) > 0
        images = self.first_stage_model.decode(samples_in.to(self.vae_dtype), **vae_options).float().clone()
        self.process_output(images)
        return images.movedim(1, -1)

    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        return self.encode_tiled_(pixel_samples.movedim(-1, 1), tile_x, tile_y, overlap)

    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        return self.decode_tiled_(samples, tile_x, tile_y, overlap).movedim(1, -1)

    def encode_tiled_(self, pixel_samples, tile_x, tile_y, overlap):
        raise NotImplementedError

    def decode_tiled_(self, samples, tile_x, tile_y, overlap):
        raise NotImplementedError


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
        self.model = model.to(load_device)


class ProgressBar:
    updates: list[tuple] = []  # noqa: RUF012

    def __init__(self, total, node_id=None):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        self.updates.append((value, total, preview))


def load_models_gpu(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None,
                    force_full_load=False):  # fmt: skip
    assert all(isinstance(model, ModelPatcher) for model in models)


@pytest.fixture(scope="module")
def interface(tmp_path_factory):
    """The modules of ComfyUI, as far as the nodes need them."""
    models = tmp_path_factory.mktemp("models")
    folders: dict[str, str] = {}

    def get_full_path_or_raise(folder_name, filename):
        return str(Path(folders[folder_name]) / filename)

    def get_filename_list(folder_name):
        root = Path(folders[folder_name])
        return [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]

    def add_model_folder_path(folder_name, full_folder_path, is_default=False):
        folders[folder_name] = full_folder_path

    return {
        "comfy/sd.py": {"VAE": VAE},
        "comfy/model_management.py": {
            "load_models_gpu": load_models_gpu,
            "vae_device": lambda: CPU,
            "vae_offload_device": lambda: CPU,
            "vae_dtype": lambda device=None, allowed_dtypes=(): torch.float32,
            "intermediate_device": lambda: CPU,
            "dtype_size": lambda dtype: dtype.itemsize,
        },
        "comfy/model_patcher.py": {"ModelPatcher": ModelPatcher},
        "comfy/utils.py": {"ProgressBar": ProgressBar},
        "folder_paths.py": {
            "models_dir": str(models),
            "add_model_folder_path": add_model_folder_path,
            "get_filename_list": get_filename_list,
            "get_full_path_or_raise": get_full_path_or_raise,
        },
    }


@pytest.fixture(scope="module")
def nodes(interface):
    """The module with the nodes, imported as ComfyUI does, and forgotten afterwards."""
    made = {"comfy": types.ModuleType("comfy")}
    for file, names in interface.items():
        name = file.removesuffix(".py").replace("/", ".")
        made[name] = types.ModuleType(name)
        vars(made[name]).update(names)
        if "." in name:
            setattr(made["comfy"], name.partition(".")[2], made[name])
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("monobath.integrations.comfyui")
    sys.modules.pop("monobath.integrations.comfyui", None)


@pytest.fixture(scope="module")
def model():
    return tiny_tokenizer(noise="zero")


def parameters(function) -> str:
    return f"({', '.join(inspect.signature(function).parameters)})"


def test_what_the_tests_stand_in_for_is_what_is_recorded(interface):
    for file, recorded in RECORD.items():
        for name, signature in recorded.items():
            if signature == "set":
                owner, _, attribute = name.partition(".")
                assert attribute in vars(VAE(sd={})) if attribute else owner in interface[file], name
                continue
            found = interface[file]
            for part in name.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            assert parameters(found) == signature, name


def test_overridden_methods_keep_their_signatures(nodes):
    for name, signature in RECORD["comfy/sd.py"].items():
        method = getattr(nodes.MonobathVAE, name.partition(".")[2], None)
        if signature != "set" and not name.endswith("__init__"):
            assert parameters(method) == signature


def test_the_folder_for_custom_nodes_has_the_nodes(nodes):
    file = Path(__file__).resolve().parent.parent / "integrations" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes_monobath", file, submodule_search_locations=[])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in module.NODE_CLASS_MAPPINGS.values():
        inputs = [name for part in node.INPUT_TYPES().values() for name in part]
        assert parameters(getattr(node, node.FUNCTION)) == f"(self, {', '.join(inputs)})"
        assert len(node.RETURN_TYPES) == 1


def test_the_registry_is_told_the_package_s_version():
    file = Path(__file__).resolve().parent.parent / "integrations" / "comfyui" / "pyproject.toml"
    described = tomllib.loads(file.read_text(encoding="utf-8"))
    assert described["project"]["version"] == __version__
    assert described["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}


def test_comfyui_s_own_nodes_give_the_tokenizer_s_pictures(nodes, model):
    vae, x = nodes.MonobathVAE(model), rand_images(2, 3, 40, 56)
    image = ((x + 1) / 2).movedim(1, -1)
    z = vae.encode(image.clone())
    torch.testing.assert_close(z, model.encode(x).mode(), atol=1e-4, rtol=0)
    expected = (model.decode(z) + 1) / 2
    torch.testing.assert_close(vae.decode(z).movedim(-1, 1), expected, atol=1e-5, rtol=0)
    tiled = vae.decode_tiled(z, tile_x=4, tile_y=4, overlap=2).movedim(-1, 1)
    torch.testing.assert_close(tiled, (model.decode(z, tile=32, overlap=16) + 1) / 2, atol=1e-5, rtol=0)
    assert vae.encode_tiled(image, tile_x=32, tile_y=32, overlap=8).shape == z.shape


def test_our_nodes_keep_any_size(nodes, model):
    vae, x = nodes.MonobathVAE(model), rand_images(1, 3, 37, 50)
    image = ((x + 1) / 2).movedim(1, -1)
    (latent,) = nodes.Encode().encode(image, vae)
    (back,) = nodes.Decode().decode(latent, vae)
    assert back.shape == image.shape
    expected = model.decode(model.encode(x).mode(), size=(37, 50))
    torch.testing.assert_close(back.movedim(-1, 1), (expected + 1) / 2, atol=1e-4, rtol=0)
    larger = latent | {"samples": torch.cat([latent["samples"]] * 2, dim=3)}  # an upscaled latent has another size
    assert nodes.Decode().decode(larger, vae)[0].shape == (1, 40, 112, 3)


def test_flux2_latents_are_packed_and_normalised_there(nodes):
    shape, statistics = {"latent_channels": 3}, {"packed_mean": [0.5] * 12, "packed_variance": [4.0] * 12}
    model = tiny_tokenizer(decoder=shape, encoder=shape, noise="zero")
    model.config.encoder.family = "flux2"
    for name, value in statistics.items():
        setattr(model.config, name, value)
    vae, held = nodes.MonobathVAE(model), randn(1, 12, 2, 3)
    assert (vae.latent_channels, vae.upscale_ratio) == (12, 16)
    z = torch.nn.functional.pixel_shuffle(held * 2 + 0.5, 2)
    expected = (model.decode(z) + 1) / 2
    torch.testing.assert_close(vae.decode(held).movedim(-1, 1), expected, atol=1e-5, rtol=0)
    assert vae.encode(torch.rand(1, 40, 56, 3)).shape == (1, 12, 3, 4)  # both sides padded to multiples of 16


def test_coarse_to_fine_shows_each_stage(nodes):
    model = tiny_tokenizer(decoder={"stages": 2}, noise="zero", stages=2)
    ProgressBar.updates.clear()
    z = randn(1, 4, 4, 6)
    (image,) = nodes.DecodeProgressive().decode({"samples": z}, nodes.MonobathVAE(model))
    torch.testing.assert_close(image.movedim(-1, 1), (model.decode(z) + 1) / 2, atol=1e-5, rtol=0)
    assert [(value, total) for value, total, _ in ProgressBar.updates] == [(1, 2), (2, 2)]
    assert [preview[1].size for *_, preview in ProgressBar.updates] == [(24, 16), (48, 32)]


def test_mistakes_are_one_line(nodes, model):
    vae = nodes.MonobathVAE(model)
    for decode in (vae.decode, lambda z: nodes.Decode().decode({"samples": z}, vae)):
        with pytest.raises(UserError, match=r"have 16 channels, .* of 4 channels") as error:
            decode(randn(1, 16, 2, 2))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="Load monobath decoder"):
        nodes.Decode().decode({"samples": randn(1, 4, 2, 2)}, VAE(sd={}))


def test_the_loader_lists_and_loads_models(nodes, model, tmp_path):
    folder = Path(nodes.folder_paths.models_dir) / "monobath" / "mine"
    model.save_pretrained(folder)
    names = nodes.LoadDecoder.INPUT_TYPES()["required"]["model"][0]
    assert "default" in names
    assert "mine/model.safetensors" in names
    assert "mine/config.json" not in names
    z = randn(1, 4, 2, 3)
    for given in ({"model": "mine/model.safetensors"}, {"model": "default", "other": str(folder)}):
        (vae,) = nodes.LoadDecoder().load(**given)
        assert isinstance(vae.first_stage_model.tokenizer, Tokenizer)
        torch.testing.assert_close(vae.decode(z).movedim(-1, 1), (model.decode(z) + 1) / 2, atol=1e-5, rtol=0)
