"""The verb `export`, and what other verbs need to decode with another engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .shared import MAX_PIXELS, load_tokenizer, open_pixels, out_folder, write

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizer import Tokenizer

# engines.Engine, which costs an import of torch (a test compares them)
EngineName = Literal[
    "torch", "compile", "torch-export", "aotinductor", "onnxruntime", "openvino", "openvino-bf16", "openvino-int8"
]
FileEngine = Literal["torch-export", "aotinductor", "onnxruntime", "openvino", "openvino-int8"]
CALIBRATION_SIDE = 256


def export(
    model: str = "default",
    *,
    out: str,
    engine: list[FileEngine] | None = None,
    calibration: list[str] | None = None,
) -> None:
    """Write the one-step decoder for other runtimes, with the model beside it, to OUT.

    decoder.onnx (ONNX Runtime and others), decoder.xml (OpenVINO), decoder-int8.xml (OpenVINO, int8), decoder.pt2
    (torch.export), decoder-aotinductor.pt2 (the same compiled for this processor): input `latent` (B, c, h, w), output
    `image` (B, 3, H, W) in [-1, 1] before clipping, any B, h and w. OUT is also a model:
    monobath reconstruct PHOTO --model OUT --engine openvino.

    Args:
        model: Packaged name, folder, or Hugging Face Hub id.
        out: Folder for the files.
        engine: What to write for: onnxruntime, openvino, openvino-int8, torch-export, aotinductor; default: onnxruntime
            and openvino.
        calibration: Pictures or folders of pictures whose latents int8 takes its ranges from; default: the packaged
            sample photos.
    """
    folder = out_folder(out)
    from ..export.engines import onnx_bytes, write_export

    tokenizer = load_tokenizer(model, "cpu", "float32")
    if tokenizer.config.sampler.stages > 1:
        raise UserError(f"{model} decodes in {tokenizer.config.sampler.stages} stages: only one step can be exported")
    engines: Sequence[FileEngine] = list(dict.fromkeys(engine or ["onnxruntime", "openvino"]))
    latents = calibration_latents(tokenizer, calibration) if "openvino-int8" in engines else []
    tokenizer.save_pretrained(folder)
    program = onnx_bytes(tokenizer) if set(engines) - {"torch-export", "aotinductor"} else None
    for name in engines:
        write(f"{write_export(tokenizer, name, folder, calibration=latents, program=program)}\n")


def on_engine(tokenizer: Tokenizer, model: str, engine: str | None) -> Tokenizer:
    """The tokenizer decoding with an engine, from the file beside the model where `monobath export` wrote one."""
    if engine is None:
        return tokenizer
    if engine not in ("torch", "compile") and tokenizer.device.type != "cpu":
        raise UserError(f"--engine {engine} runs on the CPU: add --device cpu, or choose torch or compile")
    from ..export.engines import FILES, with_engine

    folder = Path(model)
    written = engine in FILES and (folder / FILES[engine]).is_file()
    latents = calibration_latents(tokenizer) if engine == "openvino-int8" and not written else []
    return with_engine(tokenizer, engine, folder=folder if written else None, calibration=latents)  # type: ignore[arg-type]


def calibration_latents(tokenizer: Tokenizer, pictures: Sequence[str] | None = None) -> list[Tensor]:
    """Latents of the centres of pictures (default: the packaged sample photos), 256² each."""
    from .. import resources
    from .shared import find_pictures

    files = find_pictures(pictures) if pictures else resources.sample_paths()
    return [tokenizer.encode(open_pixels(file, CALIBRATION_SIDE, MAX_PIXELS)).mode() for file in files]


def engine_networks(
    models: Sequence[str], engines: Sequence[str], decoders: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """For `monobath bench`: models, decoders and AutoencoderTiny with random weights, under each engine.

    Returns:
        By name: the network whose parameters count, and (batch, side) → a call that decodes that.
    """
    import torch

    from ..decoders import decoder_config, make_decoder
    from ..decoders.folded import OneStepCall, folded
    from ..evaluation.bench import CHANNELS, TINY, random_latents, tokenizer_maker
    from ..evaluation.peers import random_autoencoder
    from ..export.engines import engine_call

    found: dict[str, tuple[Any, Any]] = {}
    shapes = {name: decoder_config({"size": name, "latent_channels": CHANNELS}) for name in decoders}
    networks = {name: make_decoder(shape).eval() for name, shape in shapes.items()}
    calls = {name: OneStepCall(folded(network, "zero")).eval() for name, network in networks.items()}
    peer = random_autoencoder("tiny").eval().decoder
    example = torch.zeros(2, CHANNELS, 18, 26)
    samples = [{"latent": random_latents(1, CALIBRATION_SIDE).numpy()}]
    for engine in engines:
        for model in models:
            tokenizer = load_tokenizer(model, "cpu", "float32")
            maker = tokenizer_maker(on_engine(tokenizer, model, engine))
            found[f"{model}, {engine}"] = (tokenizer.decoder, maker)
        for name, network in [*calls.items(), (TINY, peer)]:
            run = engine_call(network, {"latent": example}, engine, samples)  # type: ignore[arg-type]

            def make(batch: int, side: int, run: Any = run) -> Any:
                z = random_latents(batch, side).numpy()
                return lambda: run({"latent": z})

            found[f"{name}, {engine}"] = (networks.get(name, peer), make)
    return found
