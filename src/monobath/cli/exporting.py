"""The verb `export`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ..errors import UserError
from .shared import find_pictures, load_tokenizer, out_folder, write

ProgramName = Literal["comfyui", "sdcpp", "diffusers"]
FileEngine = Literal["torch-export", "aotinductor", "onnxruntime", "openvino", "openvino-int8"]


def export(
    model: str = "default",
    *,
    out: str,
    for_: ProgramName | None = None,
    engine: list[FileEngine] | None = None,
    calibration: list[str] | None = None,
) -> None:
    """Write the one-step decoder for other runtimes, with the model beside it, to OUT.

    decoder.onnx (ONNX Runtime and others), decoder.xml (OpenVINO), decoder-int8.xml (OpenVINO, int8), decoder.pt2
    (torch.export), decoder-aotinductor.pt2 (the same compiled for this processor): input `latent` (B, c, h, w), output
    `image` (B, 3, H, W) in [-1, 1] before clipping, any B, h and w. OUT is also a model:
    monobath reconstruct PHOTO --model OUT --engine openvino.

    With --for, OUT gets what another program loads without monobath. comfyui: taef2_decoder.safetensors, for its folder
    models/vae_approx, and sdcpp: taef2-sdcpp.safetensors, for --tae of stable-diffusion.cpp; both of a model of TAEF2's
    shape only (recipe flux2-slim). diffusers: a folder for AutoModel.from_pretrained(OUT, trust_remote_code=True).

    Args:
        model: Packaged name, folder, or Hugging Face Hub id.
        out: Folder for the files.
        for_: Another program: comfyui, sdcpp, diffusers; default: engines.
        engine: What to write for: onnxruntime, openvino, openvino-int8, torch-export, aotinductor; default: onnxruntime
            and openvino.
        calibration: Pictures or folders of pictures whose latents int8 takes its ranges from; default: the packaged
            sample photos.
    """
    folder = out_folder(out)
    if for_ is not None and (engine or calibration):
        raise UserError(f"--for {for_} writes no engine's file: leave out --engine and --calibration")
    tokenizer = load_tokenizer(model, "cpu", "float32")
    if for_ == "diffusers":
        from ..integrations.remote import write_remote

        return write(f"{write_remote(tokenizer, folder)}\n")
    if for_ is not None:
        from ..export.formats import write_for

        path, fidelity = write_for(tokenizer, for_, folder)
        nearly = f"{fidelity:.1f} dB between its pictures and the model's"
        return write(f"{path}: {nearly if fidelity < 90 else 'the same pictures as the model'}\n")
    from ..export.engines import onnx_bytes, write_export
    from ..export.running import calibration_latents

    if tokenizer.config.sampler.stages > 1:
        raise UserError(f"{model} decodes in {tokenizer.config.sampler.stages} stages: only one step can be exported")
    engines: Sequence[FileEngine] = list(dict.fromkeys(engine or ["onnxruntime", "openvino"]))
    pictures = find_pictures(calibration) if calibration else []
    latents = calibration_latents(tokenizer, pictures) if "openvino-int8" in engines else []
    tokenizer.save_pretrained(folder)
    program = onnx_bytes(tokenizer) if set(engines) - {"torch-export", "aotinductor"} else None
    for name in engines:
        write(f"{write_export(tokenizer, name, folder, calibration=latents, program=program)}\n")
