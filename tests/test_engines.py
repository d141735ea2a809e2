"""Every engine decodes the pictures that torch decodes, at any size, from one file."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer

from monobath import UserError
from monobath.export.engines import FILES, onnx_bytes, with_engine, write_export

for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install '.[export]'", allow_module_level=True)

SIZES = {
    "smaller than a block": (3, 5),
    "one position": (1, 1),
    "several blocks, cut": (17, 9),
    "whole blocks": (8, 16),
}

BARE = {"channels": [16], "norm": "local", "middle_blocks": 0, "modulation": False, "down": [0], "up": [1]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(tokenizer, folder with every engine's file); a decoder from Gaussian noise, for both inputs."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = tiny_tokenizer(decoder={"middle_blocks": 1, "linear_skip": True}, noise="gaussian")
    calibration = [torch.randn(1, 4, 6, 6) for _ in range(3)]
    program = onnx_bytes(tokenizer)
    for engine in ("onnxruntime", "openvino", "openvino-int8", "torch-export"):
        write_export(tokenizer, engine, folder, calibration=calibration, program=program)
    return tokenizer, folder


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch-export"])
def test_engine_gives_the_picture_of_torch_at_any_size(exported, engine, shape):
    tokenizer, folder = exported
    z = torch.randn(2, 4, *shape)
    expected = tokenizer.decode(z, seed=5)
    got = with_engine(tokenizer, engine, folder=folder).decode(z, seed=5)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_reduced_precision_is_near_and_not_the_same(exported):
    tokenizer, folder = exported
    z = torch.randn(1, 4, 6, 7)
    expected = tokenizer.decode(z)
    for engine, least in (("openvino-int8", 0.6), ("openvino-bf16", 0.98)):
        got = with_engine(tokenizer, engine, folder=folder).decode(z)
        # A random network exaggerates rounding; unrelated pictures would correlate at about 0.
        assert torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1] > least
        if engine == "openvino-int8":
            assert (got - expected).abs().max() > 1e-5  # or nothing was quantised


def test_int8_file_is_smaller(exported):
    _, folder = exported
    whole, small = ((folder / FILES[e]).with_suffix(".bin").stat().st_size for e in ("openvino", "openvino-int8"))
    assert small < 0.6 * whole


def test_file_reads_and_writes_what_its_documentation_says(exported):
    import onnx

    tokenizer, folder = exported
    model = onnx.load(folder / FILES["onnxruntime"])
    onnx.checker.check_model(model)
    assert [i.name for i in model.graph.input] == ["latent", "noise"]
    assert [o.name for o in model.graph.output] == ["image"]
    latent = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert latent == [0, tokenizer.config.encoder.latent_channels, 0, 0]  # 0: free


def test_engine_without_a_file_makes_its_own():
    tokenizer = tiny_tokenizer(decoder={"middle_blocks": 0}, noise="zero")
    z = torch.randn(1, 4, 3, 4)
    fast = with_engine(tokenizer, "onnxruntime")
    torch.testing.assert_close(fast.decode(z), tokenizer.decode(z), atol=1e-4, rtol=0)
    assert np.isfinite(fast.decode(z, output="uint8").numpy()).all()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "openvino-int8", "torch-export"])
def test_replicate_padding_at_any_size_from_one_file(tmp_path, engine):
    tokenizer = tiny_tokenizer(decoder=BARE | {"padding": "replicate"}, noise="zero")
    write_export(tokenizer, engine, tmp_path, calibration=[torch.randn(1, 4, 6, 6) for _ in range(8)])
    fast = with_engine(tokenizer, engine, folder=tmp_path)
    for shape in SIZES.values():
        z = torch.randn(2, 4, *shape)
        got, expected = fast.decode(z), tokenizer.decode(z)
        if engine == "openvino-int8":
            assert (got - expected).square().mean() < 0.01 * expected.var()
        else:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_ahead_of_time_any_size_from_one_file(tmp_path):
    tokenizer = tiny_tokenizer(decoder=BARE | {"padding": "replicate"}, noise="zero")
    file = write_export(tokenizer, "aotinductor", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    fast = with_engine(tokenizer, "aotinductor", folder=tmp_path)
    for shape in ((2, 4, 5, 3), (1, 4, 1, 1), (3, 4, 16, 9)):
        z = torch.randn(shape)
        torch.testing.assert_close(fast.decode(z), tokenizer.decode(z), atol=1e-4, rtol=0)


def test_torch_engine_is_the_optimized_form():
    tokenizer = tiny_tokenizer(noise="zero")
    z = torch.randn(1, 4, 3, 4)
    torch.testing.assert_close(with_engine(tokenizer, "torch").decode(z), tokenizer.decode(z), atol=1e-4, rtol=0)


def test_mistakes_are_explained(tmp_path):
    tokenizer = tiny_tokenizer(decoder={"middle_blocks": 0}, noise="zero")
    with pytest.raises(UserError, match="'tensorrt' is unknown: choose from torch"):
        with_engine(tokenizer, "tensorrt")
    with pytest.raises(UserError, match="has no file"):
        write_export(tokenizer, "torch", tmp_path)
    with pytest.raises(UserError, match="calibrate"):
        write_export(tokenizer, "openvino-int8", tmp_path)
    with pytest.raises(UserError, match="optimized already"):
        with_engine(tokenizer.optimize(), "onnxruntime")
    assert list(tmp_path.iterdir()) == []
