"""The verbs: each is a plain function, whose signature and docstring are its help."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from json import dumps
from typing import Literal

from ..errors import UserError
from ..export import Engine
from ..words import count, in_words
from . import shared
from .shared import MAX_PIXELS, DType


def train(
    recipe: str,
    *,
    data: list[str] | None = None,
    encoder: str | None = None,
    run: str | None = None,
    print_config: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Train a tokenizer; the same command goes on where it stopped.

    Any value of the recipe can be set by its dotted name: --training.steps 1000 --data.scale "[64, 128]".
    --print_config shows all of them. On several GPUs: accelerate launch -m monobath train RECIPE …

    Args:
        recipe: Name of a packaged recipe (cpu-default), or a YAML file.
        data: Folders of pictures, .tar shards or shard URLs; instead of the recipe's data.source.
        encoder: Train only the decoder, on the latents of this frozen encoder, KIND=WHERE: kl=FOLDER-OR-HUB-ID,
            flux2=…, tiny=… or dc=… (diffusers), taef2=FOLDER, custom=MODULE:NAME; default: the recipe's.
        run: Run folder; default: runs/NAME.
        print_config: Print the resolved recipe as YAML and exit.
    """
    _train(recipe, data, encoder, run, print_config, overrides)


def distill(
    recipe: str,
    *,
    teacher: str | None = None,
    data: list[str] | None = None,
    encoder: str | None = None,
    run: str | None = None,
    print_config: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Distil a many-step teacher into a student of one step; the same command goes on where it stopped.

    The student starts from the teacher and learns, from the same noise, what the teacher samples in many steps. Any
    value of the recipe can be set by its dotted name: --distill.steps 8 --training.steps 1000.

    Args:
        recipe: Name of a packaged recipe (cpu-distill), or a YAML file.
        teacher: Packaged name, folder or Hugging Face Hub id; instead of the recipe's distill.teacher.
        data: Folders of pictures, .tar shards or shard URLs; instead of the recipe's data.source.
        encoder: What makes the latents of a teacher that was fitted to a foreign encoder's, KIND=WHERE; default: where
            the teacher's came from.
        run: Run folder; default: runs/NAME.
        print_config: Print the resolved recipe as YAML and exit.
    """
    given = [] if teacher is None else [f"distill.teacher={teacher}"]
    _train(recipe, data, encoder, run, print_config, [*overrides, *given], distillation=True)


def _train(
    recipe: str,
    data: list[str] | None,
    encoder: str | None,
    run: str | None,
    print_config: bool,
    given: Sequence[str],
    distillation: bool = False,
) -> None:
    from ..training import dump_recipe, load_recipe
    from ..training.recipe import DistillationRecipe, TokenizerRecipe

    overrides = list(given)
    if encoder is not None:
        from ..autoencoders import split_spec

        family, source = split_spec(encoder)
        overrides = [f"model.encoder.family={family}", f"model.encoder.source={source}", *given]
    if data:
        overrides.append(f"data.source={dumps(data, ensure_ascii=False)}")
    if run is not None:
        overrides.append(f"run={run}")
    resolved = load_recipe(recipe, overrides)
    if print_config:
        shared.write(dump_recipe(resolved))
        return
    if distillation and not (isinstance(resolved, DistillationRecipe) and resolved.distill.teacher):
        raise UserError(f"recipe {recipe} names no teacher: add --teacher MODEL, or distill.teacher in the file")
    if not resolved.data.source:
        raise UserError(f"recipe {recipe} names no pictures: add --data FOLDER, or data.source in the file")
    if (
        isinstance(resolved, TokenizerRecipe)
        and resolved.model.decoder.standardise
        and not (resolved.model.encoder.family or resolved.source)
    ):
        raise UserError(
            f"recipe {recipe} names no encoder to fit a decoder to: add --encoder KIND=WHERE, such as kl=FOLDER"
        )
    from ..training import Interrupted
    from ..training import train as run_training

    try:
        folder = run_training(resolved)
    except Interrupted as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
    if os.environ.get("RANK", "0") == "0":
        shared.write(f"model: {folder}\n")


def reconstruct(
    photo: list[str],
    *,
    out: str,
    model: str = "default",
    encoder: str | None = None,
    size: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    noise: Literal["gaussian", "zero"] | None = None,
    tile: int | None = None,
    progressive: bool = False,
    engine: Engine | None = None,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Encode and decode pictures: writes OUT/NAME.png for each, and prints their figures.

    Args:
        photo: Pictures, or folders of pictures.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
        encoder: What makes the latents of a model that was fitted to a foreign encoder's, KIND=WHERE, as for train.
        size: Resize the short side to this many pixels and crop the centre square; default: the whole picture.
        steps: Sampler steps; default: what the model was made for.
        seed: Noise seed, the same for every picture.
        noise: What decoding starts from; default: what the model was made for.
        tile: Work in overlapping squares of this many pixels a side: large pictures in bounded memory, without seams.
        progressive: Also write each stage's preview as soon as it exists: OUT/NAME.64.png, or NAME.64x48.png where it
            is not square, and so on. Needs a multi-scale model; decode ms includes the writing.
        engine: Decode in one step with torch (folded weights), compile, torch-export, aotinductor, onnxruntime,
            openvino, openvino-bf16 or openvino-int8; from the file of `monobath export` where the model has one, else
            made for this run.
        max_pixels: Largest accepted picture, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    pictures = shared.find_pictures(photo)
    targets = shared.target_paths(out, pictures, ".png")
    from ..evaluation.demo import HEAD, cells, check_progressive, with_previews
    from ..evaluation.demo import reconstruct as reconstructed
    from ..files import write_file
    from ..images import tensor_to_pil

    tokenizer = shared.load_tokenizer(model, device, dtype, encoder)
    if engine is not None:
        from ..export.running import on_engine

        tokenizer = on_engine(tokenizer, model, engine)
    if progressive:
        check_progressive(tokenizer, model)
    taken = {path.resolve() for path in (*pictures, *targets)}
    rows = []
    try:
        for picture, target in zip(pictures, targets, strict=True):
            pixels = shared.open_pixels(picture, size, max_pixels)
            whole = partial(tokenizer.decode, tile=tile)
            decode = with_previews(tokenizer, target, taken) if progressive else whole
            decode = partial(decode, steps=steps, seed=[seed], noise=noise)
            with shared.explained(picture):
                row = reconstructed(tokenizer, pixels, target.name, tile=tile, decode=decode, max_pixels=max_pixels)
            write_file(target, tensor_to_pil(row.output).save)
            rows.append(cells(row)[:-1])
    finally:
        if rows:
            shared.print_table(HEAD[:-1], rows)
            shared.write(f"{count(len(rows), 'picture')} in {out}\n")


def encode(
    photo: list[str],
    *,
    out: str,
    model: str = "default",
    encoder: str | None = None,
    size: int | None = None,
    sample: bool = False,
    seed: int = 0,
    tile: int | None = None,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Turn pictures into latents: writes OUT/NAME.safetensors for each, which `monobath decode` reads.

    A file holds `latent` (c, h, w), raw, and as metadata: size "HxW", factor, model and format.

    Args:
        photo: Pictures, or folders of pictures.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
        encoder: What makes the latents of a model that was fitted to a foreign encoder's, KIND=WHERE, as for train.
        size: Resize the short side to this many pixels and crop the centre square; default: the whole picture.
        sample: Draw from the posterior instead of taking its mode.
        seed: Seed of that draw, the same for every picture.
        tile: Work in overlapping squares of this many pixels a side: large pictures in bounded memory.
        max_pixels: Largest accepted picture, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    pictures = shared.find_pictures(photo)
    targets = shared.target_paths(out, pictures, ".safetensors")
    import torch

    from ..data.latent_file import LatentFile

    tokenizer = shared.load_tokenizer(model, device, dtype, encoder)
    for picture, target in zip(pictures, targets, strict=True):
        pixels = shared.open_pixels(picture, size, max_pixels)
        with shared.explained(picture):
            posterior = tokenizer.encode(pixels, tile=tile, max_pixels=max_pixels)
        generator = torch.Generator().manual_seed(seed)
        latent = posterior.sample(generator) if sample else posterior.mode()
        found = LatentFile(
            latent=latent[0], size=posterior.size, factor=tokenizer.factor, model=shared.lasting_name(model)
        )
        found.write(target)
    shared.write(f"{count(len(targets), 'latent')} in {out}\n")


def decode(
    latent: list[str],
    *,
    out: str,
    model: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    noise: Literal["gaussian", "zero"] | None = None,
    tile: int | None = None,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Turn latents that `monobath encode` wrote into pictures: OUT/NAME.png for each.

    Args:
        latent: Files, or folders of .safetensors files.
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id; default: the one that the file names.
        steps: Sampler steps; default: what the model was made for.
        seed: Noise seed, the same for every picture.
        noise: What decoding starts from; default: what the model was made for.
        tile: Work in overlapping squares of this many pixels a side: large pictures in bounded memory, without seams.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic.
    """
    sources = shared.find_files(latent, (".safetensors",), "latents", "monobath encode writes them")
    targets = shared.target_paths(out, sources, ".png")
    from ..data.latent_file import LatentFile
    from ..files import write_file

    load = cache(shared.load_tokenizer)
    for source, target in zip(sources, targets, strict=True):
        found = LatentFile.read(source)
        name = model or found.model
        tokenizer = load(name, device, dtype)
        if tokenizer.factor != found.factor:
            raise UserError(
                f"{source} has factor {found.factor}, but {name} has {tokenizer.factor}: choose its own model"
            )
        with shared.explained(source):
            (picture,) = tokenizer.decode(
                found.latent[None], size=found.size, steps=steps, seed=[seed], noise=noise, tile=tile, output="pil"
            )
        write_file(target, picture.save)
    shared.write(f"{count(len(targets), 'picture')} in {out}\n")


def info(model: str | None = None, *, json: bool = False) -> None:
    """Say what a model is: networks, sampler, latents, training. Without MODEL: the default, and what is packaged.

    Args:
        model: Packaged name, folder, or Hugging Face Hub id.
        json: Print JSON.
    """
    from .. import resources
    from ..evaluation.facts import describe

    name = model or "default"
    facts = describe(shared.load_tokenizer(name, "cpu", "float32"), name)
    if model is None:
        facts["packaged"] = resources.weights_names()
    if json:
        shared.write(dumps(facts, indent=2) + "\n")
        return
    rows = []
    for key, value in facts.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {part}".strip().replace("_", " "), in_words(single)) for part, single in parts]
    shared.print_table((), rows)


def demo(*, out: str = "runs/demo", model: str = "default") -> None:
    """Run a model on the packaged sample photos: writes pictures, figures and report.html to OUT.

    Args:
        out: Folder for the results.
        model: Packaged name, folder, or Hugging Face Hub id.
    """
    folder = shared.out_folder(out)
    from ..evaluation import demo as demonstration

    result = demonstration.run_demo(folder, model)
    foot = demonstration.mean_line(result.rows)
    shared.print_table(demonstration.HEAD, map(demonstration.cells, result.rows), foot=foot)
    shared.write_lines([*([demonstration.PREVIEW] if result.preview else []), *result.files])
    shared.write(f"{result.seconds:.1f} s in all\n")
