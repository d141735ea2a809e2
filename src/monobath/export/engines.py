"""The one-step decoder outside eager torch: ONNX Runtime, OpenVINO (float to int8), torch.compile, torch.export.

    fast = with_engine(tokenizer, "openvino")
    pictures = fast.decode(z, output="pil")

Every engine runs the folded decoder of `decoders/folded.py` from one file with free batch, height and width: an ONNX
model, or what `torch.export` makes, as it is or compiled ahead of time by AOTInductor (which needs a C++ compiler).
`write_export` keeps the file for other programs. Input `latent` (B, c, h, w) and, for
decoders that start from Gaussian noise, `noise` (B, 3, H, W); output `image` (B, 3, H, W), not clipped, all float32.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ..decoders import Features, PixelDecoder
from ..decoders.base import Interval
from ..decoders.folded import OneStepCall, folded
from ..errors import UserError, explained_as, imported
from ..files import write_file
from ..sampling import Noise, draw_noise
from ..tokenizer import Tokenizer
from . import FILES, Engine

Run = Callable[[dict[str, np.ndarray]], np.ndarray]
"""Arrays by input name → image array."""


class EngineDecoder(PixelDecoder):
    """A one-step decoder that another runtime computes on the CPU.

    Args:
        source: the decoder that the program was made of.
        noise: what it starts from.
        run: the runtime's call.
    """

    def __init__(self, source: PixelDecoder, noise: Noise, run: Run) -> None:
        super().__init__(source.config)
        self.prediction, self.stages, self.feature_side = "x", 1, source.config.factor
        self.fixed, self.run = noise, run
        # A trunk or a context inside the program takes its statistics over a tile: such tiles are never exact.
        self.source = None if source.config.trunk or source.config.context else (source,)

    trains = False

    def receptive_field(self, output: Interval, factor: int | None = None) -> tuple[Interval, Interval] | None:
        return None if self.source is None else self.source[0].receptive_field(output, factor)

    def features(self, z: Tensor) -> Features:
        return Features(z, self.feature_side)

    def predict(self, x_t: Tensor, t: Tensor, features: Features, stage: int | None = None) -> Tensor:
        inputs = {"latent": features.z.float().cpu().numpy()}
        if self.fixed == "gaussian":
            inputs["noise"] = x_t.float().cpu().numpy()
        return torch.from_numpy(self.run(inputs)).to(features.z.device, features.z.dtype)


def with_engine(
    tokenizer: Tokenizer, engine: Engine, *, folder: Path | None = None, calibration: Iterable[Tensor] = ()
) -> Tokenizer:
    """The same tokenizer, decoding in one step with another engine.

    Args:
        tokenizer: as loaded; only its decoder is replaced. Its encoder stays in torch.
        engine: see `Engine`.
        folder: where `write_export` wrote the engine's file; default: it is made now, in memory.
        calibration: raw latents `(1, c, h, w)`, for `openvino-int8`.

    Raises:
        UserError: the engine is unknown, its package is not installed, or it lacks calibration latents.
    """
    _check(engine)
    if engine in ("torch", "compile"):
        return tokenizer.optimize(compile=engine == "compile")
    if not tokenizer.decoder.trains:
        raise UserError("this tokenizer is optimized already: give the original one to an engine")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary if folder is None else folder) / FILES[engine]
        if not file.is_file():
            file = write_export(tokenizer, engine, Path(temporary), calibration=calibration)
        run = _runner(engine, file)
    return tokenizer.with_decoder(EngineDecoder(tokenizer.decoder, tokenizer.config.sampler.noise, run))


def write_export(
    tokenizer: Tokenizer,
    engine: Engine,
    folder: Path,
    *,
    calibration: Iterable[Tensor] = (),
    program: bytes | None = None,
) -> Path:
    """Write an engine's file of the one-step decoder into `folder`, atomically; returns its path.

    Args:
        calibration: raw latents `(1, c, h, w)`, for `openvino-int8`.
        program: what `onnx_bytes` returned for this tokenizer, to make several files of it.

    Raises:
        UserError: the engine has no file, a package is missing, there are no calibration latents, or the folder cannot
            be written.
    """
    _check(engine)
    if engine not in FILES:
        raise UserError(f"engine {engine!r} has no file: choose from {', '.join(FILES)}")
    noise, factor = tokenizer.config.sampler.noise, tokenizer.factor
    samples = []
    for index, z in enumerate(calibration):
        samples.append({"latent": z.float().cpu().numpy()})
        if noise == "gaussian":
            shape = (3, z.shape[2] * factor, z.shape[3] * factor)
            samples[-1]["noise"] = draw_noise(shape, [index]).numpy()
    if engine == "openvino-int8" and not samples:
        raise UserError("int8 needs latents to calibrate on: give some photos")
    return _write(*_folded(tokenizer), engine, folder / FILES[engine], samples, program)


def onnx_bytes(tokenizer: Tokenizer) -> bytes:
    """The folded decoder as an ONNX model with free batch, height and width.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    return module_to_onnx(*_folded(tokenizer))


def _folded(tokenizer: Tokenizer) -> tuple[OneStepCall, dict[str, Tensor]]:
    """The folded decoder on the CPU, and example inputs."""
    source = tokenizer.decoder
    assert not isinstance(source, EngineDecoder), "the program of another engine cannot be exported again"
    decoder, config = folded(source, tokenizer.config.sampler.noise), source.config
    unit = max(1, config.token_side // config.factor)
    h, w = 18 * unit, 26 * unit  # unequal, larger than a block, not multiples of one: nothing may specialise
    inputs = {"latent": torch.zeros(2, config.latent_channels, h, w)}
    if decoder.fixed == "gaussian":
        inputs["noise"] = torch.zeros(2, 3, h * config.factor, w * config.factor)
    return OneStepCall(copy.deepcopy(decoder).cpu().float()).eval(), inputs


def module_to_onnx(module: nn.Module, inputs: dict[str, Tensor]) -> bytes:
    """Any module that maps `(B, …, H, W)` inputs to an `image`, as an ONNX model with free batch, height and width.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    for name in ("onnx", "onnxscript"):
        _package(name)
    with torch.no_grad(), redirect_stdout(io.StringIO()):  # it prints its progress
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamic_shapes=_free(inputs),
            input_names=list(inputs),
            output_names=["image"],
            dynamo=True,
            optimize=False,  # the runtimes do that themselves, and better
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


def engine_call(
    module: nn.Module, inputs: dict[str, Tensor], engine: Engine, samples: Sequence[dict[str, np.ndarray]] = ()
) -> Run:
    """Any module under an engine of its own, for comparisons: arrays by input name → image array.

    Args:
        inputs: examples, as for `module_to_onnx`.
        samples: for int8.
    """
    _check(engine)
    if engine in ("torch", "compile"):
        return _torch_call(torch.compile(module) if engine == "compile" else module)
    with tempfile.TemporaryDirectory() as temporary:
        return _runner(engine, _write(module, inputs, engine, Path(temporary) / FILES[engine], samples))


def _free(inputs: dict[str, Tensor]) -> tuple[dict[int, Any], ...]:
    """Batch, height and width of every input are free."""
    free = torch.export.Dim.DYNAMIC
    return tuple({0: free, 2: free, 3: free} for _ in inputs)


def _exported(module: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=_free(inputs))
    # Tracing notes down which way each comparison of sizes went, as a smallest size. The graph itself holds for every
    # size (tests/test_engines.py), so that the smallest is 1.
    for symbol in program.range_constraints:
        program.range_constraints[symbol] = ValueRanges(1, int_oo)
    return program


def _write(
    module: nn.Module,
    inputs: dict[str, Tensor],
    engine: Engine,
    target: Path,
    samples: Sequence[dict[str, np.ndarray]],
    program: bytes | None = None,
) -> Path:
    """Write an engine's file; arguments as `engine_call` and `write_export`."""
    if engine == "torch-export":
        write_file(target, partial(torch.export.save, _exported(module, inputs)))
        return target
    if engine == "aotinductor":
        from torch._inductor import aoti_compile_and_package

        exported = _exported(module, inputs)
        with explained_as("AOTInductor, which needs a C++ compiler, could not compile the decoder"):
            write_file(target, lambda path: aoti_compile_and_package(exported, package_path=str(path)))
        return target
    program = program or module_to_onnx(module, inputs)
    if engine == "onnxruntime":
        write_file(target, lambda path: path.write_bytes(program))
        return target
    openvino = _package("openvino")
    # Not `convert_model`: that reports usage over the network, from a process that runs the caller's script again.
    model = openvino.Core().read_model(program)
    if engine == "openvino-int8":
        model = _quantized(model, samples)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / target.name
        openvino.save_model(model, file, compress_to_fp16=False)
        # The weights first: an .xml without its .bin is never seen.
        for suffix in (".bin", ".xml"):
            write_file(target.with_suffix(suffix), partial(shutil.copyfile, file.with_suffix(suffix)))
    return target


def _quantized(model: Any, samples: Sequence[dict[str, np.ndarray]]) -> Any:
    """Post-training int8: weights per channel, activations per tensor, ranges from `samples`.

    The first and last convolutions stay as they are: 256 values a number are too few for a latent and for a picture,
    and these layers are a small part of the work.
    """
    os.environ.setdefault("NNCF_CI", "1")  # NNCF's own switch against reporting usage over the network
    nncf = _package("nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    return nncf.quantize(
        model,
        nncf.Dataset(list(samples)),
        subset_size=len(samples),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=_outer_convolutions(model)),
    )


def _outer_convolutions(model: Any) -> list[str]:
    """Names of the convolutions of an OpenVINO model that no other one comes before, or none after."""
    reached: dict[str, set[str]] = {}  # by operation: the convolutions on the way to it, itself included
    earlier: dict[str, set[str]] = {}  # by convolution: those before it
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        sources = (given.get_source_output().get_node().get_friendly_name() for given in node.inputs())
        reached[name] = set().union(*(reached[source] for source in sources))
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            earlier[name] = set(reached[name])
            reached[name].add(name)
    inner = set().union(*earlier.values())
    return [name for name, others in earlier.items() if not others or name not in inner]


def _runner(engine: Engine, file: Path) -> Run:
    if engine == "torch-export":
        return _torch_call(torch.export.load(file).module(check_guards=False))
    if engine == "aotinductor":
        from torch._inductor import aoti_load_package

        return _torch_call(aoti_load_package(str(file)))
    if engine == "onnxruntime":
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]
    openvino = _package("openvino")
    # Read whole: the file may be in a temporary folder that is gone when the model runs.
    weights = openvino.Tensor(np.fromfile(file.with_suffix(".bin"), np.uint8))
    model = openvino.Core().read_model(file.read_bytes(), weights)
    precision = "bf16" if engine == "openvino-bf16" else "f32"  # by itself OpenVINO takes bfloat16 where it is faster
    compiled = openvino.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    return lambda inputs: compiled(inputs)[0].copy()


def _torch_call(module: Callable[..., Tensor]) -> Run:
    return torch.no_grad()(lambda arrays: module(*map(torch.from_numpy, arrays.values())).numpy())


def _package(name: str) -> Any:
    return imported(name, f"this engine needs {name}: pip install 'monobath[export]'")


def _check(engine: str) -> None:
    if engine not in get_args(Engine):
        raise UserError(f"engine {engine!r} is unknown: choose from {', '.join(get_args(Engine))}")
