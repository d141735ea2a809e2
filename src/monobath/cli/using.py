"""The verbs that put a trained model to use: `export`, `generate` and `serve`. Imports stay lazy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..words import count as counted
from .shared import DType, check_options, find_pictures, lasting_name, load_tokenizer, out_folder, write

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


def generate(
    *,
    model: str,
    out: str,
    tokenizer: str | None = None,
    classes: list[int] | None = None,
    count: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    interval: list[float] | None = None,
    decoder_steps: int | None = None,
    seed: int = 0,
    batch: int = 32,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Generate pictures: writes OUT/grid.png, OUT/samples/000000.png …, their classes, and OUT/generate.json.

    Sample number i has seed SEED + i and a class of its own, and depends on nothing else. OUT/samples is a labelled set
    of pictures (each has a .cls sibling that holds its class) as every monobath command reads them; generate.json says
    how they were made, and the seconds that the generator and the decoder took, apart.

    Args:
        model: Generator: the folder that monobath train dit-64 wrote.
        out: Folder for the results.
        tokenizer: Whose decoder: packaged name, folder, or Hugging Face Hub id; default: the one the generator was
            trained for. Any with the same encoder will do.
        classes: Labels, as in the data; the samples take them in turn, a column of the grid each; default: all.
        count: Samples in all.
        steps: Euler steps of the generator; default: what it was made for.
        guidance: Scale of classifier-free guidance, 1 for none; default: what the generator was made for.
        interval: LOW HIGH: guidance at times LOW < t <= HIGH only, 1 being pure noise; default: what the generator was
            made for.
        decoder_steps: Sampler steps of the decoder; default: what it was made for.
        seed: Seed of the first sample.
        batch: Samples at once.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    check_options(1, count=count, batch=batch, steps=steps, decoder_steps=decoder_steps)
    folder = out_folder(out)
    if (folder / "samples").exists():
        raise UserError(f"{folder / 'samples'} is there already: choose another --out, or delete that folder")
    import torch
    from torchvision.utils import make_grid

    from ..devices import usable_device
    from ..files import write_file, write_folder, write_json
    from ..generation import Generator
    from ..generation.rendering import check_fits, in_turn, sampled
    from ..images import tensor_to_pil

    generator = Generator.from_pretrained(model, device=usable_device(device), dtype=getattr(torch, dtype))
    name = tokenizer or generator.config.tokenizer
    decoder = load_tokenizer(name, device, dtype)
    check_fits(generator, decoder, name)
    labels = in_turn(generator, classes, count)
    options = {"steps": steps, "guidance": guidance, "interval": interval}
    pictures, seconds = sampled(generator, decoder, labels, options, decoder_steps, seed=seed, batch=batch)
    sampler = generator.config.sampler
    facts: dict[str, Any] = {
        "model": lasting_name(model),
        "tokenizer": lasting_name(name),
        "count": count,
        "classes": sorted({label for label in labels if label is not None}),
        "seed": seed,
        **{key: getattr(sampler, key) if value is None else value for key, value in options.items()},
        "decoder_steps": decoder_steps or decoder.config.sampler.steps,
        "seconds": seconds,
        "batch": batch,
        "device": str(generator.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    columns = min(len(classes or generator.config.labels) or 8, len(pictures))

    def samples(partial: Path) -> None:
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            tensor_to_pil(picture).save(partial / f"{i:06d}.png")
            if label is not None:
                (partial / f"{i:06d}.cls").write_text(f"{label}\n", encoding="ascii")

    write_folder(folder / "samples", samples)
    write_file(folder / "grid.png", tensor_to_pil(make_grid(pictures, nrow=columns)).save)
    write_json(folder / "generate.json", facts)
    write(
        f"{counted(count, 'picture')} in {folder / 'samples'}: generator {seconds['generator']:.2f} s, "
        f"decoder {seconds['decoder']:.2f} s\n"
    )


def serve(
    *,
    model: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch: int = 8,
    max_wait_ms: float = 5.0,
    max_queue: int = 64,
    max_bytes: int = 64 << 20,
    max_pixels: int = 1 << 22,
    timeout: float = 60.0,
    no_page: bool = False,
    no_token: bool = False,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Serve models over HTTP, to diffusers' remote VAE client and others, and a web page. Ctrl-C or SIGTERM stops it.

    POST /decode, /encode and /reconstruct are the first model's; every model has /models/NAME/decode and so on. GET
    /docs describes the rest. Where the environment has MONOBATH_TOKEN, callers must send it (Authorization: Bearer
    TOKEN), and the page asks for it as a password.

    Args:
        model: Packaged names, folders, or Hugging Face Hub ids, each under its last part as name, or NAME=WHERE;
            default: the packaged ones.
        host: Address to listen on. Another than this machine's own needs MONOBATH_TOKEN, or --no_token.
        port: Port to listen on; 0: a free one.
        max_batch: Most samples decoded together.
        max_wait_ms: How long a request waits for others that are arriving, in milliseconds.
        max_queue: Most requests at a time; further ones get 503 and are told when to come again.
        max_bytes: Largest body of a request, in bytes.
        max_pixels: Largest picture, in pixels, counted once per sample and step; also of a batch.
        timeout: Longest time for a body to arrive, and for the work on it, in seconds.
        no_page: Serve the API alone.
        no_token: Let everybody in, whatever the host.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    try:
        from ..app import server
        from ..app.service import Limits, Service, names_and_sources

        if not no_page:
            import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs more packages ({error}): pip install 'monobath[serve]'") from None
    limits = Limits(
        max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue, max_bytes=max_bytes, max_pixels=max_pixels,
        timeout=timeout,
    )  # fmt: skip
    token = server.checked_token(host, no_token)
    sources = names_and_sources(model)
    listener = server.listen(host, port)
    models = {name: load_tokenizer(where, device, dtype) for name, where in sources.items()}
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    server.run(
        Service(models, limits),
        listener,
        token,
        page=not no_page,
        ready=lambda: write(f"serving {', '.join(models)} at {address}\n"),
    )
