"""The verbs `import-ssdd`, `stats` and `cache-latents`, which prepare models and latents for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..words import count
from . import shared
from .shared import MAX_PIXELS, DType

if TYPE_CHECKING:
    from ..models.frozen import ForeignEncoder
    from ..tokenizer import Tokenizer


def import_ssdd(file: str, *, out: str, power: float = 2.0, steps: int = 1) -> None:
    """Turn a published SSDD checkpoint into a model in OUT.

    Every size and the scale are read from the weights. Published SSDD weights are licensed for non-commercial use only;
    the model says so in its config.

    Args:
        file: The checkpoint: .safetensors, or .pt, .pth, .ckpt, .bin that hold tensors and plain values only.
        out: Folder for the model.
        power: Exponent of the sampler's time grid; 2 is the published one.
        steps: Sampler steps. The weights do not tell: 1 for a distilled decoder, such as 8 for another.
    """
    folder = shared.out_folder(out)
    from ..integrations.ssdd import NOTICE, read_ssdd, save_imported, tokenizer_from_ssdd

    source = Path(file)
    state = read_ssdd(source)
    with shared.explained(source):
        tokenizer = tokenizer_from_ssdd(state, steps=steps, power=power)
    save_imported(tokenizer, source, folder)
    config = tokenizer.config
    shared.write(f"notice: {NOTICE}\nencoder {config.encoder.name}, decoder {config.decoder.title}: {folder}\n")


def stats(
    *,
    data: list[str],
    model: str = "default",
    encoder: str | None = None,
    size: int = 256,
    limit: int | None = None,
    out: str | None = None,
    in_place: bool = False,
    batch: int = 16,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
) -> None:
    """Measure the mean and standard deviation of a model's latents over pictures, and store them with the model.

    They are those of posterior samples, of each channel and overall: the mean of the means, and the variance of the
    means plus the mean of the posterior variances. The config gets them as latent_mean and latent_std, and overall as
    shift_factor (the mean) and scaling_factor (1 / std), which generators of latents need; a model of a foreign
    encoder's latents keeps the two that its family publishes. Without --out or --in_place they are printed only.

    Args:
        data: Folders of pictures, .tar shards or shard URLs.
        model: Packaged name, folder, or Hugging Face Hub id.
        encoder: What makes the latents of a model that was fitted to a foreign encoder's, KIND=WHERE, as for train.
        size: The short side is resized to this many pixels and the centre square cropped.
        limit: At most so many pictures.
        out: New folder for a copy of the model that has them.
        in_place: Write them into the model's own folder instead.
        batch: Pictures at once.
        workers: Processes that read pictures; 0: none besides this one.
        max_pixels: Larger pictures are left out, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
    """
    shared.check_options(1, size=size, limit=limit, batch=batch)
    shared.check_options(0, workers=workers)
    if out is not None and in_place:
        raise UserError(f"--out {out} and --in_place contradict one another: give one of them")
    folder = None if out is None else shared.out_folder(out)
    if folder is not None and (folder / "model.safetensors").exists():
        raise UserError(f"--out {out} holds a model already: choose a new folder, or --in_place for the model's own")
    from ..data.statistics import check_writable, latent_statistics, store_statistics

    if in_place:
        folder = check_writable(model)
    tokenizer = shared.load_tokenizer(model, device, "float32", encoder)
    with shared.progress() as update:
        statistics = latent_statistics(
            tokenizer, data, size=size, limit=limit, batch_size=batch, workers=workers, max_pixels=max_pixels,
            progress=lambda done, total: update(description="pictures", completed=done, total=total),
        )  # fmt: skip
    rows = [("all", statistics.overall_mean, statistics.overall_std)]
    rows += [(f"channel {i}", *v) for i, v in enumerate(zip(statistics.mean, statistics.std, strict=True))]
    shared.print_table(("latents", "mean", "std"), [(name, f"{mean:.6f}", f"{std:.6f}") for name, mean, std in rows])
    shared.write(
        f"{count(statistics.pictures, 'picture')} at {size}²; std² = variance of posterior means + mean of posterior "
        f"variances\nshift_factor {statistics.overall_mean:.6f}, scaling_factor {1 / statistics.overall_std:.6f}\n"
    )
    if folder is not None:
        store_statistics(model, statistics, folder, data=data, size=size, model=shared.lasting_name(model))
        shared.write(f"model: {folder}\n")


def cache_latents(
    *,
    data: list[str],
    model: str | None = None,
    encoder: str | None = None,
    out: str,
    size: int = 64,
    scale: list[int] | None = None,
    copies: int = 1,
    seed: int = 0,
    no_flip: bool = False,
    labels: bool = False,
    shard_mb: float = 256,
    batch: int = 32,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 16,
    device: str = "auto",
    dtype: DType = "float32",
) -> None:
    """Encode augmented crops of every picture once, for training with a frozen encoder; the same command goes on.

    Writes OUT/latents-000000.tar …, each sample a crop, its moments and facts, and OUT/latents.json. Train from it with
    monobath train RECIPE --data OUT --data.latents true --training.train_encoder false --init MODEL,
    or with --encoder KIND=WHERE instead of --init.

    Args:
        data: Folders of pictures or .tar shards.
        model: Packaged name, folder, or Hugging Face Hub id: whose encoder; default: default.
        encoder: A foreign encoder instead, KIND=WHERE, as for train; with --model too, whether they fit is checked.
        out: Folder for the shards.
        size: Side of the crops, in pixels: the recipe's data.size.
        scale: LOW HIGH: the short side is resized to a random length in between before cropping, in pixels: the
            recipe's data.scale; default: SIZE and twice SIZE.
        copies: Crops of each picture: one per epoch, repeating after this many.
        seed: Of the crops: the recipe's training.seed for the crops of that run.
        no_flip: Mirror none of the crops; default: half of them.
        labels: Keep each picture's label too, for a generator of classes: the integer in its .cls sibling, in shards
            and folders, or else the number of its sub-folder, in alphabetical order from 0.
        shard_mb: Largest size of a shard, in MiB.
        batch: Crops at once.
        workers: Processes that read and crop pictures; 0: none besides this one.
        max_pixels: Larger pictures are replaced by others, in pixels.
        min_side: Pictures with a shorter side are skipped, in pixels.
        device: cpu, cuda, cuda:1 …; auto: a GPU if there is one.
        dtype: Arithmetic of the encoder.
    """
    shared.check_options(1, size=size, copies=copies, batch=batch)
    shared.check_options(0, workers=workers)
    if scale is not None and len(scale) != 2:
        raise UserError(f"--scale is {' '.join(map(str, scale))}: give two lengths, LOW HIGH")
    folder = shared.out_folder(out)
    import torch

    from ..autoencoders import as_encoder
    from ..data import Crops
    from ..data.encoding import Caching
    from ..data.encoding import cache_latents as write_cache
    from ..devices import usable_device

    source: Tokenizer | ForeignEncoder
    if encoder is not None and model is None:
        source, name = as_encoder(encoder).to(usable_device(device)), encoder
    else:
        name = model or "default"
        source = shared.load_tokenizer(name, device, "float32", encoder)
    with shared.progress() as update:
        crops = Crops(
            size=size, scale=None if scale is None else (scale[0], scale[1]), flip=not no_flip, seed=seed,
            max_pixels=max_pixels, min_side=min_side,
        )  # fmt: skip
        options = Caching(
            copies=copies, labels=labels, model=shared.lasting_name(name), shard_mb=shard_mb, batch_size=batch,
            workers=workers, dtype=getattr(torch, dtype),
            progress=lambda done, total: update(description="crops", completed=done, total=total),
        )  # fmt: skip
        facts = write_cache(source, data, folder, crops, options)
    made, pictures, shards = facts.pictures * facts.copies, facts.pictures, facts.shards
    shared.write(f"{count(made, 'crop')} of {count(pictures, 'picture')} in {count(shards, 'shard')}: {folder}\n")
