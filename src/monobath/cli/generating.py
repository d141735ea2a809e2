"""The verb `generate`: new pictures, from a latent generator and a tokenizer's decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..words import count as counted
from .shared import DType, check_options, lasting_name, load_tokenizer, out_folder, write


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
