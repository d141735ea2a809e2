"""The verb `generate`: new pictures, from a latent generator and a tokenizer's decoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .shared import DType, checked_device, lasting_name, load_tokenizer, out_folder, write
from .shared import count as counted

if TYPE_CHECKING:
    import torch

    from ..generation import Generator
    from ..tokenizer import Tokenizer


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
    for name, value in (("count", count), ("batch", batch), ("steps", steps), ("decoder_steps", decoder_steps)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be at least 1")
    folder = out_folder(out)
    if (folder / "samples").exists():
        raise UserError(f"{folder / 'samples'} is there already: choose another --out, or delete that folder")
    import torch

    from ..generation import Generator

    generator = Generator.from_pretrained(model, device=checked_device(device), dtype=getattr(torch, dtype))
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
    _write(folder, pictures, labels, facts, columns=len(classes or generator.config.labels) or 8)
    write(
        f"{counted(count, 'picture')} in {folder / 'samples'}: generator {seconds['generator']:.2f} s, "
        f"decoder {seconds['decoder']:.2f} s\n"
    )


def in_turn(generator: Generator, classes: Sequence[int] | None, count: int) -> list[int | None]:
    """The class of each sample: the given ones, or all that the generator knows, over and over; None where it has none.

    Raises:
        UserError: a class that the generator does not know.
    """
    known: list[int | None] = list(classes or generator.config.labels) or [None]
    generator.class_numbers(known)
    return [known[i % len(known)] for i in range(count)]


def check_fits(generator: Generator, tokenizer: Tokenizer, name: str) -> None:
    """Refuse a tokenizer of another latent space.

    Raises:
        UserError: it has another encoder than the one that made the generator's training data, or other channels.
    """
    from ..models.identity import weights_sha256

    config, encoder = generator.config, tokenizer.encoder
    made_by = config.tokenizer or "of an unnamed model"
    if tokenizer.config.encoder.latent_channels != config.dit.latent_channels:
        raise UserError(
            f"{name} decodes latents of {tokenizer.config.encoder.latent_channels} channels, but the generator makes "
            f"{config.dit.latent_channels} ({made_by}): choose another --tokenizer"
        )
    # A foreign encoder's weights need not be here: then channels are all that can be compared.
    own = weights_sha256(encoder) if next(encoder.parameters(), None) is not None else ""
    if own and config.encoder_sha256 and own != config.encoder_sha256:
        raise UserError(
            f"{name} has the encoder {own[:12]}, but the generator was trained on latents of "
            f"{config.encoder_sha256[:12]} ({made_by}): choose a --tokenizer with that encoder"
        )


def decoder_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds of the decoder's noise, for samples of such seeds: another stream than the latents'."""
    return [(seed + 2**31) % 2**32 for seed in seeds]


def sampled(
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Sequence[int | None],
    options: dict[str, Any],
    decoder_steps: int | None,
    *,
    seed: int,
    batch: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """uint8 pictures `(N, 3, H, W)` on the CPU, and the seconds that generator and decoder took."""
    import torch

    found, seconds = [], {"generator": 0.0, "decoder": 0.0}
    for start in range(0, len(labels), batch):
        own = labels[start : start + batch]
        seeds = [seed + start + i for i in range(len(own))]
        began = time.perf_counter()
        z = generator.sample(own, seed=seeds, **options)
        _wait(generator.device)
        between = time.perf_counter()
        pictures = tokenizer.decode(z, seed=decoder_seeds(seeds), steps=decoder_steps, output="uint8")
        found.append(pictures.cpu())
        seconds["generator"] += between - began
        seconds["decoder"] += time.perf_counter() - between
    return torch.cat(found), seconds


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(
    folder: Path, pictures: torch.Tensor, labels: Sequence[int | None], facts: dict[str, Any], *, columns: int
) -> None:
    from json import dumps

    from torchvision.utils import make_grid

    from ..files import write_file, write_folder, write_text
    from ..images import tensor_to_pil

    def samples(partial: Path) -> None:
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            tensor_to_pil(picture).save(partial / f"{i:06d}.png")
            if label is not None:
                (partial / f"{i:06d}.cls").write_text(f"{label}\n", encoding="ascii")

    write_folder(folder / "samples", samples)
    write_file(folder / "grid.png", tensor_to_pil(make_grid(pictures, nrow=min(columns, len(pictures)))).save)
    write_text(folder / "generate.json", dumps(facts, indent=2) + "\n")
